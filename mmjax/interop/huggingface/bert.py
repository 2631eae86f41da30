"""BERT (model_type "bert"): the bare encoder, with a masked language head, or with a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = "BertTokenizer", "", "", "bert."
ARCHITECTURE, PAD = "BertModel", "[PAD]"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say

# What transformers assumes where config.json is silent.
FACTS = dict(
  vocab_size=30522,
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
  hidden_act="gelu",
  max_position_embeddings=512,
  type_vocab_size=2,
  layer_norm_eps=1e-12,
  is_decoder=False,
  add_cross_attention=False,
  tie_word_embeddings=True,
  position_embedding_type="absolute",
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**FACTS, **facts}
  single.only(
    facts, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute"
  )
  masked = "cls.predictions.transform.dense.weight" in tensors
  if masked and not facts["tie_word_embeddings"]:
    raise UserError(
      "tie_word_embeddings is false, but tokens are predicted through the embeddings here"
    )
  entry = dict(
    encoder_settings(facts),
    types=facts["type_vocab_size"],
    pooling="pooler" if "pooler.dense.weight" in tensors else "mean",
  )
  next_sentence = [name for name in tensors if name.startswith("cls.seq_relationship.")]
  note = (
    "the head that tells whether a text follows another (cls.seq_relationship) is left out: there "
    "is no such head here"
  )
  return dict(
    model=single.model(tensors, dict(text=entry), facts["hidden_size"], masked_tokens=masked),
    image_size=None,
    text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"]),
    left_out=next_sentence,
    notes=[note] if next_sentence else [],
  )


def encoder_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
  """The entry of model.encoders.text of a config.json with BERT's names, but for token types and
  pooling.
  """
  return dict(
    kind="bert",
    width=facts["hidden_size"],
    depth=facts["num_hidden_layers"],
    heads=facts["num_attention_heads"],
    mlp=facts["intermediate_size"],
    activation=single.activation(facts),
    eps=facts["layer_norm_eps"],
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a BertModel and its heads, without the prefix that it has beside one."""
  text = config["model"]["encoders"]["text"]
  head = masked_head_rules(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
  )
  return [
    *embedding_rules(text),
    *block_rules(text),
    *(mapping.linear("text/pooler", "pooler.dense") if text["pooling"] == "pooler" else ()),
    *(head if config["model"]["masked_tokens"] else ()),
    *single.classifier(config),
  ]


def embedding_rules(text: Mapping[str, Any]) -> list[Rule]:
  """The weights before the blocks, of every model with BERT's embeddings."""
  types = mapping.same("text/token_type", "embeddings.token_type_embeddings.weight")
  return [
    mapping.same("text/embedding", "embeddings.word_embeddings.weight"),
    mapping.same("text/position", "embeddings.position_embeddings.weight"),
    *([types] if text["types"] else ()),
    *mapping.norm("text/input_norm", "embeddings.LayerNorm"),
  ]


def block_rules(
  text: Mapping[str, Any],
  *,
  at: str = "encoder.layer.{i}",
  attention: str = "attention.self.",
  out: str = "attention.output.dense",
  projections: Sequence[str] = ("query", "key", "value"),
  attention_norm: str = "attention.output.LayerNorm",
  up: str = "intermediate.dense",
  down: str = "output.dense",
  mlp_norm: str = "output.LayerNorm",
) -> list[Rule]:
  """The weights of the blocks; the names are BERT's unless they are given."""
  depth = text["depth"]
  return [
    *mapping.self_attention(
      "text/layers/attention",
      [f"{at}.{attention}{x}" for x in projections],
      f"{at}.{out}",
      text["heads"],
      depth,
    ),
    *mapping.norm("text/layers/attention_norm", f"{at}.{attention_norm}", depth),
    *mapping.linear("text/layers/mlp/up", f"{at}.{up}", depth),
    *mapping.linear("text/layers/mlp/down", f"{at}.{down}", depth),
    *mapping.norm("text/layers/mlp_norm", f"{at}.{mlp_norm}", depth),
  ]


def masked_head_rules(dense: str, norm: str, bias: str) -> list[Rule]:
  """The weights of a head that predicts masked tokens through the table of embeddings."""
  return [
    *mapping.linear("masked_head/dense", dense),
    *mapping.norm("masked_head/norm", norm),
    mapping.same("masked_head/bias", bias),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a BERT of transformers must have."""
  model = config["model"]
  poolings = ("pooler",) if model["classes"] else ("pooler", "mean", "class")
  text = model["encoders"]["text"]
  wanted = dict(pooler_activation="tanh", position_offset=0, relative_buckets=0)
  return [
    ("model.encoders.text.pooling", text["pooling"], poolings),
    ("model.encoders.text.types", text["types"] > 0, (True,)),
    *((f"model.encoders.text.{key}", text[key], (value,)) for key, value in wanted.items()),
    *head_refusals(config),
  ]


def head_refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What the heads of every model like BERT must be: one at most, on the encoder itself."""
  model = config["model"]
  return [
    ("model.classes", model["classes"], (0,) if model["masked_tokens"] else (model["classes"],)),
    ("model.projection", model["projection"], (False,)),
    ("model.classifier_norm", model["classifier_norm"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json. special: the tokenizer's pad_token_id, bos_token_id and eos_token_id."""
  model = config["model"]
  pooler = model["encoders"]["text"]["pooling"] == "pooler"
  name = "BertForSequenceClassification" if model["classes"] else ARCHITECTURE
  if model["masked_tokens"]:
    name = "BertForPreTraining" if pooler else "BertForMaskedLM"
  return dict(model_type="bert", architectures=[name], **encoder_facts(config, special))


def encoder_facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """What stands in the config.json of every model with BERT's names."""
  text, data = config["model"]["encoders"]["text"], config["data"]["text"]
  return dict(
    torch_dtype="float32",
    vocab_size=data["vocab_size"],
    hidden_size=text["width"],
    num_hidden_layers=text["depth"],
    num_attention_heads=text["heads"],
    intermediate_size=text["mlp"],
    hidden_act=single.activation_name(text["activation"]),
    layer_norm_eps=text["eps"],
    max_position_embeddings=text["position_offset"] + (text["max_positions"] or data["length"]),
    type_vocab_size=text["types"],
    hidden_dropout_prob=text["dropout"],
    attention_probs_dropout_prob=0.0,
    tie_word_embeddings=True,
    pad_token_id=special.get("pad_token_id", 0),
    **single.labels(config),
  )
