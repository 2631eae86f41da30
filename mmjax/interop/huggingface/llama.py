"""Llama 1 to 3 (model_type "llama", Touvron et al. 2023, arXiv:2302.13971)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import decoders
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "PreTrainedTokenizerFast", "", "model."
ARCHITECTURE, PAD, MASK_PADDING = "LlamaForCausalLM", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "LlamaModel"),)
BESIDE = ("config.json", decoders.GENERATION)

# What transformers assumes where config.json is silent.
FACTS = dict(
  decoders.FACTS,
  vocab_size=32_000,
  hidden_size=4096,
  intermediate_size=11_008,
  num_hidden_layers=32,
  num_attention_heads=32,
  max_position_embeddings=2048,
  attention_bias=False,
  mlp_bias=False,
  bos_token_id=1,
  eos_token_id=2,
)
NORMS = dict(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  block = dict(qkv_bias=f["attention_bias"], out_bias=f["attention_bias"], mlp_bias=f["mlp_bias"])
  return decoders.rotary_settings(f, tensors, block=block)


def rules(config: Mapping[str, Any]) -> list[Rule]:
  return decoders.rules(config, NORMS)


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a LlamaForCausalLM."""
  b = decoders.block_of(config)
  return dict(
    model_type="llama",
    architectures=[ARCHITECTURE],
    **decoders.facts(config, special),
    **decoders.rotary_facts(b),
    attention_bias=b.has_bias("qkv"),
    mlp_bias=b.has_bias("mlp"),
  )
