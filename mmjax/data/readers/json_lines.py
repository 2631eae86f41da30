"""JSON: an object a line, one after the other, one array of objects, or a document: {"data":
[...]}, COCO's, VQA's, {"a.jpg": "its caption"}, {"17": {"image": "a.jpg", ...}}.

Objects name files of media relative to the file that they are in. Conversations (LLaVA, OpenAI) are
objects too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.data.readers import coco, vqa
from mmjax.data.readers.cells import Skip, printable, text_of
from mmjax.data.readers.columns import (
  COLUMNS,
  MEDIA,
  Part,
  cells_of,
  choose_columns,
  is_text_alone,
  part_of,
)
from mmjax.data.readers.json_stream import Several, Twice, as_object, objects, values
from mmjax.data.readers.rows import Left, ListedReader
from mmjax.data.readers.table import lines, open_text

ENDINGS = (".jsonl", ".json", ".ndjson")
_HEAVY = ("segmentation", "keypoints")  # of COCO's objects: not read, and most of a file
Object = tuple[str, dict[str, Any] | Skip]  # where it stands, and what it is


class JsonReader(ListedReader):
  """Files of any of these forms; those of VQA are read together, since questions and answers lie in
  two.
  """

  endings = ENDINGS

  def parts(self) -> Iterator[Part | Left]:
    questions, answers = [], []
    for path in self.paths:
      document = read_json(path, self.options.encoding)
      if not isinstance(document, dict):
        yield from object_parts(document, path, self.folder_of(path), self.options)
      elif vqa.is_questions(document):
        questions.append((path, document))
      elif vqa.is_answers(document):
        answers.append((path, document))
      else:
        yield from object_parts(
          objects_of(document, path), path, self.folder_of(path), self.options
        )
    if questions or answers:
      yield from self._vqa_parts(questions, answers)

  def _vqa_parts(self, questions: list, answers: list) -> Iterator[Part | Left]:
    chosen = {role: (role,) for role in ("image", "image_id", "question", "answer")}
    find = vqa.pictures_by_id(self.root)
    for at, row in vqa.rows(questions, answers):
      if isinstance(row, Skip):
        yield at, row
        continue
      row["image"] = row.get("image") or find(row["image_id"])
      part = part_of(cells_of(row, chosen), at, "", self.options)
      yield part if isinstance(part, Part) else (at, part)


def read_json(path: str, encoding: str = "") -> dict[str, Any] | Iterator[Object]:
  """The document in a file (without what is not read), or its objects one by one where it is an
  array or lines. Raises UserError.
  """
  base = os.path.basename(path)
  if _is_lines(path, encoding):
    return _lines(path, encoding)
  with open_text(path, encoding) as file:
    first = next(values(file, path), None)
  if first is None or first[0] is None:
    return _items(path, encoding, base)
  try:
    return _document(path, encoding)
  except Several:
    return _one_after_the_other(path, encoding, base)


def _document(path: str, encoding: str) -> dict[str, Any]:
  """The object that is all of a file, else raises Several."""
  document: dict[str, Any] = {}
  last = None
  with open_text(path, encoding) as file:
    for name, value in values(file, path):
      key = name or ""
      grows = key == last and isinstance(document[key], list)
      if key in document and not grows:
        raise UserError(
          f"{path}: {printable(key)!r:.100} stands twice in one object, which would lose what the "
          "first says. Write an object a line"
        )
      if grows and isinstance(value, dict):
        value = {name: what for name, what in value.items() if name not in _HEAVY}
      if grows:
        document[key].append(value)
      else:
        document[key] = value
      last = key
  return document


def object_parts(
  objects: Iterator[Object], path: str, folder: str, options
) -> Iterator[Part | Left]:
  """The parts that objects are, which may differ in their keys. Raises UserError: the first says of
  no medium what it shows.
  """
  chosen: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
  targets = [
    options.columns[role] for role in ("value", "labels", "group") if role in options.columns
  ]
  may_lack = dict.fromkeys(name for names in targets for name in names.split("+"))
  for at, row in objects:
    if isinstance(row, Skip):
      yield at, row
      continue
    row = may_lack | row
    present = tuple(row)
    if present not in chosen:
      named = {
        role: name
        for role, name in options.columns.items()
        if not chosen or name in row or set(name.split("+")) <= set(row)
      }
      try:
        alone = all(map(is_text_alone, chosen.values()))  # as the first is
        chosen[present] = choose_columns(row, named, path, alone=alone)
      except UserError as error:
        if not chosen:
          raise
        yield at, Skip("broken row", printable(str(error)))
        continue
    part = part_of(cells_of(row, chosen[present]), at, folder, options)
    yield (
      part
      if isinstance(part, Part)
      else (text_of(row.get(chosen[present].get("id", ("",))[0])) or at, part)
    )


def _lines(path: str, encoding: str) -> Iterator[Object]:
  with open_text(path, encoding) as file:
    for number, line in lines(file, path):
      at = f"{os.path.basename(path)}:{number}"
      try:
        row = line if isinstance(line, Skip) else json.loads(line, object_pairs_hook=as_object)
      except (ValueError, RecursionError) as error:
        row = Skip("broken row", f"line {number}: {error}")
      yield at, row if isinstance(row, Skip) else _row(row, f"line {number}")


def _row(value: Any, where: str) -> dict[str, Any] | Skip:
  """A value as a row."""
  if isinstance(value, Twice):
    return Skip("broken row", f"{where} has a key twice")
  return value if isinstance(value, dict) else Skip("broken row", f"{where} is no JSON object")


def _items(path: str, encoding: str, base: str) -> Iterator[Object]:
  with open_text(path, encoding) as file:
    for number, (_, item) in enumerate(values(file, path)):
      yield f"{base}[{number}]", _row(item, "it")


def _one_after_the_other(path: str, encoding: str, base: str) -> Iterator[Object]:
  with open_text(path, encoding) as file:
    for number, item in enumerate(objects(file, path)):
      yield f"{base}[{number}]", _row(item, "it")


def _is_lines(path: str, encoding: str) -> bool:
  """Whether a file holds an object a line. A document of one line is a line too, unless it is
  called .json.
  """
  if not path.lower().endswith(".json"):
    return True
  with open_text(path, encoding) as file:
    found = lines(file, path)
    _, first = next(found, (0, ""))
    if isinstance(first, Skip) or next(found, None) is None:
      return False
  try:
    return isinstance(json.loads(first), dict)
  except (ValueError, RecursionError):
    return False


def objects_of(document: Mapping[str, Any], path: str) -> Iterator[Object]:
  """The objects of a document that is not of VQA. Raises UserError."""
  base = os.path.basename(path)
  if coco.is_coco(document):
    return coco.rows(document, base)
  if document and all(modality_of(key) for key in document):
    return (
      (
        f"{base}[{printable(key)}]",
        {"file_name": key, **(value if isinstance(value, dict) else {"caption": value})},
      )
      for key, value in document.items()
    )
  lists = [
    key
    for key, value in document.items()
    if isinstance(value, list) and value and isinstance(value[0], dict)
  ]
  names = {
    "conversations",
    "messages",
    "chosen",
    "completion",
    *(name for role in MEDIA for name in COLUMNS[role] if isinstance(document.get(name), str)),
  }
  if document and not names & set(document) and all(isinstance(v, dict) for v in document.values()):
    rows = ((key, _row(value, "it")) for key, value in document.items())
    return (
      (f"{base}[{printable(key)}]", row if isinstance(row, Skip) else {"id": key, **row})
      for key, row in rows
    )
  if not lists or names & set(document):
    return iter([(f"{base}[0]", dict(document))])
  if len(lists) > 1:
    raise UserError(
      f"{path}: which of {', '.join(lists)} are the rows? Keep one, or write an object a line"
    )
  return ((f"{base}[{number}]", _row(item, "it")) for number, item in enumerate(document[lists[0]]))
