"""Placeholders: the places that a medium takes in a row of a language model, and the text that is
written around them.

A medium fills slots of batch["media"], which all have one shape: a picture in tiles one for each
tile (tiles.py), any other medium one. Each of its places names a slot (`media_index`) and one of
the tokens that the connector makes of it (`media_offset`). So a medium has as many places as it
needs - a short sound has few, a large picture many - and shapes stay static. What a processor
writes between tiles is text (data.sequence.tiles); a learned token is one more of a slot. Where the
tokens of tiles make one grid, a place is a mix of four of them, counted from the picture's first
slot (`media_offset` [.., 4], `media_weight`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.tiles import Tiling, joined_tokens

HERE = "{}"  # where the medium stands in data.sequence.written.MODALITY


class Places(NamedTuple):
  """Places in a row, one after the other: the tokens `offsets` int32 [N] of a slot, which is number
  `slot` of the medium's own. weights: float32 [N, 4], where each is a sum of four, offsets [N, 4],
  counted through `slots` slots. axes: int32 [N, A], their positions from the first, where they have
  several.
  """

  modality: str
  slot: int
  offsets: np.ndarray
  weights: np.ndarray | None = None
  slots: int = 1
  axes: np.ndarray | None = None


def placeholders(
  data: Mapping[str, Any],
  modality: str,
  slots: Sequence[Mapping[str, np.ndarray]],
  tiling: Tiling = Tiling(),
) -> list[str | Places]:
  """How a medium that fills these slots stands in a row: texts, and places between them. data: of
  the config. tiling: of a picture.
  """
  sequence = data["sequence"]
  before, after = around(sequence, modality)
  count = sequence[modality]
  if modality == "image" and mixes_tokens(data):
    mix = joined_tokens(tiling, count, data["image"]["tiles"]["budget"])
    return [before, Places(modality, 0, *mix, len(slots)), after]
  if modality == "audio" and (step := sequence["audio_step"]):
    # As in encoders that halve the frames twice, the first time rounding up, then down.
    count = min(count, max(1, (int(slots[0]["length"]) + step // 2 - 1) // step))
  if modality == "video" and data["video"]["group"]:
    parts: list[str | Places] = []
    for slot, arrays in enumerate(slots):
      squares = _squares(modality, slot, arrays, data["image"]["merge"])
      parts += [before.replace("{time}", f"{float(arrays['time']):.1f}"), squares, after]
    return parts
  if modality == "image" and (merge := data["image"]["merge"]) > 1:
    return [before, _squares(modality, 0, slots[0], merge), after]
  offsets = np.arange(count, dtype=np.int32)
  runs = [Places(modality, slot, offsets) for slot in range(len(slots))]
  if modality != "image":
    return [before, *runs, after]
  of_tile, row_end, whole, alone = sequence["tiles"]
  parts = [before]
  for slot, run in enumerate(runs[:-1]):
    row, column = divmod(slot, tiling.columns)
    named = of_tile.replace("{row}", str(row + 1)).replace("{column}", str(column + 1))
    parts += [named, run, row_end if column == tiling.columns - 1 else ""]
  return [*parts, whole if tiling.columns else alone, runs[-1], after]


def _squares(modality: str, slot: int, arrays: Mapping[str, np.ndarray], merge: int) -> Places:
  """The places of a slot whose patches are joined to squares of merge x merge."""
  rows, columns = (arrays["grid"] // merge).tolist()
  places = np.arange(rows * columns, dtype=np.int32)
  axes = np.stack([np.zeros_like(places), *np.divmod(places, columns)], axis=1)
  return Places(modality, slot, places, axes=axes)


def positions_of(
  parts: Iterable[Sequence[int] | Places], axes: int, first: int = 0
) -> tuple[np.ndarray, int]:
  """(positions int32 [N, axes] of parts that begin at `first`, the position after them). A token of
  a text has one on all axes; a medium moves on by the longest of its axes.
  """
  found = [np.zeros((0, axes), np.int32)]
  for part in parts:
    own = part.axes if isinstance(part, Places) and axes > 1 else None
    if own is None:
      count = len(part.offsets if isinstance(part, Places) else part)
      own = np.arange(count, dtype=np.int32)[:, None].repeat(axes, 1)
    found.append(own + first)
    first += int(own.max()) + 1 if len(own) else 0
  return np.concatenate(found), first


def axes_of(model: Mapping[str, Any]) -> int:
  """Axes of the positions of a language model, by the config's model: 3 = time, row and column of
  pictures' tokens (M-RoPE).
  """
  rotary = (model.get("block") or {}).get("rotary") or {}
  return len(rotary.get("sections") or ()) or 1


def mixes_tokens(data: Mapping[str, Any]) -> bool:
  """Whether a place of a picture is a sum of several tokens. data: of the config."""
  return bool(data["image"]["tiles"]["grids"])


def around(sequence: Mapping[str, Any], modality: str) -> tuple[str, str]:
  """The texts before and after the places of a medium."""
  before, _, after = sequence["written"].get(modality, HERE).partition(HERE)
  return before, after


def is_written(before: Sequence[int], last: Sequence[int]) -> bool:
  """Whether the tokens `last` end with `before`, those that stand before a medium: a template has
  then written what is around it.
  """
  return bool(before) and list(last[-len(before) :]) == list(before)


def prompted(sequence: Mapping[str, Any], text: str) -> str:
  """The text of a prompt after its last medium as data.sequence.prompt has it."""
  before, _, after = sequence["prompt"].partition(HERE)
  return before + text + after
