"""Classes and values of rows: their names and numbers, and what of a config they contradict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.sources import Source


def check_classes(config, sources: Sequence[Source]) -> None:
  """Raises UserError: the sources have other classes than each other, or more than data.classes."""
  if config.data.label == "none":
    return
  labelled = [source for source in sources if class_names(source, config.data)]
  if not labelled:
    raise UserError(
      f"data.label is {config.data.label!r}, but no source has such classes: "
      f"{', '.join(source.name for source in sources)}. Set data.label='none' or choose another "
      "source"
    )
  first = class_names(labelled[0], config.data)
  for source in labelled:
    names = class_names(source, config.data)
    unknown = [name for name in _found(source, config.data.label) if name not in names]
    if unknown:
      raise UserError(
        f"{source.name} has the label {unknown[0]!r}, which data.class_names does not name: "
        f"{', '.join(names[:12])}"
      )
    if names != first:
      raise UserError(
        f"sources {labelled[0].name} and {source.name} have different classes; a classifier needs "
        "one list of them"
      )
    if len(names) > config.data.classes:
      raise UserError(
        f"data.classes is {config.data.classes}, but {source.name} has {len(names)}: "
        f"{', '.join(names[:12])}. Set data.classes to {len(names)}"
      )


def check_values(config, sources: Sequence[Source]) -> None:
  """Raises UserError: no source has values, or not data.values of them, or others than another."""
  count = config.data["values"]
  having = [source for source in sources if source.values]
  if not count:
    return
  if not having:
    raise UserError(
      f"data.values is {count}, but no source has values: "
      f"{', '.join(source.name for source in sources)}. Convert with --value COLUMN, or set "
      "data.values=0"
    )
  for source in having:
    if len(source.values) != count:
      raise UserError(
        f"data.values is {count}, but {source.name} has {len(source.values)}: "
        f"{', '.join(source.values[:12])}. Set data.values to {len(source.values)}"
      )
    if source.values != having[0].values:
      raise UserError(
        f"sources {having[0].name} and {source.name} have different values "
        f"({', '.join(having[0].values[:6])}; {', '.join(source.values[:6])})"
      )


def class_names(source: Source, data: Mapping[str, Any]) -> tuple[str, ...]:
  """The classes of a source in the order of their numbers: data.class_names, or else those that it
  has, sorted; () = none.
  """
  found = _found(source, data["label"])
  return tuple(data["class_names"]) or found if found else ()


def _found(source: Source, label: str) -> tuple[str, ...]:
  """The classes that a source has, for data.label `label`; answers only where its texts are
  questions.
  """
  if label == "answer":
    return (
      tuple(getattr(source, "answers", ()))
      if getattr(source, "text", "caption") == "question"
      else ()
    )
  if label == "labels" and any("|" in names for names in source.labels):
    return tuple(sorted({name for names in source.labels for name in names.split("|") if name}))
  return tuple(source.labels)


def blank_labels(config, count: int) -> np.ndarray | None:
  """Labels of `count` rows that have none: int32 [count] or [count, K] of -1, bool [count,
  classes], or None.
  """
  kind, each = config.data.label, config.data.text.per_example
  if kind == "none":
    return None
  if kind == "labels":
    return np.zeros((count, config.data.classes), bool)
  return np.full((count, each) if kind == "answer" and each > 1 else count, -1, np.int32)


def blank_values(config, count: int) -> np.ndarray | None:
  """Values of `count` rows that have none: float32 [count, data.values] of NaN, or None."""
  if not config.data["values"]:
    return None
  return np.full((count, config.data["values"]), np.nan, np.float32)
