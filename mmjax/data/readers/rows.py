"""What readers share: rows, the step that joins them by medium, files inside the folder of the
source.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.image import Unreadable
from mmjax.data.readers.cells import Annotation, Skip
from mmjax.data.readers.columns import Part
from mmjax.data.series import as_series, read_series
from mmjax.data.tars import expand
from mmjax.files import StoreError, files_below, is_object, is_url, read_file, read_object

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
  """A record to be: its id, where it lies (a reader's own matter), and how many rows of the source
  it joins.
  """

  name: str
  where: Any
  count: int = 1


class Where(NamedTuple):
  """The files of a record, {modality: path below the root or URL}, and what is said of them; or the
  text files beside them.
  """

  media: dict[str, str]
  said: Annotation | None
  texts: tuple[tuple[str, str], ...] = ()  # (file, language)


@dataclasses.dataclass(frozen=True)
class Options:
  """`columns`: {role: column}. `language`: of captions that do not say. `media`: the folder of the
  media ("" = where the annotations lie). `encoding`: of texts without a byte order mark ("" =
  UTF-8). `cache`: the folder for indices of tars. `separator`: between several labels in a cell.
  `classes`: that labels may be, in their order; () = any. `root`: the folder below which all files
  lie that annotations name ("" = `media`, or where the annotations lie)."""

  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  language: str = "en"
  media: str = ""
  encoding: str = ""
  cache: str | os.PathLike | None = None
  separator: str = ","
  classes: tuple[str, ...] = ()
  root: str = ""


OUTSIDE = "outside the source folder"
ADDRESS = "an address of no store"
Left = tuple[str, Skip]  # the name of what is left out, and why


def join(parts: Iterable[Part | Left]) -> tuple[list[Row], list[Left]]:
  """Parts about the same media become one row, in the order of the first of each. Where a name is
  taken, a part that has it from its first medium is called by where it stands; others are left out.
  """
  rows: dict[tuple, Row] = {}
  owner: dict[str, tuple] = {}
  skipped: list[Left] = []
  for part in parts:
    if not isinstance(part, Part):
      skipped.append(part)
      continue
    name = part.name
    if name in part.media.values() and owner.get(name, part.key) != part.key:
      name = part.at
    if part.key not in rows and owner.setdefault(name, part.key) != part.key:
      skipped.append((part.name, Skip("duplicate id", part.at)))
    elif part.key not in rows:
      rows[part.key] = Row(name, Where(part.media, part.said))
    elif differs := rows[part.key].where.said.other_values(part.said):
      skipped.append((part.at, differs))
    else:
      row = rows[part.key]
      where = row.where._replace(said=row.where.said.joined(part.said))
      rows[part.key] = dataclasses.replace(row, where=where, count=row.count + 1)
  return list(rows.values()), skipped


class ListedReader:
  """Reads files of annotations that name files of media. A form defines `parts`."""

  endings: tuple[str, ...] = ()

  def __init__(self, source: str, options: Options):
    self.paths, self.options = self.find(source), options
    self.notes: list[str] = []
    self.root = os.path.abspath(options.root or options.media or os.path.dirname(self.paths[0]))

  def find(self, source: str) -> list[str]:
    return [os.path.abspath(path) for path in find_files(source, self.endings)]

  def parts(self) -> Iterator[Part | Left]:
    """The rows of all files, in order. Raises UserError."""
    raise NotImplementedError

  def folder_of(self, path: str) -> str:
    """Where the media that a file of annotations names lie, below the root."""
    folder = os.path.relpath(self.options.media or os.path.dirname(path), self.root)
    return "" if folder == "." else folder

  def rows(self) -> tuple[list[Row], list[Left]]:
    return join(self.parts())

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, Record | Skip, int]]:
    for row in rows:
      yield row.name, file_record(self.root, row.name, row.where.media, row.where.said), row.count

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths
    for row in rows:
      yield from (
        path if is_url(path) else os.path.join(self.root, path) for path in row.where.media.values()
      )

  def fields(self, rows: Iterable[Row]) -> set[str]:
    found: set[str] = set()
    for row in rows:
      found.update("media" if ":" in name else name for name in row.where.media)
      if row.where.said is not None:
        found |= fields_of(row.where.said)
    return found


def fields_of(said: Annotation) -> set[str]:
  """The optional fields (schema.FIELDS) that an annotation fills."""
  facts = any(one.answers for one in said.questions)
  found = {
    "questions": said.questions,
    "facts": facts,
    "value": said.values,
    "conversations": said.conversations,
    "preferences": said.preferences,
  }
  return {name for name, found_any in found.items() if found_any}


def file_record(root: str, name: str, paths: Mapping[str, str], said: Annotation) -> Record | Skip:
  """The record of an annotation and the media files {modality: path below root}, which are read."""
  media: dict[str, Any] = {}
  for modality, path in paths.items():
    content: Any = read_inside(root, path)
    if modality == "series" and isinstance(content, bytes):
      content = series_of(content, path)
    if isinstance(content, Skip):
      return content
    media[modality] = content
  return said.record(name, media)


def series_of(content: Any, path: str = "") -> np.ndarray | Skip:
  """A series float32 [T, C], of the bytes of a file or of nested lists; or why not."""
  try:
    return read_series(content) if isinstance(content, bytes) else as_series(content)
  except Unreadable as error:
    return Skip("unreadable", f"{path}: {error}" if path else str(error))


def read_inside(root: str, path: str) -> bytes | Skip:
  """The bytes of a file inside the folder `root`, links resolved, of an object of a store, or of a
  data: URL; or why not. Raises UserError: a store does not answer, which is no fault of the object.
  """
  if path.startswith("data:"):
    try:
      return base64.b64decode(path.partition(",")[2], validate=True)
    except binascii.Error as error:
      return Skip("unreadable", f"a data: URL that is not base64 ({error})")
  try:
    if is_object(path):
      return read_object(path)
    if is_url(path):
      return Skip(ADDRESS, f"{path}: download it, or name it by s3:// or gs://")
    base, full = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([base, full]) != base:
      return Skip(OUTSIDE, f"{path} is not below {root}; --root names a folder that holds it")
    return read_file(full)
  except StoreError as error:
    raise UserError(str(error)) from error
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
    return Skip("missing file", path)
  except OSError as error:
    return Skip(
      "too large" if error.errno == errno.EFBIG else "unreadable", f"{path} ({error.strerror})"
    )


def find_files(source: str, endings: tuple[str, ...]) -> list[str]:
  """The files of a folder with these endings, or those that a pattern names. Raises UserError."""
  if os.path.isdir(source):
    everything, closed = files_below(source)
    for place, why in closed:
      raise UserError(f"{place} cannot be read ({why}). Change its permissions, or move it away")
    found = [str(p) for p in everything if p.suffix.lower() in endings and p.is_file()]
    if not found:
      raise UserError(f"{source}: no {' or '.join(endings)} file in this folder")
    return found
  return expand(source)


def stems(paths: list[str]) -> list[str]:
  """Short names of files, unique: the path below their common folder, without the ending."""
  folder = os.path.commonpath([os.path.dirname(path) for path in paths])
  return [os.path.splitext(os.path.relpath(path, folder))[0] for path in paths]
