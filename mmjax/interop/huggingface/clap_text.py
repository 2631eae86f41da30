"""CLAP's tower of texts (model_type "clap_text_model"): a RoBERTa with its pooler, and a projection
of two layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import bert, mapping, roberta, single
from mmjax.interop.huggingface.clip import ACTIVATIONS
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = (
  "RobertaTokenizer",
  "",
  "",
  "text_model.",
)
ARCHITECTURE, PAD = "ClapTextModelWithProjection", "<pad>"
MASK_PADDING = True  # what the tokenizer does where tokenizer_config.json does not say

# What transformers assumes where config.json is silent.
PROJECTION = dict(projection_dim=512, projection_hidden_act="relu")
TEXT = dict(roberta.FACTS, max_position_embeddings=514, type_vocab_size=1, **PROJECTION)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "text": settings of data.text} of a config.json."""
  facts = {**TEXT, **facts}
  entry, text = text_settings(facts)
  model = single.projected(
    tensors,
    "text_projection.linear2.weight",
    dict(text=entry),
    facts["hidden_size"],
    **projection_settings(facts),
  )
  return dict(model=model, image_size=None, text=text)


def text_settings(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
  """(the entry of model.encoders.text, settings of data.text) of a text_config that is filled
  in.
  """
  offset = facts["pad_token_id"] + 1
  entry = dict(
    bert.encoder_settings(facts),
    types=facts["type_vocab_size"],
    position_offset=offset,
    pooling="pooler",
  )
  length = facts["max_position_embeddings"] - offset
  return entry, dict(vocab_size=facts["vocab_size"], length=length)


def projection_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of `model`. Raises UserError: a function between the layers that is not here."""
  function = facts["projection_hidden_act"]
  if function not in ACTIVATIONS:
    raise UserError(
      f"projection_hidden_act {function!r} is not supported; there are: {', '.join(ACTIVATIONS)}"
    )
  return dict(projection_bias=True, projection_function=ACTIVATIONS[function])


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ClapTextModel and its projection, without the prefix that it has beside
  one.
  """
  projects = config["model"]["projection"]
  return [
    *text_rules(config["model"]["encoders"]["text"]),
    *(mapping.two_layers("projection", "text_projection") if projects else ()),
  ]


def text_rules(text: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ClapTextModel."""
  return [
    *bert.embedding_rules(text),
    *bert.block_rules(text),
    *mapping.linear("text/pooler", "pooler.dense"),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a ClapTextModelWithProjection must have; one without
  a projection is a RobertaModel.
  """
  return [
    ("model.projection", config["model"]["projection"], (True,)),
    *text_refusals(config["model"]["encoders"]["text"]),
    *single.headless(config, projection_bias=True, functions=tuple(ACTIVATIONS.values())),
  ]


def text_refusals(text: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What the tower itself must have."""
  wanted = dict(pooling="pooler", pooler_activation="tanh", relative_buckets=0)
  return [
    ("model.encoders.text.position_offset", text["position_offset"] > 0, (True,)),
    ("model.encoders.text.types", text["types"] > 0, (True,)),
    *((f"model.encoders.text.{key}", text[key], (value,)) for key, value in wanted.items()),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a ClapTextModelWithProjection. special: the tokenizer's pad_token_id,
  bos_token_id and eos_token_id; positions are counted from the first.
  """
  pad = config["model"]["encoders"]["text"]["position_offset"] - 1
  return dict(
    bert.encoder_facts(config, special),
    model_type="clap_text_model",
    architectures=[ARCHITECTURE],
    **projection_facts(config),
    **{**special, "pad_token_id": pad},
  )


def projection_facts(config: Mapping[str, Any]) -> dict[str, Any]:
  """What config.json says of the projections."""
  function = config["model"]["projection_function"]
  projects = function != "none"
  return dict(
    projection_dim=config["model"]["width"],
    projection_hidden_act=single.activation_name(function) if projects else "relu",
  )


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """{name: tensor} of what transformers keeps in the file beside the weights."""
  text = config["model"]["encoders"]["text"]
  positions = text["position_offset"] + (text["max_positions"] or config["data"]["text"]["length"])
  return {
    "embeddings.position_ids": np.arange(positions)[None],
    "embeddings.token_type_ids": np.zeros((1, positions), np.int64),
  }
