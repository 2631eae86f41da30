"""Text: token embeddings, learned positions, a transformer, a pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.layers import Encoded, constrain, normal, with_axes
from mmjax.models.stack import run_stack
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, TokenId, Width
from mmjax.special_tokens import Special

Array = jax.Array
TextPooling = Literal["last", "final", "eos", "highest", "class", "mean", "attention"]


class TokenEncoder(nn.Module):
  """What text encoders share: the table of token embeddings, positions, and which tokens are real.

  max_positions: rows of the table of positions; 0 = `length`.
  trunk: a transformer shared with other encoders, instead of its own.
  """

  config: BlockConfig
  vocab_size: int
  length: int
  mask_padding: bool = True
  max_positions: int = 0
  trunk: nn.Module | None = None

  def setup(self) -> None:
    self.embedding = self.param(
      "embedding",
      with_axes(normal(0.02), ("vocab", "embed")),
      (self.vocab_size, self.config.width),
      jnp.float32,
    )

  def table(self) -> Array:
    """The token embeddings, float32 [V, D]: what a tied output layer multiplies hidden states
    with.
    """
    return self.embedding

  def positions(self) -> int:
    """The longest text that the encoder can take."""
    return self.max_positions or self.length

  def real(self, batch: Mapping[str, Array]) -> Array:
    """bool [B, L]: the tokens that are there. Raises UserError: a text longer than the model's."""
    tokens, mask = batch["tokens"], batch.get("mask")
    if tokens.shape[1] > self.positions():
      raise UserError(
        f"text of {tokens.shape[1]} tokens for a model of {self.positions()} positions "
        "(data.text.length, or max_positions). Cut it, or change the length"
      )
    if mask is None or not self.mask_padding:
      mask = jnp.ones(tokens.shape, bool)
    return mask & batch["present"][:, None] if "present" in batch else mask

  def embed(self, tokens: Array, position_stddev: float, offset: int = 0) -> Array:
    """Embeddings and learned positions, float32 [B, L, D]; of `position` [offset + positions, D]
    the L rows after `offset` are used.
    """
    position = self.param(
      "position",
      with_axes(normal(position_stddev), ("position", "embed")),
      (offset + self.positions(), self.config.width),
      jnp.float32,
    )
    return jnp.take(self.embedding, tokens, axis=0) + position[offset : offset + tokens.shape[1]]


def enough_positions(max_positions: int, length: int) -> int:
  """`max_positions` itself. Raises UserError: texts of `length` tokens need more (0 = as many as
  they need).
  """
  if max_positions and max_positions < length:
    raise UserError(
      f"max_positions is {max_positions}, but texts take {length} positions. Set data.text.length "
      "lower"
    )
  return max_positions


class TextTransformer(TokenEncoder):
  """Call: {"tokens" int32 [B, L], "mask" bool [B, L], "present" bool [B]?} -> Encoded of width D.

  `pooling`: "last" real token, the "final" position (padding or not, as SigLIP does), the first
  token equal to `eos_id` ("eos"; the last real one where there is none), the token of the highest
  id ("highest", as CLIP did), the first ("class"), the "mean" of the real ones, or learned
  "attention".
  """

  pooling: TextPooling = "last"
  eos_id: int = -1
  final_norm: bool = True

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c, tokens, mask = self.config, batch["tokens"], self.real(batch)
    x = self.embed(tokens, position_stddev=0.01)
    x = constrain(nn.Dropout(c.dropout, deterministic=not train)(x.astype(c.dtype)))
    x = run_stack(self, x, mask, train=train)
    if self.final_norm:
      x = c.make_norm("norm")(x)
    return Encoded(x, mask, self._pool(x, mask, tokens))

  def _pool(self, x: Array, mask: Array, tokens: Array) -> Array:
    if self.pooling == "attention":
      return pool.AttentionPool(self.config, name="pool")(x, mask)
    if self.pooling == "eos":
      found = (tokens == self.eos_id) & mask
      last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
      return pool.at(x, jnp.where(found.any(-1), jnp.argmax(found, axis=-1), last), mask)
    if self.pooling == "highest":
      return pool.at(x, jnp.argmax(jnp.where(mask, tokens, -1), axis=-1), mask)
    if self.pooling == "final":
      return pool.keep_rows(x[:, -1], mask)
    return {"last": pool.last, "class": pool.first, "mean": pool.mean}[self.pooling](x, mask)


@with_block
def transformer(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  causal: bool = False,
  pooling: TextPooling = "last",
  eos_id: Annotated[TokenId, Special(("eos",), needed=("eos",), when=("pooling", "eos"))] = -1,
  norm: Literal["pre", "post"] = "pre",
  final_norm: bool = True,
  activation: Activation = "gelu_tanh",
  bias: bool = True,
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  max_positions: Count = 0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> TextTransformer:
  """Text transformer (reads batch["text"]).

  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  causal: a token sees itself and those before it.
  pooling: last (real token), final (position), eos (first `eos_id`), highest (token id), class
  (first token), mean, attention.
  eos_id: the token that pooling "eos" looks for; -1 = the tokenizer's <eos>.
  norm, final_norm: layer norm before or after each part of a block; one at the end of the stack.
  activation, bias, eps, dropout: of the blocks.
  max_positions: rows of the table of positions; 0 = data.text.length, which may be less.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
  config = BlockConfig(
    width=width,
    depth=depth,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    norm=norm,
    activation=activation,
    causal=causal,
    bias=bias,
    eps=eps,
    dropout=dropout,
    dtype=jnp.dtype(precision["compute"]),
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return TextTransformer(
    config,
    vocab_size=data["text"]["vocab_size"],
    length=data["text"]["length"],
    pooling=pooling,
    eos_id=eos_id,
    mask_padding=data["text"]["mask_padding"],
    final_norm=final_norm,
    max_positions=enough_positions(max_positions, data["text"]["length"]),
  )
