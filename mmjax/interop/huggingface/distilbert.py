"""DistilBERT (model_type "distilbert", Sanh et al. 2019, arXiv:1910.01108): bare, with a masked
language head, or with a classifier.

A classifier's own dense layer is the pooler here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import bert, mapping, roberta, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "BertTokenizer",
  "",
  "",
  "distilbert.",
)
ARCHITECTURE, PAD = "DistilBertModel", "[PAD]"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say
EPS = 1e-12  # config.json does not say

# What transformers assumes where config.json is silent.
FACTS = dict(
  vocab_size=30522,
  dim=768,
  n_layers=6,
  n_heads=12,
  hidden_dim=3072,
  activation="gelu",
  max_position_embeddings=512,
  tie_word_embeddings=True,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**FACTS, **facts}
  masked, pooler = "vocab_transform.weight" in tensors, "pre_classifier.weight" in tensors
  if "classifier.weight" in tensors and not pooler:
    raise UserError(
      "the file classifies each token, but only classifiers of whole texts are supported"
    )
  if masked:
    single.tied(facts, tensors, {"vocab_projector.weight": "embeddings.word_embeddings.weight"})
  entry = dict(
    kind="bert",
    width=facts["dim"],
    depth=facts["n_layers"],
    heads=facts["n_heads"],
    mlp=facts["hidden_dim"],
    types=0,
    eps=EPS,
    activation=single.activation(dict(hidden_act=facts["activation"])),
    pooling="pooler" if pooler else "mean",
    pooler_activation="relu",
  )
  return dict(
    model=single.model(tensors, dict(text=entry), facts["dim"], masked_tokens=masked),
    image_size=None,
    text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"]),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a DistilBertModel and its heads, without the prefix that it has beside one."""
  model, text = config["model"], config["model"]["encoders"]["text"]
  blocks = bert.block_rules(
    text,
    at="transformer.layer.{i}",
    attention="attention.",
    projections=("q_lin", "k_lin", "v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
  )
  pooler = mapping.linear("text/pooler", "pre_classifier") if text["pooling"] == "pooler" else []
  head = (
    bert.masked_head_rules("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
    if model["masked_tokens"]
    else []
  )
  return [*bert.embedding_rules(text), *blocks, *pooler, *head, *single.classifier(config)]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a DistilBERT of transformers must have."""
  model, text = config["model"], config["model"]["encoders"]["text"]
  wanted = dict(types=0, position_offset=0, relative_buckets=0, eps=EPS)
  return [
    *((f"model.encoders.text.{key}", text[key], (value,)) for key, value in wanted.items()),
    (
      "model.encoders.text.pooling",
      text["pooling"],
      ("pooler",) if model["classes"] else ("mean", "class"),
    ),
    (
      "model.encoders.text.pooler_activation",
      text["pooler_activation"],
      ("relu",) if model["classes"] else ("relu", "tanh"),
    ),
    *bert.head_refusals(config),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json. special: the tokenizer's pad_token_id, bos_token_id and eos_token_id."""
  text, data = config["model"]["encoders"]["text"], config["data"]["text"]
  return dict(
    model_type="distilbert",
    architectures=[roberta.head_name(config, "DistilBert")],
    torch_dtype="float32",
    vocab_size=data["vocab_size"],
    dim=text["width"],
    n_layers=text["depth"],
    n_heads=text["heads"],
    hidden_dim=text["mlp"],
    max_position_embeddings=text["max_positions"] or data["length"],
    activation=single.activation_name(text["activation"]),
    dropout=text["dropout"],
    attention_dropout=0.0,
    tie_word_embeddings=True,
    pad_token_id=special.get("pad_token_id", 0),
    **single.labels(config),
  )
