"""Text: BERT (Devlin et al. 2019, arXiv:1810.04805): token types, a norm on the embeddings, norms
after each part of a block.

RoBERTa (Liu et al. 2019, arXiv:1907.11692), DistilBERT and MPNet (Song et al. 2020,
arXiv:2004.09297) are settings of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models import pooling as pool
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.text import TokenEncoder, enough_positions
from mmjax.models.layers import Dense, Encoded, LayerNorm, constrain, normal, with_axes
from mmjax.models.stack import run_stack
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, Width

Array = jax.Array
BertPooling = Literal["pooler", "class", "mean"]
FARTHEST = 128  # distances from which on relative positions share the last bucket


class Bert(TokenEncoder):
  """Call: {"tokens" int32 [B, L], "mask" bool [B, L], "types" int32 [B, L]?, "present" bool [B]?}
  -> Encoded of width D.

  `types` (0 where absent) are BERT's segments. `pooling`: the first token ("class"), that token
  through a dense layer and a tanh or another function ("pooler"), or the "mean" of the real tokens.
  """

  types: int = 2
  pooling: BertPooling = "pooler"
  pooler_activation: Literal["tanh", "relu"] = "tanh"
  position_offset: int = 0
  relative_buckets: int = 0

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c, mask = self.config, self.real(batch)
    x = self.embed(batch["tokens"], position_stddev=0.02, offset=self.position_offset)
    if self.types:
      kinds = self.param(
        "token_type", with_axes(normal(0.02), (None, "embed")), (self.types, c.width), jnp.float32
      )
      x = x + (jnp.take(kinds, batch["types"], axis=0) if "types" in batch else kinds[0])
    x = LayerNorm(c.eps, c.dtype, name="input_norm")(x)
    x = constrain(nn.Dropout(c.dropout, deterministic=not train)(x))
    x = run_stack(
      self, x, mask, train=train, bias=self._relative(x.shape[1]) if self.relative_buckets else None
    )
    if self.pooling == "mean":
      return Encoded(x, mask, pool.mean(x, mask))
    pooled = x[:, 0]
    if self.pooling == "pooler":
      pooled = Dense((c.width,), ("embed", "mlp"), c.dtype, name="pooler")(pooled)
      pooled = jnp.tanh(pooled) if self.pooler_activation == "tanh" else nn.relu(pooled)
    return Encoded(x, mask, pool.keep_rows(pooled, mask))

  def _relative(self, length: int) -> Array:
    """float32 [heads, length, length]: what each distance adds to the attention's logits of every
    block.
    """
    table = self.param(
      "relative",
      with_axes(normal(0.02), (None, "heads")),
      (self.relative_buckets, self.config.heads),
      jnp.float32,
    )
    return jnp.take(table, relative_buckets(length, self.relative_buckets), axis=0).transpose(
      2, 0, 1
    )


@functools.lru_cache(maxsize=16)
def relative_buckets(length: int, buckets: int) -> np.ndarray:
  """Row of the table for query i and key j, int32 [length, length] (Raffel et al. 2020,
  arXiv:1910.10683, section 2.1).

  Half of the buckets for keys before the query, half for those after; in each half one for each of
  the nearest distances, then for distances that grow geometrically up to FARTHEST.
  """
  distance = np.arange(length)[None, :] - np.arange(length)[:, None]
  half, far = buckets // 2, np.abs(distance)
  near = half // 2
  grown = (
    np.log(np.maximum(far, 1).astype(np.float32) / np.float32(near))
    / np.float32(math.log(FARTHEST / near))
    * (half - near)
  )
  place = np.where(far < near, far, np.minimum(near + grown.astype(np.int64), half - 1))
  return (place + half * (distance > 0)).astype(np.int32)


@with_block
def bert(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  types: Count = 2,
  pooling: BertPooling = "pooler",
  activation: Activation = "gelu",
  eps: Epsilon = 1e-12,
  dropout: Dropout = 0.0,
  max_positions: Count = 0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
  pooler_activation: Literal["tanh", "relu"] = "tanh",
  position_offset: Count = 0,
  relative_buckets: Count = 0,
) -> Bert:
  """BERT (reads batch["text"]).

  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  types: token types (segments) that the model knows, 0 = none; a text without
  batch["text"]["types"] is all 0.
  pooling: pooler (first token, dense layer, pooler_activation), class (first token) or mean.
  activation, eps, dropout: of the blocks.
  max_positions: rows of the table of positions; 0 = data.text.length, which may be less.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  pooler_activation: after the pooler's dense layer: tanh, or relu as DistilBERT's classifier has.
  position_offset: rows at the start of the table of positions that no token uses, as RoBERTa has.
  relative_buckets: learned biases of the attention by distance, as MPNet has (32); 0 = none.
  """
  config = BlockConfig(
    width=width,
    depth=depth,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    norm="post",
    activation=activation,
    eps=eps,
    dropout=dropout,
    dtype=jnp.dtype(precision["compute"]),
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return Bert(
    config,
    vocab_size=data["text"]["vocab_size"],
    length=data["text"]["length"],
    types=types,
    pooling=pooling,
    mask_padding=data["text"]["mask_padding"],
    max_positions=enough_positions(max_positions, data["text"]["length"]),
    pooler_activation=pooler_activation,
    position_offset=position_offset,
    relative_buckets=relative_buckets,
  )
