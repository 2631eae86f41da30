"""A transformer stack that attends to itself and to a context: fusions by cross-attention and
resamplers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmjax.models.attention import Attention
from mmjax.models.layers import LayerNorm, Mlp, constrain
from mmjax.models.platform import platform
from mmjax.models.transformer import REMAT, TransformerConfig

Array = jax.Array


class CrossBlock(nn.Module):
  """Self-attention, cross-attention and MLP with residuals, each normalised before (Vaswani et al.
  2017, arXiv:1706.03762, section 3.1, decoder without the causal mask).

  Call: x [B, L, D], mask bool [B, L], context [B, S, D], context_mask bool [B, S] -> [B, L, D]. A
  row without any context passes the cross-attention unchanged.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x: Array, mask: Array, context: Array, context_mask: Array, *, train: bool = False
  ) -> Array:
    c = self.config
    norm = lambda name, x: LayerNorm(c.eps, c.dtype, name=name)(x)
    drop = nn.Dropout(c.dropout, deterministic=not train)
    attention = lambda name: Attention(c.heads, c.dtype, c.causal, c.kernel, c.bias, name=name)
    x = checkpoint_name(constrain(x), "block")
    x = x + drop(
      checkpoint_name(attention("attention")(norm("attention_norm", x), mask=mask), "attention")
    )
    crossed = attention("cross_attention")(
      norm("cross_attention_norm", x), context, mask=context_mask
    )
    crossed = checkpoint_name(crossed, "attention")
    x = x + drop(jnp.where(context_mask.any(-1)[:, None, None], crossed, 0))
    x = x + drop(Mlp(c.mlp, c.activation, c.dtype, c.bias, name="mlp")(norm("mlp_norm", x)))
    return constrain(x)


class CrossTransformer(nn.Module):
  """`depth` such blocks, stored and run as those of `Transformer`; then a layer norm. Call: as
  `CrossBlock`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x: Array, mask: Array, context: Array, context_mask: Array, *, train: bool = False
  ) -> Array:
    c = self.config
    x, context = x.astype(c.dtype), context.astype(c.dtype)
    block = CrossBlock(c, parent=None)

    def init(key: Array) -> Any:
      one = lambda k: block.init(k, x[:1], mask[:1], context[:1], context_mask[:1])["params"]
      return nn.meta.add_axis(
        jax.vmap(one)(jax.random.split(key, c.depth)), 0, {nn.PARTITION_NAME: "layers"}
      )

    layers = self.param("layers", init)
    unroll = min(
      c.depth, c.scan_unroll or (c.depth if platform() == "cpu" and c.depth <= 12 else 1)
    )
    keys = jax.random.split(self.make_rng("dropout"), c.depth) if train and c.dropout else None

    def run(x: Array, layer: tuple[Any, Array | None]) -> Array:
      params, key = layer
      return block.apply(
        {"params": params},
        x,
        mask,
        context,
        context_mask,
        train=train,
        rngs=None if key is None else {"dropout": key},
      )

    if c.remat != "none":
      run = jax.checkpoint(run, policy=REMAT[c.remat], prevent_cse=unroll > 1)
    x = jax.lax.scan(lambda x, layer: (run(x, layer), None), x, (layers, keys), unroll=unroll)[0]
    return LayerNorm(c.eps, c.dtype, name="norm")(x)
