"""Classification by a head of the model: classes of pictures, sounds, clips, series, or answers to
questions about them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result
from mmjax.evaluation.examples import shown
from mmjax.evaluation.metrics import classification as metrics
from mmjax.evaluation.zero_shot import confusion
from mmjax.ranges import Count

NAMED = 20  # classes that eval.json has the scores of each of; the report has them of all
Array = np.ndarray


def classification(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple[str, ...] = (),
  modalities: tuple[str, ...] = ("image",),
  text: str = "caption",
  drop: tuple[str, ...] = (),
  by: str = "",
  threshold_split: str = "",
  positive: str = "",
  mistakes: Count = 12,
) -> Result:
  """How often the classifier is right about `batch["label"]` (data.label says what that is).

  source: a data set. split: which of its splits. languages: of the texts (() =
  those that data.sources reads of it, else all). modalities: what is
  classified, as in the objective.
  text: what the text of a row is, "caption" or "question". drop: modalities that are hidden from
  the model (their `present` is False), to see what it can tell without them. by: a name in the
  records' facts: accuracy is also given for each of its values.
  threshold_split: another split, by which the thresholds with the highest F1 are chosen: of two
  classes, and of each of several labels a row. positive: of two classes the one that is looked for;
  "" = the rarer one. mistakes: how many of the surest ones the report shows.
  Metrics: "accuracy", "majority" (share of the commonest class: what guessing gets), "accuracy@5"
  from 6 classes on, "balanced_accuracy" (the mean recall of the classes that occur), "precision",
  "recall", "f1", "auc", "average_precision" (means over the classes), "calibration_error" (15
  bins), the same of each class as "NAME/f1", ... where there are at most 20, "mae" of an ordinal
  classifier; with `threshold_split` of two classes "threshold" (of the probability of `positive`)
  and "f1@threshold", ...; "examples", "unreadable".
  Of several labels a row "mean_average_precision" and "exact" (share of rows with all labels right)
  instead of what compares classes.
  """
  where = f"evaluation.evaluators.{context.name}"
  if context.config.data.label == "none":
    raise UserError(
      f"{where}: data.label is 'none', so that batches have no classes. Set it to 'label', "
      "'labels' or 'answer'"
    )
  if threshold_split and set(threshold_split.split("+")) & set(split.split("+")):
    raise UserError(
      f"{where}: threshold_split {threshold_split!r} and split {split!r} share rows, by which a "
      "threshold must not be chosen. Name a validation split"
    )

  def read(split: str) -> tuple[Any, Array, Array, Array, Array]:
    """(data, rows of `data.items` that count, their logits and labels, which are valid)."""
    data = context.data(source, split, languages, text)
    batches = (_without(batch, drop) for batch in data.batches(modalities))
    logits, valid, labels = context.apply("classify", (tuple(modalities),), batches, ("label",))
    rows = np.repeat(np.arange(len(valid)), len(logits) // len(valid))
    labels = labels if labels.dtype == bool else labels.reshape(-1)
    known = valid[rows] if labels.dtype == bool else valid[rows] & (labels >= 0)
    kept = np.flatnonzero(known)
    if not len(kept):
      raise UserError(f"{where}: {source} split {split} has no readable example with a class")
    return data, rows[kept], logits[kept], labels[kept], valid

  data, rows, logits, labels, valid = read(split)
  held = read(threshold_split)[2:4] if threshold_split else None
  # data.classes may be more than there are names: the rest are numbered.
  names = [*data.class_names, *map(str, range(len(data.class_names), logits.shape[1]))]
  if labels.dtype == bool:
    result, figures = _several(logits, labels, names, held)
    said = [[names[c] for c in np.flatnonzero(row)] or ["(none)"] for row in logits > 0]
    true = [[names[c] for c in np.flatnonzero(row)] or ["(none)"] for row in labels]
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    off = np.abs(shares - labels).max(1)  # by how much the worst label of a row is off
    wrong = np.flatnonzero(((logits > 0) != labels).any(1))
  else:
    shares = metrics.softmax(logits)
    result, figures = _one(logits, labels, names)
    if held is not None and len(names) == 2:
      result.update(_two(shares, labels, metrics.softmax(held[0]), held[1], names, positive, where))
    if context.config.model.get("ordinal"):
      result["mae"] = float(np.abs(logits.argmax(1) - labels).mean())
    said = [[names[c]] for c in logits.argmax(1)]
    true = [[names[c]] for c in labels]
    off = shares.max(1)
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    if by:
      values = np.array([str(data.facts[data.items[row][0]].get(by, "")) for row in rows])
      correct = logits.argmax(1) == labels
      result.update(
        {f"{v}/accuracy": float(correct[values == v].mean()) for v in np.unique(values)}
      )
  result.update(examples=float(len(rows)), unreadable=float((~valid[: len(data.items)]).sum()))
  worst = wrong[np.argsort(-off[wrong], kind="stable")][:mistakes]
  figures["mistakes"] = dict(
    kind="mistakes",
    wrong=len(wrong),
    of=len(rows),
    rows=[
      dict(
        said=", ".join(said[i]),
        true=", ".join(true[i]),
        note=f"{off[i]:.0%} sure" if labels.dtype != bool else f"off by {off[i]:.2f}",
        **shown(data, data.items[rows[i]], modalities),
      )
      for i in worst.tolist()
    ],
  )
  return Result(result, figures)


def _one(logits: Array, labels: Array, names: list[str]) -> tuple[dict[str, float], dict]:
  """Metrics and figures of one label a row: logits [N, C], labels int [N]."""
  predicted, shares = logits.argmax(1), metrics.softmax(logits)
  correct = predicted == labels
  true = np.eye(len(names), dtype=bool)[labels]
  scores = metrics.per_class(np.eye(len(names), dtype=bool)[predicted], true)
  present = np.flatnonzero(scores.examples)
  result = {
    "accuracy": metrics.accuracy(logits, labels),
    "majority": float(scores.examples.max() / len(labels)),
  }
  if len(names) >= 6:
    result["accuracy@5"] = metrics.accuracy(logits, labels, top=5)
  result["balanced_accuracy"] = float(scores.recall[present].mean())
  table = _table(scores, shares, true, names)
  result.update(_means(table))
  result["calibration_error"] = metrics.expected_calibration_error(logits, labels)
  result.update(_named(table))
  return result, {
    "classes": dict(kind="classes", rows=table),
    "reliability": dict(kind="reliability", points=metrics.reliability(shares.max(1), correct)),
    "confusion": confusion(labels, predicted, names),
  }


def _two(
  shares: Array,
  labels: Array,
  held: Array,
  held_labels: Array,
  names: list[str],
  positive: str,
  where: str,
) -> dict[str, float]:
  """Of two classes, at the threshold that `held` out rows choose."""
  if positive and positive not in names:
    raise UserError(f"{where}.positive is {positive!r}, which is no class; there are: {names}")
  counts = np.bincount(held_labels, minlength=2)
  which = names.index(positive) if positive else int(counts[1] <= counts[0])
  threshold = metrics.best_threshold(held[:, which], held_labels == which)
  found, true = shares[:, which] >= threshold, labels == which
  scores = metrics.per_class(found[:, None], true[:, None])
  other = metrics.per_class(~found[:, None], ~true[:, None])
  return {
    "threshold": threshold,
    "f1@threshold": float(scores.f1[0]),
    "precision@threshold": float(scores.precision[0]),
    "recall@threshold": float(scores.recall[0]),
    "balanced_accuracy@threshold": float((scores.recall[0] + other.recall[0]) / 2),
    "accuracy@threshold": float((found == true).mean()),
  }


def _several(
  logits: Array, labels: Array, names: list[str], held: tuple[Array, Array] | None
) -> tuple[dict[str, float], dict]:
  """Metrics and figures of several labels a row: logits [N, C], labels bool [N, C]."""
  shares, said = 1 / (1 + np.exp(-logits.astype(np.float64))), logits > 0
  result = {
    "mean_average_precision": metrics.mean_average_precision(logits, labels),
    "accuracy": float(np.mean(said == labels)),
    "exact": float((said == labels).all(1).mean()),
  }
  table = _table(metrics.per_class(said, labels), shares, labels, names)
  result.update({k: v for k, v in _means(table).items() if k != "average_precision"})
  if held is not None:
    known = [c for c in range(len(names)) if held[1][:, c].any()]
    limits = np.zeros(len(names))
    for c in known:
      limits[c] = metrics.best_threshold(held[0][:, c], held[1][:, c])
    at = metrics.per_class(logits >= limits, labels)
    present = np.flatnonzero(at.examples)
    result["f1@threshold"] = float(at.f1[present].mean())
    for row, limit in zip(table, limits, strict=True):
      row["threshold"] = float(1 / (1 + np.exp(-limit)))
  result.update(_named(table))
  correct = np.where(shares > 0.5, labels, ~labels)
  points = metrics.reliability(np.maximum(shares, 1 - shares).reshape(-1), correct.reshape(-1))
  return result, {
    "classes": dict(kind="classes", rows=table),
    "reliability": dict(kind="reliability", points=points),
  }


def _table(scores: metrics.PerClass, shares: Array, true: Array, names: list[str]) -> list[dict]:
  """A row of scores for each class that occurs, or is said."""
  table = []
  for c, name in enumerate(names):
    row = dict(
      name=name,
      examples=float(scores.examples[c]),
      precision=float(scores.precision[c]),
      recall=float(scores.recall[c]),
      f1=float(scores.f1[c]),
    )
    if scores.examples[c]:
      row["average_precision"] = metrics.average_precision(shares[:, c], true[:, c])
    if 0 < scores.examples[c] < len(true):
      row["auc"] = metrics.roc_auc(shares[:, c], true[:, c])
    table.append(row)
  return table


def _means(table: list[dict]) -> dict[str, float]:
  """Means over the classes that occur, each as much as another."""
  present = [row for row in table if row["examples"]]
  means = {}
  for key in ("precision", "recall", "f1", "auc", "average_precision"):
    if values := [row[key] for row in present if key in row]:
      means[key] = float(np.mean(values))
  return means


def _named(table: list[dict]) -> dict[str, float]:
  """The scores of each class, where there are few."""
  if len(table) > NAMED:
    return {}
  return {f"{row['name']}/{k}": v for row in table for k, v in row.items() if k != "name"}


def _without(batch: dict, modalities: tuple) -> dict:
  """The batch with `present` False for these modalities."""
  hidden = {m: {**batch[m], "present": np.zeros(len(batch["valid"]), bool)} for m in modalities}
  return {**batch, **hidden}
