"""Encoded sound -> int16 [rate * seconds] and how much of it is real: decoding, resampling, augmentation. NumPy, no JAX.

`AudioTransform(config.data.audio, train)` is what the pipeline calls. Files are what libsndfile opens (WAV, FLAC, OGG, MP3,
AIFF, ...), of any sample rate, depth and number of channels; channels are averaged. What is longer than `seconds` keeps its
beginning. Augmentation, in this order, each with a draw of its own, so that switching one on leaves the others as they were:

  1. speed   played faster by a factor from the range, pitch and all (Ko et al. 2015, Interspeech)
  2. shift   begins up to this many seconds later, after silence
  3. gain    times a factor from the range (log-uniform)
  4. noise   white, at up to this share of the root mean square
"""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile
import soxr

from mmjax.data.image import Unreadable

MAX_SECONDS = 3600  # of a file
MAX_SAMPLES = 1 << 29  # of a file, over all channels: 2 GB of float32
_BLOCK = 1 << 18


class AudioTransform:
  """The sound transform of a config: `transform(data, rng) -> (waveform int16 [S], length int)`, zeros from `length` on.

  `data`: encoded bytes, or float32 [n] at the config's rate. With train=False nothing is random and `rng` may be None.
  Raises Unreadable.
  """

  def __init__(self, config, train: bool):
    self.rate, self.samples = int(config.rate), round(config.rate * config.seconds)
    self.augment = dict(config.augment.items()) if train else None

  def __call__(self, data: bytes | np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
    x = data if isinstance(data, np.ndarray) else decode_audio(data, self.rate)
    if not len(x):
      raise Unreadable("audio of zero length")
    if self.augment is not None:
      x = augment(x, self.rate, rng, limit=self.samples, **self.augment)
    x = x[:self.samples]
    waveform = np.zeros(self.samples, np.int16)
    waveform[:len(x)] = np.clip(np.rint(x * 32768.0), -32768, 32767)
    return waveform, len(x)


def decode_audio(data: bytes, rate: int) -> np.ndarray:
  """Mono float32 [n] in [-1, 1] at `rate`. Raises Unreadable: no sound file, damaged, without samples, too long."""
  x, found = read_audio(data)
  return x if found == rate else resample(x, found, rate)


def read_audio(data: bytes) -> tuple[np.ndarray, int]:
  """(mono float32 [n] in [-1, 1], its rate) of a sound file. Raises Unreadable as `decode_audio`."""
  if not data:
    raise Unreadable("empty file")
  try:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      found, channels = file.samplerate, file.channels
      limit = min(MAX_SECONDS * found, MAX_SAMPLES // max(1, channels))
      blocks, count = [], 0
      while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block[:, 0] if channels == 1 else block.mean(1))
        count += len(block)
        if count > limit:
          raise Unreadable(f"audio of more than {limit // found} seconds")
  except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:  # what libsndfile and its binding raise
    raise Unreadable(f"not a sound file that libsndfile opens, or damaged{_detail(error)}") from error
  if not count:
    raise Unreadable("audio of zero length")
  x = np.concatenate(blocks)
  if not np.isfinite(x).all():
    raise Unreadable("audio with samples that are not numbers")
  return x, found


def resample(x: np.ndarray, old: float, new: float) -> np.ndarray:
  """float32 [n] at rate `old` -> [n * new / old, at least 1] at rate `new`, band-limited (soxr, high quality)."""
  out = soxr.resample(x, old, new)
  return out if len(out) else np.ascontiguousarray(x[:1])


def augment(x: np.ndarray, rate: int, rng: np.random.Generator, *, limit: int, speed: tuple[float, float] = (1.0, 1.0),
            noise: float = 0.0, shift: float = 0.0, gain: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
  """The changes of the module's table on float32 [n] at `rate`: float32 [m], m >= 1; samples beyond `limit` are not kept."""
  draws = rng.random(4)
  if tuple(speed) != (1.0, 1.0):
    factor = speed[0] + draws[0] * (speed[1] - speed[0])
    x = resample(x[:math.ceil(limit * factor) + rate], rate * factor, rate)
  if shift:
    x = np.concatenate([np.zeros(round(draws[1] * shift * rate), np.float32), x])
  x = x[:limit]
  if tuple(gain) != (1.0, 1.0):
    x = x * np.float32(gain[0] * (gain[1] / gain[0]) ** draws[2])
  if noise:
    level = draws[3] * noise * math.sqrt(float(np.square(x, dtype=np.float64).mean()))
    x = x + np.float32(level) * rng.standard_normal(len(x), np.float32)
  return x


def _detail(error: Exception) -> str:
  """' (what the library said)' in one short line."""
  text = " ".join(str(error).split()).split(": ", 1)[-1].rstrip(".")
  return f" ({text[:120]})" if text else ""
