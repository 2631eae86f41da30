"""What `mmjax data convert` reads: folders with captions, JSONL + files, WebDataset tars, parquet.

A reader lists its rows once, in an order that depends on the source alone, and reads any run of them, in any process:

  rows() -> (rows, skipped)     rows: [(id, where)], ids unique; skipped: what is left out without looking at a picture
  read(rows) -> iterator        of (id, record) or (id, Skip), one for each row
  files(rows) -> iterator       of the paths that the result depends on (a conversion goes on only while none changes)

A picture file must lie inside the folder of the source, links resolved. Nothing is decoded here.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax.config import UserError
from mmjax.data.tars import PICTURES, TarIndex, captions_of, expand, index_tar, index_tars, picture_key

Row = tuple[str, Any]
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.jsonl", "metadata.csv", "metadata.tsv")
COLUMNS = {  # what a column may be called, most likely first
  "image": ("image", "file_name", "filename", "image_path", "file", "path", "img", "picture", "jpg", "png",
            "image_bytes", "bytes"),
  "caption": ("captions", "caption", "text", "texts", "txt", "title", "description", "alt"),
  "id": ("id", "key", "image_id", "uid", "__key__"),
  "label": ("label", "class", "category"),
  "language": ("language", "lang"),
}


@dataclasses.dataclass(frozen=True)
class Skip:
  """Why a row is left out: a short reason that is counted, and what exactly was wrong."""
  reason: str
  detail: str = ""


def open_reader(format: str, source: str | os.PathLike, columns: Mapping[str, str] | None = None, language: str = "en",
                cache: str | os.PathLike | None = None):
  """The reader of a format. `cache`: the folder for indices of tars. Raises UserError."""
  kinds = {"folder": FolderReader, "jsonl": JsonlReader, "webdataset": TarReader, "parquet": ParquetReader}
  if format not in kinds:
    raise UserError(f"no format {format!r}; there are: {', '.join(kinds)}")
  for what in columns or ():
    if what not in COLUMNS:
      raise UserError(f"columns names {what!r}, but only {', '.join(COLUMNS)} can be named")
  reader = kinds[format](os.fspath(source), dict(columns or {}), language)
  reader.cache = cache
  return reader


class FolderReader:
  """Pictures with a table (captions.csv, metadata.jsonl, ...: file_name, caption, ...), or with a NAME.txt each.

  A NAME.txt holds a caption a line; NAME.de.txt holds captions in German. A table may name a picture in several rows.
  """

  def __init__(self, source: str, columns: dict[str, str], language: str):
    if not os.path.isdir(source):
      raise UserError(f"{source}: no such folder" + (" (it is a file)" if os.path.exists(source) else ""))
    self.root, self.columns, self.language = os.path.abspath(source), columns, language
    tables = (os.path.join(self.root, name) for name in TABLES)
    self.tables = [path for path in tables if os.path.isfile(path)][:1]

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    pictures = list(self._walk())
    if not self.tables:
      return [(path, (path, None, "")) for path in pictures], []
    rows, skipped = _table_rows(_table(self.tables[0]), self.tables[0], self.columns, self.language)
    named = {os.path.normpath(where[0]) for _, where in rows}
    table = os.path.basename(self.tables[0])
    return rows, skipped + [(path, Skip("no caption", f"not in {table}")) for path in pictures if path not in named]

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, dict | Skip]]:
    for name, (path, captions, label) in rows:
      captions = self._sidecars(path) if captions is None else captions
      yield name, _file_record(self.root, name, path, captions, label)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.tables
    for _, (path, captions, _) in rows:
      yield os.path.join(self.root, path)
      if captions is None:
        yield from (os.path.join(self.root, text) for text, _ in self._texts(path))

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_listings"}  # workers list what they need

  def _walk(self) -> Iterator[str]:
    for folder, folders, files in os.walk(self.root):
      folders.sort()
      for file in sorted(files):
        if file.rpartition(".")[2].lower() in PICTURES and not file.startswith("."):
          yield os.path.relpath(os.path.join(folder, file), self.root)

  def _texts(self, path: str) -> list[tuple[str, str]]:
    """[(sidecar file, language)] of a picture."""
    if not hasattr(self, "_listings"):
      self._listings: dict[str, dict[str, list[tuple[str, str]]]] = {}
    folder, base = os.path.split(path)
    if folder not in self._listings:
      texts: dict[str, list[tuple[str, str]]] = {}
      for file in sorted(os.listdir(os.path.join(self.root, folder))):
        if file.lower().endswith(".txt"):
          stem, _, language = file[:-4].rpartition(".")
          texts.setdefault(file[:-4], []).insert(0, (os.path.join(folder, file), self.language))
          if stem and 2 <= len(language) <= 3 and language.isalpha():
            texts.setdefault(stem, []).append((os.path.join(folder, file), language))
      self._listings[folder] = texts
    return self._listings[folder].get(os.path.splitext(base)[0], [])

  def _sidecars(self, path: str) -> dict[str, list[str]] | Skip:
    captions: dict[str, list[str]] = {}
    for file, language in self._texts(path):
      data = read_inside(self.root, file)
      if isinstance(data, Skip):
        return data
      try:
        for name, texts in captions_of(data.decode("utf-8-sig").splitlines(), language).items():
          captions.setdefault(name, []).extend(texts)
      except UnicodeDecodeError:
        return Skip("broken row", f"{file} is not UTF-8")
    return captions


class JsonlReader:
  """JSON lines with a picture's path (relative to the file), captions, and optionally id, label, language."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths = _files(source, (".jsonl", ".json", ".ndjson"))
    self.columns, self.language = columns, language
    self.root = os.path.dirname(os.path.abspath(self.paths[0]))

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    rows, skipped = [], []
    for path in self.paths:
      more, left = _table_rows(_table(path), path, self.columns, self.language)
      folder = os.path.relpath(os.path.dirname(os.path.abspath(path)), self.root)
      for name, (file, captions, label) in more:
        rows.append((name, (os.path.join(folder, file) if folder != "." else file, captions, label)))
      skipped += left
    return rows, skipped

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, dict | Skip]]:
    for name, (path, captions, label) in rows:
      yield name, _file_record(self.root, name, path, captions, label)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths
    for _, (path, _, _) in rows:
      yield os.path.join(self.root, path)


class TarReader:
  """WebDataset tars (see tars.py)."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths, self.language = [os.path.abspath(path) for path in expand(source)], language

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    rows: list[Row] = []
    skipped: list[tuple[str, Skip]] = []
    for path, stem, index in zip(self.paths, _stems(self.paths), index_tars(self.paths, self.cache), strict=True):
      if isinstance(index, UserError):
        skipped.append((stem, Skip("tar without pairs", str(index))))
        continue
      rows += [(f"{stem}/{key}", (path, number)) for number, key in enumerate(index.keys.tolist())]
      skipped += [(f"{stem}/{name}", Skip(reason)) for name, reason in index.skipped]
    return rows, skipped

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, dict | Skip]]:
    index: TarIndex | None = None
    for name, (path, number) in rows:
      try:
        if index is None or index.path != path:
          index = index_tar(path, self.cache)
        yield name, index.read(number, self.language) | {"id": name}
      except UserError as error:
        yield name, Skip("no caption" if "no caption" in str(error) else "broken row", str(error))

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths


class ParquetReader:
  """Parquet as Hugging Face writes it: a column of bytes, {bytes, path} or paths, and columns of captions and labels."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths, self.language = [os.path.abspath(path) for path in _files(source, (".parquet",))], language
    self.root = os.path.dirname(self.paths[0])
    self.label_names: list[str] = []
    schema = self._open(self.paths[0]).schema_arrow
    self.columns = _choose_columns(schema.names, columns, self.paths[0])
    facts = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = facts.get("info", {}).get("features", {}).get(self.columns.get("label"), {})
    if isinstance(feature, dict):
      self.label_names = list(feature.get("names") or ())

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    rows: list[Row] = []
    skipped: list[tuple[str, Skip]] = []
    for path, stem in zip(self.paths, _stems(self.paths), strict=True):
      file = self._open(path)
      missing = sorted(set(self.columns.values()) - set(file.schema_arrow.names))
      if missing:
        raise UserError(f"{path} has no column {missing[0]!r}, which {self.paths[0]} has. Convert one kind at a time")
      number = 0
      for group in range(file.num_row_groups):
        names = None
        if "id" in self.columns:
          names = file.read_row_group(group, columns=[self.columns["id"]]).column(0).to_pylist()
        for within in range(file.metadata.row_group(group).num_rows):
          name = names[within] if names else None
          rows.append((f"{stem}/{number:06d}" if name is None else str(name), (path, group, within)))
          number += 1
    return rows, skipped

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, dict | Skip]]:
    pending: list[Row] = []
    for row in rows:
      if pending and row[1][:2] != pending[0][1][:2]:
        yield from self._read_group(pending)
        pending = []
      pending.append(row)
    if pending:
      yield from self._read_group(pending)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths

  def _read_group(self, rows: list[Row]) -> Iterator[tuple[str, dict | Skip]]:
    """Rows of one row group, in small batches: a group of many gigabytes does not have to fit in memory."""
    path, group, _ = rows[0][1]
    start, wanted = 0, iter(rows)
    row = next(wanted)
    for batch in self._open(path).iter_batches(64, row_groups=[group], columns=sorted(set(self.columns.values()))):
      while row is not None and row[1][2] < start + batch.num_rows:
        yield row[0], self._record(row[0], batch.slice(row[1][2] - start, 1).to_pylist()[0])
        row = next(wanted, None)
      start += batch.num_rows
      if row is None:
        return

  def _record(self, name: str, row: dict[str, Any]) -> dict | Skip:
    picture, caption, label, language = (
      row.get(self.columns.get(what, "")) for what in ("image", "caption", "label", "language"))
    if isinstance(picture, dict):
      picture = picture.get("bytes") or picture.get("path")
    if isinstance(label, int) and 0 <= label < len(self.label_names):
      label = self.label_names[label]
    label = "" if label is None else str(label)
    captions = captions_of(caption, language or self.language)
    if isinstance(picture, str):
      return _file_record(self.root, name, picture, captions, label)
    if not isinstance(picture, bytes) or not picture:
      return Skip("missing file", "no picture in this row")
    if not captions:
      return Skip("no caption")
    return dict(id=name, image=picture, captions=captions, label=label, image_key=picture_key(picture))

  def _open(self, path: str):
    try:
      import pyarrow
      import pyarrow.parquet as parquet
    except ImportError as error:
      raise UserError("reading parquet needs pyarrow: pip install pyarrow") from error
    try:
      return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
      raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:120]})") from error


def read_inside(root: str, path: str) -> bytes | Skip:
  """The bytes of a file inside the folder `root`, links resolved; or why not."""
  try:
    base, full = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([base, full]) != base:
      return Skip("outside the source folder", path)
    with open(full, "rb") as file:
      return file.read()
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
    return Skip("missing file", path)
  except OSError as error:
    return Skip("unreadable", f"{path} ({error.strerror})")


def _file_record(root: str, name: str, path: str, captions: dict[str, list[str]] | Skip, label: str) -> dict | Skip:
  picture = read_inside(root, path)
  if isinstance(picture, Skip):
    return picture
  if isinstance(captions, Skip):
    return captions
  if not captions:
    return Skip("no caption")
  return dict(id=name, image=picture, captions=captions, label=label, image_key=picture_key(picture))


def _table(path: str) -> Iterator[tuple[int, dict | Skip]]:
  """(line number, row) of a .csv, .tsv or .jsonl file; a line that cannot be read is a Skip. Raises UserError."""
  try:
    tabular = path.endswith((".csv", ".tsv"))
    with open(path, encoding="utf-8-sig", errors="replace", newline="" if tabular else None) as file:
      if tabular:
        for row in (reader := csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")):
          yield reader.line_num, {key: value for key, value in row.items() if key}
        return
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
          yield number, row if isinstance(row, dict) else Skip("broken row", f"line {number} is no JSON object")
        except (ValueError, RecursionError) as error:
          yield number, Skip("broken row", f"line {number}: {error}")
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  except csv.Error as error:
    raise UserError(f"{path}: not a readable table ({error})") from error


def _table_rows(table: Iterable[tuple[int, dict | Skip]], path: str, columns: dict[str, str],
                language: str) -> tuple[list[Row], list[tuple[str, Skip]]]:
  """Rows [(id, (picture path, captions, label))] of a table. Lines without an id that name one picture become one row."""
  rows: list[Row] = []
  skipped: list[tuple[str, Skip]] = []
  by_picture: dict[str, dict[str, list[str]]] = {}
  chosen: dict[str, str] | None = None
  for number, row in table:
    where = f"{os.path.basename(path)}:{number}"
    if isinstance(row, Skip):
      skipped.append((where, row))
      continue
    if chosen is None or not {chosen["image"], chosen["caption"]} <= row.keys():  # the lines of a JSONL file may differ
      try:
        chosen = _choose_columns(row, columns, path)
      except UserError as error:
        if chosen is None:
          raise
        skipped.append((where, Skip("broken row", str(error))))
        continue
    file, caption, label, tongue, name = (
      row.get(chosen.get(what, "")) for what in ("image", "caption", "label", "language", "id"))
    if not isinstance(file, str) or not file:
      skipped.append((where, Skip("missing file", "names no picture")))
      continue
    captions = captions_of(caption, tongue or language)
    if name in (None, "") and file in by_picture:
      for key, texts in captions.items():
        by_picture[file].setdefault(key, []).extend(texts)
      continue
    if name in (None, ""):
      by_picture[file] = captions
    rows.append((str(file if name in (None, "") else name), (file, captions, "" if label is None else str(label))))
  return rows, skipped


def _choose_columns(there: Iterable[str], named: Mapping[str, str], path: str) -> dict[str, str]:
  """{what: column}, from `named` or by the usual names. Raises UserError: no column for pictures or captions."""
  there, chosen = list(there), {}
  for what, options in COLUMNS.items():
    if what in named:
      if named[what] not in there:
        raise UserError(f"{path} has no column {named[what]!r}; it has: {', '.join(there)}")
      chosen[what] = named[what]
    elif found := [option for option in options if option in there]:
      chosen[what] = found[0]
    elif what in ("image", "caption"):
      looks = "a picture" if what == "image" else "captions"
      raise UserError(f"{path} has no column that looks like {looks}; it has: {', '.join(there)}. Name it: {what}=COLUMN")
  return chosen


def _files(source: str, endings: tuple[str, ...]) -> list[str]:
  """The files of a folder with these endings, or those that a pattern names. Raises UserError."""
  if os.path.isdir(source):
    found = sorted(str(path) for path in Path(source).rglob("*") if path.suffix in endings and path.is_file())
    if not found:
      raise UserError(f"{source}: no {' or '.join(endings)} file in this folder")
    return found
  return expand(source)


def _stems(paths: list[str]) -> list[str]:
  """Short names of files, unique: the path below their common folder, without the ending."""
  folder = os.path.commonpath([os.path.dirname(path) for path in paths])
  return [os.path.splitext(os.path.relpath(path, folder))[0] for path in paths]
