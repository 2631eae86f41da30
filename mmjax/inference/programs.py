"""A model's programs on batches of any number of examples: they are filled up to one of a few
sizes, so that a handful of compiled programs serve all.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax.parallel import rules
from mmjax.parallel.mesh import batch_shards

SIZES = (1, 8, 32, 128, 512)  # of batches, in examples


class Programs:
  """Runs programs of a model with its variables on a mesh.

  sizes: those that batches are filled up to, ascending; `most`: the largest.
  """

  def __init__(self, config, variables: Any, mesh: Mesh, batch_size: int):
    """batch_size: the most examples that go through the model at once."""
    self.config, self.variables, self.mesh = config, variables, mesh
    self.sizes = self._split(*(size for size in SIZES if size < batch_size), batch_size)
    self.most = self.sizes[-1]

  def in_use(self) -> contextlib.AbstractContextManager:
    """A context in which programs of the model run on its mesh."""
    return rules.use(self.mesh, rules.logical_rules(self.config))

  def jit(self, function: Callable, *constant: int) -> Callable:
    """Of a function of variables, batch and constants in the places `constant`; its rows are split
    as those of the batch.
    """
    sharding = rules.batch_sharding(self.mesh)
    return jax.jit(function, out_shardings=sharding, static_argnums=constant)

  def run(
    self, program: Callable, arguments: tuple, batches: Iterable[dict], limit: int = 0
  ) -> np.ndarray:
    """Rows of `program(variables, *arguments, batch)` for batches of at most `limit` examples (0 =
    `most`), each filled up; the next one is prepared while the devices work on the last.
    """
    waiting: tuple[Any, int] | None = None
    rows: list[np.ndarray] = []
    limit = limit or self.most
    sizes = self._split(*(size for size in self.sizes if size < limit), limit)
    sharding = rules.batch_sharding(self.mesh)
    with self.in_use():
      for batch in batches:
        for part in batch.values():
          part.pop("key", None)
        count = len(jax.tree.leaves(batch)[0])
        size = next(size for size in sizes if size >= count)
        filled = jax.tree.map(functools.partial(_fill_up, size=size), batch)
        result = program(self.variables, *arguments, jax.device_put(filled, sharding))
        if waiting:
          rows.append(np.asarray(waiting[0])[: waiting[1]])
        waiting = result, count
      if waiting:
        rows.append(np.asarray(waiting[0])[: waiting[1]])
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

  def _split(self, *sizes: int) -> list[int]:
    """Sizes that the devices divide, ascending: each the next above one of these."""
    shards = batch_shards(self.mesh)
    return sorted({-(-size // shards) * shards for size in sizes})


def _fill_up(x: np.ndarray, size: int) -> np.ndarray:
  return np.concatenate([x, np.repeat(x[:1], size - len(x), axis=0)])


def in_threads(function: Callable, items: Iterable, ahead: int = 64) -> Iterator:
  """`function` of each item, in order, worked out by threads at most `ahead` items before it is
  asked for.
  """
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for chunk in chunks(items, ahead):
      yield from pool.map(function, chunk)


def chunks(items: Iterable, size: int) -> Iterator[list]:
  """The items in lists of `size`, the last with what is left."""
  chunk = []
  for item in items:
    chunk.append(item)
    if len(chunk) == size:
      yield chunk
      chunk = []
  if chunk:
    yield chunk


def stack(examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The arrays of several examples as those of a batch."""
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
