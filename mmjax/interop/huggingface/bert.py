"""BERT (model_type "bert"): the bare encoder, with a masked language head, or with a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = "BertTokenizer", "", "", "bert."
ARCHITECTURE, PAD = "BertModel", "[PAD]"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say

# What transformers assumes where config.json is silent.
FACTS = dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
             hidden_act="gelu", max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, is_decoder=False,
             add_cross_attention=False, tie_word_embeddings=True, position_embedding_type="absolute")


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**FACTS, **facts}
  single.only(facts, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
  masked = "cls.predictions.transform.dense.weight" in tensors
  if masked and not facts["tie_word_embeddings"]:
    raise UserError("tie_word_embeddings is false, but tokens are predicted through the embeddings here")
  entry = dict(kind="bert", width=facts["hidden_size"], depth=facts["num_hidden_layers"], heads=facts["num_attention_heads"],
               mlp=facts["intermediate_size"], types=facts["type_vocab_size"], activation=single.activation(facts),
               eps=facts["layer_norm_eps"], pooling="pooler" if "pooler.dense.weight" in tensors else "mean")
  return dict(model=single.model(tensors, dict(text=entry), facts["hidden_size"], masked_tokens=masked), image_size=None,
              text=dict(vocab_size=facts["vocab_size"], length=facts["max_position_embeddings"]))


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a BertModel and its heads, without the prefix that it has beside one."""
  text = config["model"]["encoders"]["text"]
  at, depth = "encoder.layer.{i}", text["depth"]
  head = [
    *mapping.linear("masked_head/dense", "cls.predictions.transform.dense"),
    *mapping.norm("masked_head/norm", "cls.predictions.transform.LayerNorm"),
    mapping.same("masked_head/bias", "cls.predictions.bias"),
  ]
  return [
    mapping.same("text/embedding", "embeddings.word_embeddings.weight"),
    mapping.same("text/position", "embeddings.position_embeddings.weight"),
    mapping.same("text/token_type", "embeddings.token_type_embeddings.weight"),
    *mapping.norm("text/input_norm", "embeddings.LayerNorm"),
    *mapping.self_attention("text/layers/attention", [f"{at}.attention.self.{x}" for x in ("query", "key", "value")],
                            f"{at}.attention.output.dense", text["heads"], depth),
    *mapping.norm("text/layers/attention_norm", f"{at}.attention.output.LayerNorm", depth),
    *mapping.linear("text/layers/mlp/up", f"{at}.intermediate.dense", depth),
    *mapping.linear("text/layers/mlp/down", f"{at}.output.dense", depth),
    *mapping.norm("text/layers/mlp_norm", f"{at}.output.LayerNorm", depth),
    *(mapping.linear("text/pooler", "pooler.dense") if text["pooling"] == "pooler" else ()),
    *(head if config["model"]["masked_tokens"] else ()),
    *single.classifier(config),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a BERT of transformers must have."""
  model = config["model"]
  poolings = ("pooler",) if model["classes"] else ("pooler", "mean", "class")
  return [("model.encoders.text.pooling", model["encoders"]["text"]["pooling"], poolings),
          ("model.classes", model["classes"], (0,) if model["masked_tokens"] else (model["classes"],))]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json. special: the tokenizer's pad_token_id, bos_token_id and eos_token_id."""
  model, data = config["model"], config["data"]
  text = model["encoders"]["text"]
  pooler = text["pooling"] == "pooler"
  name = "BertForSequenceClassification" if model["classes"] else ARCHITECTURE
  if model["masked_tokens"]:
    name = "BertForPreTraining" if pooler else "BertForMaskedLM"
  return dict(
      model_type="bert", architectures=[name], torch_dtype="float32", vocab_size=data["text"]["vocab_size"],
      hidden_size=text["width"], num_hidden_layers=text["depth"], num_attention_heads=text["heads"],
      intermediate_size=text["mlp"], hidden_act=single.activation_name(text["activation"]), layer_norm_eps=text["eps"],
      max_position_embeddings=text["max_positions"] or data["text"]["length"], type_vocab_size=text["types"], hidden_dropout_prob=text["dropout"],
      attention_probs_dropout_prob=0.0, tie_word_embeddings=True, pad_token_id=special.get("pad_token_id", 0), **single.labels(config))
