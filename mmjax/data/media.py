"""What kinds of media files there are, and whether one can be decoded. Media always stay the
encoded bytes that they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data import image
from mmjax.data.image import Unreadable

ENDINGS = {  # small, without the dot; a GIF counts as a picture, of which its first frame is used
  "image": (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "heic",
    "heif",
  ),
  "audio": (
    "wav",
    "flac",
    "ogg",
    "oga",
    "opus",
    "mp3",
    "m4a",
    "m4b",
    "aac",
    "aif",
    "aiff",
    "au",
    "caf",
    "wma",
    "mka",
  ),
  "video": (
    "mp4",
    "m4v",
    "mkv",
    "webm",
    "mov",
    "avi",
    "mpg",
    "mpeg",
    "wmv",
    "flv",
    "3gp",
    "ogv",
    "mts",
    "m2ts",
  ),
}
SERIES = (".npy", ".csv", ".tsv")  # of files of numbers, where a table is none
WORDS = {
  "image": "picture",
  "audio": "sound",
  "video": "video",
  "series": "sensor series",
  "text": "text",
}


def modality_of(name: str | os.PathLike) -> str | None:
  """ "image", "audio" or "video" by the ending of a file name; None for any other."""
  ending = os.path.splitext(os.fspath(name))[1][1:].lower()
  return next((modality for modality, endings in ENDINGS.items() if ending in endings), None)


def modality_in_column(name: str | os.PathLike, column: str) -> str:
  """The modality of a file that a column of this modality names. The column decides where the
  ending says nothing, and a video in a column of sounds is its sound track.
  """
  found = modality_of(name)
  if found is None and os.fspath(name).lower().endswith(SERIES):
    return "series"
  return column if found is None or (column, found) == ("audio", "video") else found


def content_key(record: Mapping[str, Any], modality: str) -> int:
  """The key of one medium of a record, in [0, 2^64): equal keys are the same content.

  A picture's is stored (`image_key`: of its pixels in the embedded data sets, else of its bytes).
  Others are hashes of the stored bytes, and of shape and values of a series, computed when they are
  asked for: 1 ms a megabyte. The same sound in another container has another key.
  """
  if modality == "image":
    return record["image_key"]
  content = record[modality]
  if modality == "series":
    values = np.ascontiguousarray(content, "<f4")
    content = np.array(values.shape, "<i8").tobytes() + values.tobytes()
  return bytes_key(content)


def media_key(record: Mapping[str, Any]) -> int:
  """The `image_key` of a record: a hash in [0, 2^64) of the bytes of its picture, else of its
  video, else of its sound, else of its series.
  """
  content = record.get("image") or record.get("video") or record.get("audio") or b""
  if not content and record.get("series") is not None:
    return content_key(record, "series")
  return bytes_key(content)


def bytes_key(data: bytes) -> int:
  """Hash of encoded bytes, in [0, 2^64)."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def check(record: Mapping[str, Any]) -> None:
  """Decodes all the media of a record once (a JPEG at an eighth of its size). Raises Unreadable,
  which names the kind.
  """
  if record.get("image") is not None:
    image.decode(record["image"], 8)
  if record.get("audio") is not None:
    from mmjax.data.audio import read_audio

    read_audio(record["audio"])
  if record.get("video") is not None:
    from mmjax.data.video import decode_video

    # everything is decoded, next to nothing kept
    decode_video(record["video"], lambda count: np.unique([0, count - 1]))
  if record.get("series") is not None and not np.isfinite(record["series"]).all(1).any():
    raise Unreadable("a series without one step of numbers")
  for modality, content in record.get("media") or ():
    check({modality: content})


def too_large(error: Unreadable) -> bool:
  """Whether media were refused for their size, not for damage."""
  return any(words in str(error) for words in ("megapixels", " of more than "))
