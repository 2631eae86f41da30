"""Conversations with a language model: turns that refer back, whose cache is kept, over media too.

chat = mmjax.load(DIR).chat()
chat.send("what is it?", image="a.png")
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.parts import MEDIA, Span
from mmjax.data.placeholders import Places, is_written
from mmjax.data.templates import ASSET, ChatTemplate
from mmjax.data.tokenizers import Tokenizer
from mmjax.files import write_output
from mmjax.inference.engine import decoding_of
from mmjax.inference.language import Read
from mmjax.inference.slots import Slots, Text

if TYPE_CHECKING:
  from mmjax.inference.predictor import Predictor

WINDOW = 4096  # tokens of prompt and answer at most, where the config allows more
Message = dict[str, Any]


class Conversations:
  """Messages as prompts of a checkpoint's language model, by its chat template.

  template: a name, a .jinja file or a text; "" = data.text.template of the checkpoint, else what
  came with its tokenizer. window: tokens of a prompt and its answer; 0 = data.sequence.length, at
  most 4,096. Raises UserError: no language model, or no template.
  """

  def __init__(self, predictor: Predictor, template: str = "", window: int = 0):
    if predictor.language is None:
      raise UserError("only a language model converses (model.name 'language_model')")
    self.language, self.media = predictor.language, predictor.media
    self.tokenizer: Tokenizer = predictor.tokenizer
    kept = predictor.assets.get(ASSET, b"").decode()
    named: str = template or kept or predictor.config.data.text.get("template", "")
    if not named and self.tokenizer.chat_template:
      named = "tokenizer"
    self.template = ChatTemplate.read(named, self.tokenizer)
    self.ends = self.template.end_ids(self.tokenizer)
    length = predictor.config.data.sequence.length
    self.window = window or min(length, WINDOW)

  def read(self, messages: Sequence[Mapping[str, Any]]) -> Read:
    """The prompt of the next answer. Media are parts {"type": "image", "item": an item}."""
    found: dict[str, list[Any]] = {name: [] for name in self.media}
    for message in messages:
      for given in _parts(message):
        kind = given.get("type", "text")
        if kind in MEDIA and kind not in found:
          raise self._no_encoder(kind)
        if kind in found:
          found[kind].append(given["item"])
    parts: list[list[int] | Places] = []
    media: list[tuple[str, dict[str, np.ndarray]]] = []
    rendered = self.template.render(
      messages,
      self.tokenizer,
      add_generation_prompt=True,
      lowercase=self.language.config.data.text.lowercase,
    )
    for part in rendered:
      if isinstance(part, Span):
        parts.append(list(part.tokens))
        continue
      item = found[part.modality][part.number]
      alone = len(found[part.modality]) == 1
      placed = [
        piece if isinstance(piece, Places) else self.language.encode(piece)
        for piece in self.language.place(part.modality, item, media, alone)
      ]
      before, last = placed[0], parts[-1] if parts else []
      if isinstance(before, list) and isinstance(last, list) and is_written(before, last):
        placed = placed[1:-1]
      parts += placed
    return Read(parts, media)

  def _no_encoder(self, modality: str) -> UserError:
    return UserError(
      f"this model has no encoder for {modality}; it has {', '.join(self.media) or 'none'}"
    )

  def user(self, text: str, media: Mapping[str, Any]) -> Message:
    """A user's turn: its media, then its text. Raises UserError: a medium that cannot be read."""
    content = []
    for modality, given in media.items():
      if modality not in self.media:
        raise self._no_encoder(modality)
      for item in given if isinstance(given, (list, tuple)) else [given]:
        arrays = self.media[modality](item)
        content.append({"type": modality, "item": arrays, "source": item})
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


class Chat:
  """A conversation. messages: all of it, [{"role", "content"}].

  A history that outgrows the window loses whole exchanges, the oldest first, never the system's
  turn; `note` is told of it.
  """

  def __init__(
    self,
    predictor: Predictor,
    *,
    template: str = "",
    system: str = "",
    window: int = 0,
    max_length: int = 256,
    keep_media: bool = False,
    note: Callable[[str], None] | None = None,
    **decoding: Any,
  ):
    """max_length: tokens of an answer at most. keep_media: exchanges with media are dropped last.
    decoding: temperature (0 = the likeliest token), top_k, top_p, min_p, repetition_penalty; by
    default as in the checkpoint's generation_config.json, else greedy.
    """
    self.predictor = predictor
    self.prompts = Conversations(predictor, template, window)
    self.system, self.keep_media, self.note = system, keep_media, note or (lambda text: None)
    self.max_length = min(max_length, self.prompts.window // 2)
    self.decoding = decoding_of(predictor.usual_decoding, **decoding)
    self.last: Text | None = None  # the last answer, with what it cost
    self.messages: list[Message] = []
    self.reset()
    with predictor.in_use():
      self._slots = Slots(
        self.prompts.language, 1, self.prompts.window, self.prompts.ends, reuse=True
      )

  def send(self, text: str, *, seed: int = 0, stop: Sequence[str] = (), **media: Any) -> str:
    """The answer to a turn. media: image=, audio=, video= or series=, an item or several."""
    return "".join(self.stream(text, seed=seed, stop=stop, **media))

  def stream(
    self, text: str, *, seed: int = 0, stop: Sequence[str] = (), **media: Any
  ) -> Generator[str, None, None]:
    """The answer piece by piece. Whoever stops reading keeps what has come so far as the answer.
    Raises UserError, and leaves the conversation as it was: a medium that cannot be read, or a turn
    longer than the window.
    """
    turn = self.prompts.user(text, media)
    read = self._fitting([*self.messages, turn])
    with self.predictor.in_use():
      answer = self._slots.begin(read, self.max_length, self.decoding, seed, stop)
    given = ""
    try:
      for piece in self.predictor.pieces(self._slots, answer):
        given += piece
        yield piece
    finally:
      with self.predictor.in_use():
        self._slots.end(answer)
      self.last = answer
      if given.strip():
        self.messages += [turn, {"role": "assistant", "content": given}]
      else:
        self.note("the answer is empty; the turn is left out of the conversation")

  def undo(self) -> str:
    """Takes the last turn and its answer back; the text of the turn, "" = there is none."""
    users = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
    if not users:
      return ""
    taken = self.messages[users[-1]]
    del self.messages[users[-1] :]
    return "".join(part["text"] for part in _parts(taken) if part["type"] == "text")

  def reset(self) -> None:
    """Begins anew, with the system's turn alone."""
    self.messages = [{"role": "system", "content": self.system}] if self.system else []
    self._unseen = 0  # exchanges that the window has no room for

  def save(self, path: str | os.PathLike) -> None:
    """Writes the conversation as one line of JSON, {"messages": [...]}, which `mmjax data convert
    conversations` reads. Media that came as files are named, others held within.
    Raises UserError: it cannot be written, or has media that are arrays.
    """
    messages = [
      {"role": m["role"], "content": [_saved(part) for part in _parts(m)]} for m in self.messages
    ]
    line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
      write_output(Path(path), line)
    except OSError as error:
      raise UserError(f"{path}: {error.strerror or error}") from error

  def _fitting(self, messages: list[Message]) -> Read:
    """The prompt, without the oldest exchanges where it is too long."""
    first = next(n for n, message in enumerate(messages) if message["role"] == "user")
    kept = _exchanges(messages[first:])
    dropped = 0
    while True:
      read = self.prompts.read([*messages[:first], *(m for turn in kept for m in turn)])
      if self.prompts.language.size(read) + self.max_length <= self.prompts.window:
        break
      if len(kept) == 1:
        raise UserError(
          f"this turn takes {self.prompts.language.size(read)} tokens, and an answer "
          f"{self.max_length}, of a window of {self.prompts.window}. Shorten it"
        )
      old = range(len(kept) - 1)
      plain = [n for n in old if not _has_media(kept[n])]
      del kept[(plain or old)[0] if self.keep_media else 0]
      dropped += 1
    if dropped > self._unseen:
      self.note(
        f"the model no longer sees the oldest {dropped} of {dropped + len(kept)} exchanges: the "
        f"window is {self.prompts.window} tokens"
      )
    self._unseen = dropped
    return read


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
  content = message.get("content")
  return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
  """Turns of the user, each with what follows it."""
  groups: list[list[Message]] = []
  for message in messages:
    if message["role"] == "user":
      groups.append([])
    groups[-1].append(message)
  return groups


def _has_media(messages: Sequence[Message]) -> bool:
  return any(part["type"] != "text" for message in messages for part in _parts(message))


def _saved(part: Mapping[str, Any]) -> dict[str, Any]:
  """A part in OpenAI's form, media by path or as data URLs."""
  if part["type"] == "text":
    return {"type": "text", "text": part["text"]}
  kind, source = part["type"], part.get("source")
  if isinstance(source, (str, os.PathLike)):
    url = os.fspath(source)
  elif isinstance(source, bytes):
    url = f"data:{kind}/*;base64," + base64.b64encode(source).decode()
  else:
    raise UserError(
      f"the conversation has {kind} given as an array: give files, so that it can be saved"
    )
  return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
