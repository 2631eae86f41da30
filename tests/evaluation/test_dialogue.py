"""Dialogues judged exactly: by turn, without their history, with a wrong answer in it."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import Tokenizer
from mmjax.evaluation import judge
from mmjax.evaluation.dialogue import dialogue, interval


def talk(*pairs):
  return [
    {"role": role, "content": text}
    for pair in pairs
    for role, text in zip(("user", "assistant"), pair, strict=True)
  ]


TURNS = [dict(kind="name", ago=0, voice="f1"), dict(kind="size", ago=1), dict(kind="again", ago=2)]
TALKS = [
  talk(("what?", "a cat"), ("big?", "yes"), ("what?", "a cat")),
  talk(("what?", "a dog"), ("big?", "no"), ("what?", "a dog")),
  talk(("what?", "a cat"), ("big?", "no")),
]


def says(example, turns):
  """Takes the dog for a cat, but not when it is asked again, and cats for big; without a history it
  is silent about them. After a second topic, whatever it is asked, it is a dog.
  """
  if [turn["content"] for turn in turns[:-1]].count("what?") == 3:
    return "a dog"
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
    source[2]["facts"]["turns"][1:] = [dict(kind="size", ago=9)]  # no such turn: the one before

    def __init__(self):
      self.source = [*self.source, dict(conversations=[]), dict(conversations=[[]])]

    def __len__(self):
      return len(self.source)

    def check_talk(self, record, turns):
      if not turns:
        raise UserError("nothing")

    def have_room(self, example, turns, other):
      return example != 2

    def replies(self, asked, others):
      context.asked += zip(asked, others, strict=False)
      return asked

    def picture(self, example):
      return np.full((4, 4, 3), example, np.uint8)

  def apply(method, settings, asked):
    assert method == "generate_text"
    tokens = np.full((len(asked) + 1, 16), 7)  # with a row of padding
    for row, (example, turns) in zip(tokens, asked, strict=False):
      ids = [*tokenizer.encode(says(example, turns)), tokenizer.eos_id]
      row[: len(ids)] = ids
    return tokens, np.ones(len(tokens), bool)

  model = types.SimpleNamespace(eos_id=tokenizer.eos_id, end_ids=())
  sequences = types.SimpleNamespace(sequence=types.SimpleNamespace(length=16))
  context = types.SimpleNamespace(
    name="it",
    asked=[],
    config=types.SimpleNamespace(data=sequences, model=model),
    data=lambda *place: Data(),
    apply=apply,
    tokenizer=lambda: tokenizer,
  )
  return context


def test_what_is_right_by_turn_and_without_and_with_a_wrong_history(context):
  result = dialogue(context, source="it", modalities=())
  found = result.metrics
  # of its own: cat yes cat | cat(wrong) yes(wrong) dog | cat yes(wrong)
  assert found["turn1"] == 2 / 3 and found["turn2"] == 1 / 3 and found["turn3"] == 1
  assert found["voice/f1"] == found["turn1"]
  assert found["accuracy"] == 5 / 8 and found["kind/size"] == 1 / 3 and found["ago/2"] == 1
  assert found["accuracy/low"] < 5 / 8 < found["accuracy/high"]
  # hidden: "big?" has no answer; "what?" alone is a cat
  assert found["hidden/turn2"] == 0 and found["hidden/turn3"] == 1 / 2
  # "big?" after right answers: yes no yes(wrong); after a wrong first one: no(wrong) yes(wrong) no
  assert found["right/accuracy"] == 4 / 5 and found["wrong/accuracy"] == 3 / 5
  # the last "what?" of the first two, for which there is room: dog(wrong) dog
  assert found["returned/accuracy"] == 1 / 2 and found["stayed/accuracy"] == 1
  own, aside, again = ["what?", "a cat", "big?", "yes"], ["what?", "a dog"], ["what?", "a cat"]
  between = [*own, *aside, *again, "what?"]
  ((_, other),) = [
    (turns, other)
    for (_, turns), other in context.asked
    if [turn["content"] for turn in turns] == between
  ]
  assert other == 1
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


def test_a_judge_reads_dialogues_and_its_scores_are_of_those_alone(context, tmp_path):
  results = {"it": dialogue(context, source="it", modalities=("image",), examples=1)}
  prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
  assert judge.write_prompts(results, prompts, "j-1") == 3
  asked = [json.loads(line) for line in prompts.read_text().splitlines()]
  body = asked[0]["body"]
  assert (asked[0]["method"], asked[0]["url"]) == ("POST", "/v1/chat/completions")
  picture, text = body["messages"][0]["content"]
  assert body["model"] == "j-1" and picture["image_url"]["url"].startswith("data:image/png;base64,")
  assert "User: big?\nAssistant: yes\nReference: yes\n" in text["text"]

  def answer(number, content):
    choices = [dict(message=dict(content=content))]
    return dict(custom_id=asked[number]["custom_id"], response=dict(body=dict(choices=choices)))

  lines = [answer(0, "It says [[5]]. So: [[9]]"), dict(custom_id="another", score=1)]
  lines += [answer(1, "fine, 10 of 10"), dict(custom_id=asked[2]["custom_id"], score=4)]
  answers.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
  scores = judge.read_scores(answers)
  assert list(scores.values()) == [9, 1, None, 4]
  judged = judge.with_scores(results, scores, answers)["it"]
  assert (judged.metrics["judge/score"], judged.metrics["judge/dialogues"]) == (6.5, 2)
  assert judged.metrics["judge/unscored"] == 1
  assert 4 <= judged.metrics["judge/score/low"] < 6.5 < judged.metrics["judge/score/high"] <= 9
  assert judged.figures["dialogues"]["rows"][0]["judge"] == 9
  with pytest.raises(UserError, match="no score is of the dialogues of this checkpoint"):
    judge.with_scores(results, {"another": 3.0}, answers)
  for bad in ("{", "[]", "{}"):
    answers.write_text(json.dumps(lines[0]) + "\n" + bad)
    with pytest.raises(UserError, match="line 2: no JSON object with a custom_id"):
      judge.read_scores(answers)
  with pytest.raises(UserError, match="cannot be read"):
    judge.read_scores(tmp_path)
