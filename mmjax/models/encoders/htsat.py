"""Sound: HTS-AT, a Swin transformer on a spectrogram that is folded into a square (Chen et al.
2022, arXiv:2202.00874), as CLAP has it (Wu et al. 2023, arXiv:2211.06687).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.block import Activation
from mmjax.models.encoders.audio import overlapping
from mmjax.models.encoders.resnet import BatchNorm
from mmjax.models.encoders.spectrogram import log10_mel, samples
from mmjax.models.encoders.swin import EPS, SwinConfig, run_stages, stages_of
from mmjax.models.layers import Dense, Encoded, LayerNorm
from mmjax.ranges import Dropout, Epsilon, NonNegative, Positive, Side, Sizes, Width

Array = jax.Array
Padding = Literal["repeatpad", "repeat", "pad"]


class SpectrogramSwin(nn.Module):
  """Call: {"waveform" int16 [B, S], "length" int32 [B]?, "present" bool [B]?} -> Encoded of width D
  = width * 2**(stages - 1).

  The spectrogram in decibels, batch normalised in each mel channel, is stretched over time to
  `size` * ratio frames, ratio = size // mels, and cut into `ratio` spans of time that are stacked
  over frequency: a picture of `size` x `size`. `pooled` is the mean of the tokens. Collection
  "batch_stats" as in ResNet. Randomness: stream "dropout", for stochastic depth, only when `train`.
  """

  config: SwinConfig
  rate: int
  mels: int
  n_fft: int
  hop: int
  low: float
  high: float
  padding: Padding
  size: int
  patch: int
  stride: int

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c, x = self.config, self.features(batch)
    present = jnp.ones(x.shape[0], bool) if "length" not in batch else batch["length"] > 0
    present = present & batch["present"] if "present" in batch else present
    x = BatchNorm(jnp.float32, name="input_norm")(x[:, :, None], present, train=train)[:, :, 0]
    side, edge = self.size // self.stride, (self.patch - self.stride) // 2
    x = jnp.pad(self.picture(x), ((0, 0), (edge, edge), (edge, edge)))
    x = overlapping(x.swapaxes(1, 2).astype(c.dtype), self.patch, self.stride)
    x = Dense(
      (c.width,), ("patch", "embed"), c.dtype, nn.initializers.lecun_normal(), name="patch"
    )(x)
    x = LayerNorm(EPS, c.dtype, name="patch_norm")(x).reshape(x.shape[0], side, side, c.width)
    x = run_stages(c, x, side, train=train)
    x = LayerNorm(EPS, c.dtype, name="norm")(x.reshape(x.shape[0], -1, x.shape[-1]))
    mask = jnp.broadcast_to(present[:, None], x.shape[:2])
    return Encoded(x, mask, pool.mean(x, mask))

  def features(self, batch: Mapping[str, Array]) -> Array:
    """The spectrogram in decibels, at least -100: float32 [B, 1 + S // hop, mels]. Windows are
    centred; what is shorter than S is filled up as `padding` says.
    """
    x, length = samples(batch["waveform"], batch.get("length")), batch.get("length")
    if length is not None and self.padding != "pad":
      at, once = jnp.arange(x.shape[1]), jnp.maximum(length, 1)[:, None]
      whole = x.shape[1] // once * once if self.padding == "repeatpad" else x.shape[1]
      x = jnp.where(at < whole, jnp.take_along_axis(x, at % once, axis=1), 0)
    count, edge = 1 + x.shape[1] // self.hop, self.n_fft // 2
    if x.shape[1] <= edge or count > self.size * (self.size // self.mels):
      raise UserError(
        f"a spectrogram of {count} frames ({x.shape[1]} samples) needs more than half a window "
        f"({edge} samples) and fits a picture of {self.size * (self.size // self.mels)} frames: "
        "change data.audio.seconds, `hop` or `size`"
      )
    return 10 * log10_mel(
      jnp.pad(x, ((0, 0), (edge, edge)), mode="reflect"),
      count,
      rate=self.rate,
      n_fft=self.n_fft,
      hop=self.hop,
      mels=self.mels,
      low=self.low,
      high=self.high,
    )

  def picture(self, x: Array) -> Array:
    """[B, F, mels] -> [B, size, size]: rows are mel channels, one span of time below the other."""
    ratio = self.size // self.mels
    x = stretch(x, self.size * ratio)
    x = stretch(x.swapaxes(1, 2), self.size // ratio)  # [B, channels, time]
    x = x.reshape(x.shape[0], -1, ratio, self.size).swapaxes(1, 2)
    return x.reshape(x.shape[0], self.size, self.size)


def stretch(x: Array, size: int) -> Array:
  """[B, L, C] -> [B, size, C] by cubic convolution (a = -0.75) whose first and last places are
  those of x, as PyTorch's bicubic `interpolate` with align_corners.
  """
  if x.shape[1] == size:
    return x
  indices, weights = cubic_taps(x.shape[1], size)
  taps = zip(indices.T, weights.T, strict=True)
  return sum(jnp.take(x, index, axis=1) * weight[:, None] for index, weight in taps)


@functools.lru_cache(maxsize=16)
def cubic_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Which of `old` places each of `new` ones is made of, int32 [new, 4], and their weights float32
  [new, 4]. The places are computed in float32, as PyTorch does.
  """
  source = np.arange(new, dtype=np.float32) * (np.float32(old - 1) / np.float32(max(1, new - 1)))
  first = np.floor(source)
  distance = np.abs((source - first)[:, None] - np.arange(-1, 3, dtype=np.float32))
  a = np.float32(-0.75)
  near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
  far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
  indices = np.clip(first[:, None] + np.arange(-1, 3), 0, old - 1).astype(np.int32)
  return indices, np.where(distance <= 1, near, far)


def htsat(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  mels: Side = 64,
  n_fft: Side = 1024,
  hop: Side = 480,
  low: NonNegative = 0.0,
  high: NonNegative = 0.0,
  padding: Padding = "repeatpad",
  size: Side = 256,
  patch: Side = 4,
  stride: Side = 4,
  width: Width = 96,
  depths: Sizes = (),
  heads: Sizes = (),
  window: Side = 8,
  mlp_ratio: Positive = 4.0,
  activation: Activation = "gelu",
  eps: Epsilon = 1e-5,
  drop_path: Dropout = 0.0,
) -> SpectrogramSwin:
  """HTS-AT: a Swin transformer on a folded spectrogram (reads batch["audio"]), with batch
  statistics of the whole global batch.

  mels, n_fft, hop: of the spectrogram: channels, and samples of a window and between two.
  low, high: frequencies of the channels, in Hz; high 0 = half of data.audio.rate.
  padding: of what is shorter than data.audio.seconds: repeatpad (as often as it fits, then
  silence), repeat (to the end), pad (silence).
  size: side of the picture; size * (size // mels) frames fit it.
  patch, stride: side of a patch in the picture, and steps from one to the next.
  width: channels of the first stage, doubled by each further one; 0 = the model's width.
  depths: blocks of each stage; () = (2, 2, 6, 2), as HTS-AT has.
  heads: attention heads of each stage; () = channels / 32.
  window: height and width of a window in patches; a stage whose map is smaller has one window of
  its size.
  mlp_ratio: hidden units of a block, as a multiple of its channels.
  activation, eps: of the blocks.
  drop_path: probability that the last block is skipped in training, a row at a time; earlier blocks
  less.
  """
  depths, heads = stages_of(width, depths, heads)
  ratio, rate = size // mels, data["audio"]["rate"]
  if not ratio or size % ratio or size % stride or patch < stride or (patch - stride) % 2:
    raise UserError(
      f"a picture of size {size} cannot be made of {mels} mels and patches of {patch} with stride "
      f"{stride}: size // mels must divide size, as stride must, and patch - stride be even, not "
      "negative"
    )
  high = high or rate / 2
  if not low < high <= rate / 2:
    raise UserError(
      f"low {low:g} and high {high:g} must be ascending and at most half of data.audio.rate {rate}"
    )
  config = SwinConfig(
    width,
    depths,
    heads,
    window,
    mlp_ratio,
    activation,
    eps,
    drop_path,
    jnp.dtype(precision["compute"]),
  )
  return SpectrogramSwin(config, rate, mels, n_fft, hop, low, high, padding, size, patch, stride)
