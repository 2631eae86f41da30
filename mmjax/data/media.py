"""What kinds of media files there are, and whether one can be decoded. Media always stay the encoded bytes that they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from mmjax.data import image
from mmjax.data.image import Unreadable

ENDINGS = {  # small, without the dot; a GIF counts as a picture, of which its first frame is used
  "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp"),
  "audio": ("wav", "flac", "ogg", "oga", "opus", "mp3"),
  "video": ("mp4", "m4v", "mkv", "webm", "mov", "avi"),
}
WORDS = {"image": "picture", "audio": "sound", "video": "video", "series": "sensor series", "text": "text"}


def modality_of(name: str | os.PathLike) -> str | None:
  """"image", "audio" or "video" by the ending of a file name; None for any other."""
  ending = os.fspath(name).rpartition(".")[2].lower()
  return next((modality for modality, endings in ENDINGS.items() if ending in endings), None)


def media_key(record: Mapping[str, Any]) -> int:
  """The `image_key` of a record: a hash in [0, 2^64) of the bytes of its picture, else of its video, else of its sound."""
  return bytes_key(record.get("image") or record.get("video") or record.get("audio") or b"")


def bytes_key(data: bytes) -> int:
  """Hash of encoded bytes, in [0, 2^64)."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def check(record: Mapping[str, Any]) -> None:
  """Decodes all the media of a record once (a JPEG at an eighth of its size). Raises Unreadable, which names the kind."""
  if record.get("image") is not None:
    image.decode(record["image"], 8)
  if record.get("audio") is not None:
    from mmjax.data.audio import read_audio

    read_audio(record["audio"])
  if record.get("video") is not None:
    from mmjax.data.video import decode_video

    decode_video(record["video"], lambda count: sorted({0, count - 1}))  # everything is decoded, next to nothing kept


def too_large(error: Unreadable) -> bool:
  """Whether media were refused for their size, not for damage."""
  return any(words in str(error) for words in ("megapixels", " of more than "))
