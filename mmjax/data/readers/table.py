"""Tables that name media and say what they show: CSV, TSV and JSON lines, with columns by their usual names or by given ones."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping

from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.data.readers.rows import MEDIA, Row, Skip, Where
from mmjax.data.tars import captions_of, questions_of
from mmjax.files import open_file

COLUMNS = {  # what a column may be called, most likely first
  "image": ("image", "file_name", "filename", "image_path", "file", "path", "img", "picture", "jpg", "png",
            "image_bytes", "bytes"),
  "audio": ("audio", "sound", "audio_path", "wav", "flac", "mp3", "speech"),
  "video": ("video", "clip", "video_path", "mp4", "webm"),
  "caption": ("captions", "caption", "text", "texts", "txt", "title", "description", "alt", "transcription", "transcript", "sentence"),
  "question": ("questions", "question"),
  "answer": ("answers", "answer"),
  "id": ("id", "key", "image_id", "uid", "__key__"),
  "label": ("label", "class", "category"),
  "language": ("language", "lang"),
}
TEXTS = ("caption", "question", "label")  # at least one of these is needed


def read_table(path: str) -> Iterator[tuple[int, dict | Skip]]:
  """(line number, row) of a .csv, .tsv or .jsonl file; a line that cannot be read is a Skip. Raises UserError."""
  try:
    tabular = path.endswith((".csv", ".tsv"))
    newline = "" if tabular else None
    with io.TextIOWrapper(open_file(path), "utf-8-sig", errors="replace", newline=newline) as file:
      if tabular:
        for row in (reader := csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")):
          yield reader.line_num, {key: value for key, value in row.items() if key}
        return
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
          yield number, row if isinstance(row, dict) else Skip("broken row", f"line {number} is no JSON object")
        except (ValueError, RecursionError) as error:
          yield number, Skip("broken row", f"line {number}: {error}")
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  except csv.Error as error:
    raise UserError(f"{path}: not a readable table ({error})") from error


def table_rows(table: Iterable[tuple[int, dict | Skip]], path: str, columns: dict[str, str],
                language: str) -> tuple[list[Row], list[tuple[str, Skip]]]:
  """Rows [(id, Where)] of a table. Lines without an id that name the same files become one row."""
  rows: list[Row] = []
  skipped: list[tuple[str, Skip]] = []
  by_files: dict[tuple, int] = {}
  chosen: dict[tuple[str, ...], dict[str, str]] = {}  # the lines of a JSONL file may differ
  captioned = False
  for number, row in table:
    at = f"{os.path.basename(path)}:{number}"
    if isinstance(row, Skip):
      skipped.append((at, row))
      continue
    there = tuple(row)
    if there not in chosen:
      try:
        chosen[there] = choose_columns(row, columns if not chosen else {k: v for k, v in columns.items() if v in row}, path)
      except UserError as error:
        if not chosen:
          raise
        skipped.append((at, Skip("broken row", str(error))))
        continue
    cell = lambda what, row=row, names=chosen[there]: row.get(names.get(what, ""))
    named = {modality: cell(modality) for modality in MEDIA if cell(modality) not in (None, "")}
    if not named or not all(isinstance(file, str) for file in named.values()):
      skipped.append((at, Skip("missing file", "names no picture, sound or video")))
      continue
    media = {modality_of(file) or modality: file for modality, file in named.items()}
    captions, questions = captions_of(cell("caption"), cell("language") or language), questions_of(cell("question"), cell("answer"))
    captioned |= "caption" in chosen[there]
    name, label, key = cell("id"), cell("label"), tuple(media.items())
    if name in (None, "") and key in by_files:
      place, before = rows[by_files[key]]
      for tongue, texts in captions.items():
        before.captions.setdefault(tongue, []).extend(texts)
      rows[by_files[key]] = place, before._replace(questions=(*before.questions, *questions))
      continue
    if name in (None, ""):
      by_files[key] = len(rows)
      name = next(iter(media.values()))
    rows.append((str(name), Where(media, captions, "" if label is None else str(label), tuple(questions))))
  return [(name, where._replace(captioned=captioned)) for name, where in rows], skipped


def choose_columns(there: Iterable[str], named: Mapping[str, str], path: str) -> dict[str, str]:
  """{what: column}, from `named` or by the usual names. Raises UserError: no column for media or for what is said of them."""
  there, chosen = list(there), {}
  for what, options in COLUMNS.items():
    if what in named:
      if named[what] not in there:
        raise UserError(f"{path} has no column {named[what]!r}; it has: {', '.join(there)}")
      chosen[what] = named[what]
    elif found := [option for option in options if option in there and option not in named.values()]:
      chosen[what] = found[0]
  for looks, needed, example in (("a picture, sound or video", MEDIA, "image"), ("captions, questions or a label", TEXTS, "caption")):
    if not any(what in chosen for what in needed):
      raise UserError(f"{path} has no column that looks like {looks}; it has: {', '.join(there)}. Name it: {example}=COLUMN")
  return chosen
