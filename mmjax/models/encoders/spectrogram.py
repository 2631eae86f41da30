"""Waveforms to spectrograms on the device: Whisper's log-mel, Kaldi's filter banks as AST has them,
SpecAugment.

Everything is float32. Samples from `length` on count as silence, whatever they are, so padding
changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.models.encoders.sequence import standardise
from mmjax.models.platform import on_lone_cpu

Array = jax.Array
Normalisation = Literal["whisper", "utterance"]


def log_mel(
  waveform: Array,
  length: Array | None = None,
  *,
  rate: int = 16_000,
  n_fft: int = 400,
  hop: int = 160,
  mels: int = 80,
  normalisation: Normalisation = "whisper",
) -> tuple[Array, Array]:
  """Whisper's spectrogram (Radford et al. 2022, arXiv:2212.04356, section 2.2).

  waveform int16 (or float in [-1, 1]) [B, S], length int32 [B] -> (features float32 [B, S // hop,
  mels], mask bool: frames whose centre is real). "whisper": log10, at most 8 below the loudest, (x
  + 4) / 4. "utterance": the same log10, then mean 0 and variance 1 of each mel channel over the
  real frames. Raises UserError: a waveform that is shorter than half a window.
  """
  x = samples(waveform, length)
  count = x.shape[1] // hop
  if x.shape[1] <= n_fft // 2 or not count:
    raise UserError(
      f"audio of {x.shape[1]} samples is shorter than half a window of {n_fft}. Raise "
      "data.audio.seconds"
    )
  x = jnp.pad(x, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
  x = log10_mel(x, count, rate=rate, n_fft=n_fft, hop=hop, mels=mels)
  x = jnp.maximum(x, x.max((1, 2), keepdims=True) - 8)
  mask = (
    jnp.ones(x.shape[:2], bool) if length is None else jnp.arange(count) * hop < length[:, None]
  )
  return (x + 4) / 4 if normalisation == "whisper" else standardise(x, mask), mask


def log10_mel(
  x: Array,
  count: int,
  *,
  rate: int,
  n_fft: int,
  hop: int,
  mels: int,
  low: float = 0.0,
  high: float | None = None,
) -> Array:
  """log10 of the energy in each mel channel, at least -10: float32 [B, S] -> [B, count, mels],
  windows from sample 0 on. The channels are from `low` to `high` Hz; None = half the rate.
  """
  power = power_spectrum(
    _windows(x, n_fft, hop, count) * np.hanning(n_fft + 1)[:-1].astype(np.float32), n_fft
  )
  filters = mel_filters(n_fft // 2 + 1, mels, rate, low, "slaney", high)
  return jnp.log10(jnp.maximum(_filter(power, filters), 1e-10))


def kaldi_mel(
  waveform: Array, length: Array | None = None, *, rate: int = 16_000, mels: int = 128
) -> tuple[Array, Array]:
  """Kaldi's log filter banks as AST reads them (Gong et al. 2021, arXiv:2104.01778, section 2.1),
  not normalised.

  waveform int16 (or float in [-1, 1]) [B, S], length int32 [B] -> (features float32 [B, F, mels],
  mask bool [B, F]: windows that lie within the sound; always the first of a row with any). Windows
  of 25 ms every 10 ms, F = 1 + (S - window) // step;
  the mean taken out, pre-emphasis 0.97, symmetric Hann window, natural logarithm.
  """
  x = samples(waveform, length)
  window, hop = rate // 40, rate // 100
  if x.shape[1] < window:
    raise UserError(
      f"audio of {x.shape[1]} samples is shorter than a window of {window}. Raise "
      "data.audio.seconds"
    )
  count = kaldi_frames(x.shape[1], rate)
  x = _windows(x, window, hop, count)
  x = x - x.mean(-1, keepdims=True)
  x = x - 0.97 * jnp.concatenate([x[..., :1], x[..., :-1]], -1)
  size = 1 << (window - 1).bit_length()
  power = power_spectrum(x * np.hanning(window).astype(np.float32), size)
  x = jnp.log(
    jnp.maximum(
      _filter(power, mel_filters(size // 2 + 1, mels, rate, 20.0, "kaldi")),
      np.finfo(np.float32).eps,
    )
  )
  if length is None:
    return x, jnp.ones(x.shape[:2], bool)
  whole = jnp.where(length > 0, jnp.maximum(1, 1 + (length - window) // hop), 0)
  return x, jnp.arange(count) < whole[:, None]


def kaldi_frames(samples: int, rate: int) -> int:
  """Frames of `kaldi_mel` of so many samples."""
  return max(0, 1 + (samples - rate // 40) // (rate // 100))


def power_spectrum(windows: Array, size: int) -> Array:
  """|DFT of `size` points|^2: float32 [B, F, n <= size] -> [B, F, size // 2 + 1].

  A matrix product, except on a lone CPU: XLA would gather a sharded batch on every device for a
  Fourier transform.
  """
  if on_lone_cpu():
    z = jnp.fft.rfft(windows, size)
    return jnp.square(z.real) + jnp.square(z.imag)
  real, imaginary = jnp.split(
    jnp.matmul(windows, _fourier(windows.shape[-1], size), precision="highest"), 2, -1
  )
  return jnp.square(real) + jnp.square(imaginary)


@functools.lru_cache(maxsize=16)
def _fourier(n: int, size: int) -> np.ndarray:
  """[n, 2 * (size // 2 + 1)]: cosines, then sines."""
  angles = 2 * np.pi / size * (np.outer(np.arange(n), np.arange(size // 2 + 1)) % size)
  return np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


@functools.lru_cache(maxsize=16)
def mel_filters(
  bins: int,
  mels: int,
  rate: int,
  low: float,
  scale: Literal["slaney", "kaldi"],
  high: float | None = None,
) -> np.ndarray:
  """Triangles from `low` to `high` Hz, rate / 2 where that is None: float32 [bins, mels].

  "slaney" (Slaney 1998, Auditory Toolbox): linear below 1 kHz, triangles over frequency, of equal
  area. "kaldi": 1127 ln(1 + f / 700), triangles over mels, of height 1.
  """
  to_mel, to_hertz = _SCALES[scale]
  high = rate / 2 if high is None else high
  edges = np.linspace(to_mel(np.float64(low)), to_mel(np.float64(high)), mels + 2)
  at = np.linspace(0, rate / 2, bins)
  if scale == "slaney":
    edges = to_hertz(edges)
  else:
    at = to_mel(at)
  rising = (at[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
  falling = (edges[2:] - at[:, None]) / (edges[2:] - edges[1:-1])
  weights = np.maximum(0, np.minimum(rising, falling))
  return (weights * (2 / (edges[2:] - edges[:-2]) if scale == "slaney" else 1)).astype(np.float32)


_STEP = math.log(6.4) / 27
_SCALES = {
  "slaney": (
    lambda f: np.where(f < 1000, 3 * f / 200, 15 + np.log(np.maximum(f, 1000) / 1000) / _STEP),
    lambda m: np.where(m < 15, 200 * m / 3, 1000 * np.exp(_STEP * (m - 15))),
  ),
  "kaldi": (lambda f: 1127 * np.log1p(f / 700), lambda m: 700 * np.expm1(m / 1127)),
}


def samples(waveform: Array, length: Array | None) -> Array:
  """float32 [B, S] in [-1, 1], zeros from `length` on."""
  x = waveform.astype(jnp.float32)
  if jnp.issubdtype(waveform.dtype, jnp.integer):
    x = x * np.float32(1 / 32768)
  return x if length is None else jnp.where(jnp.arange(x.shape[1]) < length[:, None], x, 0)


def _windows(x: Array, size: int, hop: int, count: int) -> Array:
  """[B, S] -> [B, count, size], one every `hop` samples: steps of the waveform side by side, no
  gather.
  """
  steps = -(-size // hop)
  wanted = (count + steps - 1) * hop
  x = jnp.pad(x, ((0, 0), (0, max(0, wanted - x.shape[1]))))[:, :wanted].reshape(
    x.shape[0], -1, hop
  )
  return jnp.concatenate([x[:, i : i + count] for i in range(steps)], -1)[..., :size]


def _filter(power: Array, filters: np.ndarray) -> Array:
  return jnp.matmul(power, filters, precision="highest")


@dataclasses.dataclass(frozen=True)
class SpecAugment:
  """Random changes of a spectrogram in training (Park et al. 2019, arXiv:1904.08779). The defaults
  change nothing.

  Call: features [B, F, M], mask bool [B, F], key -> features. Each row draws its own. Warps come
  first: `frequency_warp` stretches the mel axis by up to +- this share (Jaitly and Hinton 2013, as
  another speaker), `time_warp` moves the middle of the sound by up to +- this share of its length.
  Then `time_masks` of up to `time_width` frames (of all masks together less than the sound) and
  `frequency_masks` of up to `frequency_width` channels get the row's mean.
  """

  time_masks: int = 0
  time_width: int = 0
  frequency_masks: int = 0
  frequency_width: int = 0
  time_warp: float = 0.0
  frequency_warp: float = 0.0

  def __post_init__(self):
    if not (0 <= self.time_warp < 0.5 and 0 <= self.frequency_warp < 1):
      raise UserError(
        f"time_warp {self.time_warp} must be below 0.5 and frequency_warp {self.frequency_warp} "
        "below 1, neither negative"
      )

  @property
  def active(self) -> bool:
    return self != SpecAugment()

  def __call__(self, x: Array, mask: Array, key: Array) -> Array:
    keys, (rows, _, mels) = jax.random.split(key, 4), x.shape
    frames = mask.sum(1)
    if self.frequency_warp:
      x = _warp_frequency(
        x, 1 + self.frequency_warp * jax.random.uniform(keys[0], (rows,), minval=-1)
      )
    if self.time_warp:
      x = _warp_time(x, frames, self.time_warp * jax.random.uniform(keys[1], (rows,), minval=-1))
    weights = mask / jnp.maximum(frames, 1)[:, None]
    mean = jnp.einsum("bf,bfm->b", weights, x)[:, None, None] / mels
    if self.time_masks and self.time_width:
      width = jnp.minimum(self.time_width, frames // (self.time_masks + 1))
      x = jnp.where(
        _spans(keys[2], self.time_masks, width, frames, x.shape[1])[:, :, None], mean, x
      )
    if self.frequency_masks and self.frequency_width:
      width = jnp.full_like(frames, min(self.frequency_width, mels // (self.frequency_masks + 1)))
      x = jnp.where(
        _spans(keys[3], self.frequency_masks, width, jnp.full_like(frames, mels), mels)[:, None, :],
        mean,
        x,
      )
    return x


def _spans(key: Array, masks: int, width: Array, length: Array, size: int) -> Array:
  """bool [B, size]: `masks` random spans of 0 to width[b] places, each within the first
  length[b].
  """
  draws = jax.random.uniform(key, (2, width.shape[0], masks, 1))
  wide = jnp.floor(draws[0] * (width[:, None, None] + 1))
  start = jnp.floor(draws[1] * (length[:, None, None] - wide + 1))
  at = jnp.arange(size)
  return ((at >= start) & (at < start + wide)).any(1)


def _warp_frequency(x: Array, factor: Array) -> Array:
  """Channel m becomes channel m * factor[b], interpolated: [B, F, M] -> [B, F, M]."""
  at = jnp.arange(x.shape[2], dtype=jnp.float32)
  source = jnp.clip(at * factor[:, None], 0, x.shape[2] - 1)
  weights = jnp.maximum(0, 1 - jnp.abs(at - source[:, :, None]))
  return jnp.einsum("bfn,bmn->bfm", x, weights, precision="highest")


def _warp_time(x: Array, frames: Array, shift: Array) -> Array:
  """The middle of the first frames[b] frames moves by shift[b] of them; both ends stay: [B, F, M]
  -> [B, F, M].
  """
  at = jnp.arange(x.shape[1], dtype=jnp.float32)
  end = jnp.maximum(frames - 1, 1).astype(jnp.float32)[:, None]
  middle = end / 2
  moved = middle + shift[:, None] * end
  source = jnp.where(
    at < moved, at * middle / moved, middle + (at - moved) * (end - middle) / (end - moved)
  )
  source = jnp.clip(source, 0, end)
  low = jnp.floor(source)
  part = (source - low)[:, :, None]

  def take(index):
    return jnp.take_along_axis(x, index.astype(jnp.int32)[:, :, None], axis=1)

  return take(low) * (1 - part) + take(jnp.minimum(low + 1, end)) * part
