"""Sound: wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477) and HuBERT (Hsu et al. 2021,
arXiv:2106.07447), on the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.sequence import (
  SequencePooling,
  drop_and_run,
  pooled,
  real,
  stack_config,
  standardise,
)
from mmjax.models.encoders.spectrogram import samples
from mmjax.models.layers import (
  Dense,
  Encoded,
  Init,
  LayerNorm,
  activate,
  hide_patches,
  normal,
  with_axes,
)
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Few, Heads, Kernels, Width, Widths

Array = jax.Array
FeatureNorm = Literal["group", "layer"]
Normalisation = Literal["utterance", "none"]
EPS = 1e-5  # of the norms between the convolutions


class Wav2Vec2Encoder(nn.Module):
  """Call: {"waveform" int16 [B, S], "length" int32 [B], "present" bool [B]?, "patch_mask" bool [B,
  L]?} -> Encoded of width D.

  Convolutions over the samples (of `channels`, `sizes` and `strides`), a dense layer, a grouped
  convolution over `positions` tokens that tells places apart, the stack. L = the windows of all
  convolutions that fit S. A token is real if its window lies within the sound; always the first of
  a row with any. With mask_padding=False the model sees the silence after the sound.
  Tokens where patch_mask is True are hidden by a learned one. trunk: a transformer shared with
  other encoders.
  Randomness: stream "dropout", only when `train`. Raises UserError: a waveform that is shorter than
  a window.
  """

  config: BlockConfig
  channels: tuple[int, ...]
  sizes: tuple[int, ...]
  strides: tuple[int, ...]
  feature_norm: FeatureNorm = "group"
  feature_bias: bool = False
  projection_norm: bool = True
  positions: int = 128
  position_groups: int = 16
  normalisation: Normalisation = "utterance"
  mask_padding: bool = True
  pooling: SequencePooling = "mean"
  trunk: nn.Module | None = None

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    x, mask = self._features(batch)
    if self.projection_norm:
      x = LayerNorm(c.eps, c.dtype, name="projection_norm")(x)
    x = Dense((c.width,), ("channels", "embed"), c.dtype, normal(0.02), name="projection")(x)
    mask = real(mask, batch)
    x = jnp.where(mask[..., None], hide_patches(self, x, batch), 0)
    left = self.positions // 2
    place = Convolution(
      c.width,
      self.positions,
      1,
      c.dtype,
      normal(2 / (self.positions * c.width) ** 0.5),
      groups=self.position_groups,
      padding=(left, self.positions - 1 - left),
      name="position",
    )
    x = x + activate(c.activation, place(x))
    if c.norm == "post":
      x = LayerNorm(c.eps, c.dtype, name="input_norm")(x)
    x = drop_and_run(self, x, mask, train=train)
    if c.norm == "pre":
      x = c.make_norm("norm")(x)
    return pooled(self, x, mask, self.pooling)

  def _features(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """What the convolutions make of the samples [B, L, channels], and which of it is real, bool [B,
    L].
    """
    c, length = self.config, batch.get("length")
    x = samples(batch["waveform"], length)
    if _windows(x.shape[1], self.sizes, self.strides) < 1:
      raise UserError(
        f"audio of {x.shape[1]} samples is shorter than a window of the convolutions. Raise "
        "data.audio.seconds"
      )
    mask = jnp.ones(x.shape, bool) if length is None else jnp.arange(x.shape[1]) < length[:, None]
    if self.normalisation == "utterance":
      x = standardise(x[..., None], mask, 1e-7)[..., 0]
    if length is None or not self.mask_padding:
      length = jnp.full(x.shape[:1], x.shape[1])
    x, count = x[..., None], length
    for i, (channels, size, stride) in enumerate(
      zip(self.channels, self.sizes, self.strides, strict=True)
    ):
      x = Convolution(
        channels,
        size,
        stride,
        c.dtype,
        nn.initializers.he_normal(),
        self.feature_bias,
        name=f"convolution_{i}",
      )(x)
      count = jnp.where(length > 0, jnp.maximum(1, _windows(count, (size,), (stride,))), 0)
      mask = jnp.arange(x.shape[1]) < count[:, None]
      if self.feature_norm == "layer":
        x = LayerNorm(EPS, c.dtype, name=f"convolution_{i}_norm")(x)
      elif i == 0:
        x = ChannelNorm(c.dtype, name="convolution_0_norm")(x, mask)
      x = activate(c.activation, x)
    return x, mask


class Convolution(nn.Module):
  """A convolution over time in groups of channels. Call: x [B, T, C] -> [B, T', channels]; kernel
  [size, C / groups, channels].
  """

  channels: int
  size: int
  stride: int
  dtype: jnp.dtype
  kernel_init: Init
  use_bias: bool = True
  groups: int = 1
  padding: tuple[int, int] = (0, 0)

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if x.shape[-1] % self.groups:
      raise UserError(
        f"width {x.shape[-1]} is not divisible by {self.groups} groups. Change `position_groups` "
        "of the encoder"
      )
    shape = (self.size, x.shape[-1] // self.groups, self.channels)
    kernel = self.param(
      "kernel", with_axes(self.kernel_init, ("patch", "channels", "embed")), shape, jnp.float32
    )
    x = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride,),
      (self.padding,),
      dimension_numbers=("NHC", "HIO", "NHC"),
      feature_group_count=self.groups,
    )
    if self.use_bias:
      x = x + self.param(
        "bias", with_axes(nn.initializers.zeros, ("embed",)), (self.channels,), jnp.float32
      ).astype(self.dtype)
    return x


class ChannelNorm(nn.Module):
  """Each channel of each row normalised over its real steps. Call: x [B, T, C], mask bool [B, T] ->
  [B, T, C].
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    scale = self.param(
      "scale", with_axes(nn.initializers.ones, ("embed",)), (x.shape[-1],), jnp.float32
    )
    bias = self.param(
      "bias", with_axes(nn.initializers.zeros, ("embed",)), (x.shape[-1],), jnp.float32
    )
    return (standardise(x.astype(jnp.float32), mask, EPS) * scale + bias).astype(self.dtype)


def _windows(samples: Any, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Any:
  """How many windows of convolutions, one after the other, fit into so many samples."""
  for size, stride in zip(sizes, strides, strict=True):
    samples = (samples - size) // stride + 1
  return samples


@with_block
def wav2vec2(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  channels: Widths = (512,) * 7,
  sizes: Kernels = (10, 3, 3, 3, 3, 2, 2),
  strides: Kernels = (5, 2, 2, 2, 2, 2, 2),
  feature_norm: FeatureNorm = "group",
  feature_bias: bool = False,
  projection_norm: bool = True,
  positions: Few = 128,
  position_groups: Few = 16,
  norm: Literal["pre", "post"] = "post",
  normalisation: Normalisation = "utterance",
  mask_padding: bool = True,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: SequencePooling = "mean",
  activation: Activation = "gelu",
  eps: Epsilon = 1e-5,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> Wav2Vec2Encoder:
  """wav2vec 2.0 or HuBERT: convolutions over the samples, then a transformer (reads
  batch["audio"]).

  channels, sizes, strides: of the convolutions, one number each; as they are, 50 tokens a second at
  16 kHz.
  feature_norm: group (each channel over time, after the first convolution) or layer (each step over
  channels, after each).
  feature_bias: the convolutions have biases.
  projection_norm: a layer norm before the dense layer that follows them.
  positions: tokens that the convolution for places sees at once.
  position_groups: groups of channels of that convolution.
  norm: of the blocks: post (base models) or pre (large models).
  normalisation: utterance (mean 0 and variance 1 of the samples of each sound) or none.
  mask_padding: false: the silence after the sound is seen, and counts in the norm of
  feature_norm=group.
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
  if not len(channels) == len(sizes) == len(strides) > 0:
    raise UserError(
      f"channels, sizes and strides have {len(channels)}, {len(sizes)} and {len(strides)} "
      "numbers, but each convolution has one of each"
    )
  config = stack_config(
    precision,
    width=width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    norm=norm,
    activation=activation,
    eps=eps,
    dropout=dropout,
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return Wav2Vec2Encoder(
    config,
    tuple(channels),
    tuple(sizes),
    tuple(strides),
    feature_norm,
    feature_bias,
    projection_norm,
    positions,
    position_groups,
    normalisation,
    mask_padding,
    pooling,
  )
