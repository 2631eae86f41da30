"""Swin (model_type "swin"): the bare encoder or with a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.clip import square
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models.encoders.swin import stages_of

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "",
  "",
  "CLIPImageProcessor",
  "swin.",
)
ARCHITECTURE = "SwinModel"

# What transformers assumes where config.json is silent.
FACTS = dict(
  image_size=224,
  patch_size=4,
  num_channels=3,
  embed_dim=96,
  depths=(2, 2, 6, 2),
  num_heads=(3, 6, 12, 24),
  window_size=7,
  mlp_ratio=4.0,
  qkv_bias=True,
  drop_path_rate=0.1,
  hidden_act="gelu",
  use_absolute_embeddings=False,
  layer_norm_eps=1e-5,
)
PREPROCESSOR = dict(
  do_resize=True,
  size={"height": 224, "width": 224},
  resample=3,
  do_center_crop=False,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  **single.IMAGENET,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": int} of a config.json."""
  facts = {**FACTS, **facts}
  single.only(facts, num_channels=3, qkv_bias=True, use_absolute_embeddings=False)
  patch, size, stages = (
    square(facts["patch_size"], "patch_size"),
    single.image_size(facts),
    len(facts["depths"]),
  )
  last = _last_side(size, patch, stages)
  if last < facts["window_size"]:
    raise UserError(
      f"window_size {facts['window_size']} is larger than the map of {last}x{last} patches of the "
      "last stage"
    )
  entry = dict(
    kind="swin",
    patch=patch,
    width=facts["embed_dim"],
    depths=tuple(facts["depths"]),
    heads=tuple(facts["num_heads"]),
    window=facts["window_size"],
    mlp_ratio=facts["mlp_ratio"],
    activation=single.activation(facts),
    eps=facts["layer_norm_eps"],
    drop_path=facts["drop_path_rate"],
  )
  return dict(
    model=single.model(tensors, dict(image=entry), facts["embed_dim"] * 2 ** (stages - 1)),
    image_size=size,
    text=None,
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a SwinModel and its classifier, without the prefix that it has beside one."""
  image = config["model"]["encoders"]["image"]
  depths, heads = stages_of(image["width"], image["depths"], image["heads"])
  out = [
    mapping.patches(
      "image/patch/kernel", "embeddings.patch_embeddings.projection.weight", image["patch"]
    ),
    mapping.same("image/patch/bias", "embeddings.patch_embeddings.projection.bias"),
    *mapping.norm("image/patch_norm", "embeddings.norm"),
  ]
  out += stage_rules("image", "encoder.layers", depths, heads)
  return out + mapping.norm("image/norm", "layernorm") + single.classifier(config)


def stage_rules(ours: str, theirs: str, depths: Sequence[int], heads: Sequence[int]) -> list[Rule]:
  """The weights of the blocks and merges of each stage; `theirs` is up to "encoder.layers"."""
  out = []
  for stage, count in enumerate(depths):
    at, merge = f"{theirs}.{stage}", f"{ours}/merge{stage}"
    for i in range(count):
      out += _block(f"{ours}/stage{stage}_block{i}", f"{at}.blocks.{i}", heads[stage])
    if stage + 1 < len(depths):
      out += mapping.norm(f"{merge}/norm", f"{at}.downsample.norm")
      out += mapping.linear(f"{merge}/out", f"{at}.downsample.reduction", bias=False)
  return out


def _block(ours: str, theirs: str, heads: int) -> list[Rule]:
  projections = [f"{theirs}.attention.self.{x}" for x in ("query", "key", "value")]
  return [
    *mapping.self_attention(
      f"{ours}/attention", projections, f"{theirs}.attention.output.dense", heads
    ),
    mapping.same(
      f"{ours}/attention/relative", f"{theirs}.attention.self.relative_position_bias_table"
    ),
    *mapping.norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
    *mapping.norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
    *mapping.linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
    *mapping.linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
  ]


def _last_side(size: int, patch: int, stages: int) -> int:
  """Patches along one side of the last stage's map: transformers wants a whole window of them."""
  return -(-size // (patch * 2 ** (stages - 1)))


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a Swin of transformers must have."""
  image = config["model"]["encoders"]["image"]
  largest = _last_side(
    config["data"]["image"]["size"],
    image["patch"],
    len(stages_of(image["width"], image["depths"], image["heads"])[0]),
  )
  return [
    ("model.encoders.image.window", image["window"], (min(image["window"], largest),)),
    ("model.masked_tokens", config["model"]["masked_tokens"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a SwinModel or a SwinForImageClassification."""
  image = config["model"]["encoders"]["image"]
  depths, heads = stages_of(image["width"], image["depths"], image["heads"])
  return dict(
    model_type="swin",
    architectures=["SwinForImageClassification" if config["model"]["classes"] else ARCHITECTURE],
    torch_dtype="float32",
    image_size=config["data"]["image"]["size"],
    patch_size=image["patch"],
    num_channels=3,
    embed_dim=image["width"],
    depths=list(depths),
    num_heads=list(heads),
    window_size=image["window"],
    mlp_ratio=image["mlp_ratio"],
    qkv_bias=True,
    drop_path_rate=image["drop_path"],
    use_absolute_embeddings=False,
    hidden_act=single.activation_name(image["activation"]),
    layer_norm_eps=image["eps"],
    **single.labels(config),
  )
