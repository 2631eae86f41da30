"""Which column of a table, or key of a JSON object, holds what, and the part of a record that a row
is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mmjax.config import UserError
from mmjax.data.image import Unreadable
from mmjax.data.media import modality_in_column
from mmjax.data.readers.cells import (
  Annotation,
  Skip,
  about_media,
  annotate,
  broken_text,
  captions_of,
  text_of,
)
from mmjax.data.readers.conversations import media_in
from mmjax.data.readers.preferences import ROLES, given_in, is_judged
from mmjax.data.series import inline_series
from mmjax.files import is_url

COLUMNS = {  # what a column may be called, in small letters, most likely first
  "image": (
    "image",
    "images",
    "file_name",
    "filename",
    "image_path",
    "file",
    "path",
    "img",
    "picture",
    "pictures",
    "image_name",
    "image_filename",
    "image_file",
    "img_path",
    "jpg",
    "png",
    "image_bytes",
    "bytes",
  ),
  "audio": ("audio", "audios", "sound", "audio_path", "wav", "flac", "mp3", "speech"),
  "video": ("video", "videos", "clip", "video_path", "mp4", "webm"),
  "caption": (
    "captions",
    "caption",
    "text",
    "texts",
    "txt",
    "sentences",
    "title",
    "description",
    "alt",
    "transcription",
    "transcript",
    "sentence",
    "comment",
  ),
  "series": ("series", "sensor", "signal"),
  "question": ("questions", "question"),
  "answer": ("answers", "answer", "multiple_choice_answer"),
  "id": ("id", "key", "uid", "__key__"),
  "image_id": ("image_id", "img_id", "imageid"),
  "label": ("label", "labels", "class", "category"),
  "labels": (),  # several, of which there may be none; by name alone
  "value": (),  # numbers to predict; by name alone
  "group": (),  # of rows that stay in one split; by name alone
  "split": ("split",),
  "language": ("language", "lang"),
  "conversation": ("conversations", "messages", "conversation"),
  "prompt": ("prompt", "input"),
  "chosen": ("chosen", "preferred_output"),
  "rejected": ("rejected", "non_preferred_output"),
  "completion": ("completion",),
}
MEDIA = ("image", "audio", "video", "series")  # columns of these hold media
# at least one of these is needed
TEXTS = ("caption", "question", "label", "labels", "value", "conversation", "chosen", "completion")
TARGETS = ("label", "labels", "value")
# Names of columns of captions, of which a table may have several.
_ALSO = (r"captions?([ _/-]?\d+)?|alt_?text", r"(text|sentence|description)s?[ _/-]?\d+")


class Part(NamedTuple):
  """A row of the source: `key` is equal for all rows about one medium, which become one record,
  `name` the record's id.
  """

  at: str
  name: str
  key: tuple
  media: dict[str, str]
  said: Annotation | None  # None: in files beside the media


def choose_columns(
  present: Iterable[str], named: Mapping[str, str], path: str, *, alone: bool = False
) -> dict[str, tuple[str, ...]]:
  """{role: columns}, from `named` ("a+b" = both) or by the usual names. alone: texts with labels or
  values need no media. Raises UserError: no column for media or for what is said.
  """
  present = list(present)
  chosen: dict[str, tuple[str, ...]] = {}
  lower = {column.strip().lower(): column for column in reversed(present)}
  for role, options in COLUMNS.items():
    if role in named:
      wanted = (named[role],) if named[role] in present else tuple(named[role].split("+"))
      if missing := [column for column in wanted if column not in present]:
        raise UserError(f"{path} has no column {missing[0]!r}; it has: {', '.join(present)}")
      chosen[role] = wanted
    elif role == "caption" and (several := _captions(present, named.values())):
      chosen[role] = tuple(several)
    elif found := [
      lower[option] for option in options if option in lower and lower[option] not in named.values()
    ]:
      chosen[role] = (found[0],)
  if not is_judged(chosen):
    for role in ROLES:
      chosen.pop(role, None)
  elif "prompt" not in chosen and "conversation" not in chosen and "question" in chosen:
    chosen["prompt"] = chosen.pop("question")
  talks = bool({"conversation", "chosen", "completion"} & set(chosen))
  if talks and "caption" not in named and "conversation" not in named:
    chosen.pop("caption", None)  # a "text" beside a conversation is its template
  if "labels" in chosen:
    chosen.pop("label", None)
  without = talks or (alone and is_text_alone(chosen))
  for looks, needed, example in (
    ("a picture, sound, video or series", MEDIA, "--columns image=COLUMN"),
    (
      "captions, questions or a label",
      TEXTS,
      "--columns caption=COLUMN, or --value COLUMN for numbers to predict",
    ),
  ):
    if not any(role in chosen for role in needed) and not (needed == MEDIA and without):
      raise UserError(
        f"{path} has no column that looks like {looks}; it has: {', '.join(present)}. Name it: "
        f"{example}"
      )
  return chosen


def cells_of(row: Mapping[str, Any], chosen: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
  """{role: cell} of a row; several columns of captions give a list."""
  cells = {
    role: row.get(names[0]) if len(names) == 1 else [row.get(name) for name in names]
    for role, names in chosen.items()
  }
  if isinstance(talk := cells.get("conversation"), str):
    cells["conversation"] = _turns_in(talk)
  if "question" in cells and isinstance(row.get("multiple_choice_answer"), str):
    cells["chosen_answer"] = row["multiple_choice_answer"]  # VQAv2's, beside the ten
  if (given := given_in(cells)) is not None:
    cells["preference"] = given
  return cells


def _turns_in(cell: str) -> Any:
  """A conversation that is JSON in a cell, as tables have it; any other text as it is."""
  try:
    found = json.loads(cell)
  except (ValueError, RecursionError):
    return cell
  return found if isinstance(found, list) else cell


def is_text_alone(roles: Iterable[str]) -> bool:
  """Whether columns of these roles say something of a text, and of no medium."""
  found = set(roles)
  return "caption" in found and bool(found & set(TARGETS)) and not found & set(MEDIA)


def talks_in(cells: Mapping[str, Any]) -> Any:
  """What in the cells of a row is a conversation, with or without judged answers: of such a row
  several media may be named, or none.
  """
  return cells.get("conversation") or cells.get("preference")


def files_in(cells: Mapping[str, Any]) -> dict[str, list[str]]:
  """{modality: files} that parts of the conversations of a row name."""
  given = cells.get("preference")
  return {**media_in(cells.get("conversation")), **(given.files() if given else {})}


def part_of(cells: Mapping[str, Any], at: str, folder: str, options) -> Part | Skip:
  """The part of a record that a row of a table is; its files are named relative to `folder`, itself
  below the root.
  """
  media = media_of(cells)
  if isinstance(media, Skip):
    return media
  inline = any(file.startswith("data:") for file in media.values())
  media = {modality: _below(options.root, folder, file) for modality, file in media.items()}
  # then the id is that of the caption, question or talk
  about_medium = text_of(cells.get("image_id")) or talks_in(cells)
  name = text_of(cells.get("id")) if not about_medium or not media else ""
  name = name or (at if inline else "")
  if bad := broken_text([name, *media.values()]):
    return Skip("broken text", bad)
  said = annotate(cells, options.language, separator=options.separator)
  if isinstance(said, Skip):
    return said
  said = about_media(said, media)
  if isinstance(said, Skip):
    return said
  if not media:
    name = name or at
  key = (name, *sorted((modality, os.path.normpath(file)) for modality, file in media.items()))
  return Part(at, name or next(iter(media.values())), key, media, said)


def _below(root: str, folder: str, file: str) -> str:
  """A file of `folder` by its path below the root, in its shortest form where a root is named; URLs
  as they are.
  """
  file = file.removeprefix("file://")
  if file.startswith("data:") or is_url(file):
    return file
  if root and os.path.isabs(file):
    return os.path.relpath(file, root)
  return os.path.normpath(os.path.join(folder, file)) if root else os.path.join(folder, file)


def media_of(cells: Mapping[str, Any]) -> dict[str, str] | Skip:
  """{modality: file} that a row names, one of a kind: a record holds one picture, one sound and one
  video; a conversation's further ones are "image:1", "image:2". It may have none.
  """
  named = {
    **files_in(cells),
    **{role: cells[role] for role in MEDIA if cells.get(role) not in (None, "", [])},
  }
  media: dict[str, str] = {}
  for role, cell in named.items():
    if role == "series" and not isinstance(cell, str):
      try:
        cell = inline_series(cell)
      except Unreadable as error:
        return Skip("unreadable", str(error))
    cell = [cell] if not isinstance(cell, (list, tuple)) else cell
    named_files = [one.get("path") if isinstance(one, dict) else one for one in cell]
    files = [file for file in named_files if isinstance(file, str) and file]
    if len(files) < len(named_files):
      return Skip("missing file", f"its {role} is no file name")
    if len(files) > 1 and not talks_in(cells):
      return Skip(
        "several pictures" if role == "image" else "several media",
        f"{len(files)} in one row, of which a record holds one",
      )
    for file in files:
      modality = modality_in_column(file, role)
      number = sum(name.partition(":")[0] == modality for name in media)
      media[f"{modality}:{number}" if number else modality] = file
  if not media and talks_in(cells):
    return media
  if is_text_alone(cells):
    return media if captions_of(cells["caption"]) else Skip("no caption", "its text is empty")
  return media or Skip("missing file", "names no picture, sound, video or series")


def _captions(present: list[str], taken: Iterable[str]) -> list[str]:
  """The columns of captions where there may be several: caption_0 to caption_4, caption and
  alt_text.
  """
  for pattern in _ALSO:
    if found := [
      column
      for column in present
      if re.fullmatch(pattern, column.strip().lower()) and column not in taken
    ]:
      return found
  return []
