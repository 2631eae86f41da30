"""Sensor series: a transformer on patches of time (PatchTST, Nie et al. 2023, arXiv:2211.14730, but
the channels together).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.sequence import (
  SequencePooling,
  encode_sequence,
  real,
  stack_config,
  standardise,
)
from mmjax.models.layers import Dense, Encoded, hide_patches, normal, with_axes
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, Side, Width

Array = jax.Array


class SeriesTransformer(nn.Module):
  """Call: {"values" float32 [B, T, C], "mask" bool [B, T], "present" bool [B]?} -> Encoded of width
  D, T / patch tokens.

  A patch is real if one of its steps is; steps that are not real count as zeros. Patches where
  patch_mask bool [B, L] is True are hidden by a learned token. trunk: a transformer shared with
  other encoders. `instance_norm`: each channel of each example to mean 0 and variance 1 over its
  real steps first (Kim et al. 2022, RevIN).
  """

  config: BlockConfig
  patch: int
  length: int
  instance_norm: bool = False
  pooling: SequencePooling = "mean"
  trunk: nn.Module | None = None

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    x, mask = self.patches(batch)
    x = Dense(
      (c.width,), ("patch", "embed"), c.dtype, nn.initializers.lecun_normal(), name="patch"
    )(x)
    x = hide_patches(self, x, batch)
    position = self.param(
      "position",
      with_axes(normal(0.02), ("position", "embed")),
      (self.length // self.patch, c.width),
      jnp.float32,
    )
    x = x + position[: x.shape[1]].astype(c.dtype)
    return encode_sequence(self, x, mask, pooling=self.pooling, train=train)

  def patches(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """What the tokens stand for: steps float32 [B, L, patch * C], and which are real, bool [B,
    L].
    """
    x = batch["values"].astype(jnp.float32)
    rows, length, channels = x.shape
    if length % self.patch or length > self.length:
      raise UserError(
        f"a series of {length} steps does not divide into patches of {self.patch} within "
        f"data.series.length {self.length}. Change data.series.length, or `patch` of the encoder"
      )
    mask = batch["mask"] if "mask" in batch else jnp.ones((rows, length), bool)
    x = jnp.where(mask[:, :, None], x, 0)
    if self.instance_norm:
      x = standardise(x, mask)
    x = x.reshape(rows, length // self.patch, self.patch * channels)
    return x, real(mask.reshape(rows, -1, self.patch).any(-1), batch)


@with_block
def series(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  patch: Side = 8,
  instance_norm: bool = False,
  width: Width = 0,
  depth: Depth = 4,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: SequencePooling = "mean",
  activation: Activation = "gelu_tanh",
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> SeriesTransformer:
  """Transformer on patches of time (reads batch["series"]).

  patch: steps of a patch.
  instance_norm: each channel of each example to mean 0 and variance 1 first; its level and scale
  are then not seen.
  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  pooling: mean, or attention (a learned query and an MLP).
  activation, eps, dropout: of the blocks.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
  if data["series"]["length"] % patch:
    raise UserError(
      f"data.series.length {data['series']['length']} is not divisible by "
      f"model.encoders.series.patch {patch}. Change one"
    )
  config = stack_config(
    precision,
    width=width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    activation=activation,
    eps=eps,
    dropout=dropout,
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return SeriesTransformer(
    config,
    patch=patch,
    length=data["series"]["length"],
    instance_norm=instance_norm,
    pooling=pooling,
  )
