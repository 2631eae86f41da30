"""Qwen3, dense (model_type "qwen3", Yang et al. 2025, arXiv:2505.09388): Qwen2's without its
biases, with norms of each head's queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import decoders, qwen2
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.llama import rules as rules

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "Qwen2Tokenizer", "", "model."
ARCHITECTURE, PAD, MASK_PADDING = "Qwen3ForCausalLM", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "Qwen3Model"),)
BESIDE = ("config.json", decoders.GENERATION)

FACTS = dict(qwen2.FACTS, head_dim=128, attention_bias=False)  # where config.json is silent


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  bias = f["attention_bias"]
  block = dict(qk_norm=True, qkv_bias=bias, out_bias=bias, mlp_bias=False, windows=qwen2.windows(f))
  return decoders.rotary_settings(f, tensors, block=block)


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Qwen3ForCausalLM."""
  return dict(
    model_type="qwen3",
    architectures=[ARCHITECTURE],
    **decoders.facts(config, special),
    **qwen2.rotary_and_windows(config),
    attention_bias=decoders.block_of(config).has_bias("qkv"),
  )
