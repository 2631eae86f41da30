"""Gemma 3 without pictures (model_type "gemma3_text", arXiv:2503.19786): Gemma 2's with norms of
each head's queries and keys, no cap in attention, and other positions in layers with a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import decoders, gemma2, single
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.gemma2 import rules as rules
from mmjax.models.positions import Rotary

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "GemmaTokenizer", "", "model."
ARCHITECTURE, PAD, MASK_PADDING = "Gemma3ForCausalLM", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "Gemma3Model"),)
BESIDE = ("config.json", decoders.GENERATION)

# What transformers assumes where config.json is silent.
FACTS = dict(
  gemma2.FACTS,
  vocab_size=262_208,
  max_position_embeddings=131_072,
  final_logit_softcapping=None,
  attn_logit_softcapping=None,
  sliding_window_pattern=6,
  rope_theta=1_000_000.0,
  rope_local_base_freq=10_000.0,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  single.only(f, attn_logit_softcapping=None)
  every = f["sliding_window_pattern"]
  return gemma2.gemma(
    f,
    tensors,
    qk_norm=True,
    windows=decoders.windows(f, lambda i: (i + 1) % every > 0),
    rotary=decoders.rotary(f, "full_attention"),
    local_rotary=decoders.rotary(
      dict(f, rope_scaling=None), "sliding_attention", f["rope_local_base_freq"]
    ),
  )


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Gemma3ForCausalLM."""
  b = decoders.block_of(config)
  everywhere = b.rotary or Rotary()
  return dict(
    model_type="gemma3_text",
    architectures=[ARCHITECTURE],
    **gemma2.gemma_facts(config, special),
    attn_logit_softcapping=None,
    rope_parameters=dict(
      full_attention=decoders.rope_facts(everywhere),
      sliding_attention=decoders.rope_facts(b.local_rotary or everywhere),
    ),
  )
