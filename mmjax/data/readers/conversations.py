"""Conversations about media, as LLaVA ("conversations": from, value), OpenAI ("messages": role,
content) and the Cauldron ("texts": user, assistant) write them.

A conversation becomes a list of turns {"role": "system", "user", "assistant" or "tool", "content":
text, or parts {"type": "text", "text": ...}, {"type": "image"} and the like}, and its questions and
answers. <image> in a text of the user stands for a picture; in the parts of OpenAI it is text.
"""

from __future__ import annotations

import json
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
_MARK = re.compile(r"<(image|audio|video|speech|sound)>")
_MEANT = {"speech": "audio", "sound": "audio"}
Turn = dict[str, Any]


def conversation_of(value: Any) -> list[Turn]:
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
      pairs = [(turn.get("from", turn.get("role")), _with_more(turn))]
    for role, content in pairs:
      if not isinstance(role, str) or role.lower() not in _ROLES:
        raise ValueError(f"a turn of its conversation is by {str(role)[:40]!r}")
      spoken = _ROLES[role.lower()]
      turns.append({"role": spoken, "content": _content(content, spoken != "assistant")})
  return turns


def with_media(turns: list[Turn], counts: Mapping[str, int]) -> list[Turn]:
  """The turns with a part for each of the media; those without any come first in the user's first
  turn. Raises ValueError: other numbers of parts than of media.
  """
  for modality in dict.fromkeys([*counts, *_PARTS.values()]):
    have, count = counts.get(modality, 0), 0
    for turn in turns:
      parts = turn["content"] if isinstance(turn["content"], list) else []
      count += sum(part["type"] == modality for part in parts)
    if count > have:
      raise ValueError(f"<{modality}> stands {count} times in it, but it has {have}")
    if count and count < have:
      raise ValueError(f"it has {have} of {modality}, but <{modality}> stands {count} times in it")
    if have and not count:
      first = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
      if first is None:
        raise ValueError(f"it has {have} of {modality}, but no turn of the user")
      content = turns[first]["content"]
      said = [{"type": "text", "text": content}] if isinstance(content, str) else content
      content = [{"type": modality}] * have + said
      turns = [*turns[:first], {**turns[first], "content": content}, *turns[first + 1 :]]
  return turns


def questions_in(turns: list[Turn]) -> list[tuple[str, str]]:
  """(question, answer) of each turn of the user and the assistant's next, without the marks of
  media.

  Turns of the user that follow each other are one question; one without a text is none. Raises
  ValueError: the user says nothing.
  """
  pairs: list[tuple[str, str]] = []
  asked: list[str] = []
  for turn in turns:
    content = _said(turn["content"])
    if turn["role"] == "user" and content:
      asked.append(content)
    elif turn["role"] == "assistant" and asked:
      pairs.append(("\n".join(asked), content))
      asked = []
  if asked:
    pairs.append(("\n".join(asked), ""))
  if not pairs and not any(turn["role"] == "user" and turn["content"] for turn in turns):
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
        same = [name for name, modality in _PARTS.items() if modality == _PARTS[kind]]
        given = (part.get(name) for name in (kind, *same, "path", "url"))
        file = next((one for one in given if one is not None), None)
        if isinstance(file, Mapping) and isinstance(file.get("data"), str):
          file = f"data:{_PARTS[kind]}/{file.get('format', '')};base64,{file['data']}"
        file = file.get("url", file.get("path")) if isinstance(file, Mapping) else file
        if isinstance(file, str):
          found.setdefault(_PARTS[kind], []).append(file)
  return found


def _with_more(turn: Mapping[str, Any]) -> Any:
  """The content of a turn, with its thoughts and its calls of tools as models write them."""
  content = turn.get("value", turn.get("content"))
  thought = turn.get("reasoning_content") or turn.get("thinking")
  calls = turn.get("tool_calls")
  if not thought and not calls or not isinstance(content, (str, type(None))):
    return content
  pieces = [f"<think>\n{thought}\n</think>\n\n"] if isinstance(thought, str) else []
  pieces.append(content or "")
  for call in calls if isinstance(calls, (list, tuple)) else ():
    called = call.get("function", call) if isinstance(call, Mapping) else call
    if isinstance(called, Mapping):
      called = {name: called[name] for name in ("name", "arguments") if name in called}
    pieces.append(f"<tool_call>\n{json.dumps(called, ensure_ascii=False)}\n</tool_call>")
  return "".join(pieces)


def _content(content: Any, marked: bool) -> str | list[dict[str, str]]:
  """What a turn says: a text, or parts where media stand in it. marked: <image> in a text stands
  for one. Raises ValueError.
  """
  if content is None:
    return ""
  if isinstance(content, str):
    pieces = _MARK.split(content) if marked else [content]
    if len(pieces) == 1:
      return content
    found = [
      {"type": _MEANT.get(piece, piece)} if number % 2 else {"type": "text", "text": piece}
      for number, piece in enumerate(pieces)
    ]
    return [part for part in found if part.get("text") != ""]
  if not isinstance(content, (list, tuple)):
    raise ValueError("the content of a turn is neither text nor a list of parts")
  parts = []
  for part in content:
    kind = part.get("type") if isinstance(part, Mapping) else "text"
    text = (
      part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    )
    if isinstance(kind, str) and kind in _PARTS:
      parts.append({"type": _PARTS[kind]})
    elif isinstance(text, str):
      parts.append({"type": "text", "text": text})
    else:
      raise ValueError(f"a part of a turn is of type {str(kind)[:40]!r}")
  if all(part["type"] == "text" for part in parts):
    return "\n".join(part["text"] for part in parts)
  return parts


def _said(content: str | list[dict[str, str]]) -> str:
  """The text of a turn, without its media."""
  texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
  return " ".join(text.strip() for text in texts if text.strip())
