"""Gemma 2 (model_type "gemma2", arXiv:2408.00118): norms before and after each part, whose scale is
1 + weight, capped logits, and a window in every other layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import decoders, single
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models import make_model

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "GemmaTokenizer", "", "model."
ARCHITECTURE, PAD, MASK_PADDING = "Gemma2ForCausalLM", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "Gemma2Model"),)
BESIDE = ("config.json", decoders.GENERATION)

# What transformers assumes where config.json is silent.
FACTS = dict(
  decoders.FACTS,
  vocab_size=256_000,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  hidden_activation="gelu_pytorch_tanh",
  max_position_embeddings=8192,
  tie_word_embeddings=True,
  attention_bias=False,
  query_pre_attn_scalar=256,
  sliding_window=4096,
  final_logit_softcapping=30.0,
  attn_logit_softcapping=50.0,
  use_bidirectional_attention=None,
  pad_token_id=0,
  eos_token_id=1,
  bos_token_id=2,
)
NORMS = dict(
  attention_norm="input_layernorm",
  attention_post_norm="post_attention_layernorm",
  mlp_norm="pre_feedforward_layernorm",
  mlp_post_norm="post_feedforward_layernorm",
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  windows = decoders.windows(f, lambda i: i % 2 == 0)
  return gemma(f, tensors, windows=windows, soft_cap=f["attn_logit_softcapping"] or 0.0)


def gemma(f: Mapping[str, Any], tensors: Mapping[str, np.ndarray], **block: Any) -> dict[str, Any]:
  """The settings of a Gemma 2 or 3, with those of its blocks that only one of them has."""
  if f["use_bidirectional_attention"]:
    single.only(f, use_bidirectional_attention=False)
  bias = f["attention_bias"]
  own = dict(norm="both", scale=f["query_pre_attn_scalar"] ** -0.5, qkv_bias=bias, out_bias=bias)
  return decoders.rotary_settings(
    f,
    tensors,
    block={**own, **block},
    act="hidden_activation",
    embedding_factor=math.sqrt(f["hidden_size"]),
    logit_cap=f["final_logit_softcapping"] or 0.0,
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  return decoders.rules(config, NORMS, plus=1.0)


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Gemma2ForCausalLM."""
  b = decoders.block_of(config)
  return dict(
    model_type="gemma2",
    architectures=[ARCHITECTURE],
    **gemma_facts(config, special),
    **decoders.rotary_facts(b),
    attn_logit_softcapping=b.soft_cap or None,
  )


def gemma_facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The keys of config.json of Gemma 2 and 3."""
  model = make_model(config)
  b = model.config
  return dict(
    **decoders.facts(config, special, act="hidden_activation"),
    **decoders.window_facts(b),
    attention_bias=b.has_bias("qkv"),
    query_pre_attn_scalar=round((b.scale or b.channels**-0.5) ** -2),
    final_logit_softcapping=model.logit_cap or None,
  )
