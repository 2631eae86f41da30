"""Video: an image encoder a frame with a mean or a transformer over time, and joint space-time
tubelets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.image import (
  ImagePooling,
  Positions,
  Stem,
  VisionTransformer,
  neighbours,
  normalise,
)
from mmjax.models.encoders.sequence import (
  SequencePooling,
  drop_and_run,
  encode_sequence,
  pooled,
  real,
  stack_config,
)
from mmjax.models.layers import Dense, Encoded, LayerNorm, activate, hide_patches, normal, with_axes
from mmjax.models.positions import resize_positions
from mmjax.ranges import (
  Count,
  Depth,
  Deviations,
  Dropout,
  Epsilon,
  Heads,
  Means,
  Side,
  Size,
  Sizes,
  Width,
  Widths,
)

Array = jax.Array
Temporal = Literal["mean", "transformer"]
Where = Literal["flat", "points"]
SHARPNESS = 3.0  # of the softmax over places, at first
LEAST_CHANGE = 1e-6  # of a frame, of 1: less is none
MIDDLE = (0.5, 0.5, 0.5)  # mean and standard deviation that bring pixels to -1 .. 1


class FrameEncoder(nn.Module):
  """One vector a frame, then time (CLIP4Clip, Luo et al. 2021, arXiv:2104.08860, section 3.3).

  Call: {"frames" uint8 [B, T, H, W, 3], "mask" bool [B, T], "present" bool [B]?} -> Encoded of
  width D, a token a frame.
  "mean" stops there ("meanP"); "transformer" adds positions of time, the stack and the frames' own
  vectors again ("seqTransf").
  `frame` sees {"pixels" [B * T, H, W, 3]} and gives [B * T, D]; with `changes` also {"changes"
  [B * T, H, W, 3]}, from -1 to 1 how each frame differs from the one before, which tells what moves
  (RGB difference, Wang et al. 2016, arXiv:1608.00859, section 3.2). trunk: a transformer over time
  shared with other encoders.
  """

  config: BlockConfig
  frame: nn.Module
  length: int
  temporal: Temporal = "mean"
  pooling: SequencePooling = "mean"
  changes: bool = False
  trunk: nn.Module | None = None

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c, frames = self.config, batch["frames"]
    rows, length = frames.shape[:2]
    mask = real(_mask(batch), batch)
    shown = dict(pixels=frames.reshape(rows * length, *frames.shape[2:]))
    if self.changes:
      changes = jnp.diff(frames.astype(jnp.float32) / 255, axis=1, prepend=frames[:, :1] / 255)
      shown["changes"] = changes.reshape(shown["pixels"].shape).astype(c.dtype)
    x = self.frame(shown, train=train)
    x = x.pooled if isinstance(x, Encoded) else x
    x = jnp.where(mask[:, :, None], x.reshape(rows, length, -1).astype(c.dtype), 0)
    if self.temporal == "mean":
      return pooled(self, x, mask, self.pooling)
    if length > self.length:
      raise UserError(
        f"video of {length} frames for a model of data.video.frames {self.length}. Use fewer, or "
        "change the number"
      )
    # As large as what a frame gives: the order counts from the first step.
    position = self.param(
      "position", with_axes(normal(0.5), ("position", "embed")), (self.length, c.width), jnp.float32
    )
    x = x + drop_and_run(self, x + position[:length].astype(c.dtype), mask, train=train)
    return pooled(self, c.make_norm("norm")(x), mask, self.pooling)


class ConvolutionFrame(nn.Module):
  """3x3 convolutions, and of what is left: where things are, plus each channel's maximum, which
  tells what is there wherever it is, plus the mean of what changes, which tells what moves among
  what is there; a linear layer each. For small frames.

  where: "flat" is all that is left in one row, by which few clips are learned by heart; "points" is
  the place of each channel, the mean of all places weighted by a softmax of its values (Finn et al.
  2015, arXiv:1509.06113), times its maximum.

  Call: {"pixels" uint8 [N, H, W, 3], "changes" [N, H, W, 3]?} -> [N, D]; height and width divisible
  by the product of the strides.
  """

  width: int
  channels: tuple[int, ...]
  strides: tuple[int, ...]
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  activation: str
  eps: float
  dtype: jnp.dtype
  where: Where = "flat"

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Array:
    x = normalise(batch["pixels"], self.pixel_mean, self.pixel_std, self.dtype)
    if "changes" in batch:
      x = jnp.concatenate([x, batch["changes"]], axis=-1)
    whole = math.prod(self.strides)
    if x.shape[1] % whole or x.shape[2] % whole:
      raise UserError(
        f"convolutions of strides {', '.join(map(str, self.strides))} need frames whose sides "
        f"{whole} divides, not {x.shape[2]}x{x.shape[1]}"
      )
    for i, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
      x = Dense(
        (channels,),
        ("patch", "mlp"),
        self.dtype,
        nn.initializers.he_normal(),
        name=f"convolution_{i}",
      )(neighbours(x, stride))
      x = activate(self.activation, LayerNorm(self.eps, self.dtype, name=f"norm_{i}")(x))

    def linear(name):
      return Dense(
        (self.width,), ("patch", "embed"), self.dtype, nn.initializers.lecun_normal(), name=name
      )

    what = x.max(axis=(1, 2))
    if self.where == "flat":
      where = x
    else:
      init = with_axes(nn.initializers.constant(SHARPNESS), ("mlp",))
      sharpness = self.param("sharpness", init, (x.shape[-1],), jnp.float32)
      where = mean_places(x, sharpness) * what[:, None]
    told = linear("where")(where.reshape(x.shape[0], -1)) + linear("what")(what)
    if "changes" in batch:
      told = told + linear("moves")(mean_of_changes(x, batch["changes"]))
    return told


def mean_of_changes(x: Array, changes: Array) -> Array:
  """The mean of the places of x [N, H, W, C], [N, C], weighted by how much of the frame changes
  there; 0 where nothing does. changes [N, H', W', 3]: H divides H', and W W'.
  """
  count, height, width, _ = x.shape
  cells = changes.reshape(count, height, -1, width, changes.shape[2] // width, 3)
  weights = jnp.abs(cells.astype(jnp.float32)).mean(axis=(2, 4, 5))
  weights = weights / (weights.sum(axis=(1, 2), keepdims=True) + LEAST_CHANGE)
  return jnp.einsum("nhw,nhwc->nc", weights.astype(x.dtype), x)


def mean_places(x: Array, sharpness: Array) -> Array:
  """Where each channel of x [N, H, W, C] is, [N, 2, C], from -1 (upper, left edge) to 1: the mean
  of all places by a softmax of its values times its sharpness [C].
  """
  heat = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
  heat = jax.nn.softmax(sharpness * heat, axis=1)
  axes = [jnp.linspace(-1, 1, side) for side in x.shape[1:3]]
  grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
  return jnp.einsum("npc,pd->ndc", heat, grid).astype(x.dtype)


class TubeletTransformer(nn.Module):
  """Joint attention over patches of space and time (ViViT, Arnab et al. 2021, arXiv:2103.15691,
  section 3.3, model 1).

  Call: as FrameEncoder -> Encoded of width D; tokens of T / time steps of rows of columns.
  Positions are the sum of a table of places (interpolated for frames of another size than `size`)
  and one of times. A tubelet is real if one of its frames is; those where patch_mask bool [B, L] is
  True are hidden by a learned token. trunk: a transformer shared with other encoders.
  """

  config: BlockConfig
  patch: int
  time: int
  size: int
  length: int
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  pooling: SequencePooling = "mean"
  trunk: nn.Module | None = None

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    x, mask, (steps, rows, columns) = self._patches(batch, c.dtype)
    x = Dense(
      (c.width,), ("patch", "embed"), c.dtype, nn.initializers.lecun_normal(), name="patch"
    )(x)
    x, side = hide_patches(self, x, batch), self.size // self.patch

    def table(name, count):
      return self.param(
        name, with_axes(normal(0.02), ("position", "embed")), (count, c.width), jnp.float32
      )

    place = resize_positions(table("position", side * side), (side, side), (rows, columns))
    when = table("time_position", self.length // self.time)[:steps]
    x = x + (when[:, None] + place[None]).reshape(-1, c.width).astype(c.dtype)
    return encode_sequence(self, x, mask, pooling=self.pooling, train=train)

  def patches(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """What the tokens stand for: normalised tubelets float32 [B, L, time * patch * patch * 3], and
    which are real, bool [B, L].
    """
    return self._patches(batch, jnp.float32)[:2]

  def _patches(
    self, batch: Mapping[str, Array], dtype: jnp.dtype
  ) -> tuple[Array, Array, tuple[int, int, int]]:
    """(normalised tubelets, which are real, (steps, rows, columns))."""
    (rows, length, height, width), p, t = batch["frames"].shape[:4], self.patch, self.time
    if height % p or width % p or length % t or length > self.length:
      raise UserError(
        f"video of {length} frames of {width}x{height} does not divide into tubelets of {t} "
        f"frames of {p}x{p} within data.video.frames {self.length}. Change data.video, or `patch` "
        "and `time` of the encoder"
      )
    steps, grid, mask = length // t, (height // p, width // p), _mask(batch)
    x = normalise(batch["frames"], self.pixel_mean, self.pixel_std, dtype)
    x = jnp.where(mask[:, :, None, None, None], x, 0)
    x = x.reshape(rows, steps, t, grid[0], p, grid[1], p, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    mask = real(jnp.repeat(mask.reshape(rows, steps, t).any(-1), grid[0] * grid[1], axis=1), batch)
    return x.reshape(rows, steps * grid[0] * grid[1], t * p * p * 3), mask, (steps, *grid)


def _mask(batch: Mapping[str, Array]) -> Array:
  """Which frames are real, bool [B, T]."""
  return batch["mask"] if "mask" in batch else jnp.ones(batch["frames"].shape[:2], bool)


@with_block
def frames(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  stem: Literal["vit", "convolution"] = "vit",
  temporal: Temporal = "transformer",
  patch: Side = 16,
  frame_depth: Depth = 12,
  frame_stem: Stem = "patch",
  frame_pooling: ImagePooling = "mean",
  positions: Positions = "learned",
  channels: Widths = (16, 24, 64),
  strides: Sizes = (),
  where: Where = "flat",
  changes: bool = False,
  mean: Means = MIDDLE,
  std: Deviations = MIDDLE,
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
) -> FrameEncoder:
  """Every frame a vector, then time (reads batch["video"]).

  stem: of a frame: vit, or convolution (for small frames).
  temporal: mean (order is not seen) or transformer over the frames.
  patch, frame_depth, frame_stem, frame_pooling, positions: of the frame's vit, as the kind "vit"
  has them.
  channels: of the convolutions, one after the other. strides: theirs; () = 2 of each.
  where: how they tell where things are: all that is left (flat), or the place of each channel
  (points), which needs fewer clips.
  changes: convolutions also see how each frame differs from the one before, and what moves is told
  apart from what is there.
  mean, std: of pixels in [0, 1], per channel.
  width: channels; 0 = the model's width.
  depth: blocks over time.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  pooling: of the frames: mean, or attention (a learned query and an MLP).
  activation, eps, dropout: of all blocks.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
  video, size = data["video"], data["video"]["size"]
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
  if stem == "convolution":
    strides = tuple(strides) or (2,) * len(channels)
    if len(strides) != len(channels):
      raise UserError(
        f"model.encoders.video has {len(channels)} channels, but {len(strides)} strides. Give one "
        "to each convolution"
      )
    frame: nn.Module = ConvolutionFrame(
      width, tuple(channels), strides, tuple(mean), tuple(std), activation, eps, config.dtype, where
    )
  else:
    if size % patch:
      raise UserError(
        f"data.video.size {size} is not divisible by model.encoders.video.patch {patch}. Change one"
      )
    frame = VisionTransformer(
      stack_config(
        precision,
        width=width,
        depth=frame_depth,
        heads=heads,
        mlp=mlp,
        activation=activation,
        eps=eps,
        dropout=dropout,
        kernel=kernel,
        remat=remat,
        scan_unroll=scan_unroll,
      ),
      patch=patch,
      size=size,
      pixel_mean=tuple(mean),
      pixel_std=tuple(std),
      pooling=frame_pooling,
      positions=positions,
      stem=frame_stem,
    )
    if changes:
      raise UserError(
        "model.encoders.video.changes needs stem='convolution'. Set it, or leave changes out"
      )
  return FrameEncoder(
    config, frame, length=video["frames"], temporal=temporal, pooling=pooling, changes=changes
  )


@with_block
def tubelets(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  patch: Side = 16,
  time: Size = 2,
  mean: Means = MIDDLE,
  std: Deviations = MIDDLE,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: SequencePooling = "mean",
  activation: Activation = "gelu_tanh",
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> TubeletTransformer:
  """Joint attention over patches of space and time (reads batch["video"]).

  patch, time: a tubelet's height and width in pixels, and its frames.
  mean, std: of pixels in [0, 1], per channel.
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
  video = data["video"]
  if video["size"] % patch or video["frames"] % time:
    raise UserError(
      f"data.video.size {video['size']} and frames {video['frames']} do not divide into tubelets "
      f"of {time} frames of {patch}x{patch}. Change data.video, or `patch` and `time` of "
      "model.encoders.video"
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
  return TubeletTransformer(
    config,
    patch=patch,
    time=time,
    size=video["size"],
    length=video["frames"],
    pixel_mean=tuple(mean),
    pixel_std=tuple(std),
    pooling=pooling,
  )
