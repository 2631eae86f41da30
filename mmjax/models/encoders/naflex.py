"""Images of any aspect ratio: a vision transformer on as many patches as a picture has (NaFlex of
SigLIP 2, Tschannen et al.
2025, arXiv:2502.14786, section 2.5; NaViT, Dehghani et al. 2023, arXiv:2307.06304). data/naflex.py
makes its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.image import normalise, patchify
from mmjax.models.layers import Dense, Encoded, constrain, normal, with_axes
from mmjax.models.stack import Stack
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, Side, Size, Width, Windows

Array = jax.Array
FlexiblePooling = Literal["mean", "attention"]


class FlexibleVisionTransformer(nn.Module):
  """Call: {"patches" uint8 [B, N, p * p * 3], "positions" int32 [B, N, 2] (row, column), "grid"
  int32 [B, 2] (rows, columns), "mask" bool [B, N], "present" bool [B]?} or {"pixels" uint8 [B, H,
  W, 3]} -> Encoded of width D. Patches of a clip hold `frames` pictures, [B, N, frames * p * p *
  3].

  Patches may come in any order. The learned positions, a square of `grid` x `grid`, are resized to
  the grid of each picture; corners: so that its corners get those of the square, without
  antialiasing. frames: pictures that a patch is made of; a still one is repeated. taps: numbers of
  blocks whose tokens are returned too.
  """

  config: BlockConfig
  patch: int
  grid: int
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  pooling: FlexiblePooling = "attention"
  corners: bool = False
  frames: int = 1
  final_norm: bool = True
  taps: tuple[int, ...] = ()

  any_length = True  # fewer patches than the budget will do

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    inputs = batch if "patches" in batch else sequences(batch["pixels"], self.patch)
    patches, mask = inputs["patches"], inputs["mask"]
    values = self.patch**2 * 3
    if patches.shape[-1] not in (values, values * self.frames):
      raise UserError(
        f"patches of {patches.shape[-1]} values for a model of model.encoders.image.patch "
        f"{self.patch}, which has {values}. Prepare them with that patch size"
      )
    if "present" in batch:
      mask = mask & batch["present"][:, None]
    x = normalise(
      patches.reshape(*patches.shape[:2], -1, 3), self.pixel_mean, self.pixel_std, c.dtype
    ).reshape(patches.shape)
    if patches.shape[-1] == values:  # a still picture
      x = jnp.tile(x, (1, 1, self.frames))
    x = Dense(
      (c.width,), ("patch", "embed"), c.dtype, nn.initializers.lecun_normal(), name="patch"
    )(x)
    table = self.param(
      "position",
      with_axes(normal(c.width**-0.5), ("position", "embed")),
      (self.grid**2, c.width),
      jnp.float32,
    )
    places = inputs["positions"]
    x = x + position_of(table, places, inputs["grid"], self.corners).astype(c.dtype)
    x = constrain(nn.Dropout(c.dropout, deterministic=not train)(x))
    stack = Stack(c)
    nn.share_scope(self, stack)  # its parameters are ours: image/layers, not image/Stack_0/layers
    taps: list[Array] = []
    x = stack(x, mask, positions=places, taps=self.taps, train=train)
    if self.taps:
      x, taps = x
    if self.final_norm:
      x = c.make_norm("norm")(x)
    if self.pooling == "attention":
      return Encoded(x, mask, pool.AttentionPool(c, name="pool")(x, mask), tuple(taps))
    return Encoded(x, mask, pool.mean(x, mask), tuple(taps))


def position_of(table: Array, positions: Array, grid: Array, corners: bool = False) -> Array:
  """The learned position of each patch, float32 [B, N, D], after resizing the square table [S * S,
  D] to the picture's grid.

  positions int32 [B, N, 2], grid int32 [B, 2]. Bilinear with half-pixel centres, antialiased where
  the grid is smaller than the table, as `torch.nn.functional.interpolate(..., antialias=True)`;
  corners: as with align_corners=True and not antialiased. Weights of single patches, so no shape
  depends on data.
  """
  size = round(table.shape[0] ** 0.5)
  weigh = _corner_weights if corners else _bilinear_weights
  rows, columns = (weigh(positions[..., i], grid[:, None, i], size) for i in (0, 1))
  weights = (rows[..., :, None] * columns[..., None, :]).reshape(*positions.shape[:2], size * size)
  return jnp.einsum("bns,sd->bnd", weights, table, precision="highest")


def _bilinear_weights(index: Array, count: Array, size: int) -> Array:
  """Weights [..., size] of the samples that place `index` of `count` reads from `size` samples in a
  row.
  """
  scale = size / jnp.maximum(count, 1).astype(jnp.float32)
  centre, support = scale * (index + 0.5), jnp.maximum(scale, 1)
  distance = jnp.abs(jnp.arange(size) + 0.5 - centre[..., None]) / support[..., None]
  weights = jnp.maximum(0, 1 - distance)
  return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-12)


def _corner_weights(index: Array, count: Array, size: int) -> Array:
  """As `_bilinear_weights`, the first place on the first sample and the last on the last."""
  centre = index * (size - 1) / jnp.maximum(count - 1, 1)
  return jnp.maximum(0, 1 - jnp.abs(jnp.arange(size) - centre[..., None]))


def sequences(pixels: Array, patch: int) -> dict[str, Array]:
  """Pictures of one size, uint8 [B, H, W, 3], as the module takes them: every patch, row by row."""
  rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
  if not rows or not columns:
    raise UserError(
      f"pictures of {pixels.shape[2]}x{pixels.shape[1]} pixels are smaller than one patch of "
      f"{patch}"
    )
  patches = patchify(pixels[:, : rows * patch, : columns * patch], patch)
  grid_positions = jnp.stack(
    jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1
  ).reshape(-1, 2)
  b = pixels.shape[0]
  return dict(
    patches=patches,
    positions=jnp.broadcast_to(grid_positions, (b, rows * columns, 2)),
    grid=jnp.broadcast_to(jnp.array([rows, columns]), (b, 2)),
    mask=jnp.ones((b, rows * columns), bool),
  )


@with_block
def naflex(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  patch: Side = 16,
  grid: Side = 16,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: FlexiblePooling = "attention",
  corners: bool = False,
  frames: Size = 1,
  final_norm: bool = True,
  taps: Windows = (),
  activation: Activation = "gelu_tanh",
  bias: bool = True,
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> FlexibleVisionTransformer:
  """Vision transformer on patches of pictures of any aspect ratio (reads batch["image"]).

  patch: height and width of a patch in pixels.
  grid: rows and columns of the learned positions, resized to the grid of each picture.
  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  pooling: mean, or attention (a learned query and an MLP).
  corners: the grid's corners get the positions of the corners, without antialiasing.
  frames: pictures that a patch is made of, a still one repeated. final_norm: at the end.
  taps: numbers of blocks (from 0) whose tokens a language model gets too (DeepStack).
  activation, bias, eps, dropout: of the blocks.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
  config = BlockConfig(
    width=width,
    depth=depth,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    activation=activation,
    bias=bias,
    eps=eps,
    dropout=dropout,
    dtype=jnp.dtype(precision["compute"]),
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  image = data["image"]
  return FlexibleVisionTransformer(
    config,
    patch,
    grid,
    tuple(image["mean"]),
    tuple(image["std"]),
    pooling,
    corners,
    frames,
    final_norm,
    tuple(taps),
  )
