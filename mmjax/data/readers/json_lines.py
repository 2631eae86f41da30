"""JSON lines that name files of media."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from mmjax.data.readers.rows import Row, Skip, fields_of, file_record, find_files
from mmjax.data.readers.table import read_table, table_rows


class JsonlReader:
  """JSON lines with paths of media (relative to the file), captions or questions or a label, and optionally id, language."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths = find_files(source, (".jsonl", ".json", ".ndjson"))
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
      yield name, file_record(self.root, name, where)

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths
    for _, where in rows:
      yield from (os.path.join(self.root, path) for path in where.media.values())

  def fields(self, rows: Iterable[Row]) -> set[str]:
    return fields_of(rows)
