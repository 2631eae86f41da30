"""Pooling a sequence into one vector; the ways that every encoder shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.attention import AttentionMask
from mmjax.models.block import Attention, BlockConfig, Mlp
from mmjax.models.layers import with_axes, xavier

Array = jax.Array
SentencePooling = Literal["class", "max", "mean", "mean_sqrt", "weighted_mean", "last"]


class AttentionPool(nn.Module):
  """One learned query attends to the tokens, then an MLP with a residual (Lee et al. 2019,
  arXiv:1810.00825, "PMA" with k = 1; the "MAP head" of Zhai et al. 2022, arXiv:2106.04560).

  Call: tokens [B, L, D], mask bool [B, L] (True = real) -> [B, D]. A row without any real token
  pools to zeros.
  """

  config: BlockConfig

  @nn.compact
  def __call__(self, tokens: Array, mask: Array) -> Array:
    c = self.config
    query = self.param("query", with_axes(xavier(1, c.width), ("embed",)), (c.width,), jnp.float32)
    query = jnp.broadcast_to(query.astype(c.dtype), (tokens.shape[0], 1, c.width))
    own = dataclasses.replace(c, kernel="xla", gated=False)
    x = Attention(own, name="attention")(query, AttentionMask(keys=mask), context=tokens)
    x = x + Mlp(own, name="mlp")(c.make_norm("norm")(x))
    return keep_rows(x[:, 0], mask)


def mean(tokens: Array, mask: Array) -> Array:
  """Mean of the real tokens: [B, L, D], bool [B, L] -> [B, D] float32; zeros where there is
  none.
  """
  weights = mask.astype(jnp.float32)
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)
  return jnp.einsum("bl,bld->bd", weights, tokens.astype(jnp.float32), precision="highest")


def sentence(tokens: Array, mask: Array, kinds: Sequence[SentencePooling]) -> Array:
  """What sentence-transformers pools, one kind beside the other: [B, L, D], bool [B, L] -> [B,
  len(kinds) * D] float32.

  weighted_mean: the l-th real token counts l times. mean_sqrt: the sum over the root of the number
  of tokens. Zeros where there is none.
  """
  count = mask.sum(-1, keepdims=True, dtype=jnp.float32)
  found = []
  for kind in kinds:
    if kind == "max":
      found.append(
        keep_rows(jnp.where(mask[..., None], tokens.astype(jnp.float32), -jnp.inf).max(1), mask)
      )
    elif kind == "mean_sqrt":
      found.append(mean(tokens, mask) * jnp.sqrt(count))
    elif kind == "weighted_mean":
      weights = jnp.where(mask, jnp.arange(1, mask.shape[1] + 1, dtype=jnp.float32), 0)
      weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)
      found.append(
        jnp.einsum("bl,bld->bd", weights, tokens.astype(jnp.float32), precision="highest")
      )
    else:
      found.append(
        {"mean": mean, "class": first, "last": last}[kind](tokens, mask).astype(jnp.float32)
      )
  return jnp.concatenate(found, axis=-1)


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
