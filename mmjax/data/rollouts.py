"""Prompts that a language model answers itself while it trains, and what is learned from answers:
batch["rollout"], arrays of a row for each answer, those to one prompt side by side.

  advantage  float32 [B]: how much better an answer is than the others to its prompt
  reward     float32 [B]; exact, formed, right bool [B]: what it is made of (objectives/grpo.py)
  tied       bool [B]: whether all answers to its prompt have the same reward
  old        float32 [B, L]: the log-probability of the token after each, where it is of the answer,
             under the model that drew it; only where a batch is learned from more than once
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record

TEXTS = ("question", "conversation")  # those of data.sources.*.text that have prompts


class Asked(NamedTuple):
  """A prompt as rewards see it: the question, or last turn of the user; the record's answer; what
  the record knows of itself.
  """

  question: str
  answer: str
  facts: Mapping[str, Any]


def sampling(config) -> Mapping[str, Any] | None:
  """The objective of a config whose batches are answers of the model; None = they are data."""
  return next((entry for entry in config.objectives.values() if entry.kind == "grpo"), None)


def rollout_spec(entry: Mapping[str, Any], length: int) -> dict[str, Any]:
  """{"rollout": {array: (shape of a row, dtype)}} of rows of `length` tokens."""
  arrays: dict[str, Any] = dict.fromkeys(("advantage", "reward"), ((), np.dtype(np.float32)))
  checked = ("right",) if entry["check"] else ()
  arrays |= dict.fromkeys(("exact", "formed", "tied", *checked), ((), np.dtype(bool)))
  if entry["updates"] > 1:
    arrays["old"] = ((length,), np.dtype(np.float32))
  return {"rollout": arrays}


def asked_of(record: Record, text: str, part: int, stop: int = 0) -> Asked:
  """The `part`-th question of a record, or the last answer of its `part`-th conversation up to turn
  `stop` (0 = all of it). Raises UserError: there is none.
  """
  facts = record.get("facts") or {}
  if text == "question":
    pairs = record.get("questions") or []
    if part >= len(pairs):
      raise UserError("it has no questions")
    question, answer = pairs[part]
    return Asked(question, answer, facts)
  turns, last = answered(record, part, stop)
  user = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
  return Asked(user[-1] if user else "", turns[last]["content"], facts)


def answered(record: Record, part: int, stop: int = 0) -> tuple[list[Mapping[str, Any]], int]:
  """(the turns of the `part`-th conversation of a record, the first `stop` or all; which of them is
  the assistant's last). Raises UserError: there is none.
  """
  talks = record.get("conversations") or []
  turns = list(talks[part])[: stop or None] if part < len(talks) else []
  answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
  if not answers:
    raise UserError("it has no conversation with an answer")
  return turns, answers[-1]
