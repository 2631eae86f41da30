"""Judged answers in rows of a language model: batch["preference"], arrays of P places a row.

  answers    int32 [B, P, 3]: the segments (sequence.segment_ids) of a preferred answer, of the
             rejected one, and of an answer to another prompt; 0 = there is none
  reference  float32 [B, P, 3]: the log-probability of each under the reference, a model that does
             not change: sums over the answer's tokens and the token that ends its turn

What a source's answers have under the reference is kept as float32 [records, most preferences of a
record, 3] beside the run (training/reference.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record
from mmjax.data.sources import Source

SIDES = ("chosen", "rejected", "other")
_LEAST = 3  # tokens of a preference: of a turn of the user, of an answer, and of its end
Message = Mapping[str, Any]


def preference_spec(length: int) -> dict[str, Any]:
  """{"preference": {array: (shape of a row, dtype)}} of rows of `length` tokens."""
  shape = (max(1, length // _LEAST), len(SIDES))
  arrays = dict(answers=(shape, np.dtype(np.int32)), reference=(shape, np.dtype(np.float32)))
  return {"preference": arrays}


def asks_others(config) -> bool:
  """Whether an objective asks for answers to other prompts (form "kto")."""
  return any(
    entry.kind == "preference" and entry.form == "kto" for entry in config.objectives.values()
  )


def pairs_of(source: Source, broken: list[str]) -> list[tuple[int, int]]:
  """[(record, its preference)] of a source; why there is none goes into `broken`."""
  places: list[tuple[int, int]] = []
  for index in range(len(source)):
    try:
      record = source[index]
    except UserError as error:
      broken.append(str(error))
      continue
    count = len(record.get("preferences") or ())
    if not count:
      broken.append(f"{record['id']}: it has no preferences")
    places += [(index, part) for part in range(count)]
  return places


def talks_of(
  record: Record, part: int, other: Record | None = None, other_part: int = 0
) -> Iterator[tuple[int, Sequence[Message]]]:
  """(side, the prompt and this answer as turns) of a preference. other: the record of an answer to
  another prompt. Raises UserError: there is no such preference.
  """
  judged = record.get("preferences") or []
  if part >= len(judged):
    raise UserError("it has no preference")
  answers = dict(judged[part])
  if other is not None:
    theirs = other["preferences"][other_part]
    answers["other"] = theirs.get("chosen") or theirs["rejected"]
  for side, name in enumerate(SIDES):
    if name in answers:
      yield side, [*answers["prompt"], {"role": "assistant", "content": answers[name]}]
