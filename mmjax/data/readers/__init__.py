"""What `mmjax data convert` reads, one file a form of annotation.

A reader lists its rows once, in an order that depends on the source alone, and reads any run of
them, in any process:

  rows() -> (rows, left out)  `rows.Row` of each, and (name, Skip) of what is left out
  read(rows) -> iterator      of (id, record or Skip, how many rows of the source that is), in order
  files(rows) -> iterator     of the paths that the result depends on; a conversion goes on only
                              while none changes
  fields(rows) -> set         of the optional fields (schema.FIELDS) that records may have
  notes                       what a user should know of how the source was understood

Every row of the source is read or left out with a reason: the counts of both add up to all of them.
Rows about one medium are one record (`rows.join`), so that none of its captions and questions is
lost. A record has a picture, a sound, a video, a series or several of them, and captions,
questions, labels or values. A media file must lie inside the folder of the source, links resolved;
its ending tells what it is, and where that says nothing, its column. Nothing is decoded here.

A new form is a file here and a line in FORMATS; most only turn their files into rows of a table
(`columns.part_of`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence

from mmjax import files
from mmjax.config import UserError

# the modules are imported when they are needed: tars.py, which one of them imports, uses `cells`
FORMATS = {
  "folder": "folder:FolderReader",
  "csv": "table:TableReader",
  "json": "json_lines:JsonReader",
  "jsonl": "json_lines:JsonReader",
  "coco": "json_lines:JsonReader",
  "vqa": "json_lines:JsonReader",
  "conversations": "json_lines:JsonReader",
  "documents": "documents:DocumentReader",
  "webdataset": "webdataset:TarReader",
  "parquet": "parquet:ParquetReader",
}


def open_reader(
  format: str,
  source: str | os.PathLike,
  columns: Mapping[str, str] | None = None,
  language: str = "en",
  *,
  media: str | os.PathLike = "",
  encoding: str = "",
  cache: str | os.PathLike | None = None,
  separator: str = ",",
  classes: Sequence[str] = (),
  root: str | os.PathLike = "",
):
  """The reader of a format; see rows.Options. Raises UserError."""
  if format not in FORMATS:
    raise UserError(f"no format {format!r}; there are: {', '.join(FORMATS)}")
  module, _, name = FORMATS[format].partition(":")
  from mmjax.data.readers.columns import COLUMNS
  from mmjax.data.readers.rows import Options

  for what in columns or ():
    if what not in COLUMNS:
      raise UserError(f"columns names {what!r}, but only {', '.join(COLUMNS)} can be named")
  if media and not os.path.isdir(media):
    raise UserError(f"{files.no_folder(media)}, in which media could be")
  try:
    "a".encode(encoding or "utf-8")
  except (LookupError, ValueError) as error:  # unknown, of bytes (base64), or never usable
    raise UserError(
      f"no encoding {encoding!r}: write one that Python knows, such as utf-8, utf-16, cp1252, "
      "shift_jis"
    ) from error
  if root and not os.path.isdir(root):
    raise UserError(f"{files.no_folder(root)}; --root holds all files that are named")
  if root and format in ("folder", "webdataset", "documents"):
    raise UserError(f"--root is of tables and JSON: a {format} names no files elsewhere")
  options = Options(
    dict(columns or {}),
    language,
    os.fspath(media),
    encoding,
    cache,
    separator,
    tuple(classes),
    os.path.abspath(root) if root else "",
  )
  return getattr(importlib.import_module(f"{__name__}.{module}"), name)(os.fspath(source), options)
