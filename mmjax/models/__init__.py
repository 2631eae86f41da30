"""Models: Flax linen modules, pure functions of (parameters, batch). `make_model(config)` builds the one of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mmjax.config import UserError, kind_function, settings


def make_model(config: Mapping[str, Any]) -> nn.Module:
  """The model of a resolved config: the kind `config.model.name`, with the encoders of `config.model.encoders`.

  An encoder's kind function takes (data, precision, *, settings); a model's takes (encoders, data, precision, *, settings).
  An encoder whose `width` is 0 gets the model's.
  """
  encoders = {}
  for modality, entry in config["model"]["encoders"].items():
    chosen = settings(entry)
    if not chosen.get("width", 1):
      chosen["width"] = config["model"].get("width", 512)
    try:
      encoders[modality] = kind_function(entry, "encoder")(config["data"], config["precision"], **chosen)
    except UserError as error:
      raise UserError(f"model.encoders.{modality}: {error}") from error
  if not encoders:
    raise UserError("model.encoders is empty: name at least one encoder, such as image=dict(kind='vit')")
  model = config["model"]
  return kind_function(model, "model")(encoders, config["data"], config["precision"], **settings(model, without=("encoders",)))
