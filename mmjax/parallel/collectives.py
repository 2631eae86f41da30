"""All pairs of rows of a global batch, block by block: neighbours gather, then blocks travel a ring
of groups.

With D devices and `chunk` c, devices 0..c-1 form the first group, and so on. A device holds its own
rows and meets the columns of one group at a time (all_gather within the group), after which the
columns move on to the next group (ppermute): D / c hops instead of D, c times the memory of one
block. c = 1 is a plain ring, c = D one all_gather.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mmjax.parallel.mesh import BATCH_AXES

BLOCK = (
  4 * 2**20
  # pairs of a tile: 16 MiB in float32, so that a tile and what is computed from it stay below 64 MB
)
SIDE = 2048  # rows of a tile where a device's rows make too large a block

# tile(rows, columns, row_sums, column_sums) -> (row_sums, column_sums): adds what these rows and
# columns have together.
Tile = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class Ring(NamedTuple):
  """Devices that share a batch, in groups of `chunk`. Its methods run inside `per_device` (arrays
  of one device).
  """

  devices: int
  chunk: int

  @property
  def groups(self) -> int:
    return self.devices // self.chunk

  @property
  def _neighbours(self) -> list[list[int]]:
    return [list(range(g * self.chunk, (g + 1) * self.chunk)) for g in range(self.groups)]

  def gather(self, tree: Any) -> Any:
    """[b, ...] -> [chunk * b, ...], the rows of the group in order."""
    if self.chunk == 1:
      return tree
    gather = functools.partial(
      lax.all_gather, axis_name=BATCH_AXES, axis_index_groups=self._neighbours, tiled=True
    )
    return jax.tree.map(gather, tree)

  def scatter_sum(self, tree: Any) -> Any:
    """[chunk * b, ...] -> [b, ...]: the sum over the group, of which each device keeps its own
    rows.
    """
    if self.chunk == 1:
      return tree
    scatter = functools.partial(
      lax.psum_scatter, axis_name=BATCH_AXES, axis_index_groups=self._neighbours, tiled=True
    )
    return jax.tree.map(scatter, tree)

  def group_max(self, x: jax.Array) -> jax.Array:
    return x if self.chunk == 1 else lax.pmax(x, BATCH_AXES, axis_index_groups=self._neighbours)

  def own(self, x: jax.Array) -> jax.Array:
    """[chunk * b, ...] -> [b, ...]: this device's rows of what its group holds."""
    if self.chunk == 1:
      return x
    rows = x.shape[0] // self.chunk
    return lax.dynamic_slice_in_dim(x, lax.axis_index(BATCH_AXES) % self.chunk * rows, rows)

  def hop(self, tree: Any) -> Any:
    """To the device in the same place of the next group."""
    to = [(i, (i + self.chunk) % self.devices) for i in range(self.devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, BATCH_AXES, to), tree)

  def total(self, tree: Any) -> Any:
    """The sum over all devices."""
    return tree if self.devices == 1 else lax.psum(tree, BATCH_AXES)

  def visit(
    self, tile: Tile, rows: Any, columns: Any, row_sums: Any, column_sums: Any
  ) -> tuple[Any, Any, Any]:
    """Lets this device's rows meet the columns of all devices.

    rows, columns: trees of [b, ...]; row_sums, column_sums: trees of [b, ...] with the values that
    sums start from.
    Returns (row_sums, column_sums, columns). Column sums travel with their columns and return home:
    [chunk * b, ...], to be added up over the group (`scatter_sum`). The columns are back home too:
    who keeps these, and not the ones that left, keeps one copy less alive on the way.
    """
    work = functools.partial(_over_tiles, tile, rows, block_rows=jax.tree.leaves(rows)[0].shape[0])
    home, columns = columns, self.gather(columns)
    column_sums = jax.tree.map(lambda x: jnp.concatenate([x] * self.chunk), column_sums)
    if self.groups == 1:
      return *work(columns, row_sums, column_sums), home

    def meet(_: int, state: tuple) -> tuple:
      columns, row_sums, column_sums = state
      ahead = self.hop(columns)  # under way while this block is worked on
      row_sums, column_sums = work(columns, row_sums, column_sums)
      return ahead, row_sums, self.hop(column_sums)

    columns, row_sums, column_sums = lax.fori_loop(
      0, self.groups, meet, (columns, row_sums, column_sums)
    )
    return row_sums, column_sums, jax.tree.map(self.own, columns)


def make_ring(chunk: int) -> Ring:
  """The ring of the mesh in use; without one, a single device. The chunk is the largest divisor up
  to `chunk`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return Ring(
    devices, max(c for c in range(1, devices + 1) if devices % c == 0 and c <= max(1, chunk))
  )


def per_device(
  ring: Ring, function: Callable, whole: tuple[bool, ...], whole_out: tuple[bool, ...]
) -> Callable:
  """`function` of one device's rows as a function of global arrays.

  whole: for each argument, True where every device gets all of it (scalars), False where it gets
  its rows.
  Axes that do not split the batch (tensor, context) repeat the work.
  """
  if ring.devices == 1:
    return function

  def spec(is_whole):
    return P() if is_whole else P(BATCH_AXES)

  return jax.shard_map(
    function,
    in_specs=tuple(map(spec, whole)),
    out_specs=tuple(map(spec, whole_out)),
    check_vma=False,
  )


def pad_rows(tree: Any) -> Any:
  """Appends zero rows where a device's rows would not cut into equal tiles (fewer than one a
  thousand).
  """
  size = jax.tree.leaves(tree)[0].shape[0]
  extra = _tiles(size) * _tile_rows(size) - size
  if not extra:
    return tree
  return jax.tree.map(lambda x: jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1)), tree)


def _tiles(rows: int) -> int:
  return 1 if rows * rows <= BLOCK else math.ceil(rows / SIDE)


def _tile_rows(rows: int) -> int:
  return math.ceil(rows / _tiles(rows))


def _over_tiles(
  tile: Tile, rows: Any, columns: Any, row_sums: Any, column_sums: Any, *, block_rows: int
) -> tuple[Any, Any]:
  """`tile` over all pairs of rows and columns, never more than BLOCK of them at once."""
  side = _tile_rows(block_rows)
  down, across = block_rows // side, jax.tree.leaves(columns)[0].shape[0] // side
  merged = max(
    m for m in range(1, across + 1) if across % m == 0 and (m == 1 or m * side * side <= BLOCK)
  )
  across //= merged
  if down == across == 1:
    return tile(rows, columns, row_sums, column_sums)

  def cut(tree, n):
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), tree)

  def join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

  rows = cut(rows, down)

  def one_column(row_sums: Any, column: tuple) -> tuple:
    columns, column_sums = column

    def one_tile(column_sums: Any, row: tuple) -> tuple:
      row_sums, column_sums = tile(row[0], columns, row[1], column_sums)
      return column_sums, row_sums

    column_sums, row_sums = lax.scan(one_tile, column_sums, (rows, row_sums))
    return row_sums, column_sums

  row_sums, column_sums = lax.scan(
    one_column, cut(row_sums, down), (cut(columns, across), cut(column_sums, across))
  )
  return join(row_sums), join(column_sums)
