"""ResNet (model_type "resnet"): the bare encoder or with a classifier; its running statistics
become model state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models.encoders.resnet import EXPANSION, NETWORKS

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "",
  "",
  "CLIPImageProcessor",
  "resnet.",
)
ARCHITECTURE = "ResNetModel"

# What transformers assumes where config.json is silent.
FACTS = dict(
  num_channels=3,
  embedding_size=64,
  hidden_sizes=(256, 512, 1024, 2048),
  depths=(3, 4, 6, 3),
  layer_type="bottleneck",
  hidden_act="relu",
  downsample_in_first_stage=False,
  downsample_in_bottleneck=False,
)
PREPROCESSOR = dict(
  do_resize=True,
  size={"shortest_edge": 224},
  resample=3,
  do_center_crop=True,
  crop_size=224,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  **single.IMAGENET,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ...} of a config.json, which does not say the size of the pictures."""
  facts = {**FACTS, **facts}
  single.only(
    facts,
    num_channels=3,
    hidden_act="relu",
    downsample_in_first_stage=False,
    downsample_in_bottleneck=False,
  )
  bottleneck, channels = facts["layer_type"] == "bottleneck", facts["embedding_size"]
  sizes = [channels * 2**i * (EXPANSION if bottleneck else 1) for i in range(len(facts["depths"]))]
  if list(facts["hidden_sizes"]) != sizes:
    raise UserError(
      f"hidden_sizes is {list(facts['hidden_sizes'])}, but only {sizes} is supported for "
      f"embedding_size {channels}: channels that double from stage to stage"
    )
  entry = dict(
    kind="resnet",
    layers=50 if bottleneck else 18,
    blocks=tuple(facts["depths"]),
    multiplier=channels / 64,
    stem="imagenet",
  )
  return dict(model=single.model(tensors, dict(image=entry), sizes[-1]), image_size=None, text=None)


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ResNetModel and its classifier, and its running statistics (under
  "batch_stats").
  """
  image = config["model"]["encoders"]["image"]
  blocks, bottleneck, _ = _plan(image)
  out = _convolution("image/stem", "image/stem_norm", "embedder.embedder")
  for stage, count in enumerate(blocks):
    for i in range(count):
      ours, theirs = f"image/stage{stage}_block{i}", f"encoder.stages.{stage}.layers.{i}"
      for j in range(3 if bottleneck else 2):
        out += _convolution(f"{ours}/conv{j}", f"{ours}/norm{j}", f"{theirs}.layer.{j}")
      if not i and (stage or bottleneck):
        out += _convolution(f"{ours}/shortcut", f"{ours}/shortcut_norm", f"{theirs}.shortcut")
  return out + single.classifier(config, "classifier.1")


def _convolution(convolution: str, norm: str, theirs: str) -> list[Rule]:
  """A convolution without bias and its batch normalisation."""
  return [
    mapping.convolution(f"{convolution}/kernel", f"{theirs}.convolution.weight"),
    *mapping.batch_norm(norm, f"{theirs}.normalization"),
  ]


def _plan(image: Mapping[str, Any]) -> tuple[tuple[int, ...], bool, int]:
  """(blocks of each stage, whether they are bottlenecks, channels of the stem)."""
  usual, bottleneck = NETWORKS[image["layers"]]
  return tuple(image["blocks"]) or usual, bottleneck, round(64 * image["multiplier"])


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a ResNet of transformers must have."""
  return [
    ("model.encoders.image.stem", config["model"]["encoders"]["image"]["stem"], ("imagenet",)),
    ("model.masked_tokens", config["model"]["masked_tokens"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a ResNetModel or a ResNetForImageClassification."""
  blocks, bottleneck, channels = _plan(config["model"]["encoders"]["image"])
  return dict(
    model_type="resnet",
    architectures=["ResNetForImageClassification" if config["model"]["classes"] else ARCHITECTURE],
    torch_dtype="float32",
    num_channels=3,
    embedding_size=channels,
    depths=list(blocks),
    hidden_act="relu",
    hidden_sizes=[channels * 2**i * (EXPANSION if bottleneck else 1) for i in range(len(blocks))],
    layer_type="bottleneck" if bottleneck else "basic",
    **single.labels(config),
  )
