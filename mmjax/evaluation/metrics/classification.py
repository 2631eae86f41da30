"""Accuracy, mean average precision and calibration of classifiers. Rows whose label is -1 do not
count.
"""

from __future__ import annotations

import numpy as np

from mmjax.config import UserError

Array = np.ndarray


def accuracy(logits: Array, labels: Array, *, top: int = 1) -> float:
  """Share of rows whose label int [N] is among the `top` highest of logits [N, C]; ties go to the
  lower class.

  Raises UserError: no row counts.
  """
  logits, labels = _labelled(logits, labels)
  ranked = np.argsort(-logits, axis=1, kind="stable")[:, :top]
  return float((ranked == labels[:, None]).any(1).mean())


def average_precision(scores: Array, positives: Array) -> float:
  """sum_k (recall_k - recall_{k-1}) precision_k over the distinct thresholds k of scores [N];
  positives bool [N].

  Equal scores are one threshold. Raises UserError: no positive.
  """
  positives = np.asarray(positives, bool)
  if not positives.any():
    raise UserError("average precision needs a positive example. Leave out classes that have none")
  order = np.argsort(-np.asarray(scores), kind="stable")
  scores, true_positives = np.asarray(scores)[order], np.cumsum(positives[order])
  last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
  true_positives = true_positives[last]
  gained = np.diff(true_positives, prepend=0) / positives.sum()
  return float((gained * true_positives / (last + 1)).sum())


def mean_average_precision(scores: Array, labels: Array) -> float:
  """Mean of `average_precision` over the classes that have a positive: scores [N, C], labels bool
  [N, C].

  Raises UserError: no class has one.
  """
  scores, labels = np.asarray(scores), np.asarray(labels, bool)
  classes = np.flatnonzero(labels.any(0))
  if not len(classes):
    raise UserError(
      "mean average precision needs at least one class with a positive example; there is none"
    )
  return float(np.mean([average_precision(scores[:, c], labels[:, c]) for c in classes]))


def expected_calibration_error(logits: Array, labels: Array, *, bins: int = 15) -> float:
  """sum_b n_b / n |accuracy_b - confidence_b| over `bins` equal bins of the highest probability
  (Guo et al. 2017, arXiv:1706.04599, equation 3). logits [N, C], labels int [N]. Bins are (low,
  high]. Raises UserError: no row counts.
  """
  logits, labels = _labelled(logits, labels)
  logits = logits.astype(np.float64)
  chances = np.exp(logits - logits.max(1, keepdims=True))
  chances /= chances.sum(1, keepdims=True)
  confidence, correct = chances.max(1), chances.argmax(1) == labels
  index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.bincount(index, correct - confidence, minlength=bins)
  return float(np.abs(gaps).sum() / len(labels))


def _labelled(logits: Array, labels: Array) -> tuple[Array, Array]:
  logits, labels = np.asarray(logits), np.asarray(labels)
  if logits.ndim != 2 or labels.shape != logits.shape[:1]:
    raise UserError(
      f"classification metrics take logits [N, C] and labels [N], not {logits.shape} and "
      f"{labels.shape}"
    )
  if not (keep := labels >= 0).any():
    raise UserError("no row has a label, so that there is nothing to measure")
  return logits[keep], labels[keep]
