"""Clips that the encoder of pictures reads, several frames as one picture, with the time of each in
the text (Qwen3-VL, Bai et al. 2025, arXiv:2511.21631). NumPy only.

A clip fills a slot of batch["media"]["video"] for each `data.video.group` frames. A slot has the
arrays of a PatchSequence, whose patches hold those of the frames one after another, and `time`, the
mean of the seconds of the first and the last of them.
"""

from __future__ import annotations

import math

import numpy as np

from mmjax.data.image import Unreadable
from mmjax.data.naflex import cut, size_class
from mmjax.data.resample import resize_exact
from mmjax.data.video import RATE, timed_frames


class ClipTransform:
  """The clips of a config whose data.video.group is above 0: `transform(data) -> {array: [K, ...]}`
  for the K slots that one fills.

  `data`: encoded bytes, whose timestamps count, or frames uint8 [n, H, W, 3] of 24 a second. Raises
  Unreadable.
  """

  def __init__(self, image, video):
    self.patch, self.merge = int(image.patch), int(image.merge)
    self.interpolation = image.interpolation
    self.group, self.fps = int(video.group), float(video.fps)
    self.fewest, self.most = int(video.least), int(video.frames)
    self.budget = tuple(int(n) * self.patch**2 for n in video.patches)

  def __call__(self, data: bytes | np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(data, bytes):
      frames, times = timed_frames(data, self.pick)
    else:
      chosen = self.pick(len(data), RATE)
      frames, times = data[chosen], chosen / RATE
    if len(frames) < self.group:
      raise Unreadable(
        f"a clip of {len(frames)} frame(s); it needs {self.group}. Give a single one as a picture"
      )
    height, width = self.size_of(*frames.shape[:3])
    repeated = np.full(-len(frames) % self.group, -1)  # of the last one, up to a whole group
    times = np.concatenate([times, times[repeated]]).reshape(-1, self.group)
    small = [resize_exact(frame, (height, width), self.interpolation) for frame in frames]
    budget = size_class(height * width // self.patch**2, self.merge)
    cuts = [cut(frame, self.patch, budget, self.merge) for frame in small]
    cuts += [cuts[-1]] * len(repeated)
    groups = [cuts[i : i + self.group] for i in range(0, len(cuts), self.group)]
    return dict(
      patches=np.stack([np.concatenate([one.patches for one in group], 1) for group in groups]),
      positions=np.stack([group[0].positions for group in groups]),
      mask=np.stack([group[0].mask for group in groups]),
      grid=np.stack([group[0].grid for group in groups]),
      time=(times[:, 0] + times[:, -1]) / 2,
    )

  def pick(self, count: int, rate: float) -> np.ndarray:
    """Which of `count` frames are used, `rate` of them a second: int [n], ascending."""
    wanted = int(count / rate * self.fps) if self.fps else self.most
    wanted = min(max(wanted, self.fewest), self.most, count)
    return np.linspace(0, count - 1, wanted).round().astype(int)

  def size_of(self, frames: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of all frames of a clip: whole squares of patches, as near as can
    be to its own size at which the clip has a number of patches within data.video.patches.
    """
    side = self.patch * self.merge
    if min(height, width) < side:
      grow = max(side / height, side / width)
      height, width = int(height * grow), int(width * grow)
    if max(height, width) > 200 * min(height, width):
      raise Unreadable(f"frames of {width} x {height} pixels are over 200 times as long. Crop them")
    least, most, of_frame = self.budget
    if of_frame:
      most = frames * max(min(of_frame, most // frames), int(least * 1.05))
    rows, columns = (round(n / side) * side for n in (height, width))
    whole = round(frames / self.group) * self.group
    if whole * rows * columns > most:
      shrink = math.sqrt(frames * height * width / most)
      rows, columns = (max(side, math.floor(n / shrink / side) * side) for n in (height, width))
    elif whole * rows * columns < least:
      grow = math.sqrt(least / (frames * height * width))
      rows, columns = (math.ceil(n * grow / side) * side for n in (height, width))
    return rows, columns
