"""Self-attention of short sequences on TPUs in one kernel: what stands between the input and the
output projection.

A whole sequence fits into a chip's vector memory, so nothing has to be blocked: the kernel reads
the projections of a few examples as the dense layer wrote them, rows [B L, 3 H K], keeps logits and
weights of one head at a time on the chip, and writes [B L, H K]. No transposes, no logits in memory
(written out they cost more than the matrix products of a base-size model). The backward pass
computes the weights again and needs nothing but the projections.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmjax.models.platform import vector_memory

Array = jax.Array

LONGEST = 768  # tokens from which whole rows of logits are too long to be worth it
TILE = 8  # rows of a tile: lengths are multiples of it
_ROWS = 512  # tokens of one block: examples of short sequences travel together
_LOW = -1e30


def fits(length: int, heads: int, channels: int, itemsize: int) -> bool:
  """Whether the backward pass of one sequence fits into vector memory: projections, cotangent and
  gradients, each twice (one on its way while the other is worked on), and the logits of a head and
  what is computed from them in float32."""
  return (
    length <= LONGEST
    and 14 * length * heads * channels * itemsize + 24 * length**2 <= vector_memory()
  )


def fused_attention(
  qkv: Array,
  bias: Array | None,
  mask: Array | None,
  *,
  channels: int,
  length: int,
  causal: bool,
  scale: float,
  interpret: bool = False,
) -> Array:
  """softmax(scale * q k^T + masks) v of `qkv` [B * length, 3 H K] + `bias` [3 H K]: [B * length, H
  K] in its dtype, the softmax in float32. Queries of all heads come first, then keys, then values;
  K = `channels`.

  mask: bool [B, length], True = may be seen. A query that no key is open to gives zero, and has
  zero gradient.
  """
  seen = None if mask is None else mask.astype(jnp.float32)[:, None]
  bias = jnp.zeros((1, qkv.shape[1]), qkv.dtype) if bias is None else bias[None]
  return _fused(
    _Settings(length, qkv.shape[1] // 3 // channels, channels, causal, scale, interpret),
    qkv,
    bias,
    seen,
  )


class _Settings(NamedTuple):
  """What a kernel is made for; interpret: run by the interpreter, on any platform."""

  length: int
  heads: int
  channels: int
  causal: bool
  scale: float
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings: _Settings, qkv: Array, bias: Array, seen: Array | None) -> Array:
  return _forward(settings, qkv, bias, seen)[0]


def _forward(
  settings: _Settings, qkv: Array, bias: Array, seen: Array | None
) -> tuple[Array, tuple]:
  out = jax.ShapeDtypeStruct((qkv.shape[0], settings.heads * settings.channels), qkv.dtype)
  return _call(settings, _forward_kernel, (qkv,), bias, seen, (out,))[0], (qkv, bias, seen)


def _backward(settings: _Settings, kept: tuple, cotangent: Array) -> tuple:
  qkv, bias, seen = kept
  like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  dqkv, sums = _call(
    settings,
    _backward_kernel,
    (qkv, cotangent),
    bias,
    seen,
    (
      like(qkv.shape, qkv.dtype),
      like((qkv.shape[0] // settings.length, 1, qkv.shape[1]), jnp.float32),
    ),
  )
  return dqkv, sums.sum(0).astype(bias.dtype), None


_fused.defvjp(_forward, _backward)


def _call(
  settings: _Settings,
  kernel,
  arrays: tuple[Array, ...],
  bias: Array,
  seen: Array | None,
  out: tuple,
) -> list[Array]:
  """`kernel` over blocks of examples. Arrays [B * L, ...] or one row an example, [B, 1, ...]; bias
  [1, ...]; seen float32 [B, 1, L].
  """
  length = settings.length
  b = arrays[0].shape[0] // length
  few = lambda n: (
    n * length <= _ROWS
    and fits(n * length, settings.heads, settings.channels, arrays[0].dtype.itemsize)
  )
  block = next(n for n in range(max(1, _ROWS // length), 0, -1) if n == 1 or b % n == 0 and few(n))
  spec = lambda x: (
    pl.BlockSpec((block * length, x.shape[1]), lambda i: (i, 0))
    if len(x.shape) == 2
    else pl.BlockSpec((block, *x.shape[1:]), lambda i: (i, 0, 0))
  )
  operands = arrays if seen is None else (*arrays, seen)
  body = functools.partial(kernel, settings, block, seen is not None)
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


def _forward_kernel(settings: _Settings, block: int, masked: bool, bias, qkv, *refs) -> None:
  length, heads, channels, causal, scale, _ = settings
  seen, out = (refs[0] if masked else None), refs[-1]

  def example(i: Array, _: None) -> None:
    rows = pl.ds(pl.multiple_of(i * length, TILE), length)
    opened = _open(length, causal, None if seen is None else seen[i])
    for h in range(heads):
      q, k, v = _parts(qkv, bias, rows, h, heads, channels)
      weights, total = _weights(q, k, opened, scale)
      value = jax.lax.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
      out[rows, h * channels : (h + 1) * channels] = value.astype(out.dtype)

  jax.lax.fori_loop(0, block, example, None)


def _backward_kernel(settings: _Settings, block: int, masked: bool, bias, qkv, pull, *refs) -> None:
  length, heads, channels, causal, scale, _ = settings
  seen, (out, sums) = (refs[0] if masked else None), refs[-2:]
  over = lambda a, b, axes: jax.lax.dot_general(
    a, b, (axes, ((), ())), preferred_element_type=jnp.float32
  )

  def example(i: Array, _: None) -> None:
    rows = pl.ds(pl.multiple_of(i * length, TILE), length)
    opened = _open(length, causal, None if seen is None else seen[i])
    for h in range(heads):
      q, k, v = _parts(qkv, bias, rows, h, heads, channels)
      do = pull[rows, h * channels : (h + 1) * channels]
      weights, total = _weights(q, k, opened, scale)
      weights = weights / total
      dweights = over(do, v, ((1,), (1,)))
      dlogits = (weights * (dweights - (weights * dweights).sum(1, keepdims=True)) * scale).astype(
        q.dtype
      )
      parts = (
        over(dlogits, k, ((1,), (0,))),
        over(dlogits, q, ((0,), (0,))),
        over(weights.astype(do.dtype), do, ((0,), (0,))),
      )
      for n, part in enumerate(parts):
        place = slice((n * heads + h) * channels, (n * heads + h + 1) * channels)
        out[rows, place] = part.astype(out.dtype)
        sums[i, :, place] = part.sum(0, keepdims=True)

  jax.lax.fori_loop(0, block, example, None)


def _parts(qkv, bias, rows, h: int, heads: int, channels: int) -> list[Array]:
  """query, key and value [L, K] of one head."""
  places = (slice((n * heads + h) * channels, (n * heads + h + 1) * channels) for n in range(3))
  return [qkv[rows, place] + bias[:, place] for place in places]


def _open(length: int, causal: bool, seen: Array | None) -> Array | None:
  """bool [L, L] (or [1, L]): which keys a query may see; None = all."""
  opened = None if seen is None else seen > 0
  if causal:
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    opened = key <= query if opened is None else (key <= query) & opened
  return opened


def _weights(q: Array, k: Array, opened: Array | None, scale: float) -> tuple[Array, Array]:
  """(exp(logits - largest) float32 [L, L], zero where closed; its sum over keys [L, 1], 1 where no
  key is open).
  """
  logits = (
    jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
  )
  if opened is None:
    weights = jnp.exp(logits - logits.max(1, keepdims=True))
    return weights, weights.sum(1, keepdims=True)
  logits = jnp.where(opened, logits, _LOW)
  weights = jnp.where(opened, jnp.exp(logits - logits.max(1, keepdims=True)), 0.0)
  total = weights.sum(1, keepdims=True)
  return weights, jnp.where(total > 0, total, 1.0)
