"""What the labels and values of the training data are like: how often each class is there, and the
mean and standard deviation of each value. One pass over the records.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.labels import class_names
from mmjax.data.sources import Source


class Statistics:
  """Of the records of the sources of a config. A record of a source counts by the share of the rows
  that data.sources.*.weight gives it, so that one source of several, or one that is drawn more
  often, counts as it does in training. Records that cannot be read do not count.
  """

  def __init__(self, config, sources: Sequence[Source]):
    self._config, self._sources = config, list(sources)

  @functools.lru_cache(maxsize=1)  # noqa: B019  lives as long as the start of a run
  def class_counts(self) -> tuple[float, list[float]]:
    """(rows that have labels, rows of each class), of as many rows as the sources have records.
    With data.label "answer" each question counts as a row. Raises UserError: no row has a label.
    """
    data = self._config.data
    counts, rows = np.zeros(data.classes), 0.0
    for source, share in self._shared():
      numbers = {name: number for number, name in enumerate(class_names(source, data))}
      for record in _records(source):
        labels = _labels(record, data.label)
        known = [numbers[label] for label in labels if label in numbers]
        rows += share * (1 if data.label == "labels" else len(known))
        np.add.at(counts, known, share)
    if not rows:
      raise UserError("no record of the training data has a label, so that classes have no weights")
    return float(rows), counts.tolist()

  @functools.lru_cache(maxsize=1)  # noqa: B019
  def values(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each value, where it is there (no NaN). A value that never
    changes has standard deviation 1. Raises UserError: no record has the value.
    """
    count = self._config.data["values"]  # `.values` is a method
    sums = np.zeros((3, count))  # of weights, values, squares of the difference to the first
    first = None
    for source, share in self._shared():
      for record in _records(source):
        value = record.get("value")
        if value is None or len(value) != count:
          continue
        value = np.asarray(value, np.float64)
        known = np.isfinite(value)
        first = np.where(known, value, 0.0) if first is None else first
        off = np.where(known, value - first, 0.0)
        sums += share * np.stack([known, off, off * off])
    weight = sums[0]
    if first is None or not weight.all():
      raise UserError(
        f"the training data has no values for {int((weight == 0).sum())} of the {count} of "
        "data.values"
      )
    mean = sums[1] / weight
    spread = np.sqrt(np.maximum(sums[2] / weight - mean * mean, 0))
    spread = np.where(spread > 0, spread, 1.0)
    return tuple((first + mean).tolist()), tuple(spread.tolist())

  def _shared(self) -> Iterator[tuple[Source, float]]:
    """(source, how many rows one record of it stands for)."""
    weights = [entry.weight for entry in self._config.data.sources.values()]
    lengths = [len(source) for source in self._sources]
    rows = sum(length for length, weight in zip(lengths, weights, strict=True) if weight)
    for source, length, weight in zip(self._sources, lengths, weights, strict=True):
      if weight:
        yield source, rows * weight / sum(weights) / length


def _records(source: Source) -> Iterator[dict[str, Any]]:
  for index in range(len(source)):
    try:
      yield source[index]
    except UserError:
      continue


def _labels(record: dict[str, Any], kind: str) -> list[str]:
  if kind == "answer":
    return [answer for _, answer in record.get("questions") or ()]
  if kind == "labels":
    return [name for name in record["label"].split("|") if name]
  return [record["label"]]
