"""What all models of encoders share: the encoders as their parts, and what they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mmjax.config import UserError
from mmjax.models.layers import Encoded


def adopt(model: nn.Module, encoders: Mapping[str, nn.Module], **given: Any) -> None:
  """Makes encoders parts of a model, in its `setup`; `given`: fields that they then have. The
  parameters of "image" are image/..., not encoders_image/...
  """
  for modality, encoder in encoders.items():
    setattr(model, modality, unbound(encoder, **given))


def unbound(module: nn.Module, **given: Any) -> nn.Module:
  """A copy that belongs to no model yet, and so do the modules among its fields: else these would
  stay parts of what holds the original. `given`: fields that it then has.
  """
  fields = {field.name: getattr(module, field.name, None) for field in dataclasses.fields(module)}
  own: dict[str, Any] = {
    name: unbound(value)
    for name, value in fields.items()
    if isinstance(value, nn.Module) and name not in {"parent", *given}
  }
  return module.clone(parent=None, **own, **given)


def encode(model: nn.Module, modality: str, batch: Mapping[str, Any], train: bool) -> Encoded:
  """What the encoder of a modality makes of it. Raises UserError: the model has none."""
  encoders: Mapping[str, nn.Module] = model.encoders
  if modality not in encoders:
    raise UserError(
      f"the model has no encoder for {modality!r}; it has {', '.join(sorted(encoders))}"
    )
  return getattr(model, modality)(batch[modality], train=train)


def check_encoders(key: str, modalities: tuple, encoders: Mapping[str, nn.Module]) -> None:
  """Raises UserError: model.KEY names a modality without an encoder."""
  for modality in modalities:
    if modality not in encoders:
      raise UserError(
        f"model.{key} names {modality!r}, but model.encoders has {', '.join(sorted(encoders))}"
      )
