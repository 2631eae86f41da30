"""MPNet (model_type "mpnet"): bare, with a masked language head, or with a classifier. Attention
has a bias of relative positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import bert, mapping, roberta, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = "MPNetTokenizer", "", "", "mpnet."
ARCHITECTURE, PAD = "MPNetModel", "<pad>"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say
BUCKETS, OFFSET = 32, 2  # transformers takes no others, whatever config.json says

# What transformers assumes where config.json is silent.
FACTS = dict(bert.FACTS, vocab_size=30527, relative_attention_num_buckets=BUCKETS)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**FACTS, **facts}
  single.only(facts, relative_attention_num_buckets=BUCKETS)
  entry = dict(
    bert.encoder_settings(facts),
    types=0,
    position_offset=OFFSET,
    relative_buckets=BUCKETS,
    pooling=roberta.pooling(tensors),
  )
  return dict(
    model=single.model(
      tensors, dict(text=entry), facts["hidden_size"], masked_tokens=roberta.masked(facts, tensors)
    ),
    image_size=None,
    text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"] - OFFSET),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of an MPNetModel and its heads, without the prefix that it has beside one."""
  text = config["model"]["encoders"]["text"]
  blocks = bert.block_rules(
    text,
    attention="attention.attn.",
    projections="qkv",
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
  )
  return [
    *bert.embedding_rules(text),
    mapping.same("text/relative", "encoder.relative_attention_bias.weight"),
    *blocks,
    *roberta.head_rules(config),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what an MPNet of transformers must have."""
  text, wanted = (
    config["model"]["encoders"]["text"],
    dict(types=0, position_offset=OFFSET, relative_buckets=BUCKETS),
  )
  return [
    *((f"model.encoders.text.{key}", text[key], (value,)) for key, value in wanted.items()),
    *roberta.head_refusals(config),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json. special: the tokenizer's pad_token_id, bos_token_id and eos_token_id."""
  shared = {
    name: value
    for name, value in bert.encoder_facts(config, special).items()
    if name != "type_vocab_size"
  }
  return dict(
    shared,
    model_type="mpnet",
    architectures=[roberta.head_name(config, "MPNet")],
    relative_attention_num_buckets=BUCKETS,
    **{**special, "pad_token_id": 1},
  )
