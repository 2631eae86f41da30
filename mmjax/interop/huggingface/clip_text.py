"""CLIP's tower of texts alone (model_type "clip_text_model"), with its projection or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import clip, mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "CLIPTokenizer",
  "",
  "",
  "text_model.",
)
ARCHITECTURE, PAD, MASK_PADDING = "CLIPTextModel", clip.PAD, clip.MASK_PADDING


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**clip.TEXT, **facts}
  model = single.projected(
    tensors,
    "text_projection.weight",
    dict(text=clip.text_settings(facts, "")),
    facts["hidden_size"],
  )
  return dict(
    model=model,
    image_size=None,
    text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"]),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a CLIPTextModel and its projection, without the prefix that it has beside
  one.
  """
  model = config["model"]
  projection = (
    mapping.linear("projection", "text_projection", bias=False) if model["projection"] else []
  )
  return [*clip.text_rules(model["encoders"]["text"]), *projection]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a CLIPTextModel must have."""
  return [
    *clip.text_refusals(config["model"]["encoders"]["text"]),
    *clip.block_refusals(config),
    *single.headless(config),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a CLIPTextModel or a CLIPTextModelWithProjection. special: the tokenizer's
  ids.
  """
  name = f"{ARCHITECTURE}WithProjection" if config["model"]["projection"] else ARCHITECTURE
  return dict(clip.text_facts(config, special), architectures=[name], torch_dtype="float32")
