"""A stack that attends to itself and to a context: fusions by cross-attention and resamplers."""

from __future__ import annotations

import flax.linen as nn
import jax

from mmjax.models.block import BlockConfig
from mmjax.models.stack import Stack

Array = jax.Array


class CrossTransformer(nn.Module):
  """Blocks of self-attention, attention to the context and an MLP (Vaswani et al. 2017,
  arXiv:1706.03762, section 3.1, decoder without the causal mask), then a norm.

  Call: x [B, L, D], mask bool [B, L], context [B, S, D], context_mask bool [B, S] -> [B, L, D]. A
  row without any context passes the cross-attention unchanged.
  """

  config: BlockConfig

  @nn.compact
  def __call__(
    self, x: Array, mask: Array, context: Array, context_mask: Array, *, train: bool = False
  ) -> Array:
    stack = Stack(self.config, cross=True)
    nn.share_scope(self, stack)  # its parameters are ours: cross/layers
    x = stack(x, mask, context=context, context_mask=context_mask, train=train)
    return self.config.make_norm("norm")(x)
