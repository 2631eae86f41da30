"""Mistral (model_type "mistral", Jiang et al. 2023, arXiv:2310.06825): Llama's weights, without
biases, and a window in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import decoders, llama
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.llama import rules as rules

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "PreTrainedTokenizerFast", "", "model."
ARCHITECTURE, PAD, MASK_PADDING = "MistralForCausalLM", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "MistralModel"),)
BESIDE = ("config.json", decoders.GENERATION)

# What transformers assumes where config.json is silent.
FACTS = dict(
  llama.FACTS,
  intermediate_size=14_336,
  num_key_value_heads=8,
  max_position_embeddings=131_072,
  sliding_window=4096,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  if len(set(f.get("layer_types") or ())) > 1:
    raise UserError(
      "layer_types has layers of several types, which transformers passes over in a model of this "
      "model_type. Name the model_type that it has (ministral)"
    )
  block = dict(windows=decoders.windows(dict(f, layer_types=None), lambda i: True))
  return decoders.rotary_settings(f, tensors, block=block)


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a MistralForCausalLM."""
  b = decoders.block_of(config)
  return dict(
    model_type="mistral",
    architectures=[ARCHITECTURE],
    **decoders.facts(config, special),
    **decoders.rotary_facts(b),
    sliding_window=decoders.window_facts(b)["sliding_window"],
  )
