"""Placeholders: the places that a medium takes in a row of a language model, and the text that is
written around them.

A medium fills slots of batch["media"], which all have one shape: a picture in tiles one for each
tile (tiles.py), any other medium one. Each of its places names a slot (`media_index`) and one of
the tokens that the connector makes of it (`media_offset`). So a medium has as many places as it
needs - a short sound has few, a large picture many - and shapes stay static. What a processor
writes between tiles is text (data.sequence.tiles); a learned token would be one more of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

HERE = "{}"  # where the medium stands in data.sequence.written.MODALITY


class Places(NamedTuple):
  """Places in a row, one after the other: the tokens `offsets` int32 [N] of a slot, which is number
  `slot` of the medium's own.
  """

  modality: str
  slot: int
  offsets: np.ndarray


def placeholders(
  sequence: Mapping[str, Any],
  modality: str,
  slots: Sequence[Mapping[str, np.ndarray]],
  columns: int = 0,
) -> list[str | Places]:
  """How a medium that fills these slots stands in a row: texts, and places between them. sequence:
  the config's data.sequence. columns: of a picture's tiles, 0 = it is in none.
  """
  before, after = around(sequence, modality)
  count = sequence[modality]
  if modality == "audio" and (step := sequence["audio_step"]):
    # As in encoders that halve the frames twice, the first time rounding up, then down.
    count = min(count, max(1, (int(slots[0]["length"]) + step // 2 - 1) // step))
  offsets = np.arange(count, dtype=np.int32)
  runs = [Places(modality, slot, offsets) for slot in range(len(slots))]
  if modality != "image":
    return [before, *runs, after]
  of_tile, row_end, whole, alone = sequence["tiles"]
  parts: list[str | Places] = [before]
  for slot, run in enumerate(runs[:-1]):
    row, column = divmod(slot, columns)
    named = of_tile.replace("{row}", str(row + 1)).replace("{column}", str(column + 1))
    parts += [named, run, row_end if column == columns - 1 else ""]
  return [*parts, whole if columns else alone, runs[-1], after]


def around(sequence: Mapping[str, Any], modality: str) -> tuple[str, str]:
  """The texts before and after the places of a medium."""
  before, _, after = sequence["written"].get(modality, HERE).partition(HERE)
  return before, after


def prompted(sequence: Mapping[str, Any], text: str) -> str:
  """The text of a prompt after its last medium as data.sequence.prompt has it."""
  before, _, after = sequence["prompt"].partition(HERE)
  return before + text + after
