"""Classes: of one modality or of several that a model fuses (visual question answering with a
closed set of answers too).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, example_mask, is_highest, objective
from mmjax.ranges import Dropout

Array = jax.Array


@objective(couples_examples=False, mixup="alone")
def classification(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  modalities: tuple = ("image",),
  label_smoothing: Dropout = 0.0,
) -> Losses:
  """Cross-entropy of the classes given the modalities.

  One label a row, batch["label"] int32 [B] (-1 = none), or [B, K] for K texts a row: softmax, in
  nats. Targets are (1 - e) onehot + e / classes for label smoothing e (Szegedy et al. 2016,
  arXiv:1512.00567, section 7). Any number of labels, bool [B, classes]: the sum of sigmoid
  cross-entropies over the classes, targets smoothed towards 1/2.
  Mixup (Zhang et al. 2018, arXiv:1710.09412): where a modality was mixed, `mix_weight` float32 [B]
  of it is the row's own label and the rest that of the row mixed in, `mix_label`; an unlabelled one
  of the two does not count, the other with its share.

  modalities: what is classified. label_smoothing: e. Rows with `valid` False, or without any of the
  modalities, do not count.
  Returns "accuracy": share of rows whose (own) label is likelier than any other class; of single
  labels with several a row.
  """
  modalities = tuple(modalities)
  logits = forward("classify", modalities).astype(jnp.float32)
  several = batch["label"].dtype == jnp.bool_
  times = logits.shape[0] // batch["label"].shape[0]

  def each(x):
    return jnp.repeat(x, times) if x.ndim == 1 else x.reshape(logits.shape[0], *x.shape[2:])

  rows = _rows(batch, modalities, times)
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
    total += (share * losses(logits, side, label_smoothing)).sum()
    weights += share.sum()
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


def _rows(batch: dict, modalities: tuple, times: int) -> Array:
  """bool [B * times]: rows that count. With several texts a row, `text.present` may be of each
  text.
  """
  rows = jnp.repeat(example_mask(batch, some=modalities), times)
  present = batch["text"].get("present") if "text" in modalities else None
  if present is not None and present.ndim == 2 and modalities == ("text",):
    rows &= present.reshape(-1)
  return rows


def _softmax(logits: Array, label: Array, smoothing: float) -> Array:
  """[B] cross-entropies; of class 0 where label is -1."""
  log_shares = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_shares, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
  return -(1 - smoothing) * chosen - smoothing * log_shares.mean(-1)


def _sigmoid(logits: Array, label: Array, smoothing: float) -> Array:
  """[B] sums over the classes."""
  target = (1 - smoothing) * label + 0.5 * smoothing
  return (target * jax.nn.softplus(-logits) + (1 - target) * jax.nn.softplus(logits)).sum(-1)
