"""`easy_vqa`: 5,000 pictures of one coloured shape with 48,248 questions, from the package
`easy-vqa`, without a download.

One record a picture, with all its questions. `test` is the package's own; `validation` are 400 of
its training pictures, those whose number has the smallest hash.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.openmoji import key_of

VERSION = "1.0.0"
VALIDATION = 400
SIZES = {"train": 3600, "validation": VALIDATION, "test": 1000}
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

CARD = """\
# easy_vqa

Visual question answering on simple shapes: 5,000 pictures of 64x64 pixels, each with about ten
questions; 13 answers.

Made by `mmjax data build easy_vqa` from the Python package `easy-vqa` 1.0 by Victor Zhou
(https://github.com/vzhou842/easy-VQA).

- Licence: MIT, Copyright (c) 2019 Victor Zhou.
- Fields: `id`, `image` (PNG), `questions` (question, answer), `captions` (English: "a blue
  rectangle", put together from the questions and answers, of nine records in ten; the others have
  none), `label` (empty), `image_key` (hash of the pixels), `facts` (`colour`, `shape`; "" where the
  questions leave it open).
- Splits: train {train:,}, validation {validation:,} (cut from the package's training pictures by a
  hash of their number), test {test:,} (the package's own).
- Limits: one shape a picture, questions from templates; about two thirds of the answers can be
  guessed from the question alone, so compare with a model that sees nothing else.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/easy_vqa/VERSION in a few seconds, or finds it there. Raises UserError: the
  package is missing or another.
  """
  if (built := find_version(data_dir, "easy_vqa")) and built.name == VERSION:
    return built
  splits = find_splits()
  sizes = {split: len(numbers) for split, numbers in splits.items()}
  if sizes != SIZES:
    raise UserError(
      f"easy_vqa: the installed package has {sizes} pictures, not {SIZES}. Install easy-vqa==1.0"
    )
  return write_dataset(
    "easy_vqa",
    data_dir,
    {split: records(split, numbers) for split, numbers in splits.items()},
    fields=("image", "questions", "facts"),
    version=VERSION,
    card=CARD.format(**sizes),
    licence="MIT",
    homepage="https://github.com/vzhou842/easy-VQA",
  )


def find_splits() -> dict[str, list[int]]:
  """{split: numbers of its pictures, sorted}. Raises UserError: the package is missing."""
  try:
    import easy_vqa
  except ImportError as error:
    raise UserError(
      f"easy_vqa: {error}. Install the package it is made of: pip install 'mmjax[demo]'"
    ) from error
  train = sorted(
    easy_vqa.get_train_image_paths(),
    key=lambda n: hashlib.sha256(f"easy_vqa:{n}".encode()).hexdigest(),
  )
  return {
    "train": sorted(train[VALIDATION:]),
    "validation": sorted(train[:VALIDATION]),
    "test": sorted(easy_vqa.get_test_image_paths()),
  }


def records(split: str, numbers: list[int]) -> Iterator[Record]:
  """The records of the pictures with these numbers; `split` says which half of the package they are
  in.
  """
  import easy_vqa
  from PIL import Image

  half = "test" if split == "test" else "train"
  paths = getattr(easy_vqa, f"get_{half}_image_paths")()
  questions: dict[int, list[tuple[str, str]]] = {}
  for question, answer, number in zip(*getattr(easy_vqa, f"get_{half}_questions")(), strict=True):
    questions.setdefault(number, []).append((question, answer))
  for number in numbers:
    data = Path(paths[number]).read_bytes()
    facts = {
      "colour": find_attribute(questions[number], COLOURS),
      "shape": find_attribute(questions[number], SHAPES),
    }
    captions = {"en": [f"a {facts['colour']} {facts['shape']}"]} if all(facts.values()) else {}
    yield {
      "id": f"{half}-{number:04d}",
      "image": data,
      "captions": captions,
      "label": "",
      "questions": questions[number],
      "facts": facts,
      "image_key": key_of(Image.open(io.BytesIO(data)).convert("RGB").tobytes()),
    }


def find_attribute(questions: list[tuple[str, str]], options: tuple[str, ...]) -> str:
  """The one of `options` that the questions and answers about a picture say it has, or "" where
  they leave it open.
  """
  true: set[str] = set()
  false: set[str] = set()
  for question, answer in questions:
    words = question.rstrip("?").split()
    said = {option for option in options if option in words}
    if answer in ("yes", "no"):
      (true if (answer == "yes") != bool({"no", "not"} & set(words)) else false).update(said)
    else:
      # "what color is the circle?" says that there is a circle.
      true |= said | {answer} & set(options)
  left = true or set(options) - false
  return left.pop() if len(left) == 1 else ""
