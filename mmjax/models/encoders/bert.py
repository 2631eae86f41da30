"""Text: BERT (Devlin et al. 2019, arXiv:1810.04805): token types, a norm on the embeddings, norms after each part of a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import pooling as pool
from mmjax.models.encoders.text import TokenEncoder, enough_positions
from mmjax.models.layers import Dense, Encoded, LayerNorm, constrain, normal, with_axes
from mmjax.models.transformer import Activation, Kernel, Remat, TransformerConfig, run_stack
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, Size, Width

Array = jax.Array
BertPooling = Literal["pooler", "class", "mean"]


class Bert(TokenEncoder):
  """Call: {"tokens" int32 [B, L], "mask" bool [B, L], "types" int32 [B, L]?, "present" bool [B]?} -> Encoded of width D.

  `types` (0 where absent) are BERT's segments. `pooling`: the first token ("class"), that token through a dense layer and a
  tanh ("pooler"), or the "mean" of the real tokens.
  """

  types: int = 2
  pooling: BertPooling = "pooler"

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c, mask = self.config, self.real(batch)
    x = self.embed(batch["tokens"], position_stddev=0.02)
    kinds = self.param("token_type", with_axes(normal(0.02), (None, "embed")), (self.types, c.width), jnp.float32)
    kind = jnp.take(kinds, batch["types"], axis=0) if "types" in batch else kinds[0]
    x = LayerNorm(c.eps, c.dtype, name="input_norm")(x + kind)
    x = constrain(nn.Dropout(c.dropout, deterministic=not train)(x))
    x = run_stack(self, x, mask, train=train)
    if self.pooling == "mean":
      return Encoded(x, mask, pool.mean(x, mask))
    pooled = x[:, 0]
    if self.pooling == "pooler":
      pooled = jnp.tanh(Dense((c.width,), ("embed", "mlp"), c.dtype, name="pooler")(pooled))
    return Encoded(x, mask, pool.keep_rows(pooled, mask))


def bert(data: Mapping[str, Any], precision: Mapping[str, Any], *, width: Width = 0, depth: Depth = 12, heads: Heads = 0,
         mlp: Width = 0, types: Size = 2, pooling: BertPooling = "pooler", activation: Activation = "gelu", eps: Epsilon = 1e-12,
         dropout: Dropout = 0.0, max_positions: Count = 0, kernel: Kernel = "auto", remat: Remat = "none", scan_unroll: Count = 0) -> Bert:
  """BERT (reads batch["text"]).

  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  types: token types (segments) that the model knows; a text without batch["text"]["types"] is all 0.
  pooling: pooler (first token, dense layer, tanh), class (first token) or mean.
  activation, eps, dropout: of the blocks.
  max_positions: rows of the table of positions; 0 = data.text.length, which may be less.
  kernel: attention kernel. remat: what backward passes keep (transformer.py REMAT). scan_unroll: blocks a loop trip.
  """
  config = TransformerConfig(
      width=width, depth=depth, heads=heads or max(1, width // 64), mlp=mlp or 4 * width, norm="post", activation=activation,
      eps=eps, dropout=dropout, dtype=jnp.dtype(precision["compute"]), kernel=kernel, remat=remat, scan_unroll=scan_unroll)
  return Bert(config, vocab_size=data["text"]["vocab_size"], length=data["text"]["length"], types=types, pooling=pooling,
              mask_padding=data["text"]["mask_padding"], max_positions=enough_positions(max_positions, data["text"]["length"]))
