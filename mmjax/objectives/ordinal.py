"""Classes that have an order, such as grades: a mistake costs the more the farther it is off."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, is_highest, objective
from mmjax.objectives.classification import ClassWeights, balance, rows_of, weights_of

Array = jax.Array


@objective(couples_examples=False, fit=balance, methods=("classify",))
def ordinal(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  modalities: tuple[str, ...] = ("image",),
  loss: Literal["coral", "likelihood"] = "coral",
  class_weights: ClassWeights = (),
) -> Losses:
  """Losses of batch["label"] int32 [B] (-1 = none), whose numbers are ranks (data.class_names says
  their order). With model.ordinal the classifier is a cumulative link model, one score a row
  against ascending thresholds; any other classifier may be trained with it too.

  modalities: what is classified. class_weights: as of "classification".
  loss: "coral": the sum over the thresholds k of the binary cross-entropy of "the label is above
  k", in nats (Cao, Mirjalili and Raschka 2020, arXiv:1901.07884, equation 4); "likelihood": -log of
  the label's probability, which fits the cumulative link model (McCullagh 1980).
  Rows with `valid` False, or without any of the modalities, do not count.
  Returns "accuracy", and "mae": by how many ranks the likeliest class is off.
  """
  modalities = tuple(modalities)
  logits = forward("classify", modalities).astype(jnp.float32)
  label = jnp.maximum(batch["label"], 0)
  counts = rows_of(batch, modalities) & (batch["label"] >= 0)
  log_shares = jax.nn.log_softmax(logits, axis=-1)
  if loss == "coral":
    numbers = jnp.arange(logits.shape[1])
    thresholds = numbers[:-1, None]
    is_above = label[:, None, None] > thresholds  # [B, classes - 1, 1]
    same_side = is_above == (numbers > thresholds)  # [B, classes - 1, classes]
    each = -jax.nn.logsumexp(jnp.where(same_side, log_shares[:, None], -jnp.inf), axis=-1).sum(-1)
  else:
    each = -jnp.take_along_axis(log_shares, label[:, None], axis=1)[:, 0]
  weight = jnp.where(counts, weights_of(class_weights, logits.shape[1])[label], 0)
  off = jnp.abs(jnp.argmax(logits, axis=1) - label)
  count = counts.sum(dtype=jnp.float32)
  return {
    "loss": ((weight * each).sum(), weight.sum()),
    "accuracy": ((counts & is_highest(logits, label)).sum(dtype=jnp.float32), count),
    "mae": (jnp.where(counts, off, 0).sum(dtype=jnp.float32), count),
  }
