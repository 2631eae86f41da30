"""Which examples share a row of a language model: a table made beforehand from their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPEN = 64  # rows that are filled at the same time


def pack(
  lengths: np.ndarray, media: np.ndarray, room: int, slots: int, seed: int
) -> list[list[int]]:
  """[indices of the examples of a row, ...]: every example once, none cut.

  lengths int [N], each at most `room`; media int [N, M]: how many media of each kind an example
  has, each at most `slots`. Examples come in an order drawn by `seed`; each goes to the fullest of
  the open rows that it fits into (best fit), or opens one in place of the fullest.
  """
  rows: list[list[int]] = []
  left = np.zeros(0, np.int64)
  free = np.zeros((0, media.shape[1]), np.int64)
  number = np.zeros(0, np.int64)  # of each open row
  for index in np.random.default_rng(seed).permutation(len(lengths)).tolist():
    fits = (left >= lengths[index]) & (free >= media[index]).all(1)
    if fits.any():
      at = int(np.where(fits, left, room + 1).argmin())
    elif len(rows) < OPEN:
      at = len(rows)
      left, number = np.append(left, room), np.append(number, at)
      free = np.append(free, np.full((1, media.shape[1]), slots), axis=0)
      rows.append([])
    else:
      at = int(left.argmin())
      left[at], free[at], number[at] = room, slots, len(rows)
      rows.append([])
    left[at] -= lengths[index]
    free[at] -= media[index]
    rows[number[at]].append(index)
  return rows


def filling(lengths: np.ndarray, rows: Sequence[Sequence[int]], room: int) -> float:
  """The share of the places of these rows that hold a token."""
  return float(sum(lengths[index] for row in rows for index in row) / max(1, len(rows) * room))
