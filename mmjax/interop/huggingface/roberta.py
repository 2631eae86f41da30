"""RoBERTa and XLM-R (model_type "roberta" or "xlm-roberta", one architecture): bare, with a masked
language head, or with a classifier.

Both are written as "roberta". A classifier's own dense layer is the pooler here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import bert, mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "RobertaTokenizer",
  "",
  "",
  "roberta.",
)
ARCHITECTURE, PAD = "RobertaModel", "<pad>"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say

# What transformers assumes where config.json is silent.
FACTS = dict(bert.FACTS, vocab_size=50265, pad_token_id=1)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**FACTS, **facts}
  single.only(
    facts, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute"
  )
  offset = facts["pad_token_id"] + 1
  entry = dict(
    bert.encoder_settings(facts),
    types=facts["type_vocab_size"],
    position_offset=offset,
    pooling=pooling(tensors),
  )
  return dict(
    model=single.model(
      tensors, dict(text=entry), facts["hidden_size"], masked_tokens=masked(facts, tensors)
    ),
    image_size=None,
    text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"] - offset),
  )


def pooling(tensors: Mapping[str, np.ndarray]) -> str:
  """How a file's encoder is pooled. Raises UserError: the file classifies tokens."""
  if "classifier.weight" in tensors:
    raise UserError(
      "the file classifies each token, but only classifiers of whole texts are supported"
    )
  return (
    "pooler" if "pooler.dense.weight" in tensors or "classifier.dense.weight" in tensors else "mean"
  )


def masked(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether a file predicts masked tokens. Raises UserError: not through the embeddings, or not
  with GELU.
  """
  found = "lm_head.dense.weight" in tensors
  if found:
    single.only(facts, hidden_act="gelu")
    single.tied(
      facts,
      tensors,
      {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
      },
    )
  return found


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a RobertaModel and its heads, without the prefix that it has beside one."""
  return [
    *bert.embedding_rules(config["model"]["encoders"]["text"]),
    *bert.block_rules(config["model"]["encoders"]["text"]),
    *head_rules(config),
  ]


def head_rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of the pooler and the heads."""
  model = config["model"]
  if model["classes"]:
    return [
      *mapping.linear("text/pooler", "classifier.dense"),
      *single.classifier(config, "classifier.out_proj"),
    ]
  pooler = (
    mapping.linear("text/pooler", "pooler.dense")
    if model["encoders"]["text"]["pooling"] == "pooler"
    else []
  )
  return [
    *pooler,
    *(
      bert.masked_head_rules("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
      if model["masked_tokens"]
      else ()
    ),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a RoBERTa of transformers must have."""
  text = config["model"]["encoders"]["text"]
  return [
    ("model.encoders.text.position_offset", text["position_offset"] > 0, (True,)),
    ("model.encoders.text.types", text["types"] > 0, (True,)),
    ("model.encoders.text.relative_buckets", text["relative_buckets"], (0,)),
    *head_refusals(config),
  ]


def head_refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What pooler and heads must be."""
  model, text = config["model"], config["model"]["encoders"]["text"]
  poolings = (
    ("pooler",)
    if model["classes"]
    else ("mean", "class")
    if model["masked_tokens"]
    else ("pooler", "mean", "class")
  )
  return [
    ("model.encoders.text.pooling", text["pooling"], poolings),
    ("model.encoders.text.pooler_activation", text["pooler_activation"], ("tanh",)),
    (
      "model.encoders.text.activation",
      text["activation"],
      ("gelu",) if model["masked_tokens"] else (text["activation"],),
    ),
    *bert.head_refusals(config),
  ]


def head_name(config: Mapping[str, Any], name: str) -> str:
  """The class of transformers that has these heads, for a `name` such as "Roberta"."""
  model = config["model"]
  return name + (
    "ForMaskedLM"
    if model["masked_tokens"]
    else "ForSequenceClassification"
    if model["classes"]
    else "Model"
  )


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json. special: the tokenizer's pad_token_id, bos_token_id and eos_token_id;
  positions are counted from the first.
  """
  pad = config["model"]["encoders"]["text"]["position_offset"] - 1
  return dict(
    bert.encoder_facts(config, special),
    model_type="roberta",
    architectures=[head_name(config, "Roberta")],
    **{**special, "pad_token_id": pad},
  )
