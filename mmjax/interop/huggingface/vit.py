"""ViT (model_type "vit"): the bare encoder, with its pooler or without, or with a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.clip import square
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "",
  "",
  "CLIPImageProcessor",
  "vit.",
)
ARCHITECTURE = "ViTModel"

# What transformers assumes where config.json is silent.
FACTS = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
  hidden_act="gelu",
  layer_norm_eps=1e-12,
  image_size=224,
  patch_size=16,
  num_channels=3,
  qkv_bias=True,
  pooler_output_size=None,
  pooler_act="tanh",
)
PREPROCESSOR = dict(
  do_resize=True,
  size={"height": 224, "width": 224},
  resample=2,
  do_center_crop=False,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=(0.5, 0.5, 0.5),
  image_std=(0.5, 0.5, 0.5),
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": int} of a config.json."""
  facts = {**FACTS, **facts}
  single.only(facts, num_channels=3, qkv_bias=True)
  pooler = "pooler.dense.weight" in tensors
  if pooler:
    single.only(
      {**facts, "pooler_output_size": facts["pooler_output_size"] or facts["hidden_size"]},
      pooler_act="tanh",
      pooler_output_size=facts["hidden_size"],
    )
  patch, size = square(facts["patch_size"], "patch_size"), single.image_size(facts)
  entry = dict(
    kind="vit",
    patch=patch,
    crop_edge=bool(size % patch),
    width=facts["hidden_size"],
    depth=facts["num_hidden_layers"],
    heads=facts["num_attention_heads"],
    mlp=facts["intermediate_size"],
    activation=single.activation(facts),
    eps=facts["layer_norm_eps"],
    pooling="class",
    positions="learned",
    stem="patch",
    pooler=pooler,
  )
  return dict(
    model=single.model(tensors, dict(image=entry), facts["hidden_size"]), image_size=size, text=None
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ViTModel and its classifier, without the prefix that it has beside one."""
  image = config["model"]["encoders"]["image"]
  at, depth = "encoder.layer.{i}", image["depth"]
  return [
    *embedding_and_attention_rules(image),
    *mapping.norm("image/layers/attention_norm", f"{at}.layernorm_before", depth),
    *mapping.norm("image/layers/mlp_norm", f"{at}.layernorm_after", depth),
    *mapping.linear("image/layers/mlp/up", f"{at}.intermediate.dense", depth),
    *mapping.linear("image/layers/mlp/down", f"{at}.output.dense", depth),
    *mapping.norm("image/norm", "layernorm"),
    *(mapping.linear("image/pooler", "pooler.dense") if image["pooler"] else ()),
    *single.classifier(config),
  ]


def embedding_and_attention_rules(image: Mapping[str, Any]) -> list[Rule]:
  """The weights that all models made like a ViT name alike: before the blocks, in attention."""
  at = "encoder.layer.{i}.attention"
  return [
    mapping.same("image/class", "embeddings.cls_token", shape=(1, 1, -1)),
    mapping.row("image/position", "embeddings.position_embeddings"),
    mapping.patches(
      "image/patch/kernel", "embeddings.patch_embeddings.projection.weight", image["patch"]
    ),
    mapping.same("image/patch/bias", "embeddings.patch_embeddings.projection.bias"),
    *mapping.self_attention(
      "image/layers/attention",
      [f"{at}.attention.{x}" for x in ("query", "key", "value")],
      f"{at}.output.dense",
      image["heads"],
      image["depth"],
    ),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a ViT of transformers must have."""
  model, image = config["model"], config["model"]["encoders"]["image"]
  wanted = dict(
    pooling="class",
    positions="learned",
    stem="patch",
    norm="pre",
    final_norm=True,
    bias=True,
    input_norm=False,
    patch_bias=True,
    layer_scale=0,
    registers=0,
    grid=0,
    gated=False,
  )
  return [
    *((f"model.encoders.image.{key}", image[key], (value,)) for key, value in wanted.items()),
    (
      "model.encoders.image.pooler",
      image["pooler"],
      (False,) if model["classes"] else (True, False),
    ),
    ("model.masked_tokens", model["masked_tokens"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a ViTModel or a ViTForImageClassification."""
  model, image = config["model"], config["model"]["encoders"]["image"]
  return dict(
    model_type="vit",
    architectures=["ViTForImageClassification" if model["classes"] else ARCHITECTURE],
    torch_dtype="float32",
    hidden_size=image["width"],
    num_hidden_layers=image["depth"],
    num_attention_heads=image["heads"],
    intermediate_size=image["mlp"],
    hidden_act=single.activation_name(image["activation"]),
    layer_norm_eps=image["eps"],
    image_size=config["data"]["image"]["size"],
    patch_size=image["patch"],
    num_channels=3,
    qkv_bias=True,
    hidden_dropout_prob=image["dropout"],
    attention_probs_dropout_prob=0.0,
    **single.labels(config),
  )
