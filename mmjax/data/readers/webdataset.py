"""WebDataset tars."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from mmjax.config import UserError
from mmjax.data.readers.rows import MEDIA, Row, Skip, stems
from mmjax.data.tars import TarIndex, expand, index_tar, index_tars


class TarReader:
  """WebDataset tars (see tars.py)."""

  def __init__(self, source: str, columns: dict[str, str], language: str):
    self.paths, self.language = [os.path.abspath(path) for path in expand(source)], language

  def rows(self) -> tuple[list[Row], list[tuple[str, Skip]]]:
    rows: list[Row] = []
    skipped: list[tuple[str, Skip]] = []
    for path, stem, index in zip(self.paths, stems(self.paths), index_tars(self.paths, self.cache), strict=True):
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
