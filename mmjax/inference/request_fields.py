"""Fields of a request in the form of OpenAI's API: those that are read, and what is refused."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any


class Refused(Exception):
  """A request that is answered by a status and one line."""

  def __init__(self, status: int, why: str, kind: str = "invalid_request_error"):
    super().__init__(why)
    self.status, self.why, self.kind = status, why, kind


# Fields of a request that change no answer; every other that is not read is refused.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are read only to see that they ask for nothing: {name: what is nothing}
NOTHING = {
  "frequency_penalty": (0, None),
  "presence_penalty": (0, None),
  "logit_bias": ({}, None),
  "n": (1, None),
  "tools": ([], None),
  "tool_choice": ("none", "auto", None),
  "response_format": ({"type": "text"}, None),
  "parallel_tool_calls": (True, False, None),
  "modalities": (["text"], None),
}


def check_fields(body: Mapping[str, Any], known: set[str]) -> None:
  for name, value in body.items():
    if name in known or name in IGNORED:
      continue
    if name in NOTHING:
      if value not in NOTHING[name]:
        raise Refused(400, f"{name} is not supported here; leave it out")
      continue
    raise Refused(400, f"field {name!r:.60} is not known here")


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON. Raises ValueError: it has a field twice, of which readers take either."""
  found = dict(pairs)
  if len(found) < len(pairs):
    twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    raise ValueError(f"field {twice!r:.60} stands twice")
  return found


def list_of(body: Mapping[str, Any], name: str) -> list:
  value = body.get(name)
  if not isinstance(value, list) or not value:
    raise Refused(400, f"{name} must be a list of at least one")
  return value


def number_of(
  body: Mapping[str, Any], name: str, kind: type, least: float, most: float, default: Any = None
) -> Any:
  value = body.get(name)
  if value is None:
    return default
  fine = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
  if not fine or (kind is int and value != int(value)):
    raise Refused(
      400, f"{name} is {value!r:.40}, but must be {kind.__name__}, {least:g} to {most:g}"
    )
  return kind(value)


def decoded(where: str, data: str) -> bytes:
  with contextlib.suppress(binascii.Error, ValueError):
    return base64.b64decode(data, validate=True)
  raise Refused(400, f"{where}: not base64")
