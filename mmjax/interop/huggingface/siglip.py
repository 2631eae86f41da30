"""SigLIP (model_type "siglip"): what its config.json means here, which tensors are which
parameters, and the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clip, mapping
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "SiglipTokenizer",
  "SiglipProcessor",
  "SiglipImageProcessor",
  "",
)
ARCHITECTURE, PAD = "SiglipModel", "</s>"
# SigLIP was trained on padding that the model sees; its tokenizer_config.json lists no
# attention_mask
MASK_PADDING = False

# What transformers assumes where config.json is silent.
TEXT = dict(
  vocab_size=32000,
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  max_position_embeddings=64,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
  attention_dropout=0.0,
  projection_size=None,
)
VISION = dict(
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  num_channels=3,
  image_size=224,
  patch_size=16,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
  attention_dropout=0.0,
  vision_use_head=True,
)
PREPROCESSOR = dict(
  do_resize=True,
  size={"height": 224, "width": 224},
  resample=3,
  do_center_crop=False,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=(0.5, 0.5, 0.5),
  image_std=(0.5, 0.5, 0.5),
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": int, "text": settings of data.text} of a config.json."""
  text, vision = clip.towers(facts, TEXT, VISION)
  image = dict(
    pooling="attention", input_norm=False, patch_bias=True, **clip.vision_settings(vision)
  )
  return dict(
    model=model(text, vision, image, tensors),
    image_size=clip.square(vision["image_size"], "vision_config.image_size"),
    text=dict(vocab_size=text["vocab_size"], length=text["max_position_embeddings"]),
  )


def model(
  text: Mapping[str, Any],
  vision: Mapping[str, Any],
  image: dict[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Settings of the model with this image encoder, of the two towers of a config.json."""
  width = text["projection_size"] or text["hidden_size"]
  if not vision["vision_use_head"]:
    raise UserError(
      "vision_config.vision_use_head is false: such a model has no picture embedding to compare "
      "with texts"
    )
  if width != vision["hidden_size"]:
    raise UserError(
      f"text_config.projection_size {width} is not vision_config.hidden_size "
      f"{vision['hidden_size']}: texts and pictures cannot be compared"
    )
  return dict(
    name="dual_encoder",
    width=width,
    unprojected=("image",),
    projection_bias=True,
    bias=True,
    bias_init=-10.0,
    scale_init=10.0,
    scale_max=clip.scale_limit(tensors, 1e4),
    encoders=dict(
      image=image,
      text=dict(
        kind="transformer",
        causal=False,
        norm="pre",
        final_norm=True,
        bias=True,
        pooling="final",
        **clip.block_settings(text, "text_config."),
      ),
    ),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a SiglipModel."""
  return [
    *patch_rules(config["model"]["encoders"]["image"], "vision_model."),
    *after_patches(config),
  ]


def after_patches(config: Mapping[str, Any]) -> list[Rule]:
  """All the weights but those of the patches."""
  image, text = config["model"]["encoders"]["image"], config["model"]["encoders"]["text"]
  return [
    *image_rules(image, "vision_model."),
    *clip.text_rules(text, "text_model."),
    *mapping.linear("text_projection", "text_model.head"),
    mapping.scalar("log_scale", "logit_scale", (1,)),
    mapping.scalar("bias", "logit_bias", (1,)),
  ]


def patch_rules(image: Mapping[str, Any], theirs: str = "") -> list[Rule]:
  """The weights of the patches of a tower whose names begin with `theirs`."""
  return [
    mapping.patches(
      "image/patch/kernel", f"{theirs}embeddings.patch_embedding.weight", image["patch"]
    ),
    mapping.same("image/patch/bias", f"{theirs}embeddings.patch_embedding.bias"),
  ]


def image_rules(image: Mapping[str, Any], theirs: str = "") -> list[Rule]:
  """The other weights of the tower of pictures."""
  return [
    mapping.same("image/position", f"{theirs}embeddings.position_embedding.weight"),
    *mapping.blocks("image/layers", f"{theirs}encoder.layers", image["heads"], image["depth"]),
    *mapping.norm("image/norm", f"{theirs}post_layernorm"),
    *(
      mapping.attention_pool("image/pool", f"{theirs}head", image["heads"])
      if image["pooling"] == "attention"
      else ()
    ),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a SiglipModel must have."""
  model, image = config["model"], config["model"]["encoders"]["image"]
  return [
    ("model.encoders.image.pooling", image["pooling"], ("attention",)),
    *image_refusals(image),
    *text_refusals(model["encoders"]["text"], config["data"]["text"]["mask_padding"]),
    ("model.unprojected", tuple(model["unprojected"]), (("image",),)),
    ("model.projection_bias", model["projection_bias"], (True,)),
    ("model.projection_function", model["projection_function"], ("none",)),
    ("model.bias", model["bias"], (True,)),
    *clip.block_refusals(config),
  ]


def image_refusals(image: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What SigLIP's tower of pictures must have beside."""
  wanted = dict(input_norm=False, patch_bias=True)
  return [(f"model.encoders.image.{key}", image[key], (value,)) for key, value in wanted.items()]


def text_refusals(text: Mapping[str, Any], mask_padding: bool) -> list[tuple[str, Any, tuple]]:
  """What SigLIP's tower of texts must have beside."""
  return [
    (
      "model.encoders.text.pooling",
      text["pooling"],
      ("final",) if mask_padding else ("final", "last"),
    ),
    ("model.encoders.text.causal", text["causal"], (False,)),
  ]


def image_facts(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json of the tower of pictures alone."""
  image = config["model"]["encoders"]["image"]
  return dict(
    clip.tower_facts(image, "siglip_vision_model"),
    image_size=config["data"]["image"]["size"],
    num_channels=3,
    patch_size=image["patch"],
    vision_use_head=image["pooling"] == "attention",
  )


def text_facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of the tower of texts alone. special: the tokenizer's pad_token_id,
  bos_token_id and eos_token_id.
  """
  text, data = config["model"]["encoders"]["text"], config["data"]["text"]
  return dict(
    clip.tower_facts(text, "siglip_text_model"),
    vocab_size=data["vocab_size"],
    max_position_embeddings=text["max_positions"] or data["length"],
    projection_size=config["model"]["width"],
    **special,
  )


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a SiglipModel. special: as in `text_facts`."""
  return dict(
    model_type="siglip",
    architectures=[ARCHITECTURE],
    torch_dtype="float32",
    text_config=text_facts(config, special),
    vision_config=image_facts(config),
  )
