"""Values: numbers that a model reads off one modality or several fused ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.objectives import Forward, Losses, objective
from mmjax.objectives.classification import rows_of
from mmjax.ranges import Finite, Positive

Array = jax.Array


def standardise(settings: Mapping[str, Any], statistics: Any, data: Mapping[str, Any]) -> dict:
  """`mean` and `std` of each value over the training data, where a config leaves them out.
  statistics: None = 0 and 1, to plan with.
  """
  if settings["mean"] and settings["std"]:
    return {}
  if statistics is None:
    mean, std = (0.0,) * data["values"], (1.0,) * data["values"]
  else:
    mean, std = statistics.values()
  return dict(mean=settings["mean"] or mean, std=settings["std"] or std)


@objective(couples_examples=False, fit=standardise, methods=("regress",))
def regression(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  modalities: tuple[str, ...] = ("image",),
  loss: Literal["l2", "l1", "huber"] = "l2",
  delta: Positive = 1.0,
  mean: tuple[Finite, ...] = (),
  std: tuple[Positive, ...] = (),
) -> Losses:
  """The model's values of the modalities against batch["value"] float32 [B, K], NaN = none.

  The model learns (value - mean) / std, and everything that predicts gives value again.
  modalities: what the values are read off. loss: of the standardised error d, "l2": d^2, "l1": |d|,
  "huber": d^2 / 2 up to `delta` and delta (|d| - delta / 2) beyond it (Huber 1964). delta: in
  standard deviations.
  mean, std: of each value; () = those of the training data, which the start of a run fills in.
  Rows with `valid` False, or without any of the modalities, do not count; of the rest each value
  that is there counts.
  Returns "mae": the mean absolute error in the values' own units.
  """
  modalities = tuple(modalities)
  given = batch["value"].astype(jnp.float32)
  if not mean or not std:
    raise UserError("mean and std of the values are known only from the training data of a run")
  if len(mean) != given.shape[1] or len(std) != given.shape[1]:
    raise UserError(
      f"mean and std have {len(mean)} and {len(std)} numbers, but a row has {given.shape[1]} values"
    )
  counts = rows_of(batch, modalities)[:, None] & jnp.isfinite(given)
  scale = jnp.asarray(std, jnp.float32)
  target = (jnp.where(counts, given, 0) - jnp.asarray(mean, jnp.float32)) / scale
  error = jnp.where(counts, forward("regress", modalities).astype(jnp.float32) - target, 0)
  size = jnp.abs(error)
  if loss == "l2":
    each = jnp.square(error)
  elif loss == "l1":
    each = size
  else:
    each = jnp.where(size <= delta, 0.5 * jnp.square(error), delta * (size - 0.5 * delta))
  count = counts.sum(dtype=jnp.float32)
  return {"loss": (each.sum(), count), "mae": ((size * scale).sum(), count)}
