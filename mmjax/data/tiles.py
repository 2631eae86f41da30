"""Pictures in tiles: one of many pixels is cut into squares of the size that the encoder sees, and
a small one of the whole picture comes after them (InternVL, Chen et al. 2024, arXiv:2404.16821;
Idefics 3, Laurencon et al. 2024, arXiv:2408.12637).

Each tile fills a slot of its own, so a picture has as many slots as it has tiles, and every slot
one shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.resample import resize_exact


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


def cut_into_tiles(pixels: np.ndarray, image: Mapping[str, Any]) -> tuple[np.ndarray, int]:
  """uint8 [H, W, 3] -> ([tiles, size, size, 3], row by row, then the whole picture where there are
  several; their columns, 0 = it is one). image: the config's data.image.
  """
  size, tiles, how = image["size"], image["tiles"], image["interpolation"]
  if tiles["longest"]:
    side = _to_longest(pixels.shape[0], pixels.shape[1], tiles["longest"])
    pixels = resize_exact(pixels, side, how)
    rows, columns = _whole_tiles(*side, size)
  else:
    height, width = pixels.shape[:2]
    rows, columns = grid_of(height, width, size, tiles["least"], tiles["most"])
  large = resize_exact(pixels, (rows * size, columns * size), how)
  cut = large.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
  if len(cut) == 1:
    return cut, 0
  whole = resize_exact(large if tiles["longest"] else pixels, (size, size), how)
  return np.concatenate([cut, whole[None]]), columns


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
