"""Parquet as Hugging Face writes it: columns of media (bytes, {bytes, path} or paths), captions,
questions and labels.

Rows of one `image_id` become one record, if their pictures are equal. Cells are read when a record
is, not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.media import media_key, modality_in_column
from mmjax.data.readers.cells import Annotation, Skip, about_media, annotate, broken_text, text_of
from mmjax.data.readers.columns import MEDIA, cells_of, choose_columns, files_in, talks_in
from mmjax.data.readers.conversations import media_in
from mmjax.data.readers.preferences import Given
from mmjax.data.readers.rows import (
  Left,
  Options,
  Record,
  Row,
  find_files,
  read_inside,
  series_of,
  stems,
)
from mmjax.files import open_file

Position = tuple[int, int, int]  # number of the file, of the row group, of the row in it


class ParquetReader:
  def __init__(self, source: str, options: Options):
    self.paths = [os.path.abspath(path) for path in find_files(source, (".parquet",))]
    self.options = options
    self.notes: list[str] = []
    beside = os.path.abspath(options.media or os.path.dirname(self.paths[0]))
    self.root = os.path.abspath(options.root) if options.root else beside
    self.folder = os.path.relpath(beside, self.root)
    schema = self._open(0).schema_arrow
    self.chosen = choose_columns(schema.names, options.columns, self.paths[0])
    self.columns = sorted(
      {name for names in self.chosen.values() for name in names}
      | ({"multiple_choice_answer"} & set(schema.names))
    )
    self.path_columns = [
      role
      for role in MEDIA
      if role in self.chosen
      and str(schema.field(self.chosen[role][0]).type) in ("string", "large_string")
    ]
    self.label_names = _class_names(schema.metadata, self.chosen.get("label", ("",))[0])

  def rows(self) -> tuple[list[Row], list[Left]]:
    keys = [role for role in ("id", "image_id", *self.path_columns) if role in self.chosen]
    found: dict[tuple, Row] = {}
    owner: dict[str, tuple] = {}
    skipped: list[Left] = []
    for number, stem in enumerate(stems(self.paths)):
      for at, (position, cells) in enumerate(self._cells(number, keys)):
        name = f"{stem}/{at:06d}"
        if cells is None:
          skipped.append((name, Skip("broken text", "its text is not UTF-8")))
          continue
        files = tuple(
          os.path.normpath(cells[role]) for role in self.path_columns if cells.get(role)
        )
        about, own = text_of(cells.get("image_id")), text_of(cells.get("id"))
        key = (
          files
          if files and (about or not own)
          else (about or own, *files)
          if about or own
          else (name,)
        )
        name = about if about and not files else name if about else own or name
        if owner.setdefault(name, key) != key or (own and not about and not files and key in found):
          skipped.append((name, Skip("duplicate id", f"row {at} of {self.paths[number]}")))
        elif key in found:
          found[key] = dataclasses.replace(
            found[key], where=(*found[key].where, position), count=found[key].count + 1
          )
        else:
          found[key] = Row(name, (position,))
    return list(found.values()), skipped

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, Record | Skip, int]]:
    """A record once all its rows are read; rows that add nothing to it are left out on their
    own.
    """
    rows = list(rows)
    owners = {position: number for number, row in enumerate(rows) for position in row.where}
    left = [row.count for row in rows]
    made: list[list[tuple[Annotation, dict[str, Any]]]] = [[] for _ in rows]
    faults: list[list[Skip]] = [[] for _ in rows]
    at = 0
    for position, cells in self._rows_at(sorted(owners)):
      number = owners[position]
      part = self._part(cells)
      if not isinstance(part, Skip) and made[number]:
        part = made[number][0][0].other_values(part[0]) or part
      if (
        not isinstance(part, Skip)
        and made[number]
        and media_key(part[1]) != media_key(made[number][0][1])
      ):
        part = Skip("duplicate id", "another picture has its image_id")
      if isinstance(part, Skip):
        faults[number].append(part)
      else:  # the media of the first alone are kept
        made[number].append(part if not made[number] else (part[0], made[number][0][1]))
      left[number] -= 1
      while at < len(rows) and not left[at]:
        yield from ((rows[at].name, fault, 1) for fault in faults[at])
        if made[at]:
          said = made[at][0][0]
          for other, _ in made[at][1:]:
            said = said.joined(other)
          yield rows[at].name, said.record(rows[at].name, made[at][0][1]), len(made[at])
        made[at] = []
        at += 1

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths

  def fields(self, rows: Iterable[Row]) -> set[str]:
    found = {"questions", "facts"} if {"question", "conversation"} & set(self.chosen) else set()
    found |= {"value"} & set(self.chosen)
    if "conversation" in self.chosen:
      found |= {"conversations", "media", *_media_of_parts(self._all_cells("conversation"))}
    if {"chosen", "completion"} & set(self.chosen):
      found |= {"preferences", "media"}
      for role in set(self.chosen) & {"prompt", "chosen", "completion"}:
        found |= {name for cell in self._all_cells(role) for name in Given(prompt=cell).files()}
    for role in MEDIA:
      if role in self.path_columns:
        cells = (
          cells for number in range(len(self.paths)) for _, cells in self._cells(number, [role])
        )
        found |= {modality_in_column(cell[role], role) for cell in cells if cell and cell[role]}
      elif role in self.chosen:
        found.add(role)
    return found

  def _part(self, row: dict[str, Any] | None) -> tuple[Annotation, dict[str, Any]] | Skip:
    """What a row says and the media that it says it of."""
    if row is None:
      return Skip("broken text", "its text is not UTF-8")
    cells = cells_of(row, self.chosen)
    media: dict[str, Any] = {}
    named = files_in(cells)
    for role in MEDIA:
      content = cells.get(role)
      if content is None and role in named:
        content = named[role]
      several = content if role != "series" and isinstance(content, list) else [content]
      if len(several) > 1 and not talks_in(cells):
        return Skip(
          "several pictures" if role == "image" else "several media",
          f"{len(several)} in one row, of which a record holds one",
        )
      for one in several:
        modality, data = self._medium(role, one)
        if isinstance(data, Skip):
          return data
        if isinstance(data, np.ndarray) or (isinstance(data, bytes) and data):
          number = sum(name.partition(":")[0] == modality for name in media)
          media[f"{modality}:{number}" if number else modality] = data
    if not media and not talks_in(cells):
      return Skip("missing file", "no picture, sound, video or series in this row")
    said = annotate(
      cells, self.options.language, self.label_names, separator=self.options.separator
    )
    said = said if isinstance(said, Skip) else about_media(said, media)
    return said if isinstance(said, Skip) else (said, media)

  def _medium(self, role: str, content: Any) -> tuple[str, Any]:
    """(modality, content) of what a cell has in the place of a medium; or why it cannot be read."""
    if isinstance(content, dict):
      content = content.get("bytes") or content.get("path")
    modality = role
    if isinstance(content, str) and content:
      modality = modality_in_column(content, role) if role in self.path_columns else role
      content = (
        Skip("broken text", bad)
        if (bad := broken_text(content))
        else read_inside(self.root, _beside(self.folder, content))
      )
    elif role == "series" and isinstance(content, (list, np.ndarray)):
      content = series_of(content)
    if isinstance(content, bytes) and modality == "series":
      content = series_of(content)
    return modality, content

  def _all_cells(self, role: str) -> Iterator[Any]:
    for number in range(len(self.paths)):
      for _, cells in self._cells(number, [role]):
        if cells and cells[role]:
          yield cells[role]

  def _cells(
    self, number: int, roles: list[str]
  ) -> Iterator[tuple[Position, dict[str, Any] | None]]:
    """The position and the cells in these roles (None: not UTF-8) of each row of a file. Raises
    UserError.
    """
    file = self._open(number)
    missing = sorted(set(self.columns) - set(file.schema_arrow.names))
    if missing:
      raise UserError(
        f"{self.paths[number]} has no column {missing[0]!r}, which {self.paths[0]} has. Convert "
        "one kind at a time"
      )
    columns = sorted({self.chosen[role][0] for role in roles})
    for group in range(file.num_row_groups):
      count = file.metadata.row_group(group).num_rows
      with self._damage(number):
        table = _rows(file.read_row_group(group, columns=columns)) if columns else [{}] * count
      for within, row in enumerate(table):
        yield (
          (number, group, within),
          row if row is None else {role: row[self.chosen[role][0]] for role in roles},
        )

  def _rows_at(self, positions: list[Position]) -> Iterator[tuple[Position, dict[str, Any] | None]]:
    """Rows, read in small batches: a row group of many gigabytes does not have to fit in memory."""
    at = 0
    while at < len(positions):
      number, group, _ = positions[at]
      start = 0
      for batch in self._batches(number, group):
        while (
          at < len(positions)
          and positions[at][:2] == (number, group)
          and positions[at][2] < start + batch.num_rows
        ):
          yield positions[at], _rows(batch.slice(positions[at][2] - start, 1))[0]
          at += 1
        start += batch.num_rows
        if at == len(positions) or positions[at][:2] != (number, group):
          break

  def _batches(self, number: int, group: int) -> Iterator[Any]:
    batches = self._open(number).iter_batches(64, row_groups=[group], columns=self.columns)
    while True:
      with self._damage(number):
        batch = next(batches, None)
      if batch is None:
        return
      yield batch

  def _open(self, number: int):
    try:
      import pyarrow.parquet as parquet
    except ImportError as error:
      raise UserError("reading parquet needs pyarrow: pip install pyarrow") from error
    with self._damage(number):
      open_file(self.paths[number]).close()  # Arrow would wait for a pipe
      return parquet.ParquetFile(self.paths[number])

  @contextlib.contextmanager
  def _damage(self, number: int) -> Iterator[None]:
    """Turns what Arrow says of a file that it cannot read into a UserError that names the file."""
    import pyarrow

    try:
      yield
    except (pyarrow.ArrowException, OSError) as error:
      raise UserError(
        f"{self.paths[number]}: not a readable parquet file ({' '.join(str(error).split())[:120]})"
      ) from error


def _beside(folder: str, file: str) -> str:
  return file if file.startswith("data:") else os.path.join(folder, file)


def _media_of_parts(talks: Iterable[Any]) -> set[str]:
  """The modalities of the files that the parts of conversations name."""
  return {modality for talk in talks for modality in media_in(talk)}


def _rows(table) -> list[dict[str, Any] | None]:
  """The rows of an Arrow table; None for one with text that is not UTF-8."""
  try:
    return table.to_pylist()
  except UnicodeDecodeError:
    if table.num_rows == 1:
      return [None]
    return [row for at in range(table.num_rows) for row in _rows(table.slice(at, 1))]


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str]:
  """The names of the classes that a column of numbers means, as Hugging Face stores them."""
  try:
    found = json.loads((metadata or {}).get(b"huggingface", b"{}"))
  except (ValueError, RecursionError):
    return []
  for name in ("info", "features", column):
    found = found.get(name) if isinstance(found, dict) else None
  if isinstance(found, dict):
    found = found.get("feature", found)
  names = found.get("names") if isinstance(found, dict) else None
  return names if isinstance(names, list) and all(isinstance(x, str) for x in names) else []
