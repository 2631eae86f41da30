"""Sound: Whisper's convolutions and transformer, and AST's transformer on patches of the
spectrogram.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.sequence import (
  SequencePooling,
  drop_and_run,
  encode_sequence,
  pooled,
  real,
  stack_config,
)
from mmjax.models.encoders.spectrogram import (
  Normalisation,
  SpecAugment,
  kaldi_frames,
  kaldi_mel,
  log_mel,
)
from mmjax.models.layers import Dense, Encoded, activate, hide_patches, normal, with_axes
from mmjax.models.positions import resize_positions, sinusoids
from mmjax.ranges import (
  Count,
  Depth,
  Dropout,
  Epsilon,
  Finite,
  Heads,
  Positive,
  Share,
  Side,
  Size,
  Sizes,
  Width,
)

Array = jax.Array
AstPooling = Literal["class", "mean", "attention"]


class WhisperEncoder(nn.Module):
  """Whisper's encoder (Radford et al. 2022, arXiv:2212.04356, section 2.2).

  Call: {"waveform" int16 [B, S], "length" int32 [B], "present" bool [B]?, "patch_mask" bool [B,
  L]?} -> Encoded of width D;
  L = S / hop / strides, rounded up. Two convolutions over 3 frames, positions of sines, the stack.
  With mask_padding=False the model sees the silence after the sound, as Whisper was trained; with
  mask_frames=False its convolutions alone do. pool: tokens whose mean one is, before the last norm,
  real where they all are. Where patch_mask is True the frames themselves are hidden, by a learned
  one, before the convolutions. In the place of the waveform may stand its "features" float32 [B, F,
  mels], as `log_mel` makes them, all real. trunk: a transformer shared with other encoders.
  Randomness: stream "dropout", only when `train`.
  """

  config: BlockConfig
  rate: int
  n_fft: int
  hop: int
  mels: int
  strides: tuple[int, int]
  normalisation: Normalisation = "whisper"
  mask_padding: bool = True
  mask_frames: bool = True
  pool: int = 1
  pooling: SequencePooling = "mean"
  augment: SpecAugment = SpecAugment()
  trunk: nn.Module | None = None

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    x, mask = self._features(batch)
    if "patch_mask" in batch:
      x = hide_patches(
        self,
        x,
        dict(
          patch_mask=jnp.repeat(batch["patch_mask"], math.prod(self.strides), axis=1)[
            :, : x.shape[1]
          ]
        ),
      )
    elif train and self.augment.active:
      x = self.augment(x, mask, self.make_rng("dropout"))
    mask = real(mask if self.mask_padding else jnp.ones_like(mask), batch)
    x = x.astype(c.dtype)
    for i, stride in enumerate(self.strides):
      x = around(jnp.where(mask[:, :, None], x, 0) if self.mask_frames else x, stride)
      x = Dense(
        (c.width,),
        ("patch", "embed"),
        c.dtype,
        nn.initializers.lecun_normal(),
        name=f"convolution_{i}",
      )(x)
      x, mask = activate(c.activation, x), mask[:, ::stride]
    x = x + jnp.asarray(sinusoids(x.shape[1], c.width), c.dtype)
    return encode_sequence(self, x, mask, pooling=self.pooling, train=train, join=self.pool)

  def patches(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """What the tokens stand for: frames float32 [B, L, stride * mels], and which are real, bool [B,
    L].
    """
    x, mask = self._features(batch)
    stride = math.prod(self.strides)
    x = jnp.pad(jnp.where(mask[:, :, None], x, 0), ((0, 0), (0, -x.shape[1] % stride), (0, 0)))
    return x.reshape(x.shape[0], -1, stride * self.mels), real(mask[:, ::stride], batch)

  def _features(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    if "features" in batch:
      return batch["features"], jnp.ones(batch["features"].shape[:2], bool)
    return log_mel(
      batch["waveform"],
      batch.get("length"),
      rate=self.rate,
      n_fft=self.n_fft,
      hop=self.hop,
      mels=self.mels,
      normalisation=self.normalisation,
    )


class SpectrogramTransformer(nn.Module):
  """AST: overlapping square patches of the spectrogram, a class and a distillation token (Gong et
  al. 2021, arXiv:2104.01778).

  Call: as WhisperEncoder -> Encoded of width D: the two tokens, then the patches, for each band of
  mels those of its times.
  `frames`: the spectrogram is padded with zeros, or cut, to this many. Learned positions belong to
  their grid; sound of another length (frames=0) than `seconds` gets them interpolated. "class"
  pools the mean of the two tokens. patch_mask hides patches by a learned token; where they overlap,
  their neighbours still see their edges.
  """

  config: BlockConfig
  rate: int
  seconds: float
  mels: int = 128
  patch: int = 16
  stride: int = 10
  frames: int = 0
  mean: float = -4.2677393
  std: float = 4.5689974
  mask_padding: bool = True
  pooling: AstPooling = "class"
  augment: SpecAugment = SpecAugment()
  trunk: nn.Module | None = None

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    augment = train and self.augment.active and "patch_mask" not in batch
    x, mask, grid = self._patches(batch, self.make_rng("dropout") if augment else None)
    trained = self._grid(self.frames or kaldi_frames(round(self.rate * self.seconds), self.rate))
    x = Dense(
      (c.width,), ("patch", "embed"), c.dtype, nn.initializers.lecun_normal(), name="patch"
    )(x)
    x = hide_patches(self, x, batch)
    table = self.param(
      "position",
      with_axes(normal(0.02), ("position", "embed")),
      (2 + math.prod(trained), c.width),
      jnp.float32,
    )
    x = x + resize_positions(table[2:], trained, grid).astype(c.dtype)
    tokens = [
      self.param(name, with_axes(normal(0.02), ("embed",)), (c.width,), jnp.float32)
      for name in ("class", "distillation")
    ]
    head = jnp.broadcast_to(
      (jnp.stack(tokens) + table[:2]).astype(c.dtype), (x.shape[0], 2, c.width)
    )
    x = jnp.concatenate([head, x], axis=1)
    mask = jnp.concatenate(
      [jnp.broadcast_to(mask.any(1, keepdims=True), (x.shape[0], 2)), mask], axis=1
    )
    x = c.make_norm("norm")(drop_and_run(self, x, mask, train=train))
    if self.pooling == "class":
      return Encoded(x, mask, pool.keep_rows((x[:, 0] + x[:, 1]) / 2, mask))
    return pooled(self, x, mask, self.pooling)

  def patches(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """What the tokens after the first two stand for: patches float32 [B, L, patch * patch], and
    which are real, bool [B, L].
    """
    return self._patches(batch, None)[:2]

  def _patches(
    self, batch: Mapping[str, Array], key: Array | None
  ) -> tuple[Array, Array, tuple[int, int]]:
    """(normalised patches, which are real, (bands, times)); key: of the augmentation, None =
    without.
    """
    x, mask = kaldi_mel(batch["waveform"], batch.get("length"), rate=self.rate, mels=self.mels)
    if key is not None:
      x = self.augment(x, mask, key)
    x = jnp.where(mask[:, :, None], x, 0)
    if extra := max(0, self.frames - x.shape[1]):
      x, mask = jnp.pad(x, ((0, 0), (0, extra), (0, 0))), jnp.pad(mask, ((0, 0), (0, extra)))
    x, mask = (a[:, : self.frames or None] for a in (x, mask))
    mask = real(mask if self.mask_padding else jnp.ones_like(mask), batch)
    grid = self._grid(x.shape[1])
    x = overlapping((x - self.mean) / (2 * self.std), self.patch, self.stride)
    return x, jnp.tile(mask[:, : grid[1] * self.stride : self.stride], (1, grid[0])), grid

  def _grid(self, frames: int) -> tuple[int, int]:
    """(bands, times) of the patches of a spectrogram. Raises UserError: no patch fits."""
    if min(frames, self.mels) < self.patch:
      raise UserError(
        f"a spectrogram of {frames} frames and {self.mels} mels is smaller than a patch of "
        f"{self.patch}. Raise data.audio.seconds"
      )
    return (self.mels - self.patch) // self.stride + 1, (frames - self.patch) // self.stride + 1


def around(x: Array, stride: int) -> Array:
  """[B, F, C] -> [B, ceil(F / stride), 3 * C]: every stride-th frame between its neighbours, zeros
  outside.
  """
  frames = x.shape[1]
  x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
  return jnp.concatenate([x[:, i : i + frames : stride] for i in range(3)], axis=-1)


def overlapping(x: Array, patch: int, stride: int) -> Array:
  """Spectrogram [B, F, M] -> patches [B, bands * times, patch * patch], band by band, in each mels
  then frames.
  """

  def windows(x: Array, axis: int) -> Array:
    last = (x.shape[axis] - patch) // stride * stride
    return jnp.stack(
      [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(patch)], axis + 1
    )

  x = windows(windows(x, 1), 3).transpose(0, 3, 1, 4, 2)  # from [B, times, patch, bands, patch]
  return x.reshape(x.shape[0], -1, patch * patch)


@with_block
def whisper(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  mels: Side = 80,
  n_fft: Side = 400,
  hop: Side = 160,
  strides: Sizes = (1, 2),
  normalisation: Normalisation = "whisper",
  mask_padding: bool = True,
  mask_frames: bool = True,
  pool: Size = 1,
  width: Width = 0,
  depth: Depth = 4,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: SequencePooling = "mean",
  activation: Activation = "gelu",
  time_masks: Count = 0,
  time_width: Count = 0,
  frequency_masks: Count = 0,
  frequency_width: Count = 0,
  time_warp: Share = 0.0,
  frequency_warp: Share = 0.0,
  eps: Epsilon = 1e-5,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> WhisperEncoder:
  """Convolutions over a log-mel spectrogram, then a transformer (reads batch["audio"]).

  mels, n_fft, hop: of the spectrogram: channels, and samples of a window and between two.
  strides: of the two convolutions; (1, 2) gives 50 tokens a second, (2, 2) gives 25.
  normalisation: whisper (relative to the loudest) or utterance (mean 0 and variance 1 of each
  channel).
  mask_padding: false: the silence after the sound is seen, as Whisper was trained.
  mask_frames: false: the convolutions see it even where the blocks do not (Qwen2-Audio).
  pool: tokens whose mean one is, before the last norm.
  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  pooling: mean, or attention (a learned query and an MLP).
  time_masks, time_width, frequency_masks, frequency_width: SpecAugment in training: how many, and
  of how many frames or channels.
  time_warp, frequency_warp: in training the middle moves, the mel axis stretches, by up to this
  share.
  activation, eps, dropout: of the blocks.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
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
  augment = SpecAugment(
    time_masks, time_width, frequency_masks, frequency_width, time_warp, frequency_warp
  )
  return WhisperEncoder(
    config,
    rate=data["audio"]["rate"],
    n_fft=n_fft,
    hop=hop,
    mels=mels,
    strides=tuple(strides),
    normalisation=normalisation,
    mask_padding=mask_padding,
    mask_frames=mask_frames,
    pool=pool,
    pooling=pooling,
    augment=augment,
  )


@with_block
def ast(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  mels: Side = 128,
  patch: Side = 16,
  stride: Side = 10,
  frames: Count = 0,
  mean: Finite = -4.2677393,
  std: Positive = 4.5689974,
  mask_padding: bool = True,
  width: Width = 0,
  depth: Depth = 12,
  heads: Heads = 0,
  mlp: Width = 0,
  pooling: AstPooling = "class",
  activation: Activation = "gelu",
  time_masks: Count = 0,
  time_width: Count = 0,
  frequency_masks: Count = 0,
  frequency_width: Count = 0,
  time_warp: Share = 0.0,
  frequency_warp: Share = 0.0,
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> SpectrogramTransformer:
  """Transformer on patches of a spectrogram (reads batch["audio"]).

  mels: channels of the spectrogram (Kaldi's, 100 frames a second).
  patch, stride: side of a patch, and steps from one to the next; stride below patch lets them
  overlap.
  frames: of the spectrogram, padded or cut; 0 = those of data.audio.seconds.
  mean, std: of the spectrogram over the training data (those of AudioSet).
  mask_padding: false: patches after the sound are seen, as AST was trained.
  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  pooling: class (mean of the class and the distillation token), mean, attention (a learned query
  and an MLP).
  time_masks, time_width, frequency_masks, frequency_width: SpecAugment in training: how many, and
  of how many frames or channels.
  time_warp, frequency_warp: in training the middle moves, the mel axis stretches, by up to this
  share.
  activation, eps, dropout: of the blocks.
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
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
  augment = SpecAugment(
    time_masks, time_width, frequency_masks, frequency_width, time_warp, frequency_warp
  )
  return SpectrogramTransformer(
    config,
    rate=data["audio"]["rate"],
    seconds=data["audio"]["seconds"],
    mels=mels,
    patch=patch,
    stride=stride,
    frames=frames,
    mean=mean,
    std=std,
    mask_padding=mask_padding,
    pooling=pooling,
    augment=augment,
  )
