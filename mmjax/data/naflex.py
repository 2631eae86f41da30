"""Pictures of any aspect ratio as sequences of patches within a budget: the input of the encoder kind `naflex`. NumPy only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.resample import resize_exact

_EPS = 1e-5  # how finely the scale of a picture is sought


class PatchSequence(NamedTuple):
  """patches uint8 [N, p * p * 3]; positions int32 [N, 2], each (row, column); mask bool [N]; grid int32 [2], (rows, columns)."""

  patches: np.ndarray
  positions: np.ndarray
  mask: np.ndarray
  grid: np.ndarray


def patch_sequence(pixels: np.ndarray, patch: int, budget: int) -> PatchSequence:
  """A picture uint8 [H, W, 3] resized to as many patches as `budget` allows at (nearly) its aspect ratio; N = budget.

  Patches go row by row, in each rows, columns, channels; the rest is zeros. Resizing is Pillow's antialiased bilinear, as
  SigLIP 2 prepares pictures (Tschannen et al. 2025, arXiv:2502.14786). Raises UserError: no uint8 RGB picture, no budget.
  """
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
    raise UserError(f"a picture must be uint8 of shape [H, W, 3], but is {pixels.dtype} of shape {list(pixels.shape)}")
  rows, columns = fitting_grid(pixels.shape[0], pixels.shape[1], patch, budget)
  resized = resize_exact(pixels, (rows * patch, columns * patch), "bilinear")
  cut = resized.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(rows * columns, -1)
  patches = np.zeros((budget, patch * patch * 3), np.uint8)
  positions = np.zeros((budget, 2), np.int32)
  patches[:len(cut)] = cut
  positions[:len(cut)] = np.stack(np.divmod(np.arange(len(cut)), columns), axis=1)
  return PatchSequence(patches, positions, np.arange(budget) < len(cut), np.array([rows, columns], np.int32))


def fitting_grid(height: int, width: int, patch: int, budget: int) -> tuple[int, int]:
  """(rows, columns) of patches of the largest scale at which a picture, each side rounded up to patches, has at most `budget`.

  Raises UserError: the budget is below 1, or a strip so long that no scale makes it fit.
  """
  if budget < 1 or patch < 1:
    raise UserError(f"a budget of {budget} patches of {patch} pixels: both must be at least 1")
  at = lambda scale: tuple(max(1, math.ceil(side * scale / patch)) for side in (height, width))
  low, high = _EPS / 10, 100.0
  while high - low >= _EPS:
    middle = (low + high) / 2
    rows, columns = at(middle)
    low, high = (middle, high) if rows * columns <= budget else (low, middle)
  rows, columns = at(low)
  if rows * columns > budget:
    raise UserError(f"a picture of {width} x {height} pixels does not fit {budget} patches of {patch} at any scale. Crop it")
  return rows, columns
