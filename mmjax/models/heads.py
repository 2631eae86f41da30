"""Heads: from the outputs of encoders or a fusion to classes, masked tokens and masked patches."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.layers import Dense, LayerNorm, activate, normal, with_axes

Array = jax.Array


def linear(outputs: int, name: str) -> Dense:
  """A linear classifier or matcher. Call: pooled [B, D] -> float32 [B, outputs]."""
  init = nn.initializers.lecun_normal()
  return Dense((outputs,), ("embed", None), jnp.float32, init, name=name)


class NormedClassifier(nn.Module):
  """A layer norm and a linear layer, as AST has. Call: pooled [B, D] -> float32 [B, classes]."""

  classes: int
  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = LayerNorm(self.eps, jnp.float32, name="norm")(x)
    return Dense((self.classes,), ("embed", "classes"), jnp.float32, normal(0.02), name="out")(x)


class MaskedTokenHead(nn.Module):
  """BERT's transform before its tied output table (Devlin et al. 2019, arXiv:1810.04805): dense,
  activation, layer norm, and a bias for each token.

  Call: tokens [B, L, *], table float32 [V, D] -> (hidden [B, L, D], table, bias float32 [V]).
  """

  dtype: jnp.dtype
  activation: str = "gelu"
  eps: float = 1e-12

  @nn.compact
  def __call__(self, tokens: Array, table: Array) -> tuple[Array, Array, Array]:
    x = Dense((table.shape[1],), ("joint", "embed"), self.dtype, name="dense")(tokens)
    bias = self.param(
      "bias", with_axes(nn.initializers.zeros, ("vocab",)), (table.shape[0],), jnp.float32
    )
    x = activate(self.activation, x)
    return LayerNorm(self.eps, self.dtype, name="norm")(x), table, bias


class PatchHead(nn.Module):
  """A linear layer to the values of a patch (SimMIM, Xie et al. 2022, arXiv:2111.09886). Call: x
  [B, L, D], values -> [B, L, values].
  """

  @nn.compact
  def __call__(self, x: Array, values: int) -> Array:
    return Dense((values,), ("embed", "patch"), jnp.float32, name="out")(x)


def likeliest_tokens(hidden: Array, table: Array, bias: Array) -> Array:
  """int32 [B, L]: the argmax of hidden [B, L, D] table^T + bias, a row's logits at a time."""

  def guess(row: Array) -> Array:
    return jnp.argmax(row.astype(jnp.float32) @ table.T + bias, axis=-1).astype(jnp.int32)

  return jax.lax.map(guess, hidden)
