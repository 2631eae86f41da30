"""The blockwise kernels for TPUs that come with JAX: flash attention (Dao et al. 2022,
arXiv:2205.14135), and splash attention, which leaves out the blocks that a mask of positions
closes.

Sequences are padded to whole blocks. Real keys and segments go in as numbers that have to be equal;
only flash attention can hold a dense mask, for prefixes, blocks, trunks, offsets and pairs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mmjax.models.attention.mask import AttentionMask
from mmjax.models.attention.plain import LOW, open_blind_rows

Array = jax.Array
NOBODY = -(2**31)  # the segment of hidden keys, of padding and of queries that see nothing


def flash(
  query: Array, key: Array, value: Array, mask: AttentionMask, *, scale: float, soft_cap: float = 0
) -> Array:
  """Flash attention; shapes as in `attend`. Grouped keys are repeated; no soft cap."""
  from jax.experimental.pallas.ops.tpu import flash_attention as pallas

  (length, heads), (keys, groups) = query.shape[1:3], key.shape[1:3]
  q, k, v = (_pad(x.swapaxes(1, 2), 2) for x in (query, key, value))
  k, v = (jnp.repeat(x, heads // groups, axis=1) for x in (k, v))
  bias = segments = some = None
  if needs_dense(mask):
    allowed, some = open_blind_rows(mask.whole(q.shape[0], length, keys))
    bias = _pad(_pad(jnp.where(allowed, 0.0, LOW).astype(jnp.float32), 1), 2, LOW)
    bias = jnp.broadcast_to(bias[:, None], (*q.shape[:3], k.shape[2]))
  elif mask.arrays or k.shape[2] != keys:
    segments, some = _segments(mask, q.shape[0], length, keys)
    segments = pallas.SegmentIds(*segments)
  block_q, block_k = (math.gcd(x.shape[2], 512) for x in (q, k))
  sizes = pallas.BlockSizes(
    block_q=block_q,
    block_k_major=block_k,
    block_k=block_k,
    block_b=1,
    block_q_major_dkv=block_q,
    block_k_major_dkv=block_k,
    block_k_dkv=block_k,
    block_q_dkv=block_q,
    block_k_major_dq=block_k,
    block_k_dq=block_k,
    block_q_dq=block_q,
  )
  out = pallas.flash_attention(
    q,
    k,
    v,
    ab=bias,
    segment_ids=segments,
    causal=mask.causal and bias is None,
    sm_scale=scale,
    block_sizes=sizes,
  )
  out = out[:, :, :length].swapaxes(1, 2)
  return out if some is None else jnp.where(some[:, :, None, None], out, 0)


def needs_dense(mask: AttentionMask) -> bool:
  """Whether flash attention has to be given the mask as an array of all pairs."""
  parts = (mask.prefix, mask.blocks, mask.trunks, mask.offset, mask.pairs)
  return mask.window > 0 or any(part is not None for part in parts)


def splash(
  query: Array,
  key: Array,
  value: Array,
  mask: AttentionMask,
  *,
  scale: float,
  soft_cap: float = 0.0,
  interpret: bool = False,
) -> Array:
  """Splash attention; shapes as in `attend`. No prefix, blocks, trunks, offset or pairs."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  (length, heads), keys = query.shape[1:3], key.shape[1]
  q, k, v = (
    _pad(x.swapaxes(1, 2), 2) for x in (query * jnp.asarray(scale, query.dtype), key, value)
  )
  shape = (q.shape[2], k.shape[2])
  if mask.window:
    near = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    static: masks.Mask = masks.LocalMask(shape, near, offset=0)
  else:
    static = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
  segments = some = None
  if mask.arrays or k.shape[2] != keys:
    segments, some = _segments(mask, q.shape[0], length, keys)
    segments = pallas.SegmentIds(*segments)
  block_q, block_k = (math.gcd(n, 512) for n in shape)
  sizes = pallas.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_kv_compute=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    block_kv_dkv_compute=block_k,
    block_q_dq=block_q,
    block_kv_dq=block_k,
  )
  run = pallas.make_splash_mha(
    mask=masks.MultiHeadMask([static] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=soft_cap or None,
    interpret=interpret,
  )
  out = jax.vmap(run, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
  out = out[:, :, :length].swapaxes(1, 2)
  return out if some is None else jnp.where(some[:, :, None, None], out, 0)


def _segments(
  mask: AttentionMask, batch: int, length: int, keys: int
) -> tuple[tuple[Array, Array], Array | None]:
  """((numbers of queries int32 [B, L'], of keys [B, S']), which rows see a key [B, L] or None).

  Queries that see no key are given the number of the padding, so that they meet something finite
  and are then zeroed.
  """
  rows, columns, some = mask.segments, mask.key_numbers, None
  if rows is None or columns is None:
    rows, columns = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
  if mask.arrays and (dense := mask.dense(length, keys)) is not None:
    some = jnp.broadcast_to(dense.any(-1), (batch, length))
    rows = jnp.where(some, rows, NOBODY)
  if mask.keys is not None:
    columns = jnp.where(mask.keys, columns, NOBODY)
  return (_pad(rows, 1, NOBODY), _pad(columns, 1, NOBODY)), some


def _pad(x: Array, axis: int, value: float = 0, multiple: int = 128) -> Array:
  """`x` filled up with `value` along `axis` to a multiple of a TPU's lanes."""
  amount = -x.shape[axis] % multiple
  widths = [(0, amount if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if amount else x
