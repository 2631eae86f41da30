"""Attention by the plain formula, and by JAX's own function; both write the logits out."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from mmjax.models.attention.mask import AttentionMask
from mmjax.models.cpu import einsum

Array = jax.Array
LOW = -1e30


def plain(
  query: Array,
  key: Array,
  value: Array,
  mask: AttentionMask,
  *,
  scale: float,
  soft_cap: float = 0.0,
  bias: Array | None = None,
) -> Array:
  """The formula on [B, H, L, K]: small products of contiguous matrices are what CPUs are quickest
  at. Shapes as in `attend`; grouped heads share their keys as rows of one product.
  """
  (b, length, heads, channels), groups = query.shape, key.shape[2]
  q, k, v = (x.swapaxes(1, 2) for x in (query * jnp.asarray(scale, query.dtype), key, value))
  if groups != heads:
    q = q.reshape(b, groups, heads // groups * length, channels)
  logits = einsum("bhld,bhsd->bhls", q, k, preferred_element_type=jnp.float32)
  logits = logits.reshape(b, heads, length, -1)
  if soft_cap:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  if bias is not None:
    logits = logits + bias
  allowed, some = mask.dense(length, key.shape[1]), None
  if allowed is not None:
    allowed, some = open_blind_rows(allowed)
    logits = jnp.where(allowed[:, None], logits, LOW)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  if groups != heads:
    weights = weights.reshape(b, groups, heads // groups * length, -1)
  out = einsum("bhls,bhsd->bhld", weights, v).reshape(b, heads, length, -1).swapaxes(1, 2)
  return out if some is None or not mask.arrays else jnp.where(some[:, :, None, None], out, 0)


def sdpa(
  query: Array,
  key: Array,
  value: Array,
  mask: AttentionMask,
  *,
  scale: float,
  soft_cap: float = 0.0,
  implementation: Literal["xla", "cudnn"] = "xla",
) -> Array:
  """`jax.nn.dot_product_attention`, which alone would give the mean of the values to a row without
  keys. Causal masks and windows go in by name, without a dense mask.
  """
  if not mask.arrays:
    window = (mask.window - 1, 0 if mask.causal else mask.window - 1) if mask.window else None
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      is_causal=mask.causal,
      local_window_size=window,
      scale=scale,
      implementation=implementation,
    )
  allowed, some = open_blind_rows(mask.whole(query.shape[0], query.shape[1], key.shape[1]))
  out = jax.nn.dot_product_attention(
    query, key, value, mask=allowed[:, None], scale=scale, implementation=implementation
  )
  return jnp.where(some[:, :, None, None], out, 0)


def open_blind_rows(allowed: Array) -> tuple[Array, Array]:
  """(`allowed` [B, L, S] with rows that see nothing opened wide so that they stay finite, which
  rows see something [B, L]).
  """
  some = allowed.any(-1)
  return allowed | ~some[..., None], some
