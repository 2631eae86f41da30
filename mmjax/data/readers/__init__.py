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

import os
from collections.abc import Mapping

from mmjax.config import UserError
from mmjax.data.readers.folder import FolderReader
from mmjax.data.readers.json_lines import JsonlReader
from mmjax.data.readers.parquet import ParquetReader
from mmjax.data.readers.table import COLUMNS
from mmjax.data.readers.webdataset import TarReader

READERS = {"folder": FolderReader, "jsonl": JsonlReader, "webdataset": TarReader, "parquet": ParquetReader}


def open_reader(format: str, source: str | os.PathLike, columns: Mapping[str, str] | None = None, language: str = "en",
                cache: str | os.PathLike | None = None):
  """The reader of a format. `cache`: the folder for indices of tars. Raises UserError."""
  if format not in READERS:
    raise UserError(f"no format {format!r}; there are: {', '.join(READERS)}")
  for what in columns or ():
    if what not in COLUMNS:
      raise UserError(f"columns names {what!r}, but only {', '.join(COLUMNS)} can be named")
  reader = READERS[format](os.fspath(source), dict(columns or {}), language)
  reader.cache = cache
  return reader
