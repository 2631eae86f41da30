"""CLIP's tower of pictures alone (model_type "clip_vision_model"), with its projection or without.

Tokens are those after the last norm, which transformers applies to the pooled one alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import clip, mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "",
  "",
  "CLIPImageProcessor",
  "vision_model.",
)
ARCHITECTURE, PREPROCESSOR = "CLIPVisionModel", clip.PREPROCESSOR


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image_size": int} of a config.json."""
  facts = {**clip.VISION, **facts}
  image = dict(
    pooling="class", input_norm=True, patch_bias=False, **clip.vision_settings(facts, "")
  )
  return dict(
    model=single.projected(
      tensors, "visual_projection.weight", dict(image=image), facts["hidden_size"]
    ),
    image_size=single.image_size(facts),
    text=None,
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a CLIPVisionModel and its projection, without the prefix that it has beside
  one.
  """
  model = config["model"]
  projection = (
    mapping.linear("projection", "visual_projection", bias=False) if model["projection"] else []
  )
  return [*clip.image_rules(model["encoders"]["image"]), *projection]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a CLIPVisionModel must have."""
  return [
    *clip.image_refusals(config["model"]["encoders"]["image"]),
    *clip.block_refusals(config),
    *single.headless(config),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a CLIPVisionModel or a CLIPVisionModelWithProjection."""
  name = f"{ARCHITECTURE}WithProjection" if config["model"]["projection"] else ARCHITECTURE
  return dict(clip.image_facts(config), architectures=[name], torch_dtype="float32")
