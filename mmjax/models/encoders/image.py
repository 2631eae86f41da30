"""Images: a vision transformer on patches (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.layers import (
  Dense,
  Encoded,
  LayerNorm,
  activate,
  constrain,
  hide_patches,
  normal,
  with_axes,
)
from mmjax.models.positions import resize_positions, sincos_positions
from mmjax.models.stack import run_stack
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, NonNegative, Side, Width

Array = jax.Array
ImagePooling = Literal["class", "mean", "class_mean", "attention", "last"]
Positions = Literal["learned", "sincos"]
Stem = Literal["patch", "half_patch", "convolution"]


class VisionTransformer(nn.Module):
  """Call: {"pixels" uint8 or float [B, H, W, 3] in 0..255, "present" bool [B]?, "patch_mask" bool
  [B, L]?} -> Encoded of width D.

  Learned positions belong to the grid of `size`; pictures of another size get them interpolated.
  Pixels beyond the last whole patch are not seen. Patches where patch_mask is True are hidden by a
  learned token (no patch is dropped then; with the stems that overlap, their neighbours still see
  their edges). grid: rows and columns of the learned positions, 0 = those of
  `size`. registers: learned tokens between the class token and the patches (Darcet et al. 2024,
  arXiv:2309.16588). trunk: a transformer shared with other encoders.
  Randomness: stream "dropout", for dropout and patch dropout, only when `train`.
  """

  config: BlockConfig
  patch: int
  size: int
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  pooling: ImagePooling = "mean"
  positions: Positions = "learned"
  stem: Stem = "patch"
  patch_dropout: float = 0.0
  patch_bias: bool = True
  input_norm: bool = False
  final_norm: bool = True
  trunk: nn.Module | None = None
  pooler: bool = False
  registers: int = 0
  grid: int = 0
  antialias: bool = False

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    pixels, grid = self._pixels(batch, c.dtype)
    x = hide_patches(self, self._embed(pixels, grid), batch)
    head = self.pooling in ("class", "class_mean")  # one more token, with a position of its own
    positions = self._positions(grid, head)
    x = x + positions[head:].astype(c.dtype)
    if train and self.patch_dropout and "patch_mask" not in batch:
      x = drop_tokens(x, self.patch_dropout, self.make_rng("dropout"))
    before = []
    if head:
      token = self.param(
        "class", with_axes(normal(c.width**-0.5), ("embed",)), (c.width,), jnp.float32
      )
      before.append((token + positions[0])[None])
    if self.registers:
      before.append(
        self.param(
          "registers",
          with_axes(normal(0.02), (None, "embed")),
          (self.registers, c.width),
          jnp.float32,
        )
      )
    if before:
      own = jnp.concatenate(before).astype(c.dtype)
      x = jnp.concatenate([jnp.broadcast_to(own, (x.shape[0], *own.shape)), x], axis=1)
    x = constrain(nn.Dropout(c.dropout, deterministic=not train)(x))
    if self.input_norm:
      x = LayerNorm(c.eps, c.dtype, name="input_norm")(x)
    present = batch.get("present")
    mask = None if present is None else jnp.broadcast_to(present[:, None], x.shape[:2])
    x = run_stack(self, x, mask, train=train)
    if self.final_norm:
      x = c.make_norm("norm")(x)
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    if self.pooling == "attention":
      return Encoded(x, mask, pool.AttentionPool(c, name="pool")(x, mask))
    if self.pooling in ("mean", "class_mean"):
      start = head + self.registers
      pooled = pool.mean(x[:, start:], mask[:, start:])
      if head:
        pooled = jnp.concatenate([pool.first(x, mask).astype(pooled.dtype), pooled], axis=-1)
    else:
      pooled = {"class": pool.first, "last": pool.last}[self.pooling](x, mask)
    if self.pooler:
      pooled = pool.keep_rows(
        jnp.tanh(Dense((c.width,), ("embed", "mlp"), c.dtype, name="pooler")(pooled)), mask
      )
    return Encoded(x, mask, pooled)

  def patches(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """What the tokens stand for: normalised pixels float32 [B, L, patch * patch * 3], and which are
    real, bool [B, L].
    """
    values = patchify(self._pixels(batch, jnp.float32)[0], self.patch)
    present = batch.get("present", jnp.ones(values.shape[0], bool))
    return values, jnp.broadcast_to(present[:, None], values.shape[:2])

  def _pixels(self, batch: Mapping[str, Array], dtype: jnp.dtype) -> tuple[Array, tuple[int, int]]:
    """(normalised pixels [B, H, W, 3] of whole patches, (rows, columns) of patches)."""
    pixels = batch["pixels"]
    grid = (pixels.shape[1] // self.patch, pixels.shape[2] // self.patch)
    if not min(grid):
      raise UserError(
        f"pictures of {pixels.shape[2]}x{pixels.shape[1]} pixels are smaller than one patch of "
        f"{self.patch}"
      )
    return normalise(
      pixels[:, : grid[0] * self.patch, : grid[1] * self.patch],
      self.pixel_mean,
      self.pixel_std,
      dtype,
    ), grid

  def _embed(self, pixels: Array, grid: tuple[int, int]) -> Array:
    """Normalised pixels [B, H, W, 3] -> [B, grid rows * grid columns, D], row by row."""
    c = self.config
    if self.stem == "convolution":
      x = ConvolutionStem(c.width, self.patch, c.activation, c.eps, c.dtype, name="stem")(pixels)
      return x.reshape(x.shape[0], -1, c.width)
    if self.stem == "half_patch":
      x = HalfPatchStem(c.width, self.patch, c.activation, c.dtype, name="stem")(pixels)
      return x.reshape(x.shape[0], -1, c.width)
    return Dense(
      (c.width,),
      ("patch", "embed"),
      c.dtype,
      nn.initializers.lecun_normal(),
      self.patch_bias,
      name="patch",
    )(patchify(pixels, self.patch))

  def _positions(self, grid: tuple[int, int], head: bool) -> Array:
    """[head + grid rows * grid columns, D] float32."""
    width, trained = self.config.width, (self.grid or self.size // self.patch,) * 2
    if self.positions == "sincos":
      return jnp.pad(sincos_positions(*grid, width), ((int(head), 0), (0, 0)))
    table = self.param(
      "position",
      with_axes(normal(width**-0.5), ("position", "embed")),
      (int(head) + trained[0] * trained[1], width),
      jnp.float32,
    )
    return jnp.concatenate(
      [table[:head], resize_positions(table[head:], trained, grid, self.antialias)]
    )


class HalfPatchStem(nn.Module):
  """Patches of half the size, then one 3x3 convolution of stride 2: tokens overlap, at little more
  than a linear layer.

  Call: [B, H, W, 3] -> [B, H / patch, W / patch, D]; `patch`: an even number. Small pictures learn
  far quicker this way.
  """

  width: int
  patch: int
  activation: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if self.patch % 2:
      raise UserError(f"the half-patch stem needs an even patch, not {self.patch}")
    (b, h, w, _), half = x.shape, self.patch // 2
    channels = self.width // 2
    x = Dense((channels,), ("patch", "mlp"), self.dtype, nn.initializers.he_normal(), name="patch")(
      patchify(x, half)
    )
    x = activate(self.activation, x).reshape(b, h // half, w // half, channels)
    return Dense(
      (self.width,),
      ("patch", "embed"),
      self.dtype,
      nn.initializers.lecun_normal(),
      name="convolution",
    )(neighbours(x))


class ConvolutionStem(nn.Module):
  """3x3 convolutions of stride 2 with layer norm and activation, then a linear layer (Xiao et al.
  2021, arXiv:2106.14881).

  Call: [B, H, W, 3] -> [B, H / patch, W / patch, D]; the channels double up to D at the last
  convolution. `patch`: a power of two. Each convolution is a gather of nine shifted pictures and a
  matrix product, which every backend runs quickly.
  """

  width: int
  patch: int
  activation: str
  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    stages = self.patch.bit_length() - 1
    if self.patch != 2**stages or not stages:
      raise UserError(
        "the convolution stem halves the picture: patch must be a power of two from 2, not "
        f"{self.patch}"
      )
    for i in range(stages):
      channels = max(8, self.width >> (stages - i))
      x = Dense(
        (channels,),
        ("patch", "mlp"),
        self.dtype,
        nn.initializers.he_normal(),
        name=f"convolution_{i}",
      )(neighbours(x))
      x = activate(self.activation, LayerNorm(self.eps, self.dtype, name=f"norm_{i}")(x))
    return Dense(
      (self.width,), ("mlp", "embed"), self.dtype, nn.initializers.lecun_normal(), name="out"
    )(x)


def normalise(
  pixels: Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype
) -> Array:
  """Pixels in 0..255 [..., C] -> (pixels / 255 - mean) / std, in `dtype`."""
  scale = 1 / (255 * jnp.asarray(std, jnp.float32))
  offset = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
  return (pixels.astype(jnp.float32) * scale - offset).astype(dtype)


def patchify(pixels: Array, patch: int) -> Array:
  """[B, H, W, C] -> [B, H/p * W/p, p * p * C]: patches row by row, in each rows, columns,
  channels.
  """
  b, h, w, c = pixels.shape
  x = pixels.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
  return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def neighbours(x: Array, stride: int = 2) -> Array:
  """[B, H, W, C] -> [B, H / stride, W / stride, 9 * C]: the 3x3 surroundings of every
  `stride`-th pixel, zeros outside.
  """
  h, w = x.shape[1], x.shape[2]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate(
    [x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)], axis=-1
  )


def drop_tokens(x: Array, rate: float, key: Array) -> Array:
  """Keeps a random share 1 - rate of the tokens of each row, in order (FLIP, Li et al. 2023,
  arXiv:2212.00794).
  """
  keep = max(1, round(x.shape[1] * (1 - rate)))
  order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=-1)[:, :keep]
  return jnp.take_along_axis(x, jnp.sort(order, axis=-1)[..., None], axis=1)


@with_block
def vit(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  patch: Side = 16,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: ImagePooling = "mean",
  positions: Positions = "learned",
  stem: Stem = "patch",
  patch_dropout: Dropout = 0.0,
  patch_bias: bool = True,
  crop_edge: bool = False,
  input_norm: bool = False,
  norm: Literal["pre", "post"] = "pre",
  final_norm: bool = True,
  activation: Activation = "gelu_tanh",
  bias: bool = True,
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
  pooler: bool = False,
  gated: bool = False,
  layer_scale: NonNegative = 0.0,
  registers: Count = 0,
  grid: Count = 0,
  antialias: bool = False,
) -> VisionTransformer:
  """Vision transformer (reads batch["image"]).

  patch: height and width of a patch in pixels.
  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  pooling: class (a learned token), mean (of the patches), class_mean (both, side by side),
    attention (a learned query and an MLP), last (token).
  positions: learned (interpolated when a picture has another size than data.image.size, or than
  `grid`) or sincos.
  stem: patch (one linear layer), half_patch (patches of half the size, then a 3x3 convolution of
    stride 2) or convolution (3x3 convolutions of stride 2 all the way).
  patch_dropout: share of the patches left out in training.
  patch_bias: the patch embedding has a bias.
  crop_edge: pixels beyond the last whole patch are not seen, instead of refused.
  input_norm: layer norm before the first block, as CLIP has.
  norm, final_norm: layer norm before or after each part of a block; one at the end of the stack.
  activation, bias, eps, dropout: of the blocks.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  pooler: a dense layer and a tanh after the pooling (class, mean or last), as some classifiers
  have.
  gated, layer_scale: the MLPs have a gate (SwiGLU with activation silu); start of a learned factor
  of what each part adds, 0 = none.
  registers: learned tokens beside the patches; 0 = none.
  grid: rows and columns of the learned positions; 0 = data.image.size / patch. antialias: of their
  interpolation.
  """
  image = data["image"]
  if image["size"] % patch and not crop_edge:
    raise UserError(
      f"data.image.size {image['size']} is not divisible by model.encoders.image.patch {patch}. "
      "Change one, or set crop_edge to leave the rest unseen"
    )
  config = BlockConfig(
    width=width,
    depth=depth,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    norm=norm,
    activation=activation,
    bias=bias,
    eps=eps,
    dropout=dropout,
    dtype=jnp.dtype(precision["compute"]),
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
    gated=gated,
    layer_scale=layer_scale,
  )
  return VisionTransformer(
    config,
    patch=patch,
    size=image["size"],
    pixel_mean=tuple(image["mean"]),
    pixel_std=tuple(image["std"]),
    pooling=pooling,
    positions=positions,
    stem=stem,
    patch_dropout=patch_dropout,
    patch_bias=patch_bias,
    input_norm=input_norm,
    final_norm=final_norm,
    pooler=pooler,
    registers=registers,
    grid=grid,
    antialias=antialias,
  )
