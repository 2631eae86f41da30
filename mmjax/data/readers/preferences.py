"""Answers that people judged: pairs of a preferred and a rejected one (`chosen`, `rejected`), and
single ones with a label (`completion`, `label`), as TRL, LLaVA and OpenAI write them.

A preference becomes {"prompt": turns, "chosen": text, "rejected": text}; a single answer has one of
the two. The prompt is a text, turns, or the `conversations` beside the answers; without one, each
answer is a whole conversation, whose last turn is judged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mmjax.data.readers.conversations import Turn, conversation_of, media_in

ROLES = ("prompt", "chosen", "rejected", "completion")  # columns that make a preference
Preference = dict[str, Any]
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


class NoPreference(ValueError):
  """Why answers teach no preference: a short reason that is counted, and what was wrong."""

  def __init__(self, reason: str, detail: str):
    super().__init__(detail)
    self.reason = reason


class Given(NamedTuple):
  """The cells of a row that make a preference; label: of a single answer."""

  prompt: Any = None
  chosen: Any = None
  rejected: Any = None
  completion: Any = None
  label: Any = None

  def files(self) -> dict[str, list[str]]:
    """{modality: files} that parts of the prompt name, or of whole conversations."""
    for value in (self.prompt, self.chosen, self.completion):
      if found := media_in(_turns_in(value)):
        return found
    return {}


def is_judged(names: Collection[str]) -> bool:
  """Whether columns or keys of these names hold judged answers."""
  return {"chosen", "rejected"} <= set(names) or {"completion", "label"} <= set(names)


def given_in(cells: dict[str, Any]) -> Given | None:
  """Takes the cells of a preference out of those of a row; None where the row has none."""
  cells_of_it = {role: cells.pop(role, None) for role in ROLES}
  given = Given(**cells_of_it)
  if given.completion is not None and given.chosen is None and given.rejected is None:
    given = given._replace(label=cells.pop("label", None))
  elif given.chosen is None and given.rejected is None:
    return None
  if given.prompt is None:
    return given._replace(prompt=cells.pop("conversation", None))
  return given


def preference_of(given: Given) -> Preference:
  """The preference. Raises NoPreference (equal or empty answers, other prompts), ValueError (it is
  in no known form).
  """
  if given.completion is not None:
    answers = {"chosen" if _is_good(given.label) else "rejected": given.completion}
  else:
    answers = {"chosen": given.chosen, "rejected": given.rejected}
  prompt = _prompt(given.prompt)
  found: Preference = {}
  for side, value in answers.items():
    turns = _whole(value, prompt, side)
    asked, said = turns[:-1], turns[-1]["content"]
    if not isinstance(said, str):
      raise ValueError(f"its {side} answer is no text")
    if not said.strip():
      raise NoPreference("empty answer", f"its {side} answer is empty")
    if found.setdefault("prompt", asked) != asked:
      raise NoPreference("prompts differ", "its answers are to two prompts")
    found[side] = said
  if found.get("chosen", "").strip() == found.get("rejected", "").strip():
    raise NoPreference("equal answers", "its two answers are equal")
  return found


def _turns_in(value: Any) -> Any:
  """The turns of a value, which OpenAI wraps as {"messages": [...]}; other values as they are."""
  return value.get("messages") if isinstance(value, Mapping) and "messages" in value else value


def _prompt(value: Any) -> list[Turn]:
  """The turns of a prompt; [] of none."""
  value = _turns_in(value)
  if value is None:
    return []
  return conversation_of([{"role": "user", "content": value}] if isinstance(value, str) else value)


def _whole(value: Any, prompt: list[Turn], side: str) -> list[Turn]:
  """The conversation that an answer ends: one that begins with the assistant's turn goes on from
  the prompt.
  """
  value = _turns_in(value)
  if value is None:
    raise NoPreference("empty answer", f"it has no {side} answer")
  if isinstance(value, str):
    value = [{"role": "assistant", "content": value}]
  turns = conversation_of([value] if isinstance(value, Mapping) else value)
  if not turns:
    raise NoPreference("empty answer", f"it has no {side} answer")
  if turns[0]["role"] == "assistant":
    turns = [*prompt, *turns]
  if turns[-1]["role"] != "assistant":
    raise ValueError(f"its {side} answer ends with a turn of the {turns[-1]['role']}")
  if len(turns) < 2 or turns[-2]["role"] not in ("user", "tool"):
    raise ValueError(f"its {side} answer follows no turn of the user")
  return turns


def _is_good(label: Any) -> bool:
  text = str(label).strip().lower()
  if text not in _YES + _NO:
    raise ValueError(f"its label {str(label)[:40]!r} is neither true nor false")
  return text in _YES
