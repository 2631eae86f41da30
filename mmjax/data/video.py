"""Encoded video -> uint8 [T, size, size, 3] and which frames are real: decoding, clips, crops. NumPy, PyAV and OpenCV, no JAX.

`VideoTransform(config.data.video, train)` is what the pipeline calls. Containers are what FFmpeg opens; the first video
stream counts, turned upright. Of a file only the frames that are wanted are converted and kept.

A video of n frames gives min(n, T) frames. "uniform": the middle of each of T equal parts. "random" (training only): a random
frame of each part (Wang et al. 2016, arXiv:1608.00859, section 3.1). In training a random share of the time
(`augment.temporal`) is cut out first, then one box (`augment.crop`) and one flip (`augment.flip`) hold for all frames.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import cv2
import numpy as np

from mmjax.data.augment import crop_box
from mmjax.data.image import Unreadable, decode_and_transform
from mmjax.data.resample import resize_fast

MAX_PIXELS = 40_000_000  # of a frame
MAX_FRAMES = 200_000  # of a file
MAX_KEPT = 1_000_000_000  # pixels that are kept of a file, over all frames
_ASPECT = (3 / 4, 4 / 3)  # of the random box
Pick = Callable[[int], np.ndarray]


class VideoTransform:
  """The video transform of a config: `transform(data, rng) -> (frames uint8 [T, size, size, 3], mask bool [T])`.

  `data`: encoded bytes, or frames uint8 [n, H, W, 3]. With train=False nothing is random and `rng` may be None.
  Raises Unreadable.
  """

  def __init__(self, config, train: bool):
    self.size, self.frames = int(config.size), int(config.frames)
    self.random = train and config.sampling == "random"
    self.augment = dict(config.augment.items()) if train else {}

  def __call__(self, data: bytes | np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    draws = rng.random(44 + self.frames) if self.augment or self.random else None
    pick = lambda count: self.pick(count, draws)
    if isinstance(data, np.ndarray):
      if data.ndim != 4 or data.shape[-1] != 3 or not data.size:
        raise Unreadable(f"video without frames (an array of shape {data.shape})")
      kept = data[pick(len(data))]
    else:
      kept = decode_video(data, pick)
    frames, mask = np.zeros((self.frames, self.size, self.size, 3), np.uint8), np.arange(self.frames) < len(kept)
    frames[:len(kept)] = self.spatial(kept, draws)
    return frames, mask

  def pick(self, count: int, draws: np.ndarray | None) -> np.ndarray:
    """Which of `count` frames are used: int [min(count, T)], ascending."""
    first, last = 0, count
    low, high = self.augment.get("temporal", (1.0, 1.0))
    if (low, high) != (1.0, 1.0):
      length = min(count, max(1, round(count * (low + draws[0] * (high - low)))))
      first = int(draws[1] * (count - length + 1))
      last = first + length
    if last - first <= self.frames:
      return np.arange(first, last)
    inside = draws[44:] if self.random else 0.5
    edges = np.arange(self.frames) * (last - first) / self.frames
    return first + np.floor(edges + inside * (last - first) / self.frames).astype(int)

  def spatial(self, frames: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """uint8 [n, H, W, 3] -> [n, size, size, 3]: the same box and flip for all, or the central square (evaluation)."""
    if not self.augment:
      return np.stack([decode_and_transform(frame, size=self.size) for frame in frames])
    height, width = frames.shape[1:3]
    if tuple(self.augment.get("crop", (1.0, 1.0))) != (1.0, 1.0):
      left, top, right, bottom = crop_box(height, width, self.augment["crop"], _ASPECT, draws[3:43])
    else:
      side = min(height, width)
      left, top = (width - side) // 2, (height - side) // 2
      right, bottom = left + side, top + side
    out = [resize_fast(frame[top:bottom, left:right], (self.size, self.size), "bicubic") for frame in frames]
    return np.stack([cv2.flip(frame, 1) for frame in out] if draws[2] < self.augment.get("flip", 0.0) else out)


def decode_video(data: bytes, pick: Pick | None = None) -> np.ndarray:
  """Frames uint8 [n, H, W, 3] of the first video stream, upright. Raises Unreadable.

  pick: the number of frames in the file -> the ascending indices of those to keep; None = all.
  """
  if not data:
    raise Unreadable("empty file")
  try:
    count, height, width = _measure(data)
    wanted = np.arange(count) if pick is None else pick(count)
    if len(wanted) * height * width > MAX_KEPT:
      raise Unreadable(f"video of {len(wanted)} frames of {width} x {height}; the limit is {MAX_KEPT // 10**6} megapixels")
    kept = _frames(data, wanted)
  except (av.error.FFmpegError, ValueError, IndexError, MemoryError) as error:
    raise Unreadable(f"not a video that FFmpeg opens, or damaged{_detail(error)}") from error
  if not kept:
    raise Unreadable("video without frames")
  if len({frame.shape for frame in kept}) > 1:
    kept = [cv2.resize(frame, kept[0].shape[1::-1], interpolation=cv2.INTER_AREA) for frame in kept]
  kept += kept[-1:] * (len(wanted) - len(kept))  # packets that hold no frame, at the end
  return np.stack(kept)


def _measure(data: bytes) -> tuple[int, int, int]:
  """(frames, height, width) of the first video stream, by its packets; nothing is decoded. Raises Unreadable."""
  with av.open(io.BytesIO(data)) as container:
    if not container.streams.video:
      raise Unreadable("no video stream in the file")
    stream = container.streams.video[0]
    height, width = stream.codec_context.height, stream.codec_context.width
    if height * width > MAX_PIXELS:
      raise Unreadable(f"video of {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels a frame")
    count = 0
    for packet in container.demux(stream):
      count += packet.size > 0
      if count > MAX_FRAMES:
        raise Unreadable(f"video of more than {MAX_FRAMES} frames")
  if not count:
    raise Unreadable("video without frames")
  return count, height, width


def _frames(data: bytes, wanted: np.ndarray) -> list[np.ndarray]:
  """The `wanted` frames (ascending) that there are, uint8 [H, W, 3] each."""
  kept, remaining = [], list(wanted[::-1])
  with av.open(io.BytesIO(data)) as container:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # videos run in parallel, one a thread or process
    for index, frame in enumerate(container.decode(stream)):
      if frame.is_corrupt:
        raise Unreadable("damaged video (a frame cannot be decoded)")
      if index == remaining[-1]:
        kept.append(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
        while remaining and remaining[-1] == index:
          remaining.pop()
        if not remaining:
          break
  return kept


def _detail(error: Exception) -> str:
  """' (what the library said)' in one short line."""
  text = " ".join(str(getattr(error, "strerror", None) or error).split())
  return f" ({text[:120]})" if text else ""
