"""Accuracy, precision, recall, areas under curves, thresholds and calibration of classifiers. Rows
whose label is -1 do not count.
"""

from __future__ import annotations

from typing import NamedTuple

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


def roc_auc(scores: Array, positives: Array) -> float:
  """The probability that a positive scores above a negative, ties counting half (the area under the
  ROC curve): scores [N], positives bool [N]. Raises UserError: none of either.
  """
  scores, positives = np.asarray(scores), np.asarray(positives, bool)
  count = int(positives.sum())
  if not 0 < count < len(positives):
    raise UserError("the area under the ROC curve needs a positive and a negative example")
  values, index, times = np.unique(scores, return_inverse=True, return_counts=True)
  rank = np.cumsum(times) - (times - 1) / 2  # of each value, from 1; equal ones share the mean
  above = rank[index][positives].sum() - count * (count + 1) / 2
  return float(above / count / (len(positives) - count))


class PerClass(NamedTuple):
  """Float [C] each: precision, recall and F1 (0 where nothing is said or there), and how many
  examples a class has.
  """

  precision: Array
  recall: Array
  f1: Array
  examples: Array


def per_class(said: Array, true: Array) -> PerClass:
  """Of classes said and true, bool [N, C] (one-hot for one label a row)."""
  said, true = np.asarray(said, bool), np.asarray(true, bool)
  both = (said & true).sum(0).astype(float)
  precision = both / np.maximum(said.sum(0), 1)
  recall = both / np.maximum(true.sum(0), 1)
  f1 = 2 * both / np.maximum(said.sum(0) + true.sum(0), 1)
  return PerClass(precision, recall, f1, true.sum(0).astype(float))


def best_threshold(scores: Array, positives: Array) -> float:
  """The threshold t for which "score >= t" has the highest F1: scores [N], positives bool [N]; the
  highest of equally good ones. It lies halfway to the next lower score, as far from both as can be.
  Raises UserError: no positive.
  """
  scores, positives = np.asarray(scores, np.float64), np.asarray(positives, bool)
  if not positives.any():
    raise UserError("a threshold needs a positive example to be chosen by")
  order = np.argsort(-scores, kind="stable")
  ranked = scores[order]
  true_positives = np.cumsum(positives[order])
  last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
  f1 = 2 * true_positives[last] / (last + 1 + positives.sum())
  at = last[int(np.argmax(f1))]
  return float(ranked[at] if at + 1 == len(ranked) else (ranked[at] + ranked[at + 1]) / 2)


def reliability(
  confidence: Array, correct: Array, *, bins: int = 15
) -> list[tuple[float, float, int]]:
  """(mean confidence, share that is correct, examples) of each of `bins` equal bins (low, high] of
  confidence [N] in 0 to 1 that has any.
  """
  index = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
  return [
    (float(confidence[rows].mean()), float(correct[rows].mean()), len(rows))
    for b in range(bins)
    if len(rows := np.flatnonzero(index == b))
  ]


def expected_calibration_error(logits: Array, labels: Array, *, bins: int = 15) -> float:
  """sum_b n_b / n |accuracy_b - confidence_b| over `bins` equal bins of the highest probability
  (Guo et al. 2017, arXiv:1706.04599, equation 3). logits [N, C], labels int [N]. Bins are (low,
  high]. Raises UserError: no row counts.
  """
  logits, labels = _labelled(logits, labels)
  chances = softmax(logits)
  confidence, correct = chances.max(1), chances.argmax(1) == labels
  index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.bincount(index, correct - confidence, minlength=bins)
  return float(np.abs(gaps).sum() / len(labels))


def softmax(logits: Array) -> Array:
  """Probabilities float64 [N, C]."""
  shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
  return shares / shares.sum(1, keepdims=True)


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
