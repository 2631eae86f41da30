"""The emoji_scenes builder: captions and answers against the scene graph, wrong captions fail,
splits share no arrangement.
"""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.data.builders.emoji_scenes import (
  CATEGORY,
  FONT,
  SIZE,
  TEXTS,
  check_answer,
  check_caption,
  draw_sign,
  make_record,
  make_scene,
  split_of,
)
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.scene_language import COLOURS, OPPOSITE, PLACES, RELATIONS, captions

NUMBERS = st.tuples(st.sampled_from(["train", "test", "test_many"]), st.integers(0, 10_000))


def scene(*objects, background="blue"):
  """Objects as (name, row, column, size or "", text)."""
  rows = [dict(name=n, row=r, column=c, size=s, text=t) for n, r, c, s, t in objects]
  found = [
    [i, word, j]
    for i, a in enumerate(rows)
    for j, b in enumerate(rows)
    for word, true in (
      ("left", a["column"] < b["column"]),
      ("right", a["column"] > b["column"]),
      ("above", a["row"] < b["row"]),
      ("below", a["row"] > b["row"]),
    )
    if true
  ]
  return {"background": background, "objects": rows, "relations": found}


THREE = scene(("cat", 0, 0, "big", ""), ("apple", 0, 2, "small", ""), ("sign", 2, 1, "", "7"))


@pytest.mark.parametrize(
  "text",
  [
    "a cat to the left of an apple and a sign that says 7 below the cat",
    "A big cat above a sign that says 7 and the sign to the left of a small apple.",
    "an apple to the right of a cat and the apple above a sign that says 7 on blue",
  ],
)
def test_true_captions(text):
  assert check_caption(THREE, text)


@pytest.mark.parametrize(
  "text",
  [
    "a cat to the right of an apple and a sign that says 7 below the cat",  # a relation
    "a cat above an apple and a sign that says 7 below the cat",  # they stand in one row
    "a dog to the left of an apple and a sign that says 7 below the dog",  # an object
    "a cat to the left of an apple",  # one is missing
    "a cat to the left of an apple and a sign that says 8 below the cat",  # what the sign says
    "a cat to the left of an apple and a sign below the cat",  # it does not tell what the sign says
    "a small cat to the left of an apple and a sign that says 7 below the cat",  # a size
    "a cat to the left of an apple and a sign that says 7 below the cat on pink",  # the background
    "a cat and an apple and a sign that says 7",  # no relations
    "a cat to the left of an apple and a sign that says 7 below the cat and a dog",
    "a cat to the left of the cat and an apple above a sign that says 7",
    "cat left apple",
    "",
    " and ",
    "a cat to the left of",
  ],
)
def test_wrong_captions(text):
  assert not check_caption(THREE, text)


def test_one_object():
  one = scene(("octopus", 1, 1, "big", ""), background="white")
  for text in ("an octopus", "a big octopus on white", "the octopus on white."):
    assert check_caption(one, text)
  for text in (
    "a small octopus on white",
    "an octopus on blue",
    "an octopus above an octopus",
    "a cat",
    "octopus and octopus",
  ):
    assert not check_caption(one, text)
  assert check_caption(scene(("sign", 0, 0, "", "on")), "a sign that says on on blue")
  assert not check_caption(scene(("sign", 0, 0, "", "on")), "a sign that says on on pink")


@given(NUMBERS)
@settings(max_examples=60, deadline=None)
def test_stored_captions_are_true_and_fail_when_anything_is_changed(which):
  facts = make_record(*which)["facts"]
  absent = sorted(set(CATEGORY) - {one["name"] for one in facts["objects"]})[which[1] % 20]
  for text in captions(facts, np.random.default_rng(which[1])):
    assert check_caption(facts, text)
    one = facts["objects"][which[1] % len(facts["objects"])]
    said = f"sign that says {one['text']}" if one["text"] else one["name"]
    assert not check_caption(facts, re.sub(rf"\b{said}\b", absent, text))
    for relation, phrase in RELATIONS.items():
      if phrase in text:
        assert not check_caption(facts, text.replace(phrase, RELATIONS[OPPOSITE[relation]], 1))
    if found := re.search(rf" on ({'|'.join(COLOURS)})$", text):
      assert not check_caption(
        facts, text[: found.start()] + (" on pink" if found[1] != "pink" else " on grey")
      )


def answer(facts, question):
  """The answer by the scene's objects, worked out from the words of the question."""
  objects = {one["name"]: one for one in facts["objects"]}
  holds = {
    "to the left of": lambda a, b: a["column"] < b["column"],
    "to the right of": lambda a, b: a["column"] > b["column"],
    "above": lambda a, b: a["row"] < b["row"],
    "below": lambda a, b: a["row"] > b["row"],
  }
  if found := re.fullmatch(r"is there an? (\w+)\?", question):
    return "yes" if found[1] in objects else "no"
  if question == "how many objects are there?":
    return str(len(objects))
  if found := re.fullmatch(r"how many (.+) are there\?", question):
    category = {
      "animals": "animal",
      "things to eat": "food",
      "vehicles": "vehicle",
      "plants": "plant",
    }[found[1]]
    return str(sum(CATEGORY.get(name) == category for name in objects))
  if found := re.fullmatch(r"where is the (\w+)\?", question):
    one = objects[found[1]]
    return (
      f"{('top', 'middle', 'bottom')[one['y'] * 3 // SIZE]} "
      f"{('left', 'centre', 'right')[one['x'] * 3 // SIZE]}"
    )
  if found := re.fullmatch(r"is the (\w+) big or small\?", question):
    return objects[found[1]]["size"]
  if found := re.fullmatch(rf"is the (\w+) ({'|'.join(holds)}) the (\w+)\?", question):
    return "yes" if holds[found[2]](objects[found[1]], objects[found[3]]) else "no"
  if found := re.fullmatch(rf"what is ({'|'.join(holds)}) the (\w+)\?", question):
    (only,) = (name for name, one in objects.items() if holds[found[1]](one, objects[found[2]]))
    return only
  if found := re.fullmatch(r"which is bigger, the (\w+) or the (\w+)\?", question):
    return max(found[1], found[2], key=lambda name: objects[name]["pixels"])
  if question == "what colour is the background?":
    return facts["background"]
  assert question == "what does the sign say?"
  return objects["sign"]["text"]


@given(NUMBERS)
@settings(max_examples=60, deadline=None)
def test_answers_and_dialogues_are_true(which):
  record = make_record(*which)
  facts = record["facts"]
  assert 6 <= len(record["questions"]) == len(facts["kinds"]) <= 11
  for kind, (question, said) in zip(facts["kinds"], record["questions"], strict=True):
    assert answer(facts, question) == said, question
    ((judged, right),) = check_answer(facts, question, said, f" {said.upper()}").items()
    assert judged.split("/")[0] == kind and right
    assert not any(check_answer(facts, question, said, "none of it").values())
  (where, first), (_, second), *more = facts["dialogue"]
  place, name = where.removeprefix("what is in the ").rstrip("?"), first.split()[-1]
  one = next(o for o in facts["objects"] if o["name"] == name)
  assert PLACES[3 * one["row"] + one["column"]] == place and second == (one["text"] or one["size"])
  for question, said in more:
    phrase = question.removeprefix("and ").removesuffix(" it?")
    only = [
      o["name"]
      for o in facts["objects"]
      if o is not one and answer(facts, f"is the {o['name']} {phrase} the {name}?") == "yes"
    ]
    assert [said.split()[-1]] == (only or ["nothing"])


def test_no_arrangement_is_in_two_splits():
  marks = {}
  for split, count in (("train", 3000), ("validation", 500), ("test", 1000)):
    rngs = (
      np.random.default_rng(key_of(f"emoji_scenes/{split}/{i}".encode())) for i in range(count)
    )
    scenes = [make_scene(split, rng)["objects"] for rng in rngs]
    assert {len(objects) for objects in scenes} == {1, 2, 3} and all(
      split_of(objects[::-1]) == split for objects in scenes
    )
    marks[split] = {
      frozenset((o["name"], o["size"], o["row"], o["column"], o["text"]) for o in objects)
      for objects in scenes
    }
  assert (
    not marks["train"] & marks["test"]
    and not marks["train"] & marks["validation"]
    and not marks["test"] & marks["validation"]
  )
  assert {len(make_record("test_many", i)["facts"]["objects"]) for i in range(20)} == {4, 5, 6}


def test_what_is_drawn_is_where_the_facts_say():
  for number in range(12):
    record = make_record("train", number)
    pixels = np.asarray(Image.open(io.BytesIO(record["image"]))).astype(int)
    other = np.abs(pixels - np.array(COLOURS[record["facts"]["background"]])).sum(-1) > 20
    inside = np.zeros((SIZE, SIZE), bool)
    for one in record["facts"]["objects"]:
      half = (one["pixels"] or 22) // 2 + 1
      box = np.s_[
        max(0, one["y"] - half) : one["y"] + half, max(0, one["x"] - half) : one["x"] + half
      ]
      inside[box] = True
      assert other[box].any()
    assert pixels.shape == (SIZE, SIZE, 3) and other.any() and not (other & ~inside).any()


def test_records_depend_on_split_and_number_alone():
  first = make_record("test", 5)
  make_record("train", 5)
  assert (
    make_record("test", 5) == first and make_record("test", 6)["image_key"] != first["image_key"]
  )


def test_signs_can_be_read():
  glyphs = {letter: np.asarray(draw_sign(letter).convert("L")) for letter in FONT}
  assert len({glyph.tobytes() for glyph in glyphs.values()}) == len(FONT) and len(
    set(TEXTS)
  ) == len(TEXTS)
  assert draw_sign("hot").size == (21, 11) and all(
    draw_sign(text).width <= SIZE // 3 for text in TEXTS
  )
  assert (glyphs["1"][2:9, 4] == [0, 0, 0, 0, 0, 0, 0]).all()  # the stroke of a 1
