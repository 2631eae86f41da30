"""Pictures of any aspect ratio as sequences of patches within a budget: the input of the encoder
kind `naflex`. NumPy only.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.augment import Augment
from mmjax.data.image import Unreadable, decode
from mmjax.data.resample import resize_exact, resize_fast

_EPS = 1e-5  # how finely the scale of a picture is sought


class PatchSequence(NamedTuple):
  """patches uint8 [N, p * p * 3]; positions int32 [N, 2], each (row, column); mask bool [N]; grid
  int32 [2], (rows, columns).
  """

  patches: np.ndarray
  positions: np.ndarray
  mask: np.ndarray
  grid: np.ndarray


class SequenceTransform:
  """The picture transform of a config whose data.image.resize is "naflex": `transform(data, rng) ->
  PatchSequence`.

  `data`: encoded bytes, or decoded pixels uint8 [H, W, 3]. With train=False, or without `rng`,
  nothing is random. Else the operations of augment.py are drawn from `rng` alone; a random crop
  keeps its own aspect ratio. Raises Unreadable, also for a strip too long for the budget.
  `shapes`: {array of a PatchSequence: (shape, dtype)}.
  """

  def __init__(self, config, train: bool):
    self.patch, self.budget, self.interpolation = (
      int(config.patch),
      int(config.tokens),
      config.interpolation,
    )
    self.merge, self.least = int(config.merge), int(config.least)
    self.augment = Augment(**dict(config.augment.items())) if train else None
    n = self.budget // self.merge**2 * self.merge**2
    self.shapes = {
      "patches": ((n, self.patch**2 * 3), np.uint8),
      "positions": ((n, 2), np.int32),
      "mask": ((n,), np.bool_),
      "grid": ((2,), np.int32),
    }

  def __call__(
    self, data: bytes | np.ndarray, rng: np.random.Generator | None = None
  ) -> PatchSequence:
    pixels = data if isinstance(data, np.ndarray) else decode(data)
    if self.augment is None or rng is None:
      return patch_sequence(
        pixels, self.patch, self.budget, self.interpolation, self.merge, self.least
      )
    draws = self.augment.draw(rng)
    if self.augment.crops:
      height, width = pixels.shape[:2]
      left, top, right, bottom = self.augment.box(height, width, draws)
      pixels = pixels[top:bottom, left:right]
    height, width = pixels.shape[:2]
    rows, columns = grid_of(height, width, self.patch, self.budget, self.merge, self.least)
    pixels = resize_fast(pixels, (rows * self.patch, columns * self.patch), self.interpolation)
    return cut(self.augment.apply(pixels, draws, rng), self.patch, self.budget, self.merge)


def patch_sequence(
  pixels: np.ndarray,
  patch: int,
  budget: int,
  interpolation: Literal["bicubic", "bilinear"] = "bilinear",
  merge: int = 1,
  least: int = 1,
) -> PatchSequence:
  """A picture uint8 [H, W, 3] resized to as many patches as `budget` allows at (nearly) its aspect
  ratio; N = budget. merge, least: see `grid_of`.

  Resizing is Pillow's antialiased one; bilinear is what SigLIP 2 prepares pictures with (Tschannen
  et al. 2025, arXiv:2502.14786).
  Raises UserError: no uint8 RGB picture, no budget; Unreadable: a strip too long for the budget.
  """
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
    raise UserError(
      f"a picture must be uint8 of shape [H, W, 3], but is {pixels.dtype} of shape "
      f"{list(pixels.shape)}"
    )
  rows, columns = grid_of(pixels.shape[0], pixels.shape[1], patch, budget, merge, least)
  pixels = resize_exact(pixels, (rows * patch, columns * patch), interpolation)
  return cut(pixels, patch, budget, merge)


def cut(pixels: np.ndarray, patch: int, budget: int, merge: int = 1) -> PatchSequence:
  """A picture uint8 [rows * patch, columns * patch, 3] as patches, row by row, in each rows,
  columns, channels; the rest is zeros. merge: as many rows and columns of patches make a square,
  whose patches come one after another; N is the whole squares of `budget`.
  """
  budget = budget // merge**2 * merge**2
  rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
  count = rows * columns
  patches = np.zeros((budget, patch * patch * 3), np.uint8)
  positions = np.zeros((budget, 2), np.int32)
  squares = np.arange(count).reshape(rows // merge, merge, columns // merge, merge)
  order = squares.swapaxes(1, 2).ravel()
  cells = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(count, -1)
  patches[:count] = cells[order]
  positions[:count] = np.stack(np.divmod(order, columns), axis=1)
  return PatchSequence(
    patches, positions, np.arange(budget) < count, np.array([rows, columns], np.int32)
  )


def size_class(count: int, merge: int) -> int:
  """A budget of a few sizes, in whole squares of merge x merge, that holds `count` patches."""
  squares = -(-count // merge**2)
  return (1 << max(4, (squares - 1).bit_length())) * merge**2


def picture_of(sequence: PatchSequence) -> np.ndarray:
  """The picture uint8 [rows * p, columns * p, 3] that a sequence was cut from."""
  (rows, columns), patch = sequence.grid.tolist(), math.isqrt(sequence.patches.shape[1] // 3)
  cells = np.zeros((rows, columns, patch, patch, 3), np.uint8)
  places = sequence.positions[: rows * columns]
  cells[places[:, 0], places[:, 1]] = sequence.patches[: rows * columns].reshape(
    -1, patch, patch, 3
  )
  return cells.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


def grid_of(
  height: int, width: int, patch: int, budget: int, merge: int, least: int
) -> tuple[int, int]:
  """(rows, columns) of patches of a picture: with merge = 1 those of `fitting_grid`; else of whole
  squares of merge x merge patches, as near as can be to its own size, from `least` to `budget`
  patches (Qwen2-VL, Wang et al. 2024, arXiv:2409.12191). Raises Unreadable: a strip too long.
  """
  if merge == 1:
    return fitting_grid(height, width, patch, budget)
  if max(height, width) > 200 * min(height, width):
    raise Unreadable(f"a picture of {width} x {height} pixels is over 200 times as long. Crop it")
  side, pixels = patch * merge, patch**2
  rows, columns = (max(1, round(n / side)) * side for n in (height, width))
  if rows * columns > budget * pixels:
    shrink = math.sqrt(height * width / (budget * pixels))
    rows, columns = (max(side, math.floor(n / shrink / side) * side) for n in (height, width))
  elif rows * columns < least * pixels:
    grow = math.sqrt(least * pixels / (height * width))
    rows, columns = (math.ceil(n * grow / side) * side for n in (height, width))
  if rows * columns > budget * pixels:
    raise Unreadable(
      f"a picture of {width} x {height} pixels does not fit {budget} patches of {patch} at any "
      "scale. Crop it"
    )
  return rows // patch, columns // patch


def fitting_grid(height: int, width: int, patch: int, budget: int) -> tuple[int, int]:
  """(rows, columns) of patches of the largest scale at which a picture, each side rounded up to
  patches, has at most `budget`.

  Raises UserError: the budget is below 1; Unreadable: a strip so long that no scale makes it fit.
  """
  if budget < 1 or patch < 1:
    raise UserError(f"a budget of {budget} patches of {patch} pixels: both must be at least 1")

  def grid_at(scale: float) -> tuple[int, int]:
    return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

  low, high = _EPS / 10, 100.0
  while high - low >= _EPS:
    middle = (low + high) / 2
    rows, columns = grid_at(middle)
    low, high = (middle, high) if rows * columns <= budget else (low, middle)
  rows, columns = grid_at(low)
  if rows * columns > budget:
    raise Unreadable(
      f"a picture of {width} x {height} pixels does not fit {budget} patches of {patch} at any "
      "scale. Crop it"
    )
  return rows, columns
