"""Parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.data.readers.rows import MEDIA, Row, Skip, Where, file_record, find_files, stems
from mmjax.data.readers.table import choose_columns
from mmjax.data.tars import captions_of, questions_of
from mmjax.files import open_file


class ParquetReader:
  """Parquet as Hugging Face writes it: columns of media (bytes, {bytes, path} or paths), captions, questions and labels."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths, self.language = [os.path.abspath(path) for path in find_files(source, (".parquet",))], language
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
    for path, stem in zip(self.paths, stems(self.paths), strict=True):
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
    return file_record(self.root, name, where, media)

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
      open_file(path).close()  # Arrow would wait for a pipe
      return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
      raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:120]})") from error
