"""WebDataset tars (see mmjax/data/tars.py): a key is a row; a member that belongs to no key is left
out on its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from mmjax.config import UserError
from mmjax.data.media import ENDINGS
from mmjax.data.readers.cells import Skip
from mmjax.data.readers.columns import MEDIA
from mmjax.data.readers.rows import Left, Options, Record, Row, stems
from mmjax.data.tars import BadSample, TarIndex, expand, index_tar, index_tars


class TarReader:
  def __init__(self, source: str, options: Options):
    self.paths = [os.path.abspath(path) for path in expand(source)]
    self.options = options
    self.notes: list[str] = []
    if media := [role for role in options.columns if role in MEDIA]:
      raise UserError(
        f"columns names {media[0]!r}, but the media of tars are their files; keys of their JSON "
        "may be named"
      )

  def rows(self) -> tuple[list[Row], list[Left]]:
    rows: list[Row] = []
    skipped: list[Left] = []
    indices = index_tars(self.paths, self.options.cache)
    for path, stem, index in zip(self.paths, stems(self.paths), indices, strict=True):
      if isinstance(index, UserError):
        skipped.append((stem, Skip("tar without pairs", str(index))))
        continue
      rows += [
        Row(f"{stem}/{key}", (path, number)) for number, key in enumerate(index.keys.tolist())
      ]
      skipped += [(f"{stem}/{name}", Skip(reason)) for name, reason in index.skipped]
    return rows, skipped

  def read(self, rows: Iterable[Row]) -> Iterator[tuple[str, Record | Skip, int]]:
    index: TarIndex | None = None
    for row in rows:
      path, number = row.where
      try:
        if index is None or index.path != path:
          index = index_tar(path, self.options.cache)
        record = index.read(
          number, self.options.language, self.options.columns, self.options.separator
        ) | {"id": row.name}
        yield row.name, record, row.count
      except BadSample as error:
        yield row.name, error.skip, row.count
      except UserError as error:
        yield row.name, Skip("broken row", str(error)), row.count

  def files(self, rows: Iterable[Row]) -> Iterator[str]:
    yield from self.paths

  def fields(self, rows: Iterable[Row]) -> set[str]:
    indices = [
      index for index in index_tars(self.paths, self.options.cache) if isinstance(index, TarIndex)
    ]
    found = {part for part in ENDINGS if any(index.has(part) for index in indices)}
    found |= {"value"} & set(self.options.columns)
    return found | (
      {"questions", "facts", "conversations", "preferences"}
      if any(index.has("json") for index in indices)
      else set()
    )
