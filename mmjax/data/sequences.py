"""Rows of a language model: text and media in one sequence, several examples a row.

A record becomes a list of parts: spans of tokens, of which some are targets, and media, which take
as many places as the config gives them. What a source's texts are says how:

  document  the text, all of it a target; longer ones are cut into pieces that fill a row
  caption   the media, then a caption, which is the target
  question  the media and a question, then its answer, which is the target; in training
            data.text.per_example of them: they share the media, which are encoded once, and do
            not see each other
  conversation  turns by data.text.template, with the media where they stand in them; targets are
            the assistant's turns. One that is longer than a row loses whole exchanges at its end
  preference  a prompt with each of its judged answers, which are the targets, as conversations side
            by side in one row that share its media (preferences.py)

Where a model answers itself while it trains (rollouts.py), a row is a prompt: what comes before the
answer to a question, or before the last answer of a conversation.

Each target ends with <eos>; <bos> comes first where data.text.bos asks for it. What stands around
media and after them is written as data.sequence.written and data.sequence.prompt say.
"""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.contradictions import asks_side_by_side
from mmjax.data.builders import Record
from mmjax.data.media import WORDS, bytes_key
from mmjax.data.parts import MEDIA, Medium, Span
from mmjax.data.placeholders import around, is_written, mixes_tokens, prompted
from mmjax.data.preferences import talks_of
from mmjax.data.rollouts import Asked, answered, asked_of, sampling
from mmjax.data.sources import Source
from mmjax.data.templates import ChatTemplate
from mmjax.data.tiles import most_joined_tokens
from mmjax.data.tokenizers import Tokenizer, check_texts


class Piece(NamedTuple):
  """An example of a row: record number `record`, of a question the `part`-th (-1 = drawn), of a
  document the tokens from `start` to `stop` (0 = all), of the `part`-th conversation the turns up
  to `stop`, of the `part`-th preference all, with an answer to another prompt: (record, part).
  """

  record: int
  part: int = -1
  start: int = 0
  stop: int = 0
  other: tuple[int, int] | None = None


class Sequences:
  """Records as parts, and what parts take. reader: gives the Reader of a modality. Which of them
  make a row: fitting.py; rows as arrays: row_arrays.py.
  """

  def __init__(self, config, tokenizer: Tokenizer, reader: Callable[[str], Any]):
    s, self.config = config.data.sequence, config
    self.length, self.slots = s.length, s.slots
    entry = sampling(config)
    self.room = entry["max_length"] if entry else 0  # places at a row's end for an answer
    self.modalities = media_of(config)
    tiles, self.joins = config.data.image.tiles.most, mixes_tokens(config.data)
    # slots that a medium fills at most: a picture's tiles, and one of the whole picture
    self.most = {name: 1 for name in self.modalities}
    if "image" in self.most and (tiles > 1 or self.joins):
      self.most["image"] = tiles + 1
      if self.slots <= tiles:
        raise UserError(
          f"data.sequence.slots is {self.slots}, but data.image.tiles.most is {tiles}, so that a "
          f"picture may fill {tiles + 1}: raise the slots, or cut pictures into fewer tiles"
        )
    self.tokenizer, self.reader, self.text = tokenizer, reader, config.data.text
    self.places = {name: s[name] * self.most[name] for name in self.modalities}
    if "image" in self.most and self.joins:
      joined = config.data.image.tiles
      self.places["image"] = most_joined_tokens(joined.grids, s.image, joined.budget)
    elif self.most.get("image", 1) > 1:
      tile, row, *first = (len(self.encode(text)) if text else 0 for text in s.tiles)
      self.places["image"] += tiles * (tile + row) + max(first)
    pad = self.text.pad_id if self.text.pad_id >= 0 else tokenizer.pad_id
    self.pad_id = max(pad, 0)
    if tokenizer.eos_id < 0:
      raise UserError(
        f"tokenizer {self.text.tokenizer!r} has no <eos>, with which every text of a sequence ends"
      )
    self.first = [tokenizer.bos_id] if self.text.bos else []
    self.references: dict[str, np.ndarray] = {}  # {fingerprint of a source: see preferences.py}
    self._template: ChatTemplate | None = None

  @property
  def template(self) -> ChatTemplate:
    """The chat template. Raises UserError: none is named, it cannot be read, or the model would not
    stop where it ends turns.
    """
    if self._template is None:
      template = ChatTemplate.read(self.text.template, self.tokenizer)
      model = self.config.model
      for end in template.end_ids(self.tokenizer):
        if end not in (model.eos_id, *model.end_ids):
          raise UserError(
            f"{template.name} ends turns with token {end}, which the model does not stop at. Set "
            f"model.end_ids=({end},)"
          )
      self._template = template
    return self._template

  # -- A record as parts ---------------------------------------------------------------------------

  def branches(
    self, record: Record, source: Source, piece: Piece, rng: np.random.Generator | None
  ) -> tuple[list[Span | Medium], list[list[Span | Medium]]]:
    """The parts of an example, and those of texts that go on from it and do not see each other: of
    several questions in training the media, and each question; or nothing, and each question with
    the media. Raises UserError: as `parts`.
    """
    if source.text != "question" or piece.part >= 0 or rng is None or self.text.per_example == 1:
      return self.parts(record, source, piece, rng), []
    pairs = questions_of(record)
    each = min(self.text.per_example, len(pairs))
    drawn = rng.choice(len(pairs), each, replace=False)
    shared = [*self._start(), *self.media(record)]
    asked = [self._answered(*pairs[i]) for i in drawn]
    if asks_side_by_side(self.config):
      return shared, asked
    return [], [[*shared, *parts] for parts in asked]

  def parts(
    self, record: Record, source: Source, piece: Piece, rng: np.random.Generator | None
  ) -> list[Span | Medium]:
    """The parts of an example. Raises UserError: the record lacks what its source should have."""
    if source.text == "document":
      tokens = self.document(record, source)
      return [Span(tokens[piece.start : piece.stop or None], True)]
    if source.text == "conversation":
      return self.conversation(record, max(piece.part, 0), piece.stop)
    if source.text == "preference":
      return self.answers(record, source, piece)[0][1]
    if source.text == "question":
      pairs = questions_of(record)
      number = int(rng.integers(len(pairs))) if rng and piece.part < 0 else max(piece.part, 0)
      question, target = pairs[number]
    else:
      question, target = "", self._caption(record, source, rng)
    return [*self._start(), *self.media(record), *self._answered(question, target)]

  def _answered(self, question: str, target: str) -> list[Span | Medium]:
    asked = self._text(prompted(self.config.data.sequence, question))
    return [*asked, Span([*self.encode(target), self.tokenizer.eos_id], True)]

  def size(self, parts: Iterable[Span | Medium]) -> int:
    """Places that parts take at most."""
    parts = list(parts)
    places = dict(self.places)
    if self.are_whole(parts):
      places["image"] = self.config.data.sequence.image
    return sum(
      places[part.modality] if isinstance(part, Medium) else len(part.tokens) for part in parts
    )

  def are_whole(self, parts: Iterable[Span | Medium]) -> bool:
    """Whether pictures are in one tile each, as they are several."""
    pictures = [part for part in parts if isinstance(part, Medium) and part.modality == "image"]
    return self.joins and len(pictures) > 1

  def _start(self) -> list[Span]:
    return [Span(list(self.first), False)] if self.first else []

  def _text(self, text: str) -> list[Span]:
    """A text that is no target; nothing of none."""
    return [Span(self.encode(text), False)] if text else []

  def media(self, record: Record) -> list[Span | Medium]:
    """The media of a record, with the texts around them."""
    parts: list[Span | Medium] = []
    for name in self.modalities:
      if record.get(name) is not None:
        before, after = around(self.config.data.sequence, name)
        parts += [*self._text(before), Medium(name), *self._text(after)]
    return parts

  def encode(self, text: str) -> list[int]:
    check_texts([text])
    return self.tokenizer.encode(text.lower() if self.text.lowercase else text)

  def document(self, record: Record, source: Source) -> list[int]:
    text = self.captions(record, source)[0]
    return [*self.first, *self.encode(text), self.tokenizer.eos_id]

  def captions(self, record: Record, source: Source) -> list[str]:
    """The captions of the source's languages, its first ones where it says so."""
    languages = [
      language
      for language in source.languages or record["captions"]
      if record["captions"].get(language)
    ]
    if not languages:
      raise UserError(f"no text in {', '.join(source.languages) or 'any language'}")
    most = getattr(source, "first_captions", 0) or None
    return [text for language in languages for text in record["captions"][language][:most]]

  def _caption(self, record: Record, source: Source, rng: np.random.Generator | None) -> str:
    captions = self.captions(record, source)
    return captions[0 if rng is None else rng.integers(len(captions))]

  def conversation(self, record: Record, part: int, stop: int = 0) -> list[Span | Medium]:
    talks = record.get("conversations") or []
    if part >= len(talks):
      raise UserError("it has no conversation")
    return self.turns(record, talks[part][: stop or None])

  def turns(
    self,
    record: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    prompt: bool = False,
    loss: str = "",
  ) -> list[Span | Medium]:
    """The parts of a conversation about a record's media; prompt: up to where the assistant
    answers. loss: which of the assistant's turns are targets; "" = as data.text.loss says. Raises
    UserError: it is none, or the record lacks a medium of it.
    """
    parts = self.template.render(
      messages, self.tokenizer, prompt, loss=loss or self.text.loss, lowercase=self.text.lowercase
    )
    found: list[Span | Medium] = []
    for part in parts:
      if isinstance(part, Span):
        found.append(part)
        continue
      if part.modality not in self.modalities:
        why = "of which the model has no encoder"
        if part.modality == "video" and self.config.data.video.group:
          why = "which the encoder of pictures reads in generation alone"
        raise UserError(f"its conversation has {WORDS[part.modality]}s, {why}")
      medium_of(record, part)
      before, after = map(self._text, around(self.config.data.sequence, part.modality))
      last = found[-1] if found else None
      if before and isinstance(last, Span) and is_written(before[0].tokens, last.tokens):
        before, after = [], []
      found += [*before, part, *after]
    return found

  def answers(
    self, record: Record, source: Source, piece: Piece
  ) -> list[tuple[int, list[Span | Medium]]]:
    """[(side of preferences.SIDES, parts of the prompt and this answer)]. Raises UserError."""
    other = source[piece.other[0]] if piece.other else None
    talks = talks_of(record, piece.part, other, piece.other[1] if piece.other else 0)
    return [(side, self.turns(record, talk, loss="last")) for side, talk in talks]

  # -- Prompts, and what parts take ----------------------------------------------------------------

  def readable(self, parts: Iterable[Span | Medium]) -> list[tuple[str, bool]]:
    """[(text, whether it is a target)] of the parts, special tokens and media by their names."""
    names = {number: piece for piece, number in self.template.markers(self.tokenizer).items()}
    found: list[tuple[str, bool]] = []
    for part in parts:
      if isinstance(part, Medium):
        found.append((f"<{part.modality}>", False))
        continue
      for special, run in itertools.groupby(part.tokens, names.__contains__):
        tokens = list(run)
        text = (
          "".join(names[token] for token in tokens) if special else self.tokenizer.decode(tokens)
        )
        found.append((text, part.target))
    return found

  def prompt(self, record: Record, source: Source, piece: Piece) -> list[Span | Medium]:
    """What comes before the first target of an example: what a text is generated from."""
    parts = self.parts(record, source, piece, None)
    return parts[: next(i for i, p in enumerate(parts) if isinstance(p, Span) and p.target)]

  def before_answer(self, record: Record, source: Source, piece: Piece) -> list[Span | Medium]:
    """A prompt that the model answers itself while it trains. Raises UserError: there is none."""
    asked_of(record, source.text, piece.part, piece.stop)
    if source.text == "question":
      return self.prompt(record, source, piece)
    turns, last = answered(record, piece.part, piece.stop)
    return self.turns(record, turns[:last], prompt=True)

  def asked(self, source: Source, piece: Piece) -> Asked | None:
    """The question of such a prompt, its answer and facts; None = it cannot be read."""
    try:
      return asked_of(source[piece.record], source.text, piece.part, piece.stop)
    except UserError:
      return None

  def without_room(self) -> Sequences:
    """The same with rows that end where an answer begins."""
    found = copy.copy(self)
    found.length = self.length - self.room
    return found

  def narrowed(self, prompts: Iterable[Sequence[Span | Medium]]) -> Sequences:
    """The same with rows that are as long, and have as many slots, as these prompts need."""
    found = copy.copy(self)
    prompts = list(prompts)
    longest = max(map(self.size, prompts), default=1)
    found.length = min(self.length, -(-longest // 32) * 32)
    found.slots = max((max(self.slots_of(parts), default=1) for parts in prompts), default=1) or 1
    return found

  def slots_of(self, parts: Iterable[Span | Medium]) -> list[int]:
    """The slots of each modality that parts fill at most."""
    parts = list(parts)
    counts = collections.Counter(part.modality for part in parts if isinstance(part, Medium))
    most = {**self.most, "image": 1} if self.are_whole(parts) else self.most
    return [most[name] * counts[name] for name in self.modalities]


def questions_of(record: Record) -> list[tuple[str, str]]:
  """The questions of a record with their answers. Raises UserError: it has none."""
  pairs = record.get("questions") or []
  if not pairs:
    raise UserError("it has no questions")
  return pairs


def medium_of(record: Mapping[str, Any], medium: Medium) -> Mapping[str, Any]:
  """The record with this medium as that of its modality. Raises UserError: it lacks it."""
  if not medium.number:
    if record.get(medium.modality) is None:
      raise UserError(f"it has no {WORDS[medium.modality]} for its <{medium.modality}>")
    return record
  more = [data for modality, data in record.get("media") or () if modality == medium.modality]
  if len(more) < medium.number:
    raise UserError(
      f"it has {len(more) + 1} {WORDS[medium.modality]}s, but <{medium.modality}> stands "
      f"{medium.number + 1} times in its conversation"
    )
  data = more[medium.number - 1]
  return {**record, medium.modality: data, "image_key": bytes_key(data)}


def media_of(config) -> tuple[str, ...]:
  """The media of a language model's sequences, in the order of the model's encoders. Raises
  UserError: one whose places data.sequence does not give, or no medium.
  """
  for name in config.model.encoders:
    if name not in MEDIA:
      raise UserError(
        f"model.encoders.{name}: a language model reads its text itself; its encoders are of "
        f"{', '.join(MEDIA)}"
      )
    if not config.data.sequence[name]:
      raise UserError(
        f"data.sequence.{name} is 0: say how many tokens a {WORDS[name]} takes, which is what "
        f"model.connectors.{name} gives"
      )
  return tuple(config.model.encoders)
