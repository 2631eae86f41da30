"""Encoded video -> uint8 [T, size, size, 3] and which frames are real: decoding, clips, crops.
NumPy, PyAV and OpenCV, no JAX.

`VideoTransform(config.data.video, train)` is what the pipeline calls. Containers are what FFmpeg
opens; the first video stream counts, turned upright. Of a file only the frames that are wanted are
converted and kept. A file that is shorter than it says is `Unreadable` (see container.py).

Frames are chosen by time, from the container's timestamps: a clip of variable frame rate counts as
the clip of constant rate that looks the same, in which a frame that stays is repeated. A video of n
frames (so counted) gives min(n, T) frames. "uniform": the middle of each of T equal parts. "random"
(training only): a random frame of each part (Wang et al. 2016, arXiv:1608.00859, section 3.1). In
training a random share of the time (`augment.temporal`) is cut out first, then one box
(`augment.crop`) and one flip (`augment.flip`) hold for all frames.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import av
import cv2
import numpy as np

from mmjax.data.augment import crop_box
from mmjax.data.container import decoder, open_container
from mmjax.data.image import Unreadable, decode_and_transform
from mmjax.data.resample import resize_fast

MAX_PIXELS = 40_000_000  # of a frame
MAX_FRAMES = 200_000  # of a file
MAX_KEPT = 1_000_000_000  # pixels that are kept of a file, over all frames
RATE = 24.0  # frames a second of a video that does not say
_ASPECT = (3 / 4, 4 / 3)  # of the random box
Pick = Callable[[int], np.ndarray]


class Clip(NamedTuple):
  """A decoded video: frames uint8 [n, H, W, 3]; shown int [S], which of them is seen in each of S
  equal slices of its time.
  """

  frames: np.ndarray
  shown: np.ndarray


class VideoTransform:
  """The video transform of a config: `transform(data, rng) -> (frames uint8 [T, size, size, 3],
  mask bool [T])`.

  `data`: encoded bytes, a `Clip`, or frames uint8 [n, H, W, 3] of constant rate. With train=False
  nothing is random and `rng` may be None.
  Raises Unreadable.
  """

  def __init__(self, config, train: bool):
    self.size, self.frames = int(config.size), int(config.frames)
    self.random = train and config.sampling == "random"
    self.augment = dict(config.augment.items()) if train else {}

  def __call__(
    self, data: bytes | Clip | np.ndarray, rng: np.random.Generator | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    draws = rng.random(44 + self.frames) if rng and (self.augment or self.random) else None

    def pick(count):
      return self.pick(count, draws)

    if isinstance(data, np.ndarray):
      if data.ndim != 4 or data.shape[-1] != 3 or not data.size:
        raise Unreadable(f"video without frames (an array of shape {data.shape})")
      kept = data[pick(len(data))]
    elif isinstance(data, Clip):
      kept = data.frames[data.shown[pick(len(data.shown))]]
    else:
      kept = decode_video(data, pick)
    frames, mask = (
      np.zeros((self.frames, self.size, self.size, 3), np.uint8),
      np.arange(self.frames) < len(kept),
    )
    frames[: len(kept)] = self.spatial(kept, draws)
    return frames, mask

  def pick(self, count: int, draws: np.ndarray | None) -> np.ndarray:
    """Which of `count` frames are used: int [min(count, T)], ascending."""
    first, last = 0, count
    low, high = self.augment.get("temporal", (1.0, 1.0))
    if draws is not None and (low, high) != (1.0, 1.0):
      length = min(count, max(1, round(count * (low + draws[0] * (high - low)))))
      first = int(draws[1] * (count - length + 1))
      last = first + length
    if last - first <= self.frames:
      return np.arange(first, last)
    edges = first + np.arange(self.frames + 1) * (last - first) // self.frames
    inside = draws[44:] if draws is not None and self.random else 0.5
    return edges[:-1] + (inside * np.diff(edges)).astype(int)

  def spatial(self, frames: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """uint8 [n, H, W, 3] -> [n, size, size, 3]: the same box and flip for all, or the central
    square (evaluation).
    """
    if not self.augment or draws is None:
      return np.stack([decode_and_transform(frame, size=self.size) for frame in frames])
    height, width = frames.shape[1:3]
    if tuple(self.augment.get("crop", (1.0, 1.0))) != (1.0, 1.0):
      left, top, right, bottom = crop_box(height, width, self.augment["crop"], _ASPECT, draws[3:43])
    else:
      side = min(height, width)
      left, top = (width - side) // 2, (height - side) // 2
      right, bottom = left + side, top + side
    out = [
      resize_fast(frame[top:bottom, left:right], (self.size, self.size), "bicubic")
      for frame in frames
    ]
    return np.stack(
      [cv2.flip(frame, 1) for frame in out] if draws[2] < self.augment.get("flip", 0.0) else out
    )


def decode_video(data: bytes, pick: Pick | None = None) -> np.ndarray:
  """Frames uint8 [n, H, W, 3] of the first video stream, upright. Raises Unreadable.

  pick: the number of equal slices of time -> those whose frames are wanted, ascending; None = every
  frame once.
  """
  return _decode(data, pick and (lambda found: pick(len(found.shown)))).frames


def timed_frames(
  data: bytes, pick: Callable[[int, float], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """(frames as `decode_video`, seconds float64 [n] from the beginning at which each is seen). pick:
  the number of equal slices of time, and how many are a second -> those whose frames are wanted.
  """
  times: list[np.ndarray] = []

  def choose(found: _Measure) -> np.ndarray:
    count = len(found.shown)
    rate = count / found.seconds if found.seconds else RATE
    chosen = pick(count, rate)
    times.append(chosen / rate)
    return chosen

  return _decode(data, choose).frames, times[0]


def decode_clip(data: bytes) -> Clip:
  """Every frame of the first video stream, and when each is seen. Raises Unreadable."""
  return _decode(data, None)


def clip_size(data: bytes) -> tuple[float, int, float, int, int]:
  """(seconds, frames, frames a second, height, width) by the packets of a file; nothing is decoded.
  Raises Unreadable.
  """
  try:
    found = _measure(data)
  except (av.error.FFmpegError, ValueError, IndexError, MemoryError) as error:
    raise Unreadable(f"not a video that FFmpeg opens, or damaged{_detail(error)}") from error
  fps = found.frames / found.seconds if found.seconds > 0 else 0.0
  return found.seconds, found.frames, fps, found.height, found.width


def _decode(data: bytes, pick: Callable[[_Measure], np.ndarray] | None) -> Clip:
  """The wanted frames, and `shown` of the whole video."""
  if not data:
    raise Unreadable("empty file")
  try:
    found = _measure(data)
    wanted = np.arange(found.frames) if pick is None else found.shown[pick(found)]
    if len(wanted) * found.height * found.width > MAX_KEPT:
      raise Unreadable(
        f"video of {len(wanted)} frames of {found.width} x {found.height}; the limit is "
        f"{MAX_KEPT // 10**6} megapixels"
      )
    each, place = np.unique(wanted, return_inverse=True)
    kept = _frames(data, each)
  except av.error.EOFError as error:
    raise Unreadable("video without frames, or cut within its header") from error
  except (av.error.FFmpegError, ValueError, IndexError, MemoryError) as error:
    raise Unreadable(f"not a video that FFmpeg opens, or damaged{_detail(error)}") from error
  if not kept:
    raise Unreadable("video without frames")
  if len({frame.shape for frame in kept}) > 1:
    kept = [cv2.resize(frame, kept[0].shape[1::-1], interpolation=cv2.INTER_AREA) for frame in kept]
  kept += kept[-1:] * (len(each) - len(kept))  # packets that hold no frame, at the end
  return Clip(np.stack([kept[i] for i in place]), found.shown)


class _Measure(NamedTuple):
  """Of the first video stream: `frames` of them of height x width, `shown` int [S] of a `Clip`, and
  its length in seconds.
  """

  frames: int
  height: int
  width: int
  shown: np.ndarray
  seconds: float


def _measure(data: bytes) -> _Measure:
  """By the packets of the file; nothing is decoded. Raises Unreadable."""
  with open_container(data) as container:
    if not container.streams.video:
      raise Unreadable("no video stream in the file")
    stream = container.streams.video[0]
    tick = stream.time_base or Fraction(1, 90_000)  # every stream that FFmpeg reads has one
    decoder(stream)
    height, width = stream.codec_context.height, stream.codec_context.width
    if height * width > MAX_PIXELS:
      raise Unreadable(
        f"video of {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels a frame"
      )
    packets: list[tuple[int | None, int]] = []
    for packet in container.demux(stream):
      if packet.size and not packet.is_discard:
        packets.append((packet.pts, packet.duration or 0))
      if len(packets) > MAX_FRAMES:
        raise Unreadable(f"video of more than {MAX_FRAMES} frames")
    if not packets:
      raise Unreadable("video without frames")
    if any(pts is None for pts, _ in packets):  # a container without timestamps
      rate = stream.average_rate
      return _Measure(
        len(packets),
        height,
        width,
        np.arange(len(packets)),
        len(packets) / float(rate) if rate else 0.0,
      )
    packets.sort()
    times, last = np.array([pts for pts, _ in packets]), packets[-1][1]
    if stream.duration:
      last = max(last, (stream.start_time or 0) + stream.duration - times[-1])
    elif container.duration and len(container.streams) == 1:  # microseconds, from 0 to the end
      last = max(last, float(container.duration / (1_000_000 * tick)) - times[-1])
    shown, length = shown_frames(times, last)
    return _Measure(len(packets), height, width, shown, float(length * tick))


def shown_frames(times: np.ndarray, last: float = 0) -> tuple[np.ndarray, float]:
  """(which frame is seen in each of S equal slices of time, int [S], ascending; how long all of
  them take).

  times: when each of n frames begins, ascending, in any unit; last: how long the last one stays, 0
  = not known. Of a constant rate (no frame half a frame too early or too late) S = n and each is
  seen once. Else a slice is as long as the shortest gap.
  """
  gaps = np.diff(times)
  end = times[-1] + max(last, float(np.median(gaps)) if len(gaps) else 0)
  length, count = float(end - times[0]), len(times)
  step = length / count
  if not gaps.any() or np.ptp(times - step * np.arange(count)) <= step:
    return np.arange(count), length
  slices = min(MAX_FRAMES, max(1, round(length / gaps[gaps > 0].min())))
  middles = times[0] + (np.arange(slices) + 0.5) * length / slices
  return np.searchsorted(times, middles, side="right") - 1, length


def _frames(data: bytes, wanted: np.ndarray) -> list[np.ndarray]:
  """The `wanted` frames (strictly ascending) that there are, uint8 [H, W, 3] each."""
  kept, remaining = [], list(wanted[::-1])
  with open_container(data) as container:
    stream = container.streams.video[0]
    decoder(stream)
    for index, frame in enumerate(container.decode(stream)):
      if frame.is_corrupt:
        raise Unreadable("damaged video (a frame cannot be decoded)")
      if index == remaining[-1]:
        kept.append(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
        remaining.pop()
        if not remaining:
          break
  return kept


def _detail(error: Exception) -> str:
  """' (what the library said)' in one short line."""
  text = " ".join(str(getattr(error, "strerror", None) or error).split())
  return f" ({text[:120]})" if text else ""
