"""Dialogues judged exactly: by turn, without their history, with a wrong answer in it."""

from __future__ import annotations

import types

import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.data.text import Tokenizer, train_tokenizer
from mmjax.evaluation.dialogue import dialogue, interval


def talk(*pairs):
  return [
    {"role": role, "content": text}
    for pair in pairs
    for role, text in zip(("user", "assistant"), pair, strict=True)
  ]


TURNS = [dict(kind="name", ago=0), dict(kind="size", ago=1), dict(kind="again", ago=2)]
TALKS = [
  talk(("what?", "a cat"), ("big?", "yes"), ("what?", "a cat")),
  talk(("what?", "a dog"), ("big?", "no"), ("what?", "a dog")),
  talk(("what?", "a cat"), ("big?", "no")),
]


def says(example, turns):
  """Takes the dog for a cat, but not when it is asked again, and cats for big; without a history it
  is silent about them.
  """
  if turns[-1]["content"] == "what?" or isinstance(turns[-1]["content"], list):
    question = turns[-1]["content"]
    question = question if isinstance(question, str) else question[-1]["text"]
    if question == "what?":
      return "A  dog" if example == 1 and len(turns) > 1 else "a cat"
  said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
  return "yes" if said[:1] == ["a cat"] else "no" if said else ""


@pytest.fixture(scope="module")
def context(tmp_path_factory):
  file = tmp_path_factory.mktemp("dialogue") / "t.model"
  words = "a A cat dog yes no".split()
  train_tokenizer([" ".join(np.roll(words, i)) for i in range(200)], file, 400)
  tokenizer = Tokenizer.from_assets({"tokenizer.model": file.read_bytes()})

  class Data:
    source = [dict(conversations=[t], facts=dict(turns=TURNS[: len(t) // 2])) for t in TALKS]

    def __init__(self):
      self.source = [*self.source, dict(conversations=[]), dict(conversations=[[]])]

    def __len__(self):
      return len(self.source)

    def check_talk(self, record, turns):
      if not turns:
        raise UserError("nothing")

    def replies(self, asked):
      return asked

  def apply(method, settings, asked):
    assert method == "generate_text"
    tokens = np.full((len(asked) + 1, 16), 7)  # with a row of padding
    for row, (example, turns) in zip(tokens, asked, strict=False):
      ids = [*tokenizer.encode(says(example, turns)), tokenizer.eos_id]
      row[: len(ids)] = ids
    return tokens, np.ones(len(tokens), bool)

  model = types.SimpleNamespace(eos_id=tokenizer.eos_id, end_ids=())
  sequences = types.SimpleNamespace(sequence=types.SimpleNamespace(length=16))
  return types.SimpleNamespace(
    name="it",
    config=types.SimpleNamespace(data=sequences, model=model),
    data=lambda *place: Data(),
    apply=apply,
    tokenizer=lambda: tokenizer,
  )


def test_what_is_right_by_turn_and_without_and_with_a_wrong_history(context):
  result = dialogue(context, source="it", modalities=())
  found = result.metrics
  # of its own: cat yes cat | cat(wrong) yes(wrong) dog | cat yes(wrong)
  assert found["turn1"] == 2 / 3 and found["turn2"] == 1 / 3 and found["turn3"] == 1
  assert found["accuracy"] == 5 / 8 and found["kind/size"] == 1 / 3 and found["ago/2"] == 1
  assert found["accuracy/low"] < 5 / 8 < found["accuracy/high"]
  # hidden: "big?" has no answer; "what?" alone is a cat
  assert found["hidden/turn2"] == 0 and found["hidden/turn3"] == 1 / 2
  # "big?" after right answers: yes no yes(wrong); after a wrong first one: no(wrong) yes(wrong) no
  assert found["right/accuracy"] == 4 / 5 and found["wrong/accuracy"] == 3 / 5
  assert found["consistency"] == 1 / 2
  assert found["dialogues"] == 3 and found["unreadable"] == 2
  figure = result.figures["dialogues"]
  assert [turn["hidden"] for turn in figure["turns"]] == [None, 0, 1 / 2]
  assert figure["rows"][1]["turns"][1] == dict(
    question="big?", answer="yes", expected="no", correct=False
  )
  assert dialogue(context, source="it", modalities=(), limit=1).metrics["dialogues"] == 1


def test_an_interval_draws_dialogues_not_answers():
  together = [[True] * 8] * 50 + [[False] * 8] * 50
  apart = [[True]] * 400 + [[False]] * 400
  low, high = interval(together)
  assert abs((high - low) / 2 - 1.96 * 0.5 / 10) < 0.015  # of 100, not of 800
  low, high = interval(apart)
  assert abs((high - low) / 2 - 1.96 * 0.5 / 800**0.5) < 0.01
