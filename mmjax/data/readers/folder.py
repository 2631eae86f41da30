"""Media in folders: with a table each (captions.csv, metadata.jsonl, ...: file_name, caption, ...),
or with a NAME.txt each.

A NAME.txt holds a caption a line; NAME.de.txt holds captions in German. NAME.png, NAME.wav,
NAME.mp4 and NAME.npy (or a NAME.csv of numbers, a sensor's) are one record. A table speaks of the
files in its folder and below, where no other table lies, by their paths from there. Where nothing
says anything of any file, the name of its folder is its label. Every file counts, except hidden
ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping

from mmjax.config import UserError
from mmjax.data.media import SERIES, modality_of
from mmjax.data.readers import json_lines, table
from mmjax.data.readers.cells import Annotation, Skip, broken_text, captions_of, encoding_of
from mmjax.data.readers.columns import MEDIA, Part
from mmjax.data.readers.rows import (
  Left,
  ListedReader,
  Record,
  Row,
  Where,
  file_record,
  join,
  read_inside,
)
from mmjax.data.series import looks_like_series
from mmjax.files import no_folder, open_file

TABLES = tuple(
  f"{name}{ending}"
  for name, endings in (
    ("captions", (".csv", ".tsv", ".jsonl", ".json")),
    ("metadata", (".jsonl", ".csv", ".tsv", ".json")),
  )
  for ending in endings
)


SPLITS = {  # what a folder of a split may be called
  "train": "train",
  "training": "train",
  "val": "validation",
  "valid": "validation",
  "validation": "validation",
  "dev": "validation",
  "test": "test",
  "testing": "test",
}
_PEEK = 4096  # characters of a table that tell whether it holds a series


class FolderReader(ListedReader):
  def find(self, source: str) -> list[str]:
    if not os.path.isdir(source):
      raise UserError(no_folder(source))
    return [os.path.join(os.path.abspath(source), "")]  # the root is its folder

  def rows(self) -> tuple[list[Row], list[Left]]:
    parts: list[Part | Left] = []
    alone: list[Row] = []
    left: list[Left] = []
    files: list[tuple[str, str]] = []  # (file, its table)
    governing: dict[str, str] = {}  # folder -> table
    self.paths = []
    for folder, names in _walk(self.root, left):
      governing[folder] = governing.get(os.path.dirname(folder), "") if folder else ""
      if own := next((name for name in TABLES if name in names), ""):
        names.remove(own)
        governing[folder] = os.path.join(folder, own)
        self.paths.append(os.path.join(self.root, folder, own))
        parts += self._table_parts(self.paths[-1], folder)
      kinds = {name: kind for name in names if (kind := self._kind(folder, name))}
      media = list(kinds)
      if governing[folder]:
        files += [(os.path.join(folder, name), governing[folder]) for name in media]
      others = [name for name in names if name not in set(media)]
      if not governing[folder]:
        found, others = self._records(folder, kinds, others)
        alone += found
      left += [(os.path.join(folder, name), _not_read(name, governing[folder])) for name in others]
    if self.options.columns and not self.paths:
      raise UserError(
        f"{self.root}: columns are named, but no table ({', '.join(TABLES[:2])}, ...) is in it. "
        "Add one, or convert your table itself: `mmjax data convert csv TABLE`"
      )
    self._find_splits()
    rows, skipped = join(parts)
    named = {os.path.normpath(path) for row in rows for path in row.where.media.values()}
    left += [
      (path, Skip("no caption", f"not in {owner}")) for path, owner in files if path not in named
    ]
    return rows + self._classes(alone), skipped + left

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, Record | Skip, int]]:
    for row in rows:
      media, said, texts = row.where
      if said is None:
        said = self._captions(texts)
      if bad := broken_text([row.name, *media.values()]):
        yield row.name, Skip("broken text", bad), row.count
      elif isinstance(said, Skip):
        yield row.name, said, row.count
      else:
        yield row.name, file_record(self.root, row.name, media, said), row.count

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from super().files(rows)
    for row in rows:
      yield from (os.path.join(self.root, text) for text, _ in row.where.texts)

  def _find_splits(self) -> None:
    """`splits` {folder: split}, of the folders of the root that are called as splits are: of two
    splits or more, or with folders in them; `only_splits`: there are no others.
    """
    folders = _folders_in(self.root)
    found = {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
    self.only_splits = len(found) == len(folders)
    several = len(set(found.values())) > 1
    deep = self.only_splits and any(_folders_in(os.path.join(self.root, name)) for name in found)
    self.splits = found if several or deep else {}

  def _kind(self, folder: str, name: str) -> str | None:
    """The modality of a file; a table that holds nothing but numbers is a series."""
    if not name.lower().endswith(SERIES) or name.lower().endswith(".npy"):
      return "series" if name.lower().endswith(SERIES) else modality_of(name)
    try:
      with open_file(os.path.join(self.root, folder, name)) as file:
        start = file.read(_PEEK).decode("utf-8-sig", "replace")
    except OSError:
      return None
    whole = start if len(start) < _PEEK else start.rpartition("\n")[0]
    return "series" if looks_like_series(whole) else None

  def _table_parts(self, path: str, folder: str) -> Iterator[Part | Left]:
    if path.endswith(table.ENDINGS):
      yield from table.table_parts(path, folder, self.options)
    else:
      objects = json_lines.read_json(path, self.options.encoding)
      objects = json_lines.objects_of(objects, path) if isinstance(objects, dict) else objects
      yield from json_lines.object_parts(objects, path, folder, self.options)

  def _records(
    self, folder: str, media: Mapping[str, str], others: list[str]
  ) -> tuple[list[Row], list[str]]:
    """A row for the files that differ in their endings alone, in the order of their names, and the
    files that none takes. media: {file: its modality}.
    """
    stems: dict[str, dict[str, list[str]]] = {}
    for name, kind in media.items():
      stems.setdefault(os.path.splitext(name)[0], {}).setdefault(kind, []).append(
        os.path.join(folder, name)
      )
    texts: dict[str, list[tuple[str, str]]] = {}
    taken = set()
    for name in (name for name in others if name.lower().endswith(".txt")):
      stem, language = name[:-4], self.options.language
      if stem not in stems:
        stem, _, language = stem.rpartition(".")
        if stem not in stems or not (2 <= len(language) <= 3 and language.isalpha()):
          continue
      found = (os.path.join(folder, name), language)
      texts.setdefault(stem, []).insert(0 if stem == name[:-4] else len(texts.get(stem, ())), found)
      taken.add(name)
    rows = []
    for stem, present in stems.items():
      for number in range(max(map(len, present.values()))):
        files = {
          kind: present[kind][number] for kind in MEDIA if number < len(present.get(kind, ()))
        }
        rows.append(Row(next(iter(files.values())), Where(files, None, tuple(texts.get(stem, ())))))
    return rows, [name for name in others if name not in taken]

  def _captions(self, texts: Iterable[tuple[str, str]]) -> Annotation | Skip:
    captions: dict[str, list[str]] = {}
    for file, language in texts:
      data = read_inside(self.root, file)
      if isinstance(data, Skip):
        return data
      encoding = encoding_of(data, self.options.encoding)
      try:
        lines = data.decode(encoding).splitlines()
      except UnicodeError:
        return Skip(
          "broken text", f"{file} is not {encoding}; --encoding names another, such as cp1252"
        )
      for name, found in captions_of(lines, language).items():
        captions.setdefault(name, []).extend(found)
    return Annotation(captions) if captions else Skip("no caption")

  def _classes(self, rows: list[Row]) -> list[Row]:
    """The rows, with their folders as labels where no file of any has a text or a table."""
    if self.paths or any(row.where.texts for row in rows):
      return rows
    folders = [os.path.dirname(next(iter(row.where.media.values()))) for row in rows]
    none = self.splits if self.only_splits else {}
    labels = ["" if folder in none else os.path.basename(folder) for folder in folders]
    names = sorted(set(labels) - {""})
    if names:
      shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
      self.notes.append(
        f"no captions: the folder of a file is its label ({len(names)} classes: {shown})"
      )
    return [
      dataclasses.replace(row, where=row.where._replace(said=Annotation({}, (label,))))
      if label
      else row
      for row, label in zip(rows, labels, strict=True)
    ]


def _folders_in(folder: str) -> list[str]:
  found = next(os.walk(folder), ("", [], []))[1]
  return sorted(name for name in found if not name.startswith("."))


def _walk(root: str, left: list[Left]) -> Iterator[tuple[str, list[str]]]:
  """(folder below root, names of its files) in order; hidden ones are passed over. left: gets the
  folders that cannot be listed. Raises UserError: it is the root itself.
  """

  def note(error: OSError) -> None:
    below = os.path.relpath(error.filename, root)
    if below == ".":
      raise UserError(
        f"{error.filename} cannot be read ({error.strerror}). Change its permissions, or name "
        "another"
      )
    left.append((os.path.join(below, ""), Skip("folder not read", error.strerror or str(error))))

  for folder, folders, files in os.walk(root, onerror=note):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    below = os.path.relpath(folder, root)
    yield "" if below == "." else below, sorted(name for name in files if not name.startswith("."))


def _not_read(name: str, table: str) -> Skip:
  """Why a file that is neither a medium nor its text is left out."""
  if name.lower().endswith(".txt") and not table:
    return Skip("text without a file", "no picture, sound, video or series has its name")
  return Skip("ending not read", f"{table} is read" if table else "")
