"""Connectors: tokens of an encoder as tokens of a language model. A connector's call: tokens [N, L,
C], mask bool [N, L] -> [N, M, D], M tokens a medium whatever it shows; with `taps`, which some
take, [1 + taps, N, M, D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.attention import AttentionMask
from mmjax.models.block import Activation, Attention, BlockConfig, Mlp
from mmjax.models.layers import Dense, LayerNorm, RMSNorm, activate, normal, with_axes
from mmjax.ranges import Count, Depth, Epsilon, Heads, Size, Width

Array = jax.Array


class Projector(nn.Module):
  """Dense layers of the language model's width with an activation between (Liu et al. 2023,
  arXiv:2304.08485: one layer; LLaVA-1.5: two), over what `fold` and `pool` leave of the tokens.

  fold: side of the squares of tokens that become one of so many more channels (pixel shuffle).
  pool: side of the squares whose mean one token is. norm: of the tokens before the layers: "none",
  "layer" or "rms". skip: tokens at the start that are left out, such as a class token. end: a
  learned token comes last, which is the same of every medium. join: tokens one after another that
  become one with all their channels, after the norm, or before it with norm_joined. hidden:
  channels between the layers; 0 = width. positions: learned vectors are added at last, by the place
  of a token in its medium: places are easily lost in an encoder that tells what is there. A tap of
  the encoder has layers of its own, no positions, and a norm after its tokens are joined.
  """

  width: int
  layers: int = 2
  activation: str = "gelu"
  bias: bool = True
  norm: str = "none"
  eps: float = 1e-6
  fold: int = 1
  pool: int = 1
  skip: int = 0
  end: bool = False
  join: int = 1
  norm_joined: bool = False
  hidden: int = 0
  positions: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: Array, mask: Array, taps: Sequence[Array] = ()) -> Array:
    x = tokens[:, self.skip :]
    if self.pool > 1:
      x = _squares(x, self.pool).mean(axis=(2, 4)).reshape(x.shape[0], -1, x.shape[-1])
    if self.fold > 1:
      squares = _squares(x, self.fold).swapaxes(2, 3)
      x = squares.reshape(x.shape[0], -1, self.fold**2 * x.shape[-1])
    joined = (x.shape[0], x.shape[1] // self.join, self.join * x.shape[2])
    if self.norm_joined:
      x = x.reshape(joined)
    if self.norm != "none":
      x = (LayerNorm if self.norm == "layer" else RMSNorm)(self.eps, self.dtype, name="norm")(x)
    x = x.reshape(joined)
    for number in range(1, self.layers + 1):
      if number > 1:
        x = activate(self.activation, x)
      width, axis = self.width, "embed"
      if number < self.layers and self.hidden:
        width, axis = self.hidden, "mlp"
      x = Dense((width,), ("joint", axis), self.dtype, use_bias=self.bias, name=f"layer{number}")(x)
    if self.positions:
      table = with_axes(normal(0.02), ("position", "embed"))
      position = self.param("position", table, (x.shape[1], self.width), jnp.float32)
      x = x + position.astype(x.dtype)
    if self.end:
      end = self.param("end", with_axes(normal(0.02), ("embed",)), (self.width,), jnp.float32)
      end = jnp.broadcast_to(end.astype(x.dtype), (x.shape[0], 1, self.width))
      x = jnp.concatenate([x, end], axis=1)
    if not taps:
      return x
    of_taps = [
      self.clone(norm_joined=True, positions=False, name=f"tap{number}", parent=self)(tap, mask)
      for number, tap in enumerate(taps, 1)
    ]
    return jnp.stack([x, *of_taps])


def _squares(x: Array, side: int) -> Array:
  """Tokens [N, H * W, C] of a square grid as [N, H / side, side, W / side, side, C]."""
  grid = math.isqrt(x.shape[1])
  if grid**2 != x.shape[1] or grid % side:
    raise UserError(
      f"a connector joins squares of {side} x {side} tokens, but the encoder gives {x.shape[1]}, "
      "which is no square grid of them. Change `fold` or `pool`, or `skip` a class token"
    )
  return x.reshape(x.shape[0], grid // side, side, grid // side, side, x.shape[-1])


class Resampler(nn.Module):
  """Learned queries that attend to a medium's tokens, block after block (Alayrac et al. 2022,
  arXiv:2204.14198, section 3.1.1; the Q-Former of Li et al. 2023, arXiv:2301.12597, without text).
  """

  config: BlockConfig
  tokens: int

  @nn.compact
  def __call__(self, tokens: Array, mask: Array) -> Array:
    c = self.config
    queries = self.param(
      "queries", with_axes(normal(0.02), (None, "embed")), (self.tokens, c.width), jnp.float32
    )
    memory = Dense((c.width,), ("joint", "embed"), c.dtype, name="inputs")(tokens)
    x = jnp.broadcast_to(queries.astype(c.dtype), (tokens.shape[0], *queries.shape))
    for number in range(c.depth):
      y = c.make_norm(f"attention_norm{number + 1}")(x)
      real = AttentionMask(keys=mask)
      x = x + Attention(c, name=f"attention{number + 1}")(y, real, context=memory)
      y = c.make_norm(f"mlp_norm{number + 1}")(x)
      x = x + Mlp(c, name=f"mlp{number + 1}")(y)
    return c.make_norm("norm")(x)


# -- Kinds: (data, precision, *, settings) -> module -----------------------------------------------


def mlp(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  layers: Size = 2,
  activation: Activation = "gelu",
  bias: bool = True,
  norm: str = "none",
  eps: Epsilon = 1e-6,
  fold: Size = 1,
  pool: Size = 1,
  skip: Count = 0,
  end: bool = False,
  join: Size = 1,
  hidden: Width = 0,
  positions: bool = False,
) -> Projector:
  """Dense layers with an activation between.

  width: channels of the language model; 0 = the model's. layers: how many; 1 = linear.
  activation: between them. bias: they have one. norm: of the
  tokens before them: none, layer or rms. eps: of the norm. fold: side of the squares of tokens that
  become one with all their channels (pixel shuffle). pool: side of the squares whose mean one token
  is. skip: tokens at the start that are left out, such as a class token. end: a learned token after
  those of a medium, which ends the rows of joined tiles. join: tokens one after another that become
  one with all their channels. hidden: channels between the layers; 0 = width. positions: learned
  vectors are added at last, by the place of a token in its medium, all of one size.
  """
  if norm not in ("none", "layer", "rms"):
    raise UserError(f"norm {norm!r} is unknown; there are: none, layer, rms")
  return Projector(
    width,
    layers,
    activation,
    bias,
    norm,
    eps,
    fold,
    pool,
    skip,
    end,
    join,
    hidden=hidden,
    positions=positions,
    dtype=jnp.dtype(precision["compute"]),
  )


def resampler(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  tokens: Size = 32,
  depth: Depth = 2,
  heads: Heads = 0,
  mlp: Width = 0,
  activation: Activation = "gelu_tanh",
  eps: Epsilon = 1e-6,
) -> Resampler:
  """Learned queries that attend to the tokens of a medium.

  width: channels of the language model; 0 = the model's. tokens: queries, and so tokens a medium.
  depth: blocks. heads: 0 = width / 64. mlp: hidden units; 0 = 4 * width. activation, eps: of the
  blocks.
  """
  config = BlockConfig(
    width=width,
    depth=depth,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    activation=activation,
    eps=eps,
    dtype=jnp.dtype(precision["compute"]),
  )
  return Resampler(config, tokens)
