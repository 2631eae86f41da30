"""DINOv2 (model_type "dinov2", Oquab et al. 2024, arXiv:2304.07193): bare, or with a classifier on
the class token beside the mean of the patches. Those with registers have a module of their own
beside this one.

The file's mask token, which only pretraining uses, is left out, and written as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import mapping, single, vit
from mmjax.interop.huggingface.clip import square
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "",
  "",
  "CLIPImageProcessor",
  "dinov2.",
)
ARCHITECTURE = "Dinov2Model"
REGISTERS = "dinov2_with_registers"

# What transformers assumes where config.json is silent.
FACTS = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  mlp_ratio=4,
  hidden_act="gelu",
  layer_norm_eps=1e-6,
  image_size=224,
  patch_size=14,
  num_channels=3,
  qkv_bias=True,
  layerscale_value=1.0,
  use_swiglu_ffn=False,
  num_register_tokens=4,
)
PREPROCESSOR = dict(
  do_resize=True,
  size={"shortest_edge": 256},
  resample=3,
  do_center_crop=True,
  crop_size=224,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  **single.IMAGENET,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": None} of a config.json: pictures may have another size than the
  learned positions.
  """
  registers = facts["model_type"] == REGISTERS
  facts = {**FACTS, **facts}
  single.only(facts, num_channels=3, qkv_bias=True)
  patch, width, gated = (
    square(facts["patch_size"], "patch_size"),
    facts["hidden_size"],
    facts["use_swiglu_ffn"],
  )
  head = "classifier.weight" in tensors
  entry = dict(
    kind="vit",
    patch=patch,
    crop_edge=True,
    width=width,
    depth=facts["num_hidden_layers"],
    heads=facts["num_attention_heads"],
    mlp=hidden_units(width, facts["mlp_ratio"], gated),
    gated=gated,
    activation="silu" if gated else single.activation(facts),
    eps=facts["layer_norm_eps"],
    layer_scale=facts["layerscale_value"] or 1.0,
    grid=single.image_size(facts) // patch,
    registers=facts["num_register_tokens"] if registers else 0,
    antialias=registers,
    pooling="class_mean" if head else "class",
    positions="learned",
    stem="patch",
  )
  return dict(
    model=single.model(tensors, dict(image=entry), width * (1 + head)), image_size=None, text=None
  )


def hidden_units(width: int, ratio: float, gated: bool) -> int:
  """Of a block's MLP; with a gate two thirds of them, rounded up to a multiple of 8."""
  hidden = int(width * ratio)
  return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a Dinov2Model and its classifier, without the prefix that it has beside one."""
  image = config["model"]["encoders"]["image"]
  at, depth = "encoder.layer.{i}", image["depth"]
  up, down = ("weights_in", "weights_out") if image["gated"] else ("fc1", "fc2")
  registers = mapping.row("image/registers", "embeddings.register_tokens")
  return [
    *vit.embedding_and_attention_rules(image),
    *([registers] if image["registers"] else ()),
    *mapping.norm("image/layers/attention_norm", f"{at}.norm1", depth),
    *mapping.norm("image/layers/mlp_norm", f"{at}.norm2", depth),
    mapping.same("image/layers/attention_scale/scale", f"{at}.layer_scale1.lambda1", depth),
    mapping.same("image/layers/mlp_scale/scale", f"{at}.layer_scale2.lambda1", depth),
    *mapping.linear("image/layers/mlp/up", f"{at}.mlp.{up}", depth),
    *mapping.linear("image/layers/mlp/down", f"{at}.mlp.{down}", depth),
    *mapping.norm("image/norm", "layernorm"),
    *single.classifier(config),
  ]


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of a file that are no parameters here."""
  return {
    "embeddings.mask_token": np.zeros(
      (1, config["model"]["encoders"]["image"]["width"]), np.float32
    )
  }


def refusals(config: Mapping[str, Any], registers: bool = False) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a DINOv2 of transformers must have."""
  model, image = config["model"], config["model"]["encoders"]["image"]
  wanted = dict(
    positions="learned",
    stem="patch",
    norm="pre",
    final_norm=True,
    bias=True,
    input_norm=False,
    patch_bias=True,
    pooler=False,
    antialias=registers,
    pooling="class_mean" if model["classes"] else "class",
  )
  activations = ("silu",) if image["gated"] else tuple(name for name in single.ACTIVATIONS.values())
  return [
    *((f"model.encoders.image.{key}", image[key], (value,)) for key, value in wanted.items()),
    ("model.encoders.image.layer_scale", image["layer_scale"] > 0, (True,)),
    ("model.encoders.image.registers", image["registers"] > 0, (registers,)),
    ("model.encoders.image.activation", image["activation"], activations),
    (
      "model.encoders.image.mlp",
      image["mlp"],
      tuple(hidden_units(image["width"], ratio, image["gated"]) for ratio in range(1, 17)),
    ),
    ("model.masked_tokens", model["masked_tokens"], (False,)),
    ("model.projection", model["projection"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Dinov2Model or a Dinov2ForImageClassification, with registers or
  without.
  """
  model, image = config["model"], config["model"]["encoders"]["image"]
  registers = dict(num_register_tokens=image["registers"]) if image["registers"] else {}
  name = "Dinov2WithRegisters" if registers else "Dinov2"
  grid = image["grid"] or config["data"]["image"]["size"] // image["patch"]
  ratio = next(
    r for r in range(1, 17) if hidden_units(image["width"], r, image["gated"]) == image["mlp"]
  )
  return dict(
    model_type=REGISTERS if registers else "dinov2",
    architectures=[name + ("ForImageClassification" if model["classes"] else "Model")],
    torch_dtype="float32",
    hidden_size=image["width"],
    num_hidden_layers=image["depth"],
    num_attention_heads=image["heads"],
    mlp_ratio=ratio,
    use_swiglu_ffn=image["gated"],
    hidden_act="gelu" if image["gated"] else single.activation_name(image["activation"]),
    layer_norm_eps=image["eps"],
    image_size=grid * image["patch"],
    patch_size=image["patch"],
    num_channels=3,
    qkv_bias=True,
    layerscale_value=image["layer_scale"],
    hidden_dropout_prob=image["dropout"],
    attention_probs_dropout_prob=0.0,
    **registers,
    **single.labels(config),
  )
