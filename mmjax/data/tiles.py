"""Pictures in tiles: one of many pixels is cut into squares of the size that the encoder sees, and
a small one of the whole picture comes after them (InternVL, Chen et al. 2024, arXiv:2404.16821;
Idefics 3, Laurencon et al. 2024, arXiv:2408.12637).

Each tile fills a slot of its own, so a picture has as many slots as it has tiles, and every slot
one shape. With data.image.tiles.grids the whole picture comes first, and the tokens of the tiles
make one grid, without those of the padding ("anyres" of LLaVA-OneVision, Li et al. 2024,
arXiv:2408.03326); of several pictures in one text each is but one tile then, padded to a square.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.resample import resize_exact


class Tiling(NamedTuple):
  """Rows and columns of the tiles of a picture, 0 = it is one; its height and width in pixels."""

  rows: int = 0
  columns: int = 0
  height: int = 0
  width: int = 0


def grid_of(height: int, width: int, size: int, least: int, most: int) -> tuple[int, int]:
  """(rows, columns) of the tiles, `least` to `most` of them, whose aspect ratio is nearest to the
  picture's; of equally near ones the last that has less than twice the picture's pixels.
  """
  ratio, best, distance = width / height, (1, 1), float("inf")
  for rows, columns in _grids(least, most):
    off = abs(ratio - columns / rows)
    larger = height * width > 0.5 * size * size * rows * columns
    if off < distance or (off == distance and larger):
      best, distance = (rows, columns), off
  return best


@functools.cache
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
  """(rows, columns) by their number, then by their columns."""
  sides = range(1, most + 1)
  grids = [
    (rows, columns) for columns in sides for rows in sides if least <= rows * columns <= most
  ]
  return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def cut_into_tiles(
  pixels: np.ndarray, image: Mapping[str, Any], alone: bool = True
) -> tuple[np.ndarray, Tiling]:
  """uint8 [H, W, 3] -> ([tiles, size, size, 3], row by row, then the whole picture where there are
  several, or before them with `grids`; how they lie). image: the config's data.image. alone: no
  other picture is in the text.
  """
  size, tiles, how = image["size"], image["tiles"], image["interpolation"]
  height, width = pixels.shape[:2]
  if tiles["grids"] and not alone:
    square = _padded(pixels, (max(height, width),) * 2, [int(255 * x) for x in image["mean"]])
    return resize_exact(square, (size, size), how)[None], Tiling()
  if tiles["grids"]:
    rows, columns = fullest_grid(height, width, size, tiles["grids"])
    target = rows * size, columns * size
    large = resize_exact(pixels, _within(height, width, *target), how)
    cut = _cut(_padded(large, target, [0, 0, 0]), size)
    whole = resize_exact(pixels, (size, size), how)
    return np.concatenate([whole[None], cut]), Tiling(rows, columns, height, width)
  if tiles["longest"]:
    side = _to_longest(pixels.shape[0], pixels.shape[1], tiles["longest"])
    pixels = resize_exact(pixels, side, how)
    rows, columns = _whole_tiles(*side, size)
  else:
    rows, columns = grid_of(height, width, size, tiles["least"], tiles["most"])
  large = resize_exact(pixels, (rows * size, columns * size), how)
  cut = _cut(large, size)
  if len(cut) == 1:
    return cut, Tiling()
  whole = resize_exact(large if tiles["longest"] else pixels, (size, size), how)
  return np.concatenate([cut, whole[None]]), Tiling(rows, columns, height, width)


def _cut(pixels: np.ndarray, size: int) -> np.ndarray:
  """[rows * size, columns * size, 3] -> [rows * columns, size, size, 3], row by row."""
  rows, columns = (side // size for side in pixels.shape[:2])
  cells = pixels.reshape(rows, size, columns, size, 3)
  return cells.swapaxes(1, 2).reshape(-1, size, size, 3)


def _to_longest(height: int, width: int, longest: int) -> tuple[int, int]:
  """(height, width) whose longest side is `longest`, the other even."""
  if width >= height:
    height = int(longest / (width / height))
    return max(1, height + height % 2), longest
  width = int(longest * (width / height))
  return longest, max(1, width + width % 2)


def _whole_tiles(height: int, width: int, size: int) -> tuple[int, int]:
  """(rows, columns) of tiles that hold a picture: the longest side rounded up, then the other."""
  if width >= height:
    columns = math.ceil(width / size)
    return math.ceil(int(columns * size / (width / height)) / size), columns
  rows = math.ceil(height / size)
  return rows, math.ceil(int(rows * size * (width / height)) / size)


# -- Tiles whose tokens make one grid --------------------------------------------------------------


def fullest_grid(
  height: int, width: int, size: int, grids: Sequence[tuple[int, int]]
) -> tuple[int, int]:
  """(rows, columns) of the tiles, of `grids` the one that keeps most of the picture's pixels; of
  those that keep as many the smallest, the first of equal ones.
  """

  def worth(grid: tuple[int, int]) -> tuple[int, int]:
    scale = min(grid[1] * size / width, grid[0] * size / height)
    kept = min(int(width * scale) * int(height * scale), height * width)
    return kept, -grid[0] * grid[1]

  rows, columns = max(grids, key=worth)
  return rows, columns


def _within(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
  """(height, width) that a picture has in a frame of rows x columns pixels, which it fills."""
  if columns / width < rows / height:
    return min(math.ceil(height * (columns / width)), rows), columns
  return rows, min(math.ceil(width * (rows / height)), columns)


def _padded(pixels: np.ndarray, frame: tuple[int, int], colour: Sequence[int]) -> np.ndarray:
  """uint8 [*frame, 3] with the picture in its middle."""
  out = np.empty((*frame, 3), np.uint8)
  out[...] = colour
  height, width = pixels.shape[:2]
  top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
  out[top : top + height, left : left + width] = pixels
  return out


def joined_tokens(tiling: Tiling, tokens: int, budget: int) -> tuple[np.ndarray, np.ndarray]:
  """The tokens of a picture in joined tiles: (offsets int32 [N, 4], weights float32 [N, 4]), each
  the sum of four so weighted, counted through its slots of `tokens` tokens, the last of which ends
  a row. First those of the whole picture, then the grid of the tiles without its padding, row by
  row; a grid of clearly more than `budget` tiles' is resized to that many, bilinearly.
  """
  side = math.isqrt(tokens - 1)
  if not tiling.columns:
    return _each_alone(np.arange(tokens))
  rows, columns = tiling.rows * side, tiling.columns * side
  top, left = _padding(tiling, rows, columns)
  high, wide = rows - 2 * top, columns - 2 * left
  shrink = math.sqrt(high * wide / (budget * side**2))
  shrink = shrink if shrink > 1.1 else 1.0
  (y, of_y), (x, of_x) = (_samples(n, int(n // shrink)) for n in (high, wide))
  row, column = y[:, None, :, None] + top, x[None, :, None, :] + left  # [h, w, 2, 2]
  tile = 1 + row // side * tiling.columns + column // side
  offsets = (tile * tokens + row % side * side + column % side).reshape(len(y), len(x), 4)
  weights = (of_y[:, None, :, None] * of_x[None, :, None, :]).reshape(len(y), len(x), 4)
  end = _each_alone(np.full(len(y), tokens - 1))
  grid = (
    np.concatenate([of_grid, of_end[:, None]], axis=1).reshape(-1, 4)
    for of_grid, of_end in zip((offsets, weights), end, strict=True)
  )
  offsets, weights = map(np.concatenate, zip(_each_alone(np.arange(side**2)), grid, strict=True))
  return offsets.astype(np.int32), weights.astype(np.float32)


def _each_alone(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Tokens that are mixed with none: (offsets int32 [N, 4], weights float32 [N, 4])."""
  weights = np.zeros((len(offsets), 4), np.float32)
  weights[:, 0] = 1
  return offsets[:, None].repeat(4, 1).astype(np.int32), weights


def most_joined_tokens(grids: Sequence[tuple[int, int]], tokens: int, budget: int) -> int:
  """How many tokens of `joined_tokens` a picture has at most."""
  side = math.isqrt(tokens - 1)
  each = (min(rows * columns, 1.21 * budget) * side**2 + rows * side for rows, columns in grids)
  return side**2 + math.ceil(max(each))


def _padding(tiling: Tiling, rows: int, columns: int) -> tuple[int, int]:
  """Rows above and columns left of what a picture fills of a grid of rows x columns tokens."""
  if tiling.width / tiling.height > columns / rows:
    return (rows - int(round(tiling.height * (columns / tiling.width), 7))) // 2, 0
  return 0, (columns - int(round(tiling.width * (rows / tiling.height), 7))) // 2


def _samples(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """([new, 2] neighbours, their weights) of linear interpolation with half-pixel centres."""
  place = np.maximum((np.arange(new) + 0.5) * old / max(new, 1) - 0.5, 0)
  low = place.astype(int)
  share = place - low
  return np.stack([low, np.minimum(low + 1, old - 1)], 1), np.stack([1 - share, share], 1)
