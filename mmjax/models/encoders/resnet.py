"""Images: residual convolutional networks (He et al. 2016, arXiv:1512.03385), batch normalised over
the rows that are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.encoders.image import normalise
from mmjax.models.layers import Encoded, with_axes
from mmjax.ranges import Positive, Sizes

Array = jax.Array
Stem = Literal["imagenet", "small"]

# Layers of the named networks: (blocks a stage, whether the blocks are bottlenecks); He et al.
# 2016, table 1.
NETWORKS: dict[int, tuple[tuple[int, ...], bool]] = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}
EXPANSION = 4  # channels that a bottleneck block ends with, as a multiple of its inner ones
KEPT = 0.9  # share of the running statistics that one step keeps
EPS = 1e-5


class ResNet(nn.Module):
  """Call: {"pixels" uint8 or float [B, H, W, 3] in 0..255, "present" bool [B]?} -> Encoded, tokens
  [B, H/s * W/s, D].

  The tokens are the last feature map, row by row; `pooled` is their mean. Stage i has `channels` *
  2**i channels (times 4 where the blocks are bottlenecks). Collection "batch_stats" holds the
  running statistics; `train` reads those of the batch and updates the collection where it is
  mutable. Rows that are not `present` count in neither.
  """

  blocks: tuple[int, ...]
  bottleneck: bool
  channels: int
  stem: Stem
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    pixels = batch["pixels"]
    present = batch.get("present")
    present = jnp.ones(pixels.shape[0], bool) if present is None else present
    x = normalise(pixels, self.pixel_mean, self.pixel_std, self.dtype)
    size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
    x = Convolution(self.channels, size, stride, self.dtype, name="stem")(x)
    x = jax.nn.relu(BatchNorm(self.dtype, name="stem_norm")(x, present, train=train))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        block = Block(
          self.channels * 2**stage,
          self.bottleneck,
          2 if stage and not i else 1,
          self.dtype,
          name=f"stage{stage}_block{i}",
        )
        x = block(x, present, train=train)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    mask = jnp.broadcast_to(present[:, None], tokens.shape[:2])
    return Encoded(tokens, mask, pool.mean(tokens, mask))


class Block(nn.Module):
  """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 (which has the stride) and 1x1, beside a
  shortcut.

  Call: x [B, H, W, C], present bool [B] -> [B, H / stride, W / stride, channels or 4 * channels].
  """

  channels: int
  bottleneck: bool
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, present: Array, *, train: bool) -> Array:
    out = self.channels * (EXPANSION if self.bottleneck else 1)
    plan = (
      ((self.channels, 1, 1), (self.channels, 3, self.stride), (out, 1, 1))
      if self.bottleneck
      else ((self.channels, 3, self.stride), (out, 3, 1))
    )
    y = x
    for i, (channels, size, stride) in enumerate(plan):
      y = Convolution(channels, size, stride, self.dtype, name=f"conv{i}")(y)
      y = BatchNorm(self.dtype, name=f"norm{i}")(y, present, train=train)
      y = jax.nn.relu(y) if i + 1 < len(plan) else y
    if self.stride != 1 or x.shape[-1] != out:
      x = Convolution(out, 1, self.stride, self.dtype, name="shortcut")(x)
      x = BatchNorm(self.dtype, name="shortcut_norm")(x, present, train=train)
    return nn.with_logical_constraint(jax.nn.relu(x + y), ("batch", None, None, "embed"))


class Convolution(nn.Module):
  """A convolution of odd `size` without bias, zeros around: [B, H, W, C] -> [B, ceil(H / stride),
  ceil(W / stride), channels].

  kernel [size, size, C, channels], started as He et al. 2015 (arXiv:1502.01852) with the fan of the
  outputs.
  """

  channels: int
  size: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    kernel = self.param(
      "kernel",
      with_axes(init, (None, None, "channels", "embed")),
      (self.size, self.size, x.shape[-1], self.channels),
      jnp.float32,
    )
    edge = (self.size // 2, self.size // 2)
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      (edge, edge),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class BatchNorm(nn.Module):
  """Batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167) whose statistics ignore the rows
  that are not present.

  Call: x [B, H, W, C], present bool [B] -> [B, H, W, C] in `dtype`. All in float32. Under a mesh
  the means are of the global batch. Running statistics: collection "batch_stats", "mean" and
  "variance" (unbiased, as PyTorch keeps it) float32 [C], moved by a tenth of the way a step; a
  batch without any present row leaves them and is normalised by them.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, present: Array, *, train: bool) -> Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", with_axes(nn.initializers.ones, ("embed",)), shape, jnp.float32)
    bias = self.param("bias", with_axes(nn.initializers.zeros, ("embed",)), shape, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
    running_variance = self.variable(
      "batch_stats", "variance", lambda: jnp.ones(shape, jnp.float32)
    )
    mean, variance = running_mean.value, running_variance.value
    x = x.astype(jnp.float32)
    if train:
      some, now_mean, now_variance, unbiased = _statistics(x, present)
      if self.is_mutable_collection("batch_stats") and not self.is_initializing():

        def move(old, new):
          return jax.lax.stop_gradient(jnp.where(some, KEPT * old + (1 - KEPT) * new, old))

        running_mean.value, running_variance.value = move(mean, now_mean), move(variance, unbiased)
      mean, variance = jnp.where(some, now_mean, mean), jnp.where(some, now_variance, variance)
    return ((x - mean) * (jax.lax.rsqrt(variance + EPS) * scale) + bias).astype(self.dtype)


def _statistics(x: Array, present: Array) -> tuple[Array, Array, Array, Array]:
  """(whether any row is present, mean [C], variance [C], unbiased variance [C]) of x [B, H, W, C]
  over the present rows.
  """
  weight = present.astype(jnp.float32)[:, None, None, None]
  pixels = x.shape[1] * x.shape[2]
  count = present.astype(jnp.float32).sum() * pixels
  mean = (weight * x).sum((0, 1, 2)) / jnp.maximum(count, 1)
  squares = (weight * jnp.square(x - mean)).sum((0, 1, 2))
  return count > 0, mean, squares / jnp.maximum(count, 1), squares / jnp.maximum(count - 1, 1)


def resnet(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  layers: Literal[18, 34, 50, 101, 152] = 50,
  blocks: Sizes = (),
  multiplier: Positive = 1.0,
  stem: Stem = "imagenet",
) -> ResNet:
  """Residual convolutional network (reads batch["image"]), with batch statistics of the whole
  global batch.

  layers: 18 and 34 have blocks of two 3x3 convolutions; 50, 101 and 152 have bottlenecks.
  blocks: blocks of each stage; () = those of the network of that many layers.
  multiplier: factor of all channels; 1 starts with 64 and ends with 512 (2048 with bottlenecks).
  stem: imagenet (7x7 convolution of stride 2, then a maximum over 3x3 of stride 2) or small (3x3,
  for small pictures).
  """
  usual, bottleneck = NETWORKS[layers]
  blocks = tuple(blocks) or usual
  if not all(isinstance(count, int) and count > 0 for count in blocks):
    raise UserError(f"blocks is {blocks}, but must be numbers of at least 1, one a stage")
  channels = round(64 * multiplier)
  if channels < 1:
    raise UserError(f"multiplier {multiplier} leaves no channels: give at least {1 / 64}")
  image = data["image"]
  return ResNet(
    blocks,
    bottleneck,
    channels,
    stem,
    tuple(image["mean"]),
    tuple(image["std"]),
    jnp.dtype(precision["compute"]),
  )
