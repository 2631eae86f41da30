"""CLIP (model_type "clip"): what its config.json means here, which tensors are which parameters,
and the way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "CLIPTokenizer",
  "CLIPProcessor",
  "CLIPImageProcessor",
  "",
)
ARCHITECTURE, PAD = "CLIPModel", "<|endoftext|>"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say

# What transformers assumes where config.json is silent.
TEXT = dict(
  vocab_size=49408,
  hidden_size=512,
  intermediate_size=2048,
  num_hidden_layers=12,
  num_attention_heads=8,
  max_position_embeddings=77,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
  attention_dropout=0.0,
  eos_token_id=49407,
)
VISION = dict(
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
  num_channels=3,
  image_size=224,
  patch_size=32,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
  attention_dropout=0.0,
)
TOP = dict(projection_dim=512)
PREPROCESSOR = dict(
  do_resize=True,
  size={"shortest_edge": 224},
  resample=3,
  do_center_crop=True,
  crop_size=224,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=(0.48145466, 0.4578275, 0.40821073),
  image_std=(0.26862954, 0.26130258, 0.27577711),
)

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}
LEGACY_EOS = 2  # with this eos_token_id transformers pools the token of the highest id


def towers(
  facts: Mapping[str, Any], text_defaults: Mapping, vision_defaults: Mapping
) -> tuple[dict, dict]:
  """(text, vision) settings of a config.json with transformers' defaults filled in, as transformers
  merges them.
  """
  out = []
  for name, defaults in (("text_config", text_defaults), ("vision_config", vision_defaults)):
    tower = {**defaults, **(facts.get(name) or {})}
    if old := facts.get(f"{name}_dict"):
      tower.update({**defaults, **old})
    out.append(tower)
  return out[0], out[1]


def block_settings(tower: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The settings that both of our transformers share. Raises UserError for an activation that is
  not here.
  """
  if tower["hidden_act"] not in ACTIVATIONS:
    raise UserError(
      f"{where}hidden_act {tower['hidden_act']!r} is not supported; there are: "
      f"{', '.join(ACTIVATIONS)}"
    )
  return dict(
    width=tower["hidden_size"],
    depth=tower["num_hidden_layers"],
    heads=tower["num_attention_heads"],
    mlp=tower["intermediate_size"],
    activation=ACTIVATIONS[tower["hidden_act"]],
    eps=tower["layer_norm_eps"],
  )


def square(value: Any, what: str) -> int:
  """One side of a size that may be written as a number, a pair or a dict. Raises UserError unless
  it is square.
  """
  sides = (
    list(value.values())
    if isinstance(value, Mapping)
    else value
    if isinstance(value, (list, tuple))
    else [value]
  )
  if len(set(sides)) != 1:
    raise UserError(f"{what} is {value}, but only squares are supported")
  return int(sides[0])


def vision_settings(vision: Mapping[str, Any], where: str = "vision_config.") -> dict[str, Any]:
  """The settings of a tower of pictures; `where` stands before names in errors."""
  if vision["num_channels"] != 3:
    raise UserError(f"{where}num_channels is {vision['num_channels']}, but pictures have 3 here")
  patch, size = (
    square(vision["patch_size"], f"{where}patch_size"),
    square(vision["image_size"], f"{where}image_size"),
  )
  return dict(
    kind="vit",
    patch=patch,
    crop_edge=bool(size % patch),
    positions="learned",
    stem="patch",
    norm="pre",
    final_norm=True,
    bias=True,
    **block_settings(vision, where),
  )


def text_settings(text: Mapping[str, Any], where: str = "text_config.") -> dict[str, Any]:
  """The settings of a tower of texts; `where` stands before names in errors."""
  eos = text["eos_token_id"]
  if isinstance(eos, (list, tuple)):
    raise UserError(f"{where}eos_token_id is {eos}, but one token is needed for pooling")
  pooling = dict(pooling="highest") if eos == LEGACY_EOS else dict(pooling="eos", eos_id=eos)
  return dict(
    kind="transformer",
    causal=True,
    norm="pre",
    final_norm=True,
    bias=True,
    **pooling,
    **block_settings(text, where),
  )


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": int, "text": settings of data.text} of a config.json."""
  text, vision = towers(facts, TEXT, VISION)
  model = dict(
    name="dual_encoder",
    width={**TOP, **facts}["projection_dim"],
    projection_bias=False,
    bias=False,
    scale_init=float(np.exp(facts.get("logit_scale_init_value", 2.6592))),
    scale_max=scale_limit(tensors, 100.0),
    encoders=dict(
      image=dict(pooling="class", input_norm=True, patch_bias=False, **vision_settings(vision)),
      text=text_settings(text),
    ),
  )
  return dict(
    model=model,
    image_size=square(vision["image_size"], "vision_config.image_size"),
    text=dict(vocab_size=text["vocab_size"], length=text["max_position_embeddings"]),
  )


def scale_limit(tensors: Mapping[str, np.ndarray], usual: float) -> float:
  """`usual`, unless the file's own scale is beyond it: transformers never clips."""
  scale = (
    math.exp(float(np.asarray(tensors["logit_scale"], np.float32).reshape(())))
    if "logit_scale" in tensors
    else 0.0
  )
  return usual if scale <= usual * 1.0001 else 1e4


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a CLIPModel."""
  image, text = config["model"]["encoders"]["image"], config["model"]["encoders"]["text"]
  return [
    *image_rules(image, "vision_model."),
    *mapping.linear("image_projection", "visual_projection", bias=False),
    *text_rules(text, "text_model."),
    *mapping.linear("text_projection", "text_projection", bias=False),
    mapping.scalar("log_scale", "logit_scale", ()),
  ]


def image_rules(image: Mapping[str, Any], theirs: str = "") -> list[Rule]:
  """The weights of the tower of pictures, whose names begin with `theirs`."""
  return [
    mapping.same("image/class", f"{theirs}embeddings.class_embedding"),
    mapping.patches(
      "image/patch/kernel", f"{theirs}embeddings.patch_embedding.weight", image["patch"]
    ),
    mapping.same("image/position", f"{theirs}embeddings.position_embedding.weight"),
    *mapping.norm("image/input_norm", f"{theirs}pre_layrnorm"),
    *mapping.blocks("image/layers", f"{theirs}encoder.layers", image["heads"], image["depth"]),
    *mapping.norm("image/norm", f"{theirs}post_layernorm"),
  ]


def text_rules(text: Mapping[str, Any], theirs: str = "") -> list[Rule]:
  """The weights of the tower of texts, whose names begin with `theirs`."""
  return [
    mapping.same("text/embedding", f"{theirs}embeddings.token_embedding.weight"),
    mapping.same("text/position", f"{theirs}embeddings.position_embedding.weight"),
    *mapping.blocks("text/layers", f"{theirs}encoder.layers", text["heads"], text["depth"]),
    *mapping.norm("text/norm", f"{theirs}final_layer_norm"),
  ]


def block_refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, what transformers can express) of the settings that the towers of CLIP and SigLIP
  share.
  """
  checks = []
  for modality, encoder in config["model"]["encoders"].items():
    wanted = dict(norm="pre", final_norm=True, bias=True)
    if modality == "image":
      wanted.update(
        positions="learned",
        stem="patch",
        pooler=False,
        layer_scale=0,
        registers=0,
        grid=0,
        gated=False,
      )
    checks += [
      (f"model.encoders.{modality}.{key}", encoder[key], (value,)) for key, value in wanted.items()
    ]
  return checks


def image_refusals(image: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What CLIP's tower of pictures must have beside."""
  wanted = dict(pooling="class", input_norm=True, patch_bias=False)
  return [(f"model.encoders.image.{key}", image[key], (value,)) for key, value in wanted.items()]


def text_refusals(text: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What CLIP's tower of texts must have beside; see `moved_end` of own_tokenizer.py
  for an end token of LEGACY_EOS."""
  return [
    ("model.encoders.text.pooling", text["pooling"], ("eos", "highest")),
    ("model.encoders.text.causal", text["causal"], (True,)),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a CLIPModel must have."""
  model = config["model"]
  return [
    *image_refusals(model["encoders"]["image"]),
    *text_refusals(model["encoders"]["text"]),
    ("model.unprojected", tuple(model["unprojected"]), ((),)),
    ("model.projection_bias", model["projection_bias"], (False,)),
    ("model.projection_function", model["projection_function"], ("none",)),
    ("model.bias", model["bias"], (False,)),
    *block_refusals(config),
  ]


def tower_facts(encoder: Mapping[str, Any], model_type: str) -> dict[str, Any]:
  """The settings of one tower as config.json has them. `encoder` has its width, heads and mlp
  filled in.
  """
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return dict(
    model_type=model_type,
    hidden_size=encoder["width"],
    intermediate_size=encoder["mlp"],
    num_hidden_layers=encoder["depth"],
    num_attention_heads=encoder["heads"],
    hidden_act=names[encoder["activation"]],
    layer_norm_eps=encoder["eps"],
    attention_dropout=0.0,
  )


def image_facts(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json of the tower of pictures alone."""
  image = config["model"]["encoders"]["image"]
  return dict(
    tower_facts(image, "clip_vision_model"),
    image_size=config["data"]["image"]["size"],
    patch_size=image["patch"],
    num_channels=3,
    projection_dim=config["model"]["width"],
  )


def text_facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of the tower of texts alone. special: the tokenizer's pad_token_id,
  bos_token_id and eos_token_id.
  """
  text, data = config["model"]["encoders"]["text"], config["data"]["text"]
  eos = LEGACY_EOS if text["pooling"] == "highest" else text["eos_id"]
  return dict(
    tower_facts(text, "clip_text_model"),
    vocab_size=data["vocab_size"],
    max_position_embeddings=text["max_positions"] or data["length"],
    projection_dim=config["model"]["width"],
    **{**special, "eos_token_id": eos},
  )


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a CLIPModel. special: as in `text_facts`."""
  return dict(
    model_type="clip",
    architectures=[ARCHITECTURE],
    projection_dim=config["model"]["width"],
    torch_dtype="float32",
    logit_scale_init_value=math.log(config["model"]["scale_init"]),
    text_config=text_facts(config, special),
    vision_config=image_facts(config),
  )
