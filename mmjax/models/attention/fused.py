"""Self-attention of short sequences on TPUs in one kernel: what stands between the input and the
output projection.

A whole sequence fits into a chip's vector memory, so nothing has to be blocked: the kernel reads
the projections of a few examples as the dense layer wrote them, rows [B L, 3 H K], keeps logits and
weights of one head or two at a time on the chip, and writes [B L, H K]. No transposes, no logits in
memory (written out they cost more than the matrix products of a base-size model). The backward pass
computes the weights again and needs nothing but the projections.

Pallas is imported where it is used: it takes a fifth of a second.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models.attention.mask import AttentionMask, one_block
from mmjax.models.platform import vector_memory

Array = jax.Array

LONGEST = 768  # tokens from which whole rows of logits are too long to be worth it
LANES = 128  # of a vector register
TILE = 8  # rows of a tile: lengths are multiples of it
_ROWS = 512  # tokens of one block: examples of short sequences travel together
_LOW = -1e30


def fits(length: int, heads: int, channels: int, itemsize: int) -> bool:
  """Whether the backward pass of one sequence fits into vector memory: projections, cotangent and
  gradients, each twice (one on its way while the other is worked on), and the logits of the heads
  that are worked on together and what is computed from them in float32."""
  return (
    length <= LONGEST
    and 14 * length * heads * channels * itemsize + 24 * _together(heads, channels) * length**2
    <= vector_memory()
  )


def fused_attention(
  qkv: Array,
  bias: Array | None,
  mask: AttentionMask,
  *,
  channels: int,
  length: int,
  scale: float,
  soft_cap: float = 0.0,
  interpret: bool = False,
) -> Array:
  """softmax(scale * q k^T + masks) v of `qkv` [B * length, 3 H K] + `bias` [3 H K]: [B * length, H
  K] in its dtype, the softmax in float32. Queries of all heads come first, then keys, then values;
  K = `channels`.

  mask: without offset and pairs. A query that no key is open to gives zero, and has zero gradient.
  """
  bias = jnp.zeros((1, qkv.shape[1]), qkv.dtype) if bias is None else bias[None]
  heads = qkv.shape[1] // 3 // channels
  position = AttentionMask(causal=mask.causal, window=mask.window, wide_blocks=mask.wide_blocks)
  settings = _Settings(length, heads, channels, position, scale, soft_cap, interpret)
  return _fused(settings, qkv, bias, _parts_of(mask, qkv.shape[0] // length, length))


def _parts_of(mask: AttentionMask, batch: int, length: int) -> _Parts:
  """The arrays of a mask as the kernels read them: numbers of keys in a row and of queries in a
  column, which have to be equal; hidden keys have one of their own.
  """
  rows = columns = trunks = prefix = None
  if mask.segments is not None or mask.keys is not None:
    numbers = jnp.zeros((batch, length)) if mask.segments is None else mask.segments
    numbers = numbers.astype(jnp.float32)
    columns = numbers if mask.key_segments is None else mask.key_segments.astype(jnp.float32)
    columns = columns if mask.keys is None else jnp.where(mask.keys, columns, _LOW)
    columns = columns[:, None, :]
    rows = None if mask.segments is None else numbers[:, :, None]
    if mask.trunks is not None:
      trunks = jnp.where(mask.trunks > 0, mask.trunks, -1).astype(jnp.float32)[:, :, None]
  if mask.prefix is not None and mask.by_position:
    prefix = mask.prefix.astype(jnp.int32)[:, None, None]
  blocks = key_blocks = None
  if mask.blocks is not None and mask.blocks_of_keys is not None and mask.by_position:
    blocks = mask.blocks.astype(jnp.float32)[:, :, None]
    key_blocks = mask.blocks_of_keys.astype(jnp.float32)[:, None, :]
  return _Parts(columns, rows, trunks, prefix, key_blocks, blocks)


class _Parts(NamedTuple):
  """Arrays of a mask: float32 [B, 1, L] of keys, [B, L, 1] of queries, int32 [B, 1, 1]; blocks of
  keys and of queries likewise.
  """

  columns: Array | None
  rows: Array | None
  trunks: Array | None
  prefix: Array | None
  key_blocks: Array | None
  blocks: Array | None


class _Settings(NamedTuple):
  """What a kernel is made for. position: a mask of positions alone; interpret: run by the
  interpreter, on any platform.
  """

  length: int
  heads: int
  channels: int
  position: AttentionMask
  scale: float
  soft_cap: float
  interpret: bool

  @property
  def together(self) -> int:
    return _together(self.heads, self.channels)


def _together(heads: int, channels: int) -> int:
  """Heads that are worked on at once: two that fill the lanes of a register, so that nothing is
  shifted along them; else one.
  """
  return 2 if 2 * channels == LANES and heads % 2 == 0 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings: _Settings, qkv: Array, bias: Array, parts: _Parts) -> Array:
  return _forward(settings, qkv, bias, parts)[0]


def _forward(
  settings: _Settings, qkv: Array, bias: Array, parts: _Parts
) -> tuple[Array, tuple[Array, Array, _Parts]]:
  out = jax.ShapeDtypeStruct((qkv.shape[0], settings.heads * settings.channels), qkv.dtype)
  return _call(settings, _forward_kernel, (qkv,), bias, parts, (out,))[0], (qkv, bias, parts)


def _backward(
  settings: _Settings, kept: tuple[Array, Array, _Parts], cotangent: Array
) -> tuple[Array, Array, None]:
  qkv, bias, parts = kept
  parts = _Parts(*(part if part is None else part.swapaxes(1, 2) for part in parts))
  examples = qkv.shape[0] // settings.length
  out = (
    jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
    jax.ShapeDtypeStruct((examples, 1, qkv.shape[1]), jnp.float32),
  )
  dqkv, sums = _call(settings, _backward_kernel, (qkv, cotangent), bias, parts, out)
  return dqkv, sums.sum(0).astype(bias.dtype), None


_fused.defvjp(_forward, _backward)


def _call(
  settings: _Settings, kernel, arrays: tuple[Array, ...], bias: Array, parts: _Parts, out: tuple
) -> list[Array]:
  """`kernel` over blocks of examples. Arrays [B * L, ...] or one row an example, [B, 1, ...]; bias
  [1, ...]; parts of a mask [B, ...].
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  length = settings.length
  b = arrays[0].shape[0] // length

  def few(n):
    return n * length <= _ROWS and fits(
      n * length, settings.heads, settings.channels, arrays[0].dtype.itemsize
    )

  block = next(n for n in range(max(1, _ROWS // length), 0, -1) if n == 1 or b % n == 0 and few(n))

  def spec(x):
    return (
      pl.BlockSpec((block * length, x.shape[1]), lambda i: (i, 0))
      if len(x.shape) == 2
      else pl.BlockSpec((block, *x.shape[1:]), lambda i: (i, 0, 0))
    )

  given = [part for part in parts if part is not None]
  operands = (*arrays, *given)
  body = functools.partial(kernel, settings, block, [part is not None for part in parts])
  return pl.pallas_call(
    body,
    grid=(b // block,),
    in_specs=[pl.BlockSpec(bias.shape, lambda i: (0, 0)), *map(spec, operands)],
    out_specs=[spec(x) for x in out],
    out_shape=out,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=vector_memory()
    ),
    interpret=settings.interpret,
    name=kernel.__name__.strip("_"),
  )(bias, *operands)


def _forward_kernel(settings: _Settings, block: int, given: list[bool], bias, qkv, *refs) -> None:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  length, heads, channels = settings[:3]
  parts, (out,) = _refs(given, refs)
  together = settings.together

  def example(i: Array, _: None) -> None:
    rows = pl.ds(pl.multiple_of(i * length, TILE), length)
    opened, own = _open(settings, parts, i), _lanes(settings)
    for h in range(0, heads, together):
      q, k, v = _of_heads(qkv, bias, rows, h, settings)
      if own is None:
        weights = _weights(q, k, opened, settings)[0]
        total = _not_zero(weights.sum(1, keepdims=True), opened)
        value = _dot(weights.astype(v.dtype), v) / total
      else:
        first, second = (
          _dot(
            _weights(jnp.where(mine, q, 0), k, opened, settings)[0].astype(v.dtype),
            jnp.where(mine, v, 1),  # the other head's lanes become the sum of the weights
          )
          for mine in (own, ~own)
        )
        total = pltpu.roll(jnp.where(own, second, first), channels, 1)
        value = jnp.where(own, first, second) / _not_zero(total, opened)
      out[rows, h * channels : (h + together) * channels] = value.astype(out.dtype)

  jax.lax.fori_loop(0, block, example, None)


def _backward_kernel(
  settings: _Settings, block: int, given: list[bool], bias, qkv, cotangent, *refs
) -> None:
  from jax.experimental import pallas as pl

  length, heads, channels = settings[:3]
  parts, (out, sums) = _refs(given, refs)
  together = settings.together

  def of_head(q: Array, k: Array, v: Array, do: Array, opened: Array | None) -> tuple:
    """Gradients of query, key and value [L, K], or [L, 2 K] where the lanes of another head stand
    beside them; float32, those of query and key not scaled.

    Logits stand a key a row: sums over keys then go down the rows, which takes no moves between
    lanes, and of five products one has to be transposed instead of two.
    """
    weights, slope = _weights(k, q, opened, settings, axis=0)
    weights = weights * (1 / _not_zero(weights.sum(0, keepdims=True), opened))
    dweights = _dot(v, do, (1, 1))
    dlogits = weights * (dweights - (weights * dweights).sum(0, keepdims=True))
    dlogits = (dlogits if slope is None else dlogits * slope).astype(q.dtype)
    return _dot(dlogits, k, (0, 0)), _dot(dlogits, q), _dot(weights.astype(do.dtype), do)

  def example(i: Array, _: None) -> None:
    rows = pl.ds(pl.multiple_of(i * length, TILE), length)
    opened, own = _open(settings, parts, i, query_axis=1), _lanes(settings)
    for h in range(0, heads, together):
      q, k, v = _of_heads(qkv, bias, rows, h, settings)
      do = cotangent[rows, h * channels : (h + together) * channels]
      if own is None:
        dq, dk, dv = of_head(q, k, v, do, opened)
      else:  # what is zero in the other head's lanes gives nothing to them
        first, second = (
          of_head(jnp.where(mine, q, 0), k, v, jnp.where(mine, do, 0), opened)
          for mine in (own, ~own)
        )
        dq = jnp.where(own, first[0], second[0])
        dk, dv = first[1] + second[1], first[2] + second[2]
      for n, gradient in enumerate((dq * settings.scale, dk * settings.scale, dv)):
        columns = slice((n * heads + h) * channels, (n * heads + h + together) * channels)
        out[rows, columns] = gradient.astype(out.dtype)
        sums[i, :, columns] = gradient.sum(0, keepdims=True)

  jax.lax.fori_loop(0, block, example, None)


def _dot(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
  """The product over an axis of each, float32."""
  contracted = ((axes[0],), (axes[1],)), ((), ())
  return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _lanes(settings: _Settings) -> Array | None:
  """bool [L, 2 K]: the lanes of the first of two heads; None where a head is alone."""
  if settings.together == 1:
    return None
  shape = (settings.length, 2 * settings.channels)
  return jax.lax.broadcasted_iota(jnp.int32, shape, 1) < settings.channels


def _not_zero(total: Array, opened: Array | None) -> Array:
  """Sums of weights, 1 where no key is open."""
  return total if opened is None else jnp.where(total > 0, total, 1.0)


def _refs(given: list[bool], refs: tuple) -> tuple[_Parts, tuple]:
  """(the parts of the mask, the outputs) of a kernel's last references."""
  count = sum(given)
  parts = iter(refs[:count])
  return _Parts(*(next(parts) if has else None for has in given)), refs[count:]


def _of_heads(qkv, bias, rows, h: int, settings: _Settings) -> list[Array]:
  """query, key and value [L, K] of the heads from `h` on that are worked on together."""
  heads, channels = settings.heads, settings.channels
  ends = ((n * heads + h, n * heads + h + settings.together) for n in range(3))
  columns = (slice(start * channels, end * channels) for start, end in ends)
  return [qkv[rows, column] + bias[:, column] for column in columns]


def _open(settings: _Settings, parts: _Parts, i: Array, query_axis: int = 0) -> Array | None:
  """bool [L, L] (or one row or column): which keys a query of example `i` may see; None = all.
  query_axis: that of the queries, as in `parts`.
  """
  opened = None
  if parts.columns is not None:
    columns = parts.columns[i]
    opened = columns == parts.rows[i] if parts.rows is not None else columns > _LOW
    if parts.trunks is not None:
      opened = opened | (columns == parts.trunks[i])
  if settings.position.by_position:
    shape = (settings.length, settings.length)
    row, column = (
      jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (query_axis, 1 - query_axis)
    )
    prefix = None if parts.prefix is None else parts.prefix[i]
    same = None
    if parts.blocks is not None and parts.key_blocks is not None:
      same = one_block(parts.blocks[i], parts.key_blocks[i])
    reach = settings.position.in_reach(row, column, prefix, same)
    if reach is not None:
      opened = reach if opened is None else reach & opened
  return opened


def _weights(
  a: Array, b: Array, opened: Array | None, settings: _Settings, axis: int = 1
) -> tuple[Array, Array | None]:
  """(exp(logits - largest) float32 [L, L], zero where closed; slope of the soft cap or None) of
  queries and keys, or of keys and queries. axis: that of the keys.
  """
  logits, slope, scale = _dot(a, b, (1, 1)), None, settings.scale
  if settings.soft_cap:
    capped = jnp.tanh(logits * (scale / settings.soft_cap))
    logits, slope, scale = capped * settings.soft_cap, 1 - jnp.square(capped), 1.0
  if opened is not None:
    logits = jnp.where(opened, logits, _LOW)
  weights = jnp.exp2((logits - logits.max(axis, keepdims=True)) * (scale * math.log2(math.e)))
  return weights if opened is None else jnp.where(opened, weights, 0.0), slope
