"""What readers share: rows, why one is left out, files inside the folder of the source, and the record of a row."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmjax.config import UserError
from mmjax.data.media import media_key
from mmjax.data.tars import expand
from mmjax.files import read_file

Row = tuple[str, Any]
MEDIA = ("image", "audio", "video")  # columns of these hold media


@dataclasses.dataclass(frozen=True)
class Skip:
  """Why a row is left out: a short reason that is counted, and what exactly was wrong."""
  reason: str
  detail: str = ""


class Where(NamedTuple):
  """A row of a folder or a table: {modality: file}, captions by language (None = in files beside it), label, questions.

  `captioned`: the table has captions, so that a row without them is left out although it has a label.
  """
  media: dict[str, str]
  captions: dict[str, list[str]] | None
  label: str = ""
  questions: tuple[tuple[str, str], ...] = ()
  captioned: bool = True


def read_inside(root: str, path: str) -> bytes | Skip:
  """The bytes of a file inside the folder `root`, links resolved; or why not."""
  try:
    base, full = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([base, full]) != base:
      return Skip("outside the source folder", path)
    return read_file(full)
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
    return Skip("missing file", path)
  except OSError as error:
    return Skip("too large" if error.errno == errno.EFBIG else "unreadable", f"{path} ({error.strerror})")


def file_record(root: str, name: str, where: Where, media: Mapping[str, bytes] | None = None) -> dict | Skip:
  """The record of a row, whose files are read; `media`: what the row holds itself."""
  media = dict(media or {})
  for modality, path in where.media.items():
    content = read_inside(root, path)
    if isinstance(content, Skip):
      return content
    media[modality] = content
  if not media:
    return Skip("missing file", "no picture, sound or video in this row")
  if not (where.captions or where.questions or (where.label and not where.captioned)):
    return Skip("no caption")
  record = dict(id=name, image=media.get("image"), captions=where.captions, label=where.label, image_key=media_key(media))
  record |= {modality: content for modality, content in media.items() if modality != "image"}
  return record | {"questions": list(where.questions)} if where.questions else record


def fields_of(rows: Iterable[Row]) -> set[str]:
  found: set[str] = set()
  for _, where in rows:
    found.update(where.media)
    if where.questions:
      found.add("questions")
  return found


def find_files(source: str, endings: tuple[str, ...]) -> list[str]:
  """The files of a folder with these endings, or those that a pattern names. Raises UserError."""
  if os.path.isdir(source):
    found = sorted(str(path) for path in Path(source).rglob("*") if path.suffix in endings and path.is_file())
    if not found:
      raise UserError(f"{source}: no {' or '.join(endings)} file in this folder")
    return found
  return expand(source)


def stems(paths: list[str]) -> list[str]:
  """Short names of files, unique: the path below their common folder, without the ending."""
  folder = os.path.commonpath([os.path.dirname(path) for path in paths])
  return [os.path.splitext(os.path.relpath(path, folder))[0] for path in paths]
