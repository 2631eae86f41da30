"""What a record holds of one modality as the arrays of a row: a reader a modality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record
from mmjax.data.image import ImageTransform, decode
from mmjax.data.media import WORDS, content_key
from mmjax.data.naflex import PatchSequence, SequenceTransform, picture_of
from mmjax.data.text import split_key


class Absent(UserError):
  """The record lacks this modality."""


class Reader:
  """One modality: `shapes` of its arrays for one example, `read`, which gives them for a record,
  and `example`, for a content.

  The last array is "key" uint32 [2]: equal for equal content (see media.content_key).
  """

  modality = ""

  def __init__(self, data, train: bool):
    self.shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    self.transform: Callable[..., Any]

  def blank(self, count: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in self.shapes.items()}

  def read(
    self, record: Record, kept: bool, rng: np.random.Generator | None
  ) -> tuple[tuple[Any, ...], str]:
    """(the arrays in the order of `shapes`, what of `example`). kept: the record stays in memory,
    so what was decoded may be kept in it. Raises Absent, or UserError (Unreadable)."""
    content = record.get(self.modality)
    if content is None:
      raise Absent(f"it has no {WORDS[self.modality]}")
    key, decoded = f"{self.modality} key", f"decoded {self.modality}"
    if kept and key not in record:
      record[key], record[decoded] = (
        split_key(content_key(record, self.modality)),
        self.decode(content),
      )
    # Not by what a record has: a further medium of a conversation stands in a copy of its record.
    arrays, surplus = self.example(record[decoded] if kept else content, rng)
    return (
      *arrays,
      record[key] if kept else split_key(content_key(record, self.modality)),
    ), surplus

  def decode(self, content: Any) -> Any:
    """What is kept of a record in memory: the decoded array, of bytes or of an array. Raises
    Unreadable.
    """
    return content

  def example(self, content: Any, rng: np.random.Generator | None) -> tuple[tuple[Any, ...], str]:
    """(the arrays without "key", how long the content is where only its beginning is used, "" = all
    of it is). Raises Unreadable.
    """
    views = self.transform(content, rng)
    return views if isinstance(views, tuple) else (views,), ""


class ImageReader(Reader):
  modality = "image"

  def __init__(self, data, train: bool):
    image = data.image
    if image.resize == "naflex":
      self.transform = SequenceTransform(image, train=train)
      self.shapes = {**self.transform.shapes, "key": ((2,), np.uint32)}
    else:
      self.transform = ImageTransform(image, train=train)
      self.shapes = {"pixels": ((image.size, image.size, 3), np.uint8), "key": ((2,), np.uint32)}

  def decode(self, content: Any) -> np.ndarray:
    return decode(content) if isinstance(content, bytes) else content

  def picture(self, content: bytes | np.ndarray) -> np.ndarray:
    """A picture as the model sees it in evaluation, uint8 [H, W, 3]. Raises UserError
    (Unreadable).
    """
    views = self.transform(content)
    return picture_of(views) if isinstance(views, PatchSequence) else views


class AudioReader(Reader):
  modality = "audio"

  def __init__(self, data, train: bool):
    from mmjax.data.audio import AudioTransform

    self.transform = self.sound = AudioTransform(data.audio, train)
    self.seconds = data.audio.seconds
    self.shapes = {
      "waveform": ((self.sound.samples,), np.int16),
      "length": ((), np.int32),
      "key": ((2,), np.uint32),
    }

  def decode(self, content: Any) -> np.ndarray:
    from mmjax.data.audio import decode_audio

    return decode_audio(content, self.sound.rate) if isinstance(content, bytes) else content

  def example(self, content: Any, rng: np.random.Generator | None) -> tuple[tuple[Any, ...], str]:
    sound = self.decode(content)
    surplus = ""
    if len(sound) > self.sound.samples:
      surplus = f"{len(sound) / self.sound.rate:.1f} of {self.seconds:g} s"
    return self.sound(sound, rng), surplus


class VideoReader(Reader):
  modality = "video"

  def __init__(self, data, train: bool):
    from mmjax.data.video import VideoTransform

    self.transform, video = VideoTransform(data.video, train), data.video
    self.shapes = {
      "frames": ((video.frames, video.size, video.size, 3), np.uint8),
      "mask": ((video.frames,), np.bool_),
      "key": ((2,), np.uint32),
    }

  def decode(self, content: Any) -> Any:
    from mmjax.data.video import decode_clip

    return decode_clip(content) if isinstance(content, bytes) else content


class SeriesReader(Reader):
  modality = "series"

  def __init__(self, data, train: bool):
    from mmjax.data.series import SeriesTransform

    self.transform, self.length = SeriesTransform(data.series), data.series.length
    self.shapes = {
      "values": ((self.length, data.series.channels), np.float32),
      "mask": ((self.length,), np.bool_),
      "key": ((2,), np.uint32),
    }

  def example(self, content: Any, rng: np.random.Generator | None) -> tuple[tuple[Any, ...], str]:
    surplus = f"{len(content)} of {self.length} steps" if len(content) > self.length else ""
    return self.transform(content), surplus


READERS: dict[str, type[Reader]] = {
  "image": ImageReader,
  "audio": AudioReader,
  "video": VideoReader,
  "series": SeriesReader,
}
