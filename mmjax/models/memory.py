"""What a decoder attends to: the tokens of its sources."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.layers import Dense, with_axes

Array = jax.Array


class MemoryTokens(nn.Module):
  """Tokens of a source as the decoder sees them: a linear layer unless not `project`, and learned
  positions where `positions`: places are easily lost in an encoder that was trained to tell what is
  there. Call: x [B, S, *] -> [B, S, D]."""

  width: int
  project: bool
  positions: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = x
    if self.project:
      # The kernel stands beside the positions: its name is image_memory/kernel with them or
      # without.
      dense = Dense((self.width,), ("joint", "embed"), self.dtype)
      nn.share_scope(self, dense)
      y = dense(x)
    elif x.shape[-1] != self.width:
      raise UserError(
        f"model.decoder.project_memory is False, but {self.name} gets {x.shape[-1]} channels and "
        f"the decoder has {self.width}"
      )
    if self.positions:
      y = y + self.param(
        "position",
        with_axes(nn.initializers.normal(0.02), ("position", "embed")),
        (x.shape[1], self.width),
        jnp.float32,
      ).astype(self.dtype)
    return y
