"""Classification by a head of the model: classes of pictures, sounds, clips, series, or answers to
questions about them.
"""

from __future__ import annotations

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result
from mmjax.evaluation.metrics import classification as metrics
from mmjax.evaluation.zero_shot import confusion, mean_class_accuracy


def classification(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple = (),
  modalities: tuple = ("image",),
  text: str = "caption",
  drop: tuple = (),
  by: str = "",
) -> Result:
  """How often the classifier is right about `batch["label"]` (data.label says what that is).

  source: a data set. split: which of its splits. languages: of the texts (() =
  those that data.sources reads of it, else all). modalities: what is
  classified, as in the objective.
  text: what the text of a row is, "caption" or "question". drop: modalities that are hidden from
  the model (their `present` is False), to see what it can tell without them. by: a name in the
  records' facts: accuracy is also given for each of its values.
  Metrics: "accuracy", "accuracy@5", "mean_class_accuracy", "calibration_error" (15 bins),
  "majority" (share of the commonest class:
  what guessing gets), "examples", "unreadable"; of several labels a row "mean_average_precision"
  instead.
  """
  where = f"evaluation.evaluators.{context.name}"
  if context.config.data.label == "none":
    raise UserError(
      f"{where}: data.label is 'none', so that batches have no classes. Set it to 'label', "
      "'labels' or 'answer'"
    )
  data = context.data(source, split, languages, text)
  batches = (_without(batch, drop) for batch in data.batches(modalities))
  logits, valid, labels = context.apply("classify", (tuple(modalities),), batches, also=("label",))
  rows = np.repeat(np.arange(len(valid)), len(logits) // len(valid))
  if labels.dtype == bool:
    return Result(_several(logits[valid], labels[valid], valid[: len(data.items)]), {})
  labels = labels.reshape(-1)
  kept = np.flatnonzero(valid[rows] & (labels >= 0))
  if not len(kept):
    raise UserError(f"{where}: {source} split {split} has no readable example with a class")
  predicted, logits, labels = logits[kept].argmax(1), logits[kept], labels[kept]
  result = {
    "accuracy": metrics.accuracy(logits, labels),
    "accuracy@5": metrics.accuracy(logits, labels, top=5),
    "mean_class_accuracy": mean_class_accuracy(labels, predicted == labels),
    "calibration_error": metrics.expected_calibration_error(logits, labels),
    "majority": float(np.bincount(labels).max() / len(labels)),
  }
  if by:
    values = np.array([str(data.facts[data.items[row][0]].get(by, "")) for row in rows[kept]])
    result.update(
      {
        f"{v}/accuracy": float(np.mean(predicted[values == v] == labels[values == v]))
        for v in np.unique(values)
      }
    )
  result.update(examples=float(len(kept)), unreadable=float((~valid[: len(data.items)]).sum()))
  names = [
    *data.class_names,
    *map(str, range(len(data.class_names), logits.shape[1])),
  ]  # data.classes may leave room
  return Result(result, {"confusion": confusion(labels, predicted, names)})


def _several(logits: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> dict[str, float]:
  return {
    "mean_average_precision": metrics.mean_average_precision(logits, labels),
    "accuracy": float(np.mean((logits > 0) == labels)),
    "examples": float(len(labels)),
    "unreadable": float((~valid).sum()),
  }


def _without(batch: dict, modalities: tuple) -> dict:
  """The batch with `present` False for these modalities."""
  hidden = {m: {**batch[m], "present": np.zeros(len(batch["valid"]), bool)} for m in modalities}
  return {**batch, **hidden}
