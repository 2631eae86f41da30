"""Qwen2 and Qwen2.5 (model_type "qwen2", Yang et al. 2024, arXiv:2407.10671): Llama's weights with
biases of queries, keys and values, and windows in the upper layers where asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import decoders
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.llama import rules as rules

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "Qwen2Tokenizer", "", "model."
ARCHITECTURE, PAD, MASK_PADDING = "Qwen2ForCausalLM", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "Qwen2Model"),)
BESIDE = ("config.json", decoders.GENERATION)

# What transformers assumes where config.json is silent.
FACTS = dict(
  decoders.FACTS,
  vocab_size=151_936,
  hidden_size=4096,
  intermediate_size=22_016,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=32,
  use_sliding_window=False,
  sliding_window=4096,
  max_window_layers=28,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  block = dict(qkv_bias=True, out_bias=False, mlp_bias=False, windows=windows(f))
  return decoders.rotary_settings(f, tensors, block=block)


def windows(f: Mapping[str, Any]) -> tuple[int, ...]:
  """The windows of the layers: none without use_sliding_window, whatever else is stated."""
  if not f["use_sliding_window"]:
    f = dict(f, sliding_window=0)
  return decoders.windows(f, lambda i: i >= f["max_window_layers"])


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Qwen2ForCausalLM."""
  return dict(
    model_type="qwen2",
    architectures=[ARCHITECTURE],
    **decoders.facts(config, special),
    **rotary_and_windows(config),
  )


def rotary_and_windows(config: Mapping[str, Any]) -> dict[str, Any]:
  """The keys of config.json for positions and windows."""
  b = decoders.block_of(config)
  found = decoders.window_facts(b)
  return dict(**decoders.rotary_facts(b), use_sliding_window=any(b.windows), **found)
