"""VQA's pair of files: {"questions": [{"question_id", "image_id", "question"}]} and {"annotations":
[{"question_id", "answers"}]}.

All questions about a picture become one record. Of the (ten) answers to a question the commonest is
its answer, which "multiple_choice_answer" names; all of them are kept in the record's facts.
Without a file of answers they are "".
Pictures are found by their number: 42 is COCO_val2014_000000000042.jpg or 42.jpg.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmjax.data.media import modality_of
from mmjax.data.readers.cells import Skip, text_of

Documents = list[tuple[str, Mapping[str, Any]]]  # (path, document)


def is_questions(document: Mapping[str, Any]) -> bool:
  entries = document.get("questions")
  return (
    isinstance(entries, list)
    and bool(entries)
    and isinstance(entries[0], dict)
    and "question_id" in entries[0]
  )


def is_answers(document: Mapping[str, Any]) -> bool:
  entries = document.get("annotations")
  return (
    isinstance(entries, list)
    and bool(entries)
    and isinstance(entries[0], dict)
    and "question_id" in entries[0]
    and "images" not in document
  )


def rows(questions: Documents, answers: Documents) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
  """(where it stands, {"image_id", "question", "answer", ...}) of each question, and of each answer
  without one.
  """
  given: dict[str, tuple[str, Mapping[str, Any]]] = {}
  for path, document in answers:
    for number, entry in enumerate(document["annotations"]):
      at = f"{os.path.basename(path)}: annotations[{number}]"
      if not isinstance(entry, dict):
        yield at, Skip("broken row", "no JSON object")
      elif given.setdefault(text_of(entry.get("question_id")), (at, entry))[0] != at:
        yield at, Skip("duplicate id", f"question_id {text_of(entry.get('question_id'))!r}")
  for path, document in questions:
    for number, entry in enumerate(document["questions"]):
      at = f"{os.path.basename(path)}: questions[{number}]"
      if not isinstance(entry, dict):
        yield at, Skip("broken row", "no JSON object")
        continue
      name = text_of(entry.get("question_id"))
      found = given.pop(name, None) if name else None
      answer = found[1] if found else None
      if answers and answer is None:
        yield (at, Skip("no answer", f"none has its question_id {name!r}"))
        continue
      answer = answer or entry
      yield (
        at,
        {
          "image": entry.get("image"),
          "image_id": entry.get("image_id", answer.get("image_id")),
          "question": entry.get("question"),
          "answer": answer.get("answers", answer.get("multiple_choice_answer")),
          **_choice(answer),
        },
      )
  yield from ((at, Skip("no question", "none has its question_id")) for at, _ in given.values())


def pictures_by_id(root: str) -> Callable[[Any], str]:
  """image_id -> the picture below `root` that is called so, or that ends in this number; "" where
  none or several are.
  """
  found: dict[str, set[str]] = {}
  for folder, folders, files in os.walk(root):
    folders.sort()
    for file in files:
      if modality_of(file) == "image":
        stem, path = os.path.splitext(file)[0], os.path.relpath(os.path.join(folder, file), root)
        number = re.search(r"\d+$", stem)
        for key in {stem, str(int(number[0])) if number and len(number[0]) < 100 else stem}:
          found.setdefault(key, set()).add(path)

  def find(image_id: Any) -> str:
    paths = found.get(text_of(image_id), set())
    return next(iter(paths)) if len(paths) == 1 else ""

  return find


def _choice(answer: Mapping[str, Any]) -> dict[str, Any]:
  name = "multiple_choice_answer"
  return {name: answer[name]} if name in answer else {}
