"""Ring attention: the sequence is split over a mesh axis, and keys and values travel from device to
device until every query has met every key (Liu et al. 2023, arXiv:2310.01889).

A device holds its own queries and one block of keys and values at a time, with a running softmax in
float32 (Milakov and Gimelshein 2018, arXiv:1805.02867). The backward pass sends the blocks round
once more and computes their weights again, and the gradients of a block travel with it until they
are home. So neither pass ever holds logits of more than its own queries against AT_ONCE keys. Rows
without a key that they may see give exactly zero, and take and give no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mmjax.models.attention.mask import AttentionMask, one_block, one_segment

Array = jax.Array

# keys of a visiting block whose logits are held at once, where its length has such a divisor
AT_ONCE = 1024


class Ring(NamedTuple):
  """What does not change on the way round. spec: layout of query and result [B, L, H, K]; its
  second entry is the axis of the ring, which has `devices` devices."""

  spec: P
  devices: int
  scale: float
  soft_cap: float

  @property
  def axis(self) -> str:
    return self.spec[1]

  def specs(self, mask: AttentionMask) -> tuple:
    """Layouts of query, key, value and mask."""
    batch, axis = self.spec[0], self.axis
    layouts: dict[str, Any] = dict(
      prefix=P(batch),
      blocks=P(batch, axis),
      key_blocks=P(batch, axis),
      keys=P(batch, axis),
      segments=P(batch, axis),
      key_segments=P(batch, axis),
      trunks=P(batch, axis),
      pairs=P(batch, axis, None),
    )
    given = {name: x for name, x in layouts.items() if getattr(mask, name) is not None}
    return self.spec, self.spec, self.spec, dataclasses.replace(mask, **given)

  def sums(self) -> P:
    """Layout of one number a query and head [B, H, L]."""
    return P(self.spec[0], self.spec[2], self.axis)

  def hop(self, tree: Any) -> Any:
    """To the next device."""
    to = [(i, (i + 1) % self.devices) for i in range(self.devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, self.axis, to), tree)

  def logits(
    self, query: Array, key: Array, mask: AttentionMask, start: Array
  ) -> tuple[Array, Array | None]:
    """(float32 [B, H, L, T] of a tile of keys, the first of which is number `start` of the
    sequence, -inf where it may not be seen; slope of the soft cap or None).

    query [B, H, L, K], scaled; key [B, H, T, K]; mask: its keys, key_segments and key_blocks of the
    tile, its pairs of all keys.
    """
    logits, slope = _product("bhld,bhtd->bhlt", query, key), None
    if self.soft_cap:
      capped = jnp.tanh(logits / self.soft_cap)
      logits, slope = capped * self.soft_cap, 1 - jnp.square(capped)
    length, keys = logits.shape[2:]
    row = (lax.axis_index(self.axis) * length + jnp.arange(length))[:, None]
    prefix = None if mask.prefix is None else mask.prefix[:, None, None]
    same = None
    if mask.blocks is not None and mask.key_blocks is not None:
      same = one_block(mask.blocks[:, :, None], mask.key_blocks[:, None])
    allowed = [mask.in_reach(row, start + jnp.arange(keys), prefix, same)]
    if mask.keys is not None:
      allowed.append(mask.keys[:, None])
    if mask.segments is not None and mask.key_segments is not None:
      trunks = None if mask.trunks is None else mask.trunks[:, :, None]
      allowed.append(one_segment(mask.segments[:, :, None], mask.key_segments[:, None], trunks))
    if mask.pairs is not None:
      allowed.append(lax.dynamic_slice_in_dim(mask.pairs, start, keys, 2))
    for part in allowed:
      if part is not None:
        part = part[:, None] if part.ndim == 3 else part
        logits = jnp.where(part, logits, -jnp.inf)
    return logits, slope


def ring_attention(
  query: Array, key: Array, value: Array, mask: AttentionMask, ring: Ring
) -> Array:
  """query [B, L, H, K], key and value [B, S, G, K] -> [B, L, H, K], the same as the plain formula;
  the mask without an offset. L and S are multiples of the ring's devices; lengths may differ.
  Arrays are global: call it outside of shard_map."""
  if mask.segments is not None:  # those of the keys travel
    mask = dataclasses.replace(mask, key_segments=mask.key_numbers)
  if mask.blocks is not None:
    mask = dataclasses.replace(mask, key_blocks=mask.blocks_of_keys)
  return _attend(ring, query, key, value, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
  return _forward(ring, query, key, value, mask)[0]


def _forward(
  ring: Ring, query: Array, key: Array, value: Array, mask: AttentionMask
) -> tuple[Array, tuple]:
  run = jax.shard_map(
    functools.partial(_forward_here, ring),
    in_specs=ring.specs(mask),
    out_specs=(ring.spec, ring.sums()),
    check_vma=False,
  )
  out, norm = run(query, key, value, mask)
  return out, (query, key, value, mask, out, norm)


def _backward(ring: Ring, kept: tuple, cotangent: Array) -> tuple:
  run = jax.shard_map(
    functools.partial(_backward_here, ring),
    in_specs=(*ring.specs(kept[3]), ring.spec, ring.sums(), ring.spec),
    out_specs=(ring.spec,) * 3,
    check_vma=False,
  )
  query, key, value, mask, out, norm = kept
  return *run(query, key, value, mask, out, norm, cotangent), None


_attend.defvjp(_forward, _backward)


def _forward_here(
  ring: Ring, query: Array, key: Array, value: Array, mask: AttentionMask
) -> tuple[Array, Array]:
  """One device's queries: (result [B, L, H, K], log of the sum of exponentials float32 [B, H, L], 0
  where no key was seen).
  """
  query, key, value = _by_head(ring, query, key, value)
  rows = query.shape[:3]
  spread = functools.partial(jnp.repeat, repeats=query.shape[1] // key.shape[1], axis=1)

  def meet(state: tuple, part: tuple, start: Array) -> tuple:
    (highest, total, out), (key, value, mask) = state, part
    key, value = spread(key), spread(value)
    logits, _ = ring.logits(query, key, mask, start)
    now = jnp.maximum(highest, logits.max(-1))
    base = jnp.where(now == -jnp.inf, 0, now)
    weights, shrink = jnp.exp(logits - base[..., None]), jnp.exp(highest - base)
    more = _product("bhlt,bhtd->bhld", weights.astype(value.dtype), value)
    return now, total * shrink + weights.sum(-1), out * shrink[..., None] + more

  def visit(state: tuple, block: tuple, source: Array) -> tuple:
    return _over_tiles(
      lambda state, at, part: meet(state, part, source * block[0].shape[2] + at), state, block
    )

  state = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, value.shape[-1]))
  highest, total, out = _round(ring, visit, state, (key, value, mask))[0]
  some = total > 0
  total = jnp.where(some, total, 1)
  out = (out / total[..., None]).astype(value.dtype).swapaxes(1, 2)
  return out, jnp.where(some, highest + jnp.log(total), 0)


def _backward_here(
  ring: Ring,
  query: Array,
  key: Array,
  value: Array,
  mask: AttentionMask,
  out: Array,
  norm: Array,
  cotangent: Array,
) -> tuple[Array, Array, Array]:
  """Gradients of one device's queries, keys and values (Dao et al. 2022, arXiv:2205.14135, appendix
  B.4).
  """
  dtypes = query.dtype, key.dtype, value.dtype
  query, key, value = _by_head(ring, query, key, value)
  cotangent, out = cotangent.swapaxes(1, 2), out.swapaxes(1, 2)
  spread = functools.partial(jnp.repeat, repeats=query.shape[1] // key.shape[1], axis=1)
  inner = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

  def meet(state: tuple, part: tuple, at: Array, start: Array) -> tuple:
    (into_query, into_key, into_value), (key, value, mask) = state, part
    key, value = spread(key), spread(value)
    logits, slope = ring.logits(query, key, mask, start)
    weights = jnp.exp(logits - norm[..., None])
    dlogits = weights * (_product("bhld,bhtd->bhlt", cotangent, value) - inner)
    dlogits = (dlogits if slope is None else dlogits * slope).astype(query.dtype)

    def add(x: Array, more: Array) -> Array:
      more = more.reshape(x.shape[0], x.shape[1], -1, *more.shape[2:]).sum(2)
      old = lax.dynamic_slice_in_dim(x, at, more.shape[2], 2)
      return lax.dynamic_update_slice_in_dim(x, old + more, at, 2)

    return (
      into_query + _product("bhlt,bhtd->bhld", dlogits, key),
      add(into_key, _product("bhlt,bhld->bhtd", dlogits, query)),
      add(into_value, _product("bhlt,bhld->bhtd", weights.astype(cotangent.dtype), cotangent)),
    )

  def visit(state: tuple, block: tuple, source: Array) -> tuple:
    return _over_tiles(
      lambda state, at, part: meet(state, part, at, source * block[0].shape[2] + at), state, block
    )

  state = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  into_query, into_key, into_value = _round(ring, visit, state, (key, value, mask), travel=2)[0]
  gradients = into_query * ring.scale, into_key, into_value
  to_query, to_key, to_value = (
    x.astype(dtype).swapaxes(1, 2) for x, dtype in zip(gradients, dtypes, strict=True)
  )
  return to_query, to_key, to_value


def _round(
  ring: Ring, visit: Callable, state: tuple, block: tuple, travel: int = 0
) -> tuple[tuple, tuple]:
  """`visit(state, block, source)` with the block of every device, this one's first: (state, the
  block that came last).

  The last `travel` parts of the state belong to the block: they go with it, and come home at the
  end. Of the mask travels what belongs to keys.
  """
  here = lax.axis_index(ring.axis)

  def hop(block: tuple) -> tuple:
    key, value, mask = block
    of_keys = dict(keys=mask.keys, key_segments=mask.key_segments, key_blocks=mask.key_blocks)
    key, value, of_keys = ring.hop((key, value, of_keys))
    return key, value, dataclasses.replace(mask, **of_keys)

  def send(state: tuple) -> tuple:
    cut = len(state) - travel
    return *state[:cut], *ring.hop(state[cut:])

  def step(number: int, carry: tuple) -> tuple:
    state, block = carry
    ahead = hop(block)  # under way while this block is worked on
    return send(visit(state, block, (here - number) % ring.devices)), ahead

  state, block = lax.fori_loop(0, ring.devices - 1, step, (state, block))
  return send(visit(state, block, (here + 1) % ring.devices)), block


def _over_tiles(meet: Callable, state: tuple, block: tuple) -> tuple:
  """`meet(state, at, (key, value, mask))` with a block's tiles, one after the other; `at`: the
  first key of the tile in the block.
  """
  key, value, mask = block
  keys = key.shape[2]
  tile = max(n for n in range(1, min(keys, AT_ONCE) + 1) if keys % n == 0)
  if tile in (1, keys):
    return meet(state, 0, block)

  def one(number: int, state: tuple) -> tuple:
    at = number * tile

    def cut(x: Array | None, axis: int) -> Array | None:
      return None if x is None else lax.dynamic_slice_in_dim(x, at, tile, axis)

    parts = dict(keys=mask.keys, key_segments=mask.key_segments, key_blocks=mask.key_blocks)
    own = {name: cut(part, 1) for name, part in parts.items()}
    return meet(state, at, (cut(key, 2), cut(value, 2), dataclasses.replace(mask, **own)))

  return lax.fori_loop(0, keys // tile, one, state)


def _by_head(ring: Ring, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
  """[B, H, L, K] each, the query scaled."""
  scaled = query * jnp.asarray(ring.scale, query.dtype)
  return scaled.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)


def _product(equation: str, x: Array, y: Array) -> Array:
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
