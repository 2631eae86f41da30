"""Classes: of one modality or of several that a model fuses (visual question answering with a
closed set of answers too).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.objectives import Forward, Losses, example_mask, is_highest, objective
from mmjax.ranges import Dropout, NonNegative

Array = jax.Array
ClassWeights = tuple[float, ...] | Literal["balanced"]


def balance(settings: Mapping[str, Any], statistics: Any, data: Mapping[str, Any]) -> dict:
  """The class weights that "balanced" stands for, by the counts of the training data: rows /
  (classes * rows of the class), or, where a row may have several labels, rows without the label /
  rows with it. A class that no row has gets 1. statistics: None = weights of 1, to plan with.
  """
  if settings["class_weights"] != "balanced":
    return {}
  if statistics is None:
    return dict(class_weights=(1.0,) * data["classes"])
  rows, counts = statistics.class_counts()
  several, present = data["label"] == "labels", sum(count > 0 for count in counts)
  weights = [(rows - n) / n if several else rows / (present * n) for n in counts if n] or [1.0]
  weights_of_all = iter(weights)
  return dict(class_weights=tuple(next(weights_of_all) if n else 1.0 for n in counts))


@objective(couples_examples=False, mixup="alone", fit=balance, methods=("classify",))
def classification(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  modalities: tuple[str, ...] = ("image",),
  label_smoothing: Dropout = 0.0,
  class_weights: ClassWeights = (),
  focal: NonNegative = 0.0,
) -> Losses:
  """Cross-entropy of the classes given the modalities.

  One label a row, batch["label"] int32 [B] (-1 = none), or [B, K] for K texts a row: softmax, in
  nats. Targets are (1 - e) onehot + e / classes for label smoothing e (Szegedy et al. 2016,
  arXiv:1512.00567, section 7). Any number of labels, bool [B, classes]: the sum of sigmoid
  cross-entropies over the classes, targets smoothed towards 1/2.
  Mixup (Zhang et al. 2018, arXiv:1710.09412): where a modality was mixed, `mix_weight` float32 [B]
  of it is the row's own label and the rest that of the row mixed in, `mix_label`; an unlabelled one
  of the two does not count, the other with its share.

  modalities: what is classified. label_smoothing: the share e of a
  target that is spread over the classes. class_weights: factors of the classes, () = 1
  each: the loss is then a weighted mean over the rows. Where a row may have several labels, factors
  of the positives of each. "balanced": by how often the training data has each class, so that all
  weigh the same.
  focal: the exponent g of (1 - p)^g, p the probability of the label, by which the loss of a row (or
  of one of several labels) is multiplied, so that easy ones count less (Lin et al. 2017,
  arXiv:1708.02002).
  Rows with `valid` False, or without any of the modalities, do not count.
  Returns "accuracy": share of rows whose (own) label is likelier than any other class; of single
  labels with several a row.
  """
  modalities = tuple(modalities)
  logits = forward("classify", modalities).astype(jnp.float32)
  several = batch["label"].dtype == jnp.bool_
  times = logits.shape[0] // batch["label"].shape[0]
  weight_of = weights_of(class_weights, logits.shape[-1])

  def each(x):
    return jnp.repeat(x, times) if x.ndim == 1 else x.reshape(logits.shape[0], *x.shape[2:])

  rows = rows_of(batch, modalities, times)
  label = (
    batch["label"]
    if several
    else each(batch["label"])
    if batch["label"].ndim == 2
    else batch["label"]
  )
  sides = [(label, jnp.ones(logits.shape[0], jnp.float32))]
  for modality in modalities:
    if "mix_label" in batch[modality]:
      weight = each(batch[modality]["mix_weight"].astype(jnp.float32))
      other = batch[modality]["mix_label"]
      sides = [(label, weight), (other if several or other.ndim == 1 else each(other), 1 - weight)]
  losses = _sigmoid if several else _softmax
  total = weights = jnp.zeros((), jnp.float32)
  for side, share in sides:
    share = jnp.where(rows if several else rows & (side >= 0), share, 0)
    loss, weight = losses(logits, side, label_smoothing, weight_of, focal)
    total += (share * loss).sum()
    weights += (share * weight).sum()
  if several:
    correct = ((logits > 0) == label).mean(-1)
    counts = rows
  else:
    correct, counts = is_highest(logits, label), rows & (label >= 0)
  return {
    "loss": (total, weights),
    "accuracy": (
      jnp.where(counts, correct, 0).sum(dtype=jnp.float32),
      counts.sum(dtype=jnp.float32),
    ),
  }


def weights_of(class_weights: ClassWeights, classes: int) -> Array:
  """float32 [classes]. Raises UserError: not as many, or "balanced", which the start of a run
  replaces by numbers.
  """
  if class_weights == "balanced":
    raise UserError("class_weights 'balanced' are known only from the training data of a run")
  if class_weights and len(class_weights) != classes:
    raise UserError(
      f"class_weights has {len(class_weights)} numbers, but the model tells {classes} classes apart"
    )
  return jnp.asarray(class_weights or (1.0,) * classes, jnp.float32)


def rows_of(batch: dict, modalities: tuple, times: int = 1) -> Array:
  """bool [B * times]: rows that count. With several texts a row, `text.present` may be of each
  text.
  """
  rows = jnp.repeat(example_mask(batch, some=modalities), times)
  present = batch["text"].get("present") if "text" in modalities else None
  if present is not None and present.ndim == 2 and modalities == ("text",):
    rows &= present.reshape(-1)
  return rows


def _softmax(
  logits: Array, label: Array, smoothing: float, weights: Array, focal: float
) -> tuple[Array, Array]:
  """([B] cross-entropies, [B] weights of the rows); of class 0 where label is -1."""
  log_shares = jax.nn.log_softmax(logits, axis=-1)
  label = jnp.maximum(label, 0)
  chosen = jnp.take_along_axis(log_shares, label[:, None], axis=-1)[:, 0]
  weight = weights[label]
  loss = -(1 - smoothing) * weight * chosen - smoothing * (weights * log_shares).mean(-1)
  return loss * _focus(-jnp.expm1(chosen), focal), weight


def _sigmoid(
  logits: Array, label: Array, smoothing: float, weights: Array, focal: float
) -> tuple[Array, Array]:
  """([B] sums over the classes, [B] ones)."""
  target = (1 - smoothing) * label + 0.5 * smoothing
  loss = target * weights * jax.nn.softplus(-logits) + (1 - target) * jax.nn.softplus(logits)
  missed = jax.nn.sigmoid(jnp.where(label, -logits, logits))
  return (loss * _focus(missed, focal)).sum(-1), jnp.ones(len(logits), jnp.float32)


def _focus(missed: Array, focal: float) -> Array | float:
  """missed ** focal, with a finite derivative at 0."""
  return jnp.maximum(missed, 1e-7) ** focal if focal else 1.0
