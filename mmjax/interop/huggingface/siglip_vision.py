"""SigLIP's tower of pictures alone (model_type "siglip_vision_model"), with its pooling head or
without (then the mean is pooled).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import clip, siglip, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "",
  "",
  "SiglipImageProcessor",
  "vision_model.",
)
ARCHITECTURE, PREPROCESSOR = "SiglipVisionModel", siglip.PREPROCESSOR


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": int} of a config.json."""
  facts = {**siglip.VISION, **facts}
  image = dict(
    pooling="attention" if facts["vision_use_head"] else "mean",
    input_norm=False,
    patch_bias=True,
    **clip.vision_settings(facts, ""),
  )
  return dict(
    model=single.model({}, dict(image=image), facts["hidden_size"]),
    image_size=single.image_size(facts),
    text=None,
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a SiglipVisionModel."""
  image = config["model"]["encoders"]["image"]
  return [*siglip.patch_rules(image), *siglip.image_rules(image)]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a SiglipVisionModel must have."""
  image = config["model"]["encoders"]["image"]
  return [
    ("model.encoders.image.pooling", image["pooling"], ("attention", "mean")),
    *siglip.image_refusals(image),
    *clip.block_refusals(config),
    *single.headless(config, projection=False),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a SiglipVisionModel."""
  return dict(siglip.image_facts(config), architectures=[ARCHITECTURE], torch_dtype="float32")
