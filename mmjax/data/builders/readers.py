"""What `mmjax data convert` reads: folders with captions, JSONL + files, WebDataset tars, parquet.

A reader lists its rows once, in an order that depends on the source alone, and reads any run of them, in any process:

  rows() -> (rows, skipped)     rows: [(id, where)], ids unique; skipped: what is left out without looking at a picture
  read(rows) -> iterator        of (id, record) or (id, Skip), one for each row
  files(rows) -> iterator       of the paths that the result depends on (a conversion goes on only while none changes)
  fields(rows) -> set           of the optional fields (schema.FIELDS) that records may have

A record has a picture, a sound, a video or several of them, and captions, questions or a label. A media file must lie inside the
folder of the source, links resolved; its ending tells what it is, and where that says nothing, its column. Nothing is decoded here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax.config import UserError
from mmjax.data.builders.tables import COLUMNS, MEDIA, Row, Skip, Where, choose_columns, read_table, table_rows
from mmjax.data.media import media_key, modality_of
from mmjax.data.tars import TarIndex, captions_of, expand, index_tar, index_tars, questions_of

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.jsonl", "metadata.csv", "metadata.tsv")


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
  """Media with a table (captions.csv, metadata.jsonl, ...: file_name, caption, ...), or with a NAME.txt each.

  A NAME.txt holds a caption a line; NAME.de.txt holds captions in German. NAME.png, NAME.wav and NAME.mp4 are one record. A table
  may name a file in several rows.
  """

  def __init__(self, source: str, columns: dict[str, str], language: str):
    if not os.path.isdir(source):
      raise UserError(f"{source}: no such folder" + (" (it is a file)" if os.path.exists(source) else ""))
    self.root, self.columns, self.language = os.path.abspath(source), columns, language
    tables = (os.path.join(self.root, name) for name in TABLES)
    self.tables = [path for path in tables if os.path.isfile(path)][:1]

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    records = self._walk()
    if not self.tables:
      return [(next(iter(media.values())), Where(media, None)) for media in records], []
    rows, skipped = table_rows(read_table(self.tables[0]), self.tables[0], self.columns, self.language)
    named = {os.path.normpath(path) for _, where in rows for path in where.media.values()}
    table = os.path.basename(self.tables[0])
    files = sorted(path for media in records for path in media.values())
    return rows, skipped + [(path, Skip("no caption", f"not in {table}")) for path in files if path not in named]

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, dict | Skip]]:
    for name, where in rows:
      if where.captions is None:
        captions = self._sidecars(next(iter(where.media.values())))
        if isinstance(captions, Skip):
          yield name, captions
          continue
        where = where._replace(captions=captions)
      yield name, _file_record(self.root, name, where)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.tables
    for _, where in rows:
      yield from (os.path.join(self.root, path) for path in where.media.values())
      if where.captions is None:
        yield from (os.path.join(self.root, text) for text, _ in self._texts(next(iter(where.media.values()))))

  def fields(self, rows: Iterable[Row]) -> set[str]:
    return _fields(rows)

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != "_listings"}  # workers list what they need

  def _walk(self) -> list[dict[str, str]]:
    """{modality: file} of each record, in the order of their names: files that differ in their endings alone are one record."""
    records = []
    for folder, folders, files in os.walk(self.root):
      folders.sort()
      stems: dict[str, dict[str, list[str]]] = {}
      for file in sorted(files):
        modality = modality_of(file)
        if modality and not file.startswith("."):
          path = os.path.relpath(os.path.join(folder, file), self.root)
          stems.setdefault(os.path.splitext(file)[0], {}).setdefault(modality, []).append(path)
      for there in stems.values():
        for number in range(max(map(len, there.values()))):
          records.append({name: there[name][number] for name in MEDIA if number < len(there.get(name, ()))})
    return records

  def _texts(self, path: str) -> list[tuple[str, str]]:
    """[(sidecar file, language)] of a media file."""
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
  """JSON lines with paths of media (relative to the file), captions or questions or a label, and optionally id, language."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths = _files(source, (".jsonl", ".json", ".ndjson"))
    self.columns, self.language = columns, language
    self.root = os.path.dirname(os.path.abspath(self.paths[0]))

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    rows, skipped = [], []
    for path in self.paths:
      more, left = table_rows(read_table(path), path, self.columns, self.language)
      folder = os.path.relpath(os.path.dirname(os.path.abspath(path)), self.root)
      for name, where in more:
        if folder != ".":
          where = where._replace(media={modality: os.path.join(folder, file) for modality, file in where.media.items()})
        rows.append((name, where))
      skipped += left
    return rows, skipped

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, dict | Skip]]:
    for name, where in rows:
      yield name, _file_record(self.root, name, where)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths
    for _, where in rows:
      yield from (os.path.join(self.root, path) for path in where.media.values())

  def fields(self, rows: Iterable[Row]) -> set[str]:
    return _fields(rows)


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

  def fields(self, rows: Iterable[Row]) -> set[str]:
    indices = [index for index in index_tars(self.paths, self.cache) if isinstance(index, TarIndex)]
    found = {part for part in MEDIA if any(index.has(part) for index in indices)}
    return found | ({"questions"} if any(index.has("json") for index in indices) else set())


class ParquetReader:
  """Parquet as Hugging Face writes it: columns of media (bytes, {bytes, path} or paths), captions, questions and labels."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths, self.language = [os.path.abspath(path) for path in _files(source, (".parquet",))], language
    self.root = os.path.dirname(self.paths[0])
    self.label_names: list[str] = []
    schema = self._open(self.paths[0]).schema_arrow
    self.columns = choose_columns(schema.names, columns, self.paths[0])
    self.path_columns = [what for what in MEDIA if what in self.columns and str(schema.field(self.columns[what]).type) in ("string", "large_string")]
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
    cell = lambda what: row.get(self.columns.get(what, ""))
    media, files = {}, {}
    for modality in MEDIA:
      content = cell(modality)
      if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
      if isinstance(content, bytes) and content:
        media[modality] = content
      elif isinstance(content, str) and content:
        files[modality_of(content) or modality if modality in self.path_columns else modality] = content
    label = cell("label")
    if isinstance(label, int) and 0 <= label < len(self.label_names):
      label = self.label_names[label]
    where = Where(files, captions_of(cell("caption"), cell("language") or self.language), "" if label is None else str(label),
                  tuple(questions_of(cell("question"), cell("answer"))), "caption" in self.columns)
    return _file_record(self.root, name, where, media)

  def fields(self, rows: Iterable[Row]) -> set[str]:
    found = {"questions"} if "question" in self.columns else set()
    for modality in MEDIA:
      if modality in self.columns:
        found |= {modality_of(path) or modality for path in self._paths(modality)} if modality in self.path_columns else {modality}
    return found

  def _paths(self, modality: str) -> Iterator[str]:
    for path in self.paths:
      for batch in self._open(path).iter_batches(columns=[self.columns[modality]]):
        yield from filter(None, batch.column(0).to_pylist())

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


def _file_record(root: str, name: str, where: Where, media: Mapping[str, bytes] | None = None) -> dict | Skip:
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


def _fields(rows: Iterable[Row]) -> set[str]:
  found: set[str] = set()
  for _, where in rows:
    found.update(where.media)
    if where.questions:
      found.add("questions")
  return found


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
