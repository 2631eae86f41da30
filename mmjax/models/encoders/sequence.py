"""What every encoder of a sequence ends in: dropout, the transformer, a norm, a pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import pooling as pool
from mmjax.models.block import BlockConfig
from mmjax.models.layers import Encoded, constrain
from mmjax.models.stack import run_stack

Array = jax.Array
SequencePooling = Literal["mean", "attention"]


def stack_config(
  precision: Mapping[str, Any], *, width: int, heads: int, mlp: int, **settings: Any
) -> BlockConfig:
  """The stack of an encoder's settings; heads 0 = width / 64, mlp 0 = 4 * width."""
  return BlockConfig(
    width=width,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    dtype=jnp.dtype(precision["compute"]),
    **settings,
  )


def real(mask: Array, batch: Mapping[str, Array]) -> Array:
  """mask bool [B, L], false throughout the rows where the modality is missing (batch["present"]
  bool [B]).
  """
  return mask & batch["present"][:, None] if "present" in batch else mask


def standardise(x: Array, mask: Array, eps: float = 1e-5) -> Array:
  """Mean 0 and variance 1 of each channel over the real steps, zeros elsewhere. x float32 [B, T,
  C], mask bool [B, T].
  """
  weights = mask[..., None] / jnp.maximum(mask.sum(1), 1)[:, None, None]
  centred = x - (x * weights).sum(1, keepdims=True)
  variance = (jnp.square(centred) * weights).sum(1, keepdims=True)
  return jnp.where(mask[..., None], centred * jax.lax.rsqrt(variance + eps), 0)


def drop_and_run(module: nn.Module, x: Array, mask: Array, *, train: bool) -> Array:
  """Dropout, then the transformer of `module` (run_stack): x [B, L, D], mask bool [B, L] -> [B, L,
  D].
  """
  c = module.config
  return run_stack(
    module,
    constrain(nn.Dropout(c.dropout, deterministic=not train)(x.astype(c.dtype))),
    mask,
    train=train,
  )


def encode_sequence(
  module: nn.Module, x: Array, mask: Array, *, pooling: SequencePooling, train: bool, join: int = 1
) -> Encoded:
  """`drop_and_run`, a final norm ("norm") and the pooling ("pool"): x [B, L, D], mask bool [B, L]
  -> Encoded. join: neighbours whose mean one token is, before the norm; a rest is left out.
  """
  x = drop_and_run(module, x, mask, train=train)
  if join > 1:
    whole = x.shape[1] // join * join
    x = x[:, :whole].reshape(x.shape[0], -1, join, x.shape[-1]).mean(2)
    mask = mask[:, :whole].reshape(mask.shape[0], -1, join).all(-1)
  return pooled(module, module.config.make_norm("norm")(x), mask, pooling)


def pooled(module: nn.Module, x: Array, mask: Array, pooling: SequencePooling) -> Encoded:
  """Encoded of the tokens x [B, L, D]: their mean, or what a learned query takes of them."""
  if pooling == "attention":
    return Encoded(x, mask, pool.AttentionPool(module.config, name="pool")(x, mask))
  return Encoded(x, mask, pool.mean(x, mask))
