"""Media in folders, with a table or with a text file each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.data.readers.rows import MEDIA, Row, Skip, Where, fields_of, file_record, read_inside
from mmjax.data.readers.table import read_table, table_rows
from mmjax.data.tars import captions_of

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.jsonl", "metadata.csv", "metadata.tsv")


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
      yield name, file_record(self.root, name, where)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.tables
    for _, where in rows:
      yield from (os.path.join(self.root, path) for path in where.media.values())
      if where.captions is None:
        yield from (os.path.join(self.root, text) for text, _ in self._texts(next(iter(where.media.values()))))

  def fields(self, rows: Iterable[Row]) -> set[str]:
    return fields_of(rows)

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
