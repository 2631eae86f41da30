"""The easy_vqa builder: its splits, against the package; every question once; what a record
holds.
"""

import io
import sys

import easy_vqa as package
import numpy as np
import pytest
from PIL import Image

from mmjax.config import UserError
from mmjax.data.builders import build, easy_vqa


@pytest.fixture(scope="module")
def splits():
  return easy_vqa.find_splits()


def test_the_splits_are_those_of_the_package(splits):
  assert {split: len(numbers) for split, numbers in splits.items()} == {
    "train": 3600,
    "validation": 400,
    "test": 1000,
  }
  assert not set(splits["train"]) & set(splits["validation"])
  assert set(splits["train"]) | set(splits["validation"]) == set(package.get_train_image_paths())
  assert set(splits["test"]) == set(package.get_test_image_paths())


def test_every_question_of_the_package_is_asked_once(splits):
  for halves, (questions, answers, _) in (
    (("train", "validation"), package.get_train_questions()),
    (("test",), package.get_test_questions()),
  ):
    records = [record for split in halves for record in easy_vqa.records(split, splits[split])]
    assert sorted(pair for record in records for pair in record["questions"]) == sorted(
      zip(questions, answers, strict=True)
    )
    assert {answer for record in records for _, answer in record["questions"]} == set(
      package.get_answers()
    )
    assert len({record["id"] for record in records}) == len(records)


def test_records(splits):
  records = list(easy_vqa.records("train", splits["train"][:200]))
  for record in records:
    facts, pixels = (
      record["facts"],
      np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB")).astype(int),
    )
    assert pixels.shape == (64, 64, 3) and 0 <= record["image_key"] < 2**64
    for question, answer in record["questions"]:
      assert question != "what color is the shape?" or answer == facts["colour"]
      assert question != "what shape is in the image?" or answer == facts["shape"]
    # The shape is what differs from the paler background.
    if facts["colour"] in ("red", "green", "blue"):
      shape = pixels[np.abs(pixels - pixels[0, 0]).sum(-1) > 60].mean(0)
      assert ("red", "green", "blue")[int(shape.argmax())] == facts["colour"]
    assert record["captions"] == (
      {"en": [f"a {facts['colour']} {facts['shape']}"]} if all(facts.values()) else {}
    )
  assert 0.85 < np.mean([bool(record["captions"]) for record in records]) < 0.95


def test_what_questions_say_of_a_shape():
  def find(*pairs):
    return easy_vqa.find_attribute(list(pairs), easy_vqa.SHAPES)

  assert (
    find(("what shape is in the image?", "circle"))
    == find(("what color is the circle?", "red"))
    == "circle"
  )
  assert (
    find(("is there a circle?", "yes"))
    == find(("is no circle present?", "no"))
    == find(("is there not a circle?", "no"))
    == "circle"
  )
  assert find(("is there a circle?", "no"), ("is there not a triangle?", "yes")) == "rectangle"
  assert find(("is there a circle?", "no")) == find(("is there a red shape?", "yes")) == ""


def test_another_package_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(easy_vqa, "find_splits", lambda: {"train": [1], "validation": [], "test": []})
  with pytest.raises(UserError, match="easy-vqa==1.0"):
    build("easy_vqa", tmp_path)
  monkeypatch.undo()
  monkeypatch.setitem(sys.modules, "easy_vqa", None)
  with pytest.raises(UserError, match=r"mmjax\[demo\]"):
    build("easy_vqa", tmp_path)
  assert not list(tmp_path.iterdir())
