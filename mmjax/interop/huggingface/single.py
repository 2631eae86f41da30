"""What the families of single encoders (BERT, ViT, ResNet, Swin) share: heads, prefixes of names, settings of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping
from mmjax.interop.huggingface.clip import ACTIVATIONS, square
from mmjax.interop.huggingface.mapping import Rule

IMAGENET = dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
HEADS = ("classifier.", "cls.", "visual_projection.", "text_projection.")  # names that never carry the encoder's prefix
STATISTICS = "batch_stats"


def model(tensors: Mapping[str, np.ndarray], encoders: Mapping[str, Any], width: int, **heads: Any) -> dict[str, Any]:
  """Settings of `model` for one encoder, with the classifier that a file holds."""
  weight = next((x for name, x in tensors.items() if re.fullmatch(r"classifier(\.\d)?\.weight", name)), None)
  return dict(name="encoder", width=width, classes=0 if weight is None else int(weight.shape[0]), encoders=dict(encoders), **heads)


def projected(tensors: Mapping[str, np.ndarray], weight: str, encoders: Mapping[str, Any], width: int, **more: Any) -> dict[str, Any]:
  """Settings of `model` for one encoder of `width` channels, with the projection whose weight a file may hold."""
  found = tensors.get(weight)
  settings = {} if found is None else dict(projection=True, **more)
  return dict(name="encoder", width=width if found is None else int(found.shape[0]), classes=0, encoders=dict(encoders), **settings)


def headless(config: Mapping[str, Any], projection: bool = True, projection_bias: bool = False) -> list[tuple[str, Any, tuple]]:
  """What a tower alone must have: no head but, at most, a projection."""
  model = config["model"]
  return [("model.classes", model["classes"], (0,)), ("model.masked_tokens", model["masked_tokens"], (False,)),
          ("model.projection", model["projection"], (True, False) if projection else (False,)),
          ("model.projection_bias", model["projection_bias"], (projection_bias,) if model["projection"] else (True, False))]


def classifier(config: Mapping[str, Any], theirs: str = "classifier") -> list[Rule]:
  return mapping.linear("classifier", theirs) if config["model"]["classes"] else []


def without_prefix(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """Tensors under the names that the bare encoder has, and norms under their present names (gamma and beta once)."""
  rename = lambda name: re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{dict(gamma='weight', beta='bias')[m[1]]}", name)
  return {rename(name.removeprefix(prefix)): x for name, x in tensors.items()}


def with_prefix(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """Tensors as a transformers model saves them: an encoder beside a head has a prefix; batch norms count their batches."""
  mean = "running_mean"
  counts = {name.replace(mean, "num_batches_tracked"): np.zeros((), np.int64) for name in tensors if name.endswith(mean)}
  tensors = {**tensors, **counts}
  if not any(name.startswith(HEADS) for name in tensors):
    return tensors
  return {name if name.startswith(HEADS) else prefix + name: x for name, x in tensors.items()}


def activation(facts: Mapping[str, Any]) -> str:
  if facts["hidden_act"] not in ACTIVATIONS:
    raise UserError(f"hidden_act {facts['hidden_act']!r} is not supported; there are: {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[facts["hidden_act"]]


def activation_name(ours: str) -> str:
  return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[ours]


def only(facts: Mapping[str, Any], **allowed: Any) -> None:
  """Raises UserError unless the facts of a config.json have the one value that is supported here."""
  for key, value in allowed.items():
    if facts[key] != value:
      raise UserError(f"{key} is {facts[key]!r}, but only {value!r} is supported")


def image_size(facts: Mapping[str, Any]) -> int:
  return square(facts["image_size"], "image_size")


def labels(config: Mapping[str, Any]) -> dict[str, Any]:
  """The names of a classifier's outputs, which say how many there are: {} without one."""
  names = [f"LABEL_{i}" for i in range(config["model"]["classes"])]
  return dict(id2label={str(i): name for i, name in enumerate(names)}, label2id={name: i for i, name in enumerate(names)}) if names else {}
