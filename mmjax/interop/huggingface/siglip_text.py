"""SigLIP's tower of texts alone (model_type "siglip_text_model"), whose pooled output is
projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import clip, mapping, siglip, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "SiglipTokenizer",
  "",
  "",
  "text_model.",
)
ARCHITECTURE, PAD, MASK_PADDING = "SiglipTextModel", siglip.PAD, siglip.MASK_PADDING


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**siglip.TEXT, **facts}
  text = dict(
    kind="transformer",
    causal=False,
    norm="pre",
    final_norm=True,
    bias=True,
    pooling="final",
    **clip.block_settings(facts, ""),
  )
  return dict(
    model=single.projected(
      tensors, "head.weight", dict(text=text), facts["hidden_size"], projection_bias=True
    ),
    image_size=None,
    text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"]),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a SiglipTextModel."""
  return [
    *clip.text_rules(config["model"]["encoders"]["text"]),
    *mapping.linear("projection", "head"),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a SiglipTextModel must have."""
  model = config["model"]
  return [
    *siglip.text_refusals(model["encoders"]["text"], config["data"]["text"]["mask_padding"]),
    *clip.block_refusals(config),
    ("model.projection", model["projection"], (True,)),
    *single.headless(config, projection_bias=True),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a SiglipTextModel. special: the tokenizer's ids."""
  return dict(
    siglip.text_facts(config, special), architectures=[ARCHITECTURE], torch_dtype="float32"
  )
