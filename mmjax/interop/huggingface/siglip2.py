"""SigLIP 2 with pictures of any aspect ratio (model_type "siglip2", NaFlex; Tschannen et al. 2025,
arXiv:2502.14786). Its models for squares are of model_type "siglip"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clip, mapping, siglip
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "Siglip2Tokenizer",
  "Siglip2Processor",
  "Siglip2ImageProcessor",
  "",
)
ARCHITECTURE, PAD = "Siglip2Model", "<pad>"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say
LOWERCASES = True  # the tokenizer does, whatever its tokenizer.json says
PADDING_SIDE = (
  "left"  # where tokenizer_config.json does not say; texts are padded on the right here
)

# What transformers assumes where config.json is silent.
TEXT = siglip.TEXT
VISION = {
  **{name: value for name, value in siglip.VISION.items() if name != "image_size"},
  "num_patches": 256,
}
PREPROCESSOR = dict(
  do_resize=True,
  resample=2,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=(0.5, 0.5, 0.5),
  image_std=(0.5, 0.5, 0.5),
  patch_size=16,
  max_num_patches=256,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": None, "text": settings of data.text} of a config.json."""
  text, vision = clip.towers(facts, TEXT, VISION)
  if vision["num_channels"] != 3:
    raise UserError(
      f"vision_config.num_channels is {vision['num_channels']}, but pictures have 3 here"
    )
  grid = math.isqrt(vision["num_patches"])
  if grid**2 != vision["num_patches"]:
    raise UserError(
      f"vision_config.num_patches is {vision['num_patches']}, but positions are a square here"
    )
  patch = clip.square(vision["patch_size"], "vision_config.patch_size")
  image = dict(
    kind="naflex",
    patch=patch,
    grid=grid,
    pooling="attention",
    bias=True,
    **clip.block_settings(vision, "vision_config."),
  )
  return dict(
    model=siglip.model(text, vision, image, tensors),
    image_size=None,
    text=dict(vocab_size=text["vocab_size"], length=text["max_position_embeddings"]),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a Siglip2Model."""
  return [
    *mapping.linear("image/patch", "vision_model.embeddings.patch_embedding"),
    *siglip.after_patches(config),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a Siglip2Model must have."""
  model, image, text = (
    config["model"],
    config["model"]["encoders"]["image"],
    config["model"]["encoders"]["text"],
  )
  poolings = ("final",) if config["data"]["text"]["mask_padding"] else ("final", "last")
  return [
    ("data.image.resize", config["data"]["image"]["resize"], ("naflex",)),
    ("model.encoders.image.pooling", image["pooling"], ("attention",)),
    ("model.encoders.image.bias", image["bias"], (True,)),
    ("model.encoders.text.pooling", text["pooling"], poolings),
    ("model.encoders.text.causal", text["causal"], (False,)),
    *(
      (f"model.encoders.text.{key}", text[key], (value,))
      for key, value in (("norm", "pre"), ("final_norm", True), ("bias", True))
    ),
    ("model.unprojected", tuple(model["unprojected"]), (("image",),)),
    ("model.projection_bias", model["projection_bias"], (True,)),
    ("model.projection_function", model["projection_function"], ("none",)),
    ("model.bias", model["bias"], (True,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Siglip2Model. special: the tokenizer's pad_token_id, bos_token_id and
  eos_token_id.
  """
  encoders, text = config["model"]["encoders"], config["data"]["text"]
  return dict(
    model_type="siglip2",
    architectures=[ARCHITECTURE],
    torch_dtype="float32",
    text_config=dict(
      clip.tower_facts(encoders["text"], "siglip2_text_model"),
      vocab_size=text["vocab_size"],
      max_position_embeddings=encoders["text"]["max_positions"] or text["length"],
      projection_size=config["model"]["width"],
      **special,
    ),
    vision_config=dict(
      clip.tower_facts(encoders["image"], "siglip2_vision_model"),
      num_patches=encoders["image"]["grid"] ** 2,
      patch_size=encoders["image"]["patch"],
      num_channels=3,
      vision_use_head=True,
    ),
  )
