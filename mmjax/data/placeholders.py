"""Placeholders: the places that a medium takes in a row of a language model, and the text that is
written around them.

A medium fills slots of batch["media"], which all have one shape. Each of its places names a slot
(`media_index`) and one of the tokens that the connector makes of it (`media_offset`). So a medium
has as many places as it needs - a short sound has few - and shapes stay static.
"""

from __future__ import annotations

from collections.abc import Mapping
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
  sequence: Mapping[str, Any], modality: str, arrays: Mapping[str, np.ndarray]
) -> list[str | Places]:
  """How a medium of these arrays stands in a row: texts, and places between them. sequence: the
  config's data.sequence.
  """
  before, after = around(sequence, modality)
  count = sequence[modality]
  if modality == "audio" and (step := sequence["audio_step"]):
    # As in encoders that halve the frames twice, the first time rounding up, then down.
    count = min(count, max(1, (int(arrays["length"]) + step // 2 - 1) // step))
  return [before, Places(modality, 0, np.arange(count, dtype=np.int32)), after]


def around(sequence: Mapping[str, Any], modality: str) -> tuple[str, str]:
  """The texts before and after the places of a medium."""
  before, _, after = sequence["written"][modality].partition(HERE)
  return before, after


def prompted(sequence: Mapping[str, Any], text: str) -> str:
  """The text of a prompt after its last medium as data.sequence.prompt has it."""
  before, _, after = sequence["prompt"].partition(HERE)
  return before + text + after
