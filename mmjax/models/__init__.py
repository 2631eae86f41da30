"""Models: Flax linen modules, pure functions of (parameters, batch). `make_model(config)` builds
the one of a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from ml_collections import FrozenConfigDict

from mmjax.config import UserError, settings
from mmjax.kinds import kind_function

NESTED = ("fusion", "decoder")  # entries of config.model that name a kind of their own


def with_plain_kernels(config: FrozenConfigDict) -> FrozenConfigDict:
  """The config with the plain attention formula everywhere: it runs on every platform, and pads
  nothing.
  """

  def plain(entry: Any) -> Any:
    return (
      {k: "xla" if k == "kernel" else plain(v) for k, v in entry.items()}
      if isinstance(entry, dict)
      else entry
    )

  tree = config.to_dict()
  return FrozenConfigDict({**tree, "model": plain(tree["model"])})


def make_model(config: Mapping[str, Any]) -> nn.Module:
  """The model of a resolved config: the kind `config.model.name`, with the encoders of
  `config.model.encoders`.

  An encoder's or a decoder's kind function takes (data, precision, *, settings), a fusion's
  (modalities, data, precision, *, settings), a model's (encoders, data, precision, *, settings),
  with modules in the place of the entries `fusion` and `decoder`. An encoder, fusion, connector or
  decoder whose `width` is 0 gets the model's.
  """
  model, data, precision = config["model"], config["data"], config["precision"]

  def make(entry: Mapping[str, Any], group: str, path: str, *first: Any) -> nn.Module:
    chosen = settings(entry, group)
    if not chosen.get("width", 1):
      chosen["width"] = model.get("width", 512)
    try:
      return kind_function(entry, group)(*first, data, precision, **chosen)
    except UserError as error:
      raise UserError(f"model.{path}: {error}") from error

  encoders = {
    modality: make(entry, "encoder", f"encoders.{modality}")
    for modality, entry in model["encoders"].items()
  }
  connectors = {
    modality: make(entry, "connector", f"connectors.{modality}")
    for modality, entry in model.get("connectors", {}).items()
  }
  if not encoders and "connectors" not in model:
    raise UserError(
      "model.encoders is empty: name at least one encoder, such as image=dict(kind='vit')"
    )
  nested: dict[str, Any] = {
    name: make(model[name], name, name, *([tuple(encoders)] if name == "fusion" else []))
    for name in NESTED
    if model.get(name)
  }
  if "connectors" in model:
    nested["connectors"] = connectors
  chosen = settings(model, "model", without=("encoders",))
  return kind_function(model, "model")(encoders, data, precision, **{**chosen, **nested})
