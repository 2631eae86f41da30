"""Encoded sound -> int16 [rate * seconds] and how much of it is real: decoding, resampling,
augmentation. NumPy, no JAX.

`AudioTransform(config.data.audio, train)` is what the pipeline calls. Files are what libsndfile
opens (WAV, FLAC, OGG, MP3, AIFF, ...), else the first sound track of what FFmpeg opens (M4A, AAC,
WMA, a video), of any sample rate, depth and number of channels; channels are averaged. A WAV whose
header was never filled in, an MP3 behind zeros and MP3s that were joined are read. A file that is
shorter than it says is `Unreadable` (see container.py). What is longer than `seconds` keeps its
beginning. Augmentation, in this order, each with a draw of its own, so that switching one on leaves
the others as they were:

  1. speed   played faster by a factor from the range, pitch and all (Ko et al. 2015, Interspeech)
  2. shift   begins up to this many seconds later, after silence
  3. gain    times a factor from the range (log-uniform)
  4. noise   white, at up to this share of the root mean square
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator

import av
import numpy as np
import soundfile
import soxr

from mmjax.data.container import STREAMED, check_whole, decoder, is_iso, open_container
from mmjax.data.image import Unreadable

MAX_SECONDS = 3600  # of a file
MAX_SAMPLES = 1 << 29  # of a file, over all channels: 2 GB of float32
_BLOCK = 1 << 18
_GUESSED = ("MP3",)  # formats whose headers do not say how long a file is
_STREAMED_FRAMES = 1 << 31  # what a header says that was written before the end was known
_MAX_RATE = 1_000_000
_MP3_LENGTH = re.compile(  # in the first frame: then an MP3 says how long it is
  rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]..(?:.{9}|.{17}|.{32})(Xing|Info|VBRI)", re.DOTALL
)
_ENDLESS = b"\x7f\xff\xff\xff"  # frames


class _Guessed(Exception):
  """libsndfile stopped where it guessed that an MP3 without its length ends."""


class AudioTransform:
  """The sound transform of a config: `transform(data, rng) -> (waveform int16 [S], length int)`,
  zeros from `length` on.

  `data`: encoded bytes, or float32 [n] at the config's rate. With train=False nothing is random and
  `rng` may be None.
  Raises Unreadable.
  """

  def __init__(self, config, train: bool):
    self.rate, self.samples = int(config.rate), round(config.rate * config.seconds)
    self.augment = dict(config.augment.items()) if train else None

  def __call__(
    self, data: bytes | np.ndarray, rng: np.random.Generator | None = None
  ) -> tuple[np.ndarray, int]:
    x = data if isinstance(data, np.ndarray) else decode_audio(data, self.rate)
    if not len(x):
      raise Unreadable("audio of zero length")
    if self.augment is not None and rng is not None:
      x = augment(x, self.rate, rng, limit=self.samples, **self.augment)
    x = x[: self.samples]
    waveform = np.zeros(self.samples, np.int16)
    waveform[: len(x)] = np.clip(np.rint(x * 32768.0), -32768, 32767)
    return waveform, len(x)


def decode_audio(data: bytes, rate: int) -> np.ndarray:
  """Mono float32 [n] in [-1, 1] at `rate`. Raises Unreadable: no sound file, damaged, without
  samples, too long.
  """
  x, found = read_audio(data)
  return x if found == rate else resample(x, found, rate)


def read_audio(data: bytes) -> tuple[np.ndarray, int]:
  """(mono float32 [n] in [-1, 1], its rate) of a sound file, or of the sound track of a video.
  Raises Unreadable as `decode_audio`."""
  if not data:
    raise Unreadable("empty file")
  check_whole(data)
  try:
    x, found = _by_libsndfile(data)
  except (soundfile.LibsndfileError, _Guessed) as error:  # not a format that it knows
    try:
      x, found = _by_ffmpeg(data)
    except (av.error.FFmpegError, ValueError, IndexError, MemoryError) as other:
      raise Unreadable(
        f"not a sound file that libsndfile or FFmpeg opens, or damaged{_detail(error)}"
      ) from other
  if not len(x):
    raise Unreadable("audio of zero length")
  if not np.isfinite(x).all():
    raise Unreadable("audio with samples that are not numbers")
  return x, found


def audio_length(data: bytes) -> tuple[int, int]:
  """(samples, samples a second) of a sound file, by its header where that is right. Raises
  Unreadable.
  """
  try:
    with soundfile.SoundFile(io.BytesIO(_start(data))) as file:
      if file.format not in _GUESSED and 0 < file.frames < _STREAMED_FRAMES:
        return file.frames, file.samplerate
  except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError):
    pass  # what else opens it, or says what is wrong
  x, rate = read_audio(data)
  return len(x), rate


def _start(data: bytes) -> bytes:
  """The bytes of a file as libsndfile reads them: a streamed WAV with its size, an MP3 without
  zeros in front, joined ones as one.
  """
  if data[:4] == b"RIFF":
    return _with_size(data)
  if data[:1] == b"\0" and not is_iso(data):
    data = data.lstrip(b"\0")
  if data[:3] == b"ID3" or data[:1] == b"\xff":
    return _as_one(data)
  return data


def _as_one(data: bytes) -> bytes:
  """MP3 files that were joined: the first one's length, which would be taken for that of all, is
  set to no end.
  """
  found = _MP3_LENGTH.finditer(data)
  first, second = next(found, None), next(found, None)
  if first is None or second is None or first[1] == b"VBRI":
    return data
  at, size = first.end(), (len(data) - first.start()).to_bytes(4, "big")
  if data[at + 3] & 3 == 3:  # frames and bytes
    return data[: at + 4] + _ENDLESS + size + data[at + 12 :]
  return data[: at + 4] + _ENDLESS + data[at + 8 :] if data[at + 3] & 1 else data


def _by_libsndfile(data: bytes) -> tuple[np.ndarray, int]:
  """As `read_audio`, by libsndfile. Raises LibsndfileError: it does not open the file; _Guessed;
  Unreadable.
  """
  data = _start(data)
  file = soundfile.SoundFile(io.BytesIO(data))
  try:
    with file:
      found, channels = file.samplerate, file.channels
      x = _joined(
        (block.mean(1) if channels > 1 else block[:, 0] for block in _blocks(file)), found, channels
      )
      announced = file.frames
      if file.format == "MP3" and not _MP3_LENGTH.search(data):
        if len(x) >= announced:
          raise _Guessed("an MP3 without its length")
        announced = 0
      if announced >= _STREAMED_FRAMES:
        announced = 0
  except (
    soundfile.SoundFileError,
    RuntimeError,
    ValueError,
    TypeError,
  ) as error:  # what libsndfile and its binding raise
    raise Unreadable(f"damaged sound file{_detail(error)}") from error
  if len(x) < 0.99 * announced - found / 10:  # encoders count their padding differently
    raise Unreadable(
      f"cut within its data: {len(x) / found:.1f} s of the {announced / found:.1f} s that its "
      "header announces"
    )
  return x, found


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
  """float32 [n, channels], block after block."""
  while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
    yield block


def _by_ffmpeg(data: bytes) -> tuple[np.ndarray, int]:
  """As `read_audio`, by FFmpeg. Raises Unreadable, and what PyAV raises."""
  with open_container(data) as container:
    if not container.streams.audio:
      raise Unreadable("no sound track in the file")
    stream = container.streams.audio[0]
    decoder(stream)
    found, channels = stream.rate, stream.channels
    if not 0 < found <= _MAX_RATE:
      raise Unreadable(f"a sound track of {found} samples a second")
    resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=found)
    frames = (part for frame in _frames(container, stream) for part in resampler.resample(frame))
    return _joined((frame.to_ndarray().mean(0) for frame in frames), found, channels), found


def _frames(
  container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[av.AudioFrame]:
  """The frames of a track. Raises FFmpegError: one cannot be decoded, unless it is the last, of a
  file that ends within it.
  """
  broken = None
  for packet in container.demux(stream):
    if broken and packet.size:
      raise broken
    try:
      yield from packet.decode()
    except av.error.InvalidDataError as error:
      broken = error


def _joined(blocks: Iterable[np.ndarray], rate: int, channels: int) -> np.ndarray:
  """Blocks float32 [n] as one. Raises Unreadable: there is more than the limit."""
  limit, kept, count = min(MAX_SECONDS * rate, MAX_SAMPLES // max(1, channels)), [], 0
  for block in blocks:
    kept.append(block)
    count += len(block)
    if count > limit:
      raise Unreadable(f"audio of more than {limit // rate} seconds")
  return np.concatenate(kept) if kept else np.zeros(0, np.float32)


def _with_size(data: bytes) -> bytes:
  """A WAV whose data chunk says 0 although more follows (a recorder that was streaming), with the
  size filled in.
  """
  at, announced = 12, int.from_bytes(data[4:8], "little") + 8
  while at + 8 <= len(data):
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    if data[at : at + 4] == b"data":
      if size or not at + 8 < len(data) or len(data) <= announced < STREAMED:
        return data
      rest = (len(data) - at - 8).to_bytes(4, "little")
      return (
        data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8 : at + 4] + rest + data[at + 8 :]
      )
    at += 8 + size + size % 2
  return data


def resample(x: np.ndarray, old: float, new: float) -> np.ndarray:
  """float32 [n] at rate `old` -> [n * new / old, at least 1] at rate `new`, band-limited (soxr,
  high quality).
  """
  out = soxr.resample(x, old, new)
  return out if len(out) else np.ascontiguousarray(x[:1])


def augment(
  x: np.ndarray,
  rate: int,
  rng: np.random.Generator,
  *,
  limit: int,
  speed: tuple[float, float] = (1.0, 1.0),
  noise: float = 0.0,
  shift: float = 0.0,
  gain: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
  """The changes of the module's table on float32 [n] at `rate`: float32 [m], m >= 1; samples beyond
  `limit` are not kept.
  """
  draws = rng.random(4)
  if tuple(speed) != (1.0, 1.0):
    factor = speed[0] + draws[0] * (speed[1] - speed[0])
    x = resample(x[: math.ceil(limit * factor) + rate], rate * factor, rate)
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
