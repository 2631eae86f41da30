"""Who sees whom in attention, said once for every kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """A query sees a key that every given part opens to it. B examples, L queries, S keys.

  causal: keys up to the query's own position. window: the last so many of these, itself among them
  (or, where not causal, keys less than so many positions away on either side); 0 = all.
  prefix: int32 [B], so many first keys are open to all queries, whatever causal and window say.
  blocks: int32 [B, L] (and key_blocks [B, S], where keys are not the queries' own tokens): tokens
  of one block, such as a picture, see each other both ways; 0 = in none. The window holds in a
  block too, unless wide_blocks.
  keys: bool [B, S], the keys that are real.
  segments: int32 [B, L] (and key_segments [B, S], where keys are not the queries' own tokens):
  examples that share a row; only equal numbers meet.
  trunks: int32 [B, L]: a second segment, of which a query sees the keys too; 0 = none. Branches of
  one trunk, such as questions about one picture, do not see each other.
  offset: int32 scalar or [B], the position of the first query among the keys, as behind a cache.
  pairs: bool [B, L, S], for what the other parts cannot say; kernels must then hold it.
  """

  causal: bool = dataclasses.field(default=False, metadata=dict(static=True))
  window: int = dataclasses.field(default=0, metadata=dict(static=True))
  wide_blocks: bool = dataclasses.field(default=False, metadata=dict(static=True))
  prefix: Array | None = None
  blocks: Array | None = None
  key_blocks: Array | None = None
  keys: Array | None = None
  segments: Array | None = None
  key_segments: Array | None = None
  trunks: Array | None = None
  offset: Array | int | None = None
  pairs: Array | None = None

  @property
  def key_numbers(self) -> Array | None:
    """The segments of the keys, int32 [B, S]."""
    return self.segments if self.key_segments is None else self.key_segments

  @property
  def blocks_of_keys(self) -> Array | None:
    """The blocks of the keys, int32 [B, S]."""
    return self.blocks if self.key_blocks is None else self.key_blocks

  @property
  def by_position(self) -> bool:
    """Whether positions alone say something, for all examples alike (causal, window)."""
    return self.causal or self.window > 0

  @property
  def arrays(self) -> bool:
    """Whether some part is an array: the mask may then differ between examples."""
    parts = (self.prefix, self.blocks, self.keys, self.segments, self.offset, self.pairs)
    return any(part is not None for part in parts)

  def in_reach(
    self, rows: Array, columns: Array, prefix: Array | None = None, same: Array | None = None
  ) -> Array | None:
    """What positions say: bool of the broadcast shape of the positions of queries and keys (and of
    `prefix`, and of `same`, whether the two are of one block; by default none); None = all. In
    kernels too.
    """
    reach = columns <= rows if self.causal else None
    if reach is not None and same is not None:
      reach = reach | same
    if self.window:
      near = columns > rows - self.window
      if not self.causal:
        near &= columns < rows + self.window
      if self.wide_blocks and same is not None:
        near = near | same
      reach = near if reach is None else reach & near
    return reach if reach is None or prefix is None else reach | (columns < prefix)

  def dense(self, length: int, keys: int) -> Array | None:
    """bool [B or 1, L or 1, S]: the whole mask, for kernels that write their logits out; None =
    all.
    """
    rows = jnp.arange(length)[None, :, None]
    if self.offset is not None:
      rows = rows + jnp.asarray(self.offset).reshape(-1, 1, 1)
    prefix = None if self.prefix is None else self.prefix[:, None, None]
    same = None
    if self.blocks is not None and self.blocks_of_keys is not None:
      same = one_block(self.blocks[:, :, None], self.blocks_of_keys[:, None, :])
    parts = [self.in_reach(rows, jnp.arange(keys)[None, None], prefix, same)]
    if self.keys is not None:
      parts.append(self.keys[:, None, :])
    if self.segments is not None and self.key_numbers is not None:
      trunks = None if self.trunks is None else self.trunks[:, :, None]
      parts.append(one_segment(self.segments[:, :, None], self.key_numbers[:, None, :], trunks))
    given = [part for part in (*parts, self.pairs) if part is not None]
    return functools.reduce(jnp.logical_and, given) if given else None

  def whole(self, batch: int, length: int, keys: int) -> Array:
    """bool [B, L, S]: `dense`, written out for every example and query."""
    dense = self.dense(length, keys)
    return jnp.broadcast_to(True if dense is None else dense, (batch, length, keys))

  def padded(self, batch: int, length: int, wanted: int) -> AttentionMask:
    """The mask of a sequence to itself, filled up from `length` to `wanted` tokens that nobody
    sees.
    """
    keys = jnp.ones((batch, length), bool) if self.keys is None else self.keys
    more = ((0, 0), (0, wanted - length))
    numbers = dict(segments=self.segments, trunks=self.trunks, blocks=self.blocks)
    filled: dict[str, Any] = {k: jnp.pad(x, more) for k, x in numbers.items() if x is not None}
    return dataclasses.replace(self, keys=jnp.pad(keys, more), **filled)


def one_segment(rows: Array, columns: Array, trunks: Array | None = None) -> Array:
  """bool: which queries and keys meet, by the numbers of their segments and of queries' trunks."""
  met = rows == columns
  return met if trunks is None else met | ((trunks == columns) & (trunks > 0))


def one_block(rows: Array, columns: Array) -> Array:
  """bool: which queries and keys, by the numbers of their blocks, are of the same one."""
  return (rows == columns) & (rows > 0)
