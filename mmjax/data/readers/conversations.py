"""Conversations about media, as LLaVA ("conversations": from, value), OpenAI ("messages": role,
content) and the Cauldron ("texts": user, assistant) write them.

A conversation becomes a list of turns {"role": "system", "user", "assistant" or "tool", "content":
text}, where <image> stays where a picture is meant, and its questions and answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ROLES = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "model": "assistant",
  "bot": "assistant",
  "system": "system",
  "developer": "system",
  "tool": "tool",
  "function": "tool",
}
_PARTS = {
  "image": "image",
  "image_url": "image",
  "input_image": "image",
  "audio": "audio",
  "audio_url": "audio",
  "input_audio": "audio",
  "video": "video",
  "video_url": "video",
}
_MARK = re.compile(r"\s*<(image|audio|video|speech|sound)>\s*")


def conversation_of(value: Any) -> list[dict[str, str]]:
  """The turns of a conversation. Raises ValueError: it is none."""
  if not isinstance(value, (list, tuple)):
    raise ValueError("its conversation is no list of turns")
  turns = []
  for turn in value:
    if not isinstance(turn, Mapping):
      raise ValueError("a turn of its conversation is no object")
    if "user" in turn and "assistant" in turn:
      pairs = [("user", turn["user"]), ("assistant", turn["assistant"])]
    else:
      pairs = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))]
    for role, content in pairs:
      if not isinstance(role, str) or role.lower() not in _ROLES:
        raise ValueError(f"a turn of its conversation is by {str(role)[:40]!r}")
      turns.append({"role": _ROLES[role.lower()], "content": _text(content)})
  return turns


def questions_in(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
  """(question, answer) of each turn of the user and the assistant's next, without the marks of
  media.

  Turns of the user that follow each other are one question. Raises ValueError: no question.
  """
  pairs: list[tuple[str, str]] = []
  asked: list[str] = []
  for turn in turns:
    content = _MARK.sub(" ", turn["content"]).strip()
    if turn["role"] == "user" and content:
      asked.append(content)
    elif turn["role"] == "assistant" and asked:
      pairs.append(("\n".join(asked), content))
      asked = []
  if asked:
    pairs.append(("\n".join(asked), ""))
  if not pairs:
    raise ValueError("its conversation asks nothing")
  return pairs


def media_in(value: Any) -> dict[str, list[str]]:
  """{modality: files} that the parts of the turns name (OpenAI: {"type": "image_url", "image_url":
  {"url": ...}}).
  """
  found: dict[str, list[str]] = {}
  for turn in value if isinstance(value, (list, tuple)) else ():
    content = turn.get("content") if isinstance(turn, Mapping) else None
    for part in content if isinstance(content, (list, tuple)) else ():
      kind = part.get("type") if isinstance(part, Mapping) else None
      if isinstance(kind, str) and kind in _PARTS:
        file = part.get(kind, part.get(_PARTS[kind], part.get("path", part.get("url"))))
        file = file.get("url", file.get("path")) if isinstance(file, Mapping) else file
        if isinstance(file, str):
          found.setdefault(_PARTS[kind], []).append(file.removeprefix("file://"))
  return found


def _text(content: Any) -> str:
  """The text of a turn: of parts, those of text, and <image> for each picture. Raises
  ValueError.
  """
  if content is None:
    return ""  # a turn that only calls a tool
  if isinstance(content, str):
    return content
  if not isinstance(content, (list, tuple)):
    raise ValueError("the content of a turn is neither text nor a list of parts")
  parts = []
  for part in content:
    kind = part.get("type") if isinstance(part, Mapping) else "text"
    text = (
      part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    )
    if isinstance(kind, str) and kind in _PARTS:
      parts.append(f"<{_PARTS[kind]}>")
    elif isinstance(text, str):
      parts.append(text)
    else:
      raise ValueError(f"a part of a turn is of type {str(kind)[:40]!r}")
  return "\n".join(parts)
