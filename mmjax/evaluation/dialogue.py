"""How well a model holds a dialogue: exact answers by turn, with the history, without it, with a
wrong answer in it, and after a change of the topic. No judge; judge.py has files for one.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.text import normalise_caption
from mmjax.data.tokenizers import decode
from mmjax.evaluation import Context, Result, sample_evenly
from mmjax.evaluation.captions import inputs_of
from mmjax.ranges import Count, Size

RESAMPLES = 1000  # of dialogues, for intervals
Turns = list[dict[str, Any]]


class _Talk(NamedTuple):
  """A dialogue: its record, its turns, the places of the assistant's among them, and of each answer
  what the record knows (`kind`, `ago`).
  """

  example: int
  turns: Turns
  answers: list[int]
  about: list[Mapping[str, Any]]


def dialogue(
  context: Context,
  *,
  source: str,
  split: str = "test",
  modalities: tuple[str, ...] = ("image",),
  max_length: Size = 16,
  limit: Count = 0,
  examples: Count = 6,
) -> Result:
  """A language model answers the questions of conversations, turn after turn.

  source: a data set whose records have conversations; facts["turns"] may say the `kind` of each
  question, whose `voice` it is, and how many turns `ago` what it refers to came up. split: which
  of its splits. modalities: what the report shows beside a conversation. max_length: tokens of an
  answer at most. limit: conversations that are used, evenly spread; 0 = all. examples: how many
  the report shows.
  Metrics are shares of exact answers, case and spaces aside.
    With the model's own answers as history: "accuracy", "accuracy/low" and "/high" (95%, dialogues
    drawn again), "turnN", "ago/N", "kind/NAME", "voice/NAME".
    Without the history: "hidden/accuracy", "hidden/turnN".
    With right earlier answers but a wrong one to what the question refers to: "wrong/accuracy";
    the same questions without the wrong one: "right/accuracy".
    Of the last question of each that refers back, after a turn about the media of another
    conversation, and the question again that brought up what it refers to: "returned/accuracy";
    without these two turns: "stayed/accuracy".
  Besides: "consistency" (share of questions asked again that get the same answer), "dialogues",
  "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if not context.config.data.sequence.length:
    raise UserError(f"{where}: only a language model (data.sequence.length) holds a dialogue")
  data = context.data(source, split, (), "conversation")
  talks, unreadable = _talks(data, limit)
  if not talks:
    raise UserError(f"{where}: {source} split {split} has no readable conversation with an answer")
  ask = _Asking(context, data, tuple(modalities), max_length)
  said = _own_answers(ask, talks)
  correct = [
    [_equal(text, talk.turns[n]["content"]) for text, n in zip(texts, talk.answers, strict=True)]
    for texts, talk in zip(said, talks, strict=True)
  ]
  metrics = _by_turn(correct, "")
  metrics |= _by_facts(correct, talks)
  hidden = ask([(talk, _without_history(talk, k)) for talk, k in _later(talks)])
  metrics |= _of_later(hidden, talks, "hidden")
  metrics |= _with_wrong_answers(ask, talks)
  metrics |= _with_another_topic(ask, talks)
  metrics |= _consistency(said, talks)
  low, high = interval(correct)
  metrics |= {"accuracy/low": low, "accuracy/high": high}
  metrics |= dict(dialogues=float(len(talks)), unreadable=float(unreadable))
  by_turn = []
  for turn in range(max(map(len, correct))):
    of_turn = [[row[turn]] for row in correct if len(row) > turn]
    bounds = interval(of_turn)
    by_turn.append(
      dict(
        turn=turn + 1,
        share=metrics[f"turn{turn + 1}"],
        low=bounds[0],
        high=bounds[1],
        hidden=metrics.get(f"hidden/turn{turn + 1}"),
      )
    )
  transcripts = [
    dict(
      example=talk.example,
      turns=[
        dict(
          question=_text(talk.turns[n - 1]["content"]),
          answer=said[i][k],
          expected=_text(talk.turns[n]["content"]),
          correct=correct[i][k],
        )
        for k, n in enumerate(talk.answers)
      ],
    )
    for i, talk in enumerate(talks)
  ]
  inputs = functools.partial(inputs_of, data, modalities=modalities)
  shown = [
    dict(transcripts[i], **inputs(talks[i].example)) for i in sample_evenly(len(talks), examples)
  ]
  figure = dict(kind="dialogues", turns=by_turn, rows=shown, transcripts=transcripts, inputs=inputs)
  return Result({name: float(value) for name, value in metrics.items()}, {"dialogues": figure})


def interval(correct: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
  """The 95% interval of the share of exact answers: dialogues are drawn again with replacement
  (Efron 1979), for the answers of one are not independent.
  """
  exact = np.array([sum(row) for row in correct], float)
  count = np.array([len(row) for row in correct], float)
  drawn = np.random.default_rng(seed).integers(len(exact), size=(RESAMPLES, len(exact)))
  shares = exact[drawn].sum(1) / np.maximum(count[drawn].sum(1), 1)
  low, high = np.quantile(shares, (0.025, 0.975))
  return float(low), float(high)


class _Asking:
  """Asks the model for the next turn of conversations."""

  def __init__(self, context: Context, data, modalities: tuple, max_length: int):
    self.context, self.data = context, data
    self.settings = (modalities, max_length, 1, 1.0)
    model = context.config.model
    self.ends = (model.eos_id, *model.end_ids)

  def __call__(
    self, asked: Sequence[tuple[_Talk, Turns]], others: Sequence[_Talk] = ()
  ) -> list[str]:
    """others: of each, the dialogue whose media come after its own; () = of none."""
    if not asked:
      return []
    batches = self.data.replies(
      [(talk.example, turns) for talk, turns in asked], [talk.example for talk in others]
    )
    tokens, valid = self.context.apply("generate_text", self.settings, batches)
    tokenizer = self.context.tokenizer()
    rows = zip(tokens[: len(asked)], valid, strict=False)  # the model says nothing of unusable ones
    return [decode(tokenizer, row, self.ends) if usable else "" for row, usable in rows]


def _talks(data, limit: int) -> tuple[list[_Talk], int]:
  """(the first conversation of each record, records without a usable one)."""
  talks, unreadable = [], 0
  chosen = sample_evenly(len(data), min(limit, len(data))) if limit else range(len(data))
  for example in chosen:
    try:
      record = data.source[example]
      turns = list((record.get("conversations") or [()])[0])
      data.check_talk(record, turns)
    except UserError:
      unreadable += 1
      continue
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    facts = record.get("facts")
    said = facts.get("turns") if isinstance(facts, Mapping) else None
    said = said if isinstance(said, list) else []
    about: list[Mapping[str, Any]] = [
      _about(said[k] if k < len(said) else None, k) for k in range(len(answers))
    ]
    talks.append(_Talk(example, turns, answers, about))
  return talks, unreadable


def _about(said: Any, turn: int) -> dict[str, Any]:
  """What a record says of a question, without an `ago` that points at no turn."""
  found = dict(said) if isinstance(said, Mapping) else {}
  ago = found.get("ago")
  if not isinstance(ago, int) or not 0 <= ago <= turn:
    found.pop("ago", None)
  return found


def _own_answers(ask: _Asking, talks: Sequence[_Talk]) -> list[list[str]]:
  """What the model answers in each turn, where its own answers are the history."""
  said: list[list[str]] = [[] for _ in talks]
  for turn in range(max(len(talk.answers) for talk in talks)):
    rows = [i for i, talk in enumerate(talks) if len(talk.answers) > turn]
    asked = [
      (talks[i], _history(talks[i], turn, dict(zip(talks[i].answers, said[i], strict=False))))
      for i in rows
    ]
    for i, text in zip(rows, ask(asked), strict=True):
      said[i].append(text)
  return said


def _history(talk: _Talk, turn: int, answers: Mapping[int, str]) -> Turns:
  """The turns before an answer, with these in the places of earlier answers, but for empty ones,
  which templates refuse.
  """
  return [
    {**message, "content": answers[n]} if answers.get(n, "").strip() else message
    for n, message in enumerate(talk.turns[: talk.answers[turn]])
  ]


def _without_history(talk: _Talk, turn: int) -> Turns:
  """The system turn and the last question, with all media that came before it."""
  before = talk.turns[: talk.answers[turn]]
  media = [
    part
    for message in before
    if not isinstance(message["content"], str)
    for part in message["content"]
    if part["type"] != "text"
  ]
  question = [*media, {"type": "text", "text": _text(before[-1]["content"])}]
  system = [message for message in before[:1] if message["role"] == "system"]
  return [*system, {"role": "user", "content": question}]


def _text(content: Any) -> str:
  if isinstance(content, str):
    return content
  return "".join(part.get("text", "") for part in content)


def _equal(text: str, expected: Any) -> bool:
  return normalise_caption(text) == normalise_caption(_text(expected))


def _later(talks: Iterable[_Talk]) -> list[tuple[_Talk, int]]:
  """(dialogue, turn) of each question that has a history."""
  return [(talk, k) for talk in talks for k in range(1, len(talk.answers))]


def _by_turn(correct: Sequence[Sequence[bool]], prefix: str) -> dict[str, float]:
  found = {f"{prefix}accuracy": float(np.mean([x for row in correct for x in row]))}
  for turn in range(max(map(len, correct))):
    found[f"{prefix}turn{turn + 1}"] = float(np.mean([r[turn] for r in correct if len(r) > turn]))
  return found


def _by_facts(correct: Sequence[Sequence[bool]], talks: Sequence[_Talk]) -> dict[str, float]:
  groups: dict[str, list[bool]] = collections.defaultdict(list)
  for row, talk in zip(correct, talks, strict=True):
    for is_exact, about in zip(row, talk.about, strict=False):
      for name in ("ago", "kind", "voice"):
        if about.get(name) is not None:
          groups[f"{name}/{about[name]}"].append(is_exact)
  return {name: float(np.mean(groups[name])) for name in sorted(groups)}


def _of_later(texts: Sequence[str], talks: Sequence[_Talk], name: str) -> dict[str, float]:
  by_turn: dict[int, list[bool]] = collections.defaultdict(list)
  for text, (talk, k) in zip(texts, _later(talks), strict=True):
    by_turn[k].append(_equal(text, talk.turns[talk.answers[k]]["content"]))
  if not by_turn:
    return {}
  every = [exact for of_turn in by_turn.values() for exact in of_turn]
  found = {f"{name}/accuracy": float(np.mean(every))}
  return found | {f"{name}/turn{k + 1}": float(np.mean(by_turn[k])) for k in sorted(by_turn)}


def _with_wrong_answers(ask: _Asking, talks: Sequence[_Talk]) -> dict[str, float]:
  """Accuracy where the answer that a question refers to is another's, from another dialogue."""
  others: dict[Any, list[str]] = collections.defaultdict(list)
  for talk in talks:
    for n, about in zip(talk.answers, talk.about, strict=False):
      others[about.get("kind")].append(_text(talk.turns[n]["content"]))
  asked, plain, expected = [], [], []
  rng = np.random.default_rng(0)
  for talk, k in _later(talks):
    ago = talk.about[k].get("ago", 1)
    if not ago:
      continue
    at = talk.answers[k - ago]
    kind = talk.about[k - ago].get("kind")
    correct = _text(talk.turns[at]["content"])
    wrong = [text for text in dict.fromkeys(others[kind]) if not _equal(text, correct)]
    if wrong:
      asked.append((talk, _history(talk, k, {at: wrong[int(rng.integers(len(wrong)))]})))
      plain.append((talk, _history(talk, k, {})))
      expected.append(talk.turns[talk.answers[k]]["content"])
  if not asked:
    return {}
  return {
    f"{name}/accuracy": float(np.mean(list(map(_equal, ask(rows), expected))))
    for name, rows in (("wrong", asked), ("right", plain))
  }


def _with_another_topic(ask: _Asking, talks: Sequence[_Talk]) -> dict[str, float]:
  """Accuracy after the first turn of the next dialogue, about its media, and a return: the question
  that brought up what is referred to is asked again, if it refers to nothing itself.
  """
  asked, plain, others, expected = [], [], [], []
  for number, talk in enumerate(talks):
    other = talks[(number + 1) % len(talks)]
    aside = [turn for turn in other.turns[: other.answers[0] + 1] if turn["role"] != "system"]
    for k in reversed(range(1, len(talk.answers))):
      ago, before = talk.about[k].get("ago", 1), _history(talk, k, {})
      begins, at = talk.answers[k] - 1, talk.answers[k - ago]  # this question, the earlier answer
      refers_to_nothing = k == ago or talk.about[k - ago].get("ago") == 0
      if not ago or not refers_to_nothing or other is talk or _has_media(before[begins:]):
        continue
      again = dict(before[at - 1], content=_text(before[at - 1]["content"]))
      turns = [*before[:begins], *aside, again, before[at], *before[begins:]]
      if ask.data.have_room(talk.example, turns, other.example):
        asked.append((talk, turns))
        plain.append((talk, before))
        others.append(other)
        expected.append(talk.turns[talk.answers[k]]["content"])
        break
  if not asked:
    return {}
  returned, stayed = ask(asked, others), ask(plain)
  return {
    f"{name}/accuracy": float(np.mean(list(map(_equal, texts, expected))))
    for name, texts in (("returned", returned), ("stayed", stayed))
  }


def _has_media(turns: Turns) -> bool:
  return any(
    part["type"] != "text"
    for turn in turns
    if not isinstance(turn["content"], str)
    for part in turn["content"]
  )


def _consistency(said: Sequence[Sequence[str]], talks: Sequence[_Talk]) -> dict[str, float]:
  """How often a question that is asked again, with the same right answer, gets the same answer."""
  same = []
  for texts, talk in zip(said, talks, strict=True):
    before: dict[tuple[str, str], str] = {}
    for text, n, about in zip(texts, talk.answers, talk.about, strict=False):
      key = _text(talk.turns[n - 1]["content"]), _text(talk.turns[n]["content"])
      if key in before and about.get("kind", "again") == "again":
        same.append(normalise_caption(before[key]) == normalise_caption(text))
      before.setdefault(key, text)
  return {"consistency": float(np.mean(same))} if same else {}
