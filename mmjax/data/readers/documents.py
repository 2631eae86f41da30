"""Documents, texts without media, for language models: a file each (.txt, .md), or a line each of
JSON lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from mmjax.config import UserError
from mmjax.data.media import bytes_key
from mmjax.data.readers.cells import Annotation, Skip, broken_text, encoding_of
from mmjax.data.readers.json_lines import read_json
from mmjax.data.readers.rows import Left, Options, Record, Row, find_files, read_inside

FILES = (".txt", ".md")
LINES = (".jsonl", ".json", ".jsonl.gz")
KEYS = ("text", "content", "document")


class DocumentReader:
  """Whole texts as the one caption of a record each, which a source with text="document" reads."""

  def __init__(self, source: str, options: Options):
    self.options = options
    self.notes: list[str] = []
    self.paths = [os.path.abspath(path) for path in find_files(source, (*FILES, *LINES))]
    folder = source if os.path.isdir(source) else os.path.dirname(self.paths[0])
    self.root = os.path.abspath(folder)
    if named := [role for role in options.columns if role not in ("caption", "id")]:
      raise UserError(
        f"columns names {named[0]!r}, but documents have `caption` (the text) and `id` alone"
      )

  def rows(self) -> tuple[list[Row], list[Left]]:
    rows: list[Row] = []
    left: list[Left] = []
    known: set[str] = set()
    for path in self.paths:
      for name, where in self._of_file(path):
        if isinstance(where, Skip):
          left.append((name, where))
        elif name in known:
          left.append((name, Skip("duplicate id")))
        else:
          known.add(name)
          rows.append(Row(name, where))
    return rows, left

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, Record | Skip, int]]:
    for row in rows:
      text = self._file(row.where) if isinstance(row.where, tuple) else row.where
      if isinstance(text, str) and (bad := broken_text(text)):
        text = Skip("broken text", bad)
      if isinstance(text, str) and not text.strip():
        text = Skip("no text")
      if isinstance(text, Skip):
        yield row.name, text, row.count
      else:
        text = text.strip()
        record = Annotation({self.options.language: [text]}).record(row.name, {})
        yield row.name, record | dict(image_key=bytes_key(text.encode())), row.count

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths

  def fields(self, rows: Iterable[Row]) -> set[str]:
    return set()

  def _of_file(self, path: str) -> Iterator[tuple[str, Any]]:
    """(id, (file,) or the text or why there is none) of each document in a file."""
    below = os.path.relpath(path, self.root)
    if path.lower().endswith(FILES):
      yield below, (below,)
      return
    objects = read_json(path, self.options.encoding)
    if isinstance(objects, dict):
      raise UserError(
        f"{path} is one JSON object; documents are objects, one a line or in an array"
      )
    wanted = self.options.columns.get("caption")
    for at, row in objects:
      if isinstance(row, Skip):
        yield at, row
        continue
      key = wanted or next((key for key in KEYS if key in row), "")
      name = str(row.get(self.options.columns.get("id", "id"), at))
      if key not in row:
        have = ", ".join(map(str, row)) or "nothing"
        yield name, Skip("no text", f"it has {have}; --columns caption=NAME names the text")
      elif not isinstance(row[key], str):
        yield name, Skip("no text", f"{key} is no text")
      else:
        yield name, row[key]

  def _file(self, where: tuple[str]) -> str | Skip:
    data = read_inside(self.root, where[0])
    if isinstance(data, Skip):
      return data
    encoding = encoding_of(data, self.options.encoding)
    try:
      return data.decode(encoding)
    except UnicodeError:
      return Skip("broken text", f"{where[0]} is not {encoding}; --encoding names another")
