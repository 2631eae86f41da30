"""Pooling a sequence into one vector; the ways that every encoder shares."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.attention import Attention
from mmjax.models.layers import LayerNorm, Mlp, with_axes, xavier
from mmjax.models.transformer import TransformerConfig

Array = jax.Array


class AttentionPool(nn.Module):
  """One learned query attends to the tokens, then an MLP with a residual (Lee et al. 2019, arXiv:1810.00825, "PMA" with
  k = 1; the "MAP head" of Zhai et al. 2022, arXiv:2106.04560).

  Call: tokens [B, L, D], mask bool [B, L] (True = real) -> [B, D]. A row without any real token pools to zeros.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens: Array, mask: Array) -> Array:
    c = self.config
    query = self.param("query", with_axes(xavier(1, c.width), ("embed",)), (c.width,), jnp.float32)
    query = jnp.broadcast_to(query.astype(c.dtype), (tokens.shape[0], 1, c.width))
    x = Attention(c.heads, c.dtype, use_bias=c.bias, kernel="xla", name="attention")(query, tokens, mask=mask)
    x = x + Mlp(c.mlp, c.activation, c.dtype, c.bias, name="mlp")(LayerNorm(c.eps, c.dtype, name="norm")(x))
    return keep_rows(x[:, 0], mask)


def mean(tokens: Array, mask: Array) -> Array:
  """Mean of the real tokens: [B, L, D], bool [B, L] -> [B, D] float32; zeros where there is none."""
  weights = mask.astype(jnp.float32)
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)
  return jnp.einsum("bl,bld->bd", weights, tokens.astype(jnp.float32), precision="highest")


def first(tokens: Array, mask: Array) -> Array:
  """The first token (a class token): [B, D]."""
  return keep_rows(tokens[:, 0], mask)


def last(tokens: Array, mask: Array) -> Array:
  """The last real token: [B, D]."""
  return at(tokens, tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1), mask)


def at(tokens: Array, index: Array, mask: Array) -> Array:
  """tokens[b, index[b]]: [B, D]."""
  return keep_rows(jnp.take_along_axis(tokens, index[:, None, None], axis=1)[:, 0], mask)


def keep_rows(pooled: Array, mask: Array) -> Array:
  """`pooled` [B, D], zeros (value and gradient) where mask [B, L] has no real token."""
  return jnp.where(mask.any(-1, keepdims=True), pooled, 0)
