"""Rows of a language model: text and media in one sequence, several examples a row.

A record becomes a list of parts: spans of tokens, of which some are targets, and media, which take
as many places as the config gives them. What a source's texts are says how:

  document  the text, all of it a target; longer ones are cut into pieces that fill a row
  caption   the media, then a caption, which is the target
  question  the media and a question, then its answer, which is the target; in training
            data.text.per_example of them one after another, each given those before it
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
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record
from mmjax.data.media import WORDS, bytes_key
from mmjax.data.packing import filling, pack
from mmjax.data.parts import MEDIA, Medium, Span
from mmjax.data.placeholders import (
  Places,
  around,
  axes_of,
  is_written,
  mixes_tokens,
  placeholders,
  positions_of,
  prompted,
)
from mmjax.data.preferences import SIDES, asks_others, pairs_of, preference_spec, talks_of
from mmjax.data.rollouts import Asked, answered, asked_of, sampling
from mmjax.data.sources import Source
from mmjax.data.templates import ChatTemplate
from mmjax.data.text import Tokenizer, check_texts
from mmjax.data.tiles import Tiling, cut_into_tiles, most_joined_tokens
from mmjax.printing import printable


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
  """Records as parts, and parts as rows. reader: gives the Reader of a modality."""

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
      tile, row, *first = (len(self._encode(text)) if text else 0 for text in s.tiles)
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

  def parts(
    self, record: Record, source: Source, piece: Piece, rng: np.random.Generator | None
  ) -> list[Span | Medium]:
    """The parts of an example. Raises UserError: the record lacks what its source should have."""
    if source.text == "document":
      tokens = self._document(record, source)
      return [Span(tokens[piece.start : piece.stop or None], True)]
    if source.text == "conversation":
      return self._conversation(record, max(piece.part, 0), piece.stop)
    if source.text == "preference":
      return self._answers(record, source, piece)[0][1]
    if source.text == "question":
      pairs = self._questions(record, piece, rng)
    else:
      pairs = [("", self._caption(record, source, rng))]
    parts: list[Span | Medium] = [*self._start(), *self._media(record)]
    for question, target in pairs:
      parts += self._text(prompted(self.config.data.sequence, question))
      parts.append(Span([*self._encode(target), self.tokenizer.eos_id], True))
    return parts

  def size(self, parts: Iterable[Span | Medium]) -> int:
    """Places that parts take at most."""
    parts = list(parts)
    places = dict(self.places)
    if self._are_whole(parts):
      places["image"] = self.config.data.sequence.image
    return sum(
      places[part.modality] if isinstance(part, Medium) else len(part.tokens) for part in parts
    )

  def _are_whole(self, parts: Iterable[Span | Medium]) -> bool:
    """Whether pictures are in one tile each, as they are several."""
    pictures = [part for part in parts if isinstance(part, Medium) and part.modality == "image"]
    return self.joins and len(pictures) > 1

  def _start(self) -> list[Span]:
    return [Span(list(self.first), False)] if self.first else []

  def _text(self, text: str) -> list[Span]:
    """A text that is no target; nothing of none."""
    return [Span(self._encode(text), False)] if text else []

  def _media(self, record: Record) -> list[Span | Medium]:
    """The media of a record, with the texts around them."""
    parts: list[Span | Medium] = []
    for name in self.modalities:
      if record.get(name) is not None:
        before, after = around(self.config.data.sequence, name)
        parts += [*self._text(before), Medium(name), *self._text(after)]
    return parts

  def _encode(self, text: str) -> list[int]:
    check_texts([text])
    return self.tokenizer.encode(text.lower() if self.text.lowercase else text)

  def _document(self, record: Record, source: Source) -> list[int]:
    text = self._captions(record, source)[0]
    return [*self.first, *self._encode(text), self.tokenizer.eos_id]

  def _captions(self, record: Record, source: Source) -> list[str]:
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
    captions = self._captions(record, source)
    return captions[0 if rng is None else rng.integers(len(captions))]

  def _questions(
    self, record: Record, piece: Piece, rng: np.random.Generator | None
  ) -> list[tuple[str, str]]:
    """The piece's question with its answer; in training `per_example` different ones, drawn."""
    pairs = _pairs(record)
    if piece.part >= 0 or rng is None:
      return [pairs[max(piece.part, 0)]]
    each = min(self.text.per_example, len(pairs))
    return [pairs[i] for i in rng.choice(len(pairs), each, replace=False)]

  def _conversation(self, record: Record, part: int, stop: int = 0) -> list[Span | Medium]:
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
        raise UserError(
          f"its conversation has {WORDS[part.modality]}s, of which the model has no encoder"
        )
      medium_of(record, part)
      before, after = map(self._text, around(self.config.data.sequence, part.modality))
      last = found[-1] if found else None
      if before and isinstance(last, Span) and is_written(before[0].tokens, last.tokens):
        before, after = [], []
      found += [*before, part, *after]
    return found

  def _answers(
    self, record: Record, source: Source, piece: Piece
  ) -> list[tuple[int, list[Span | Medium]]]:
    """[(side of preferences.SIDES, parts of the prompt and this answer)]. Raises UserError."""
    other = source[piece.other[0]] if piece.other else None
    talks = talks_of(record, piece.part, other, piece.other[1] if piece.other else 0)
    return [(side, self.turns(record, talk, loss="last")) for side, talk in talks]

  # -- Which examples make a row -------------------------------------------------------------------

  def examples(self, source: Source) -> tuple[list[Piece], np.ndarray, np.ndarray]:
    """(the examples of an epoch, the most places that each takes int [N], its media int [N, M]).

    Examples that no row has room for are left out and counted, with a line on stderr. A record that
    cannot be read is an example of no place, which costs its row nothing.
    """
    if source.text == "preference":
      return self._judged(source)
    pieces, lengths, media, long = [], [], [], []
    targets: list[int] = []
    broken: list[str] = []
    for index in range(len(source)):
      try:
        record = source[index]
        counts = [self.most[m] * (record.get(m) is not None) for m in self.modalities]
        if source.text == "conversation":
          for piece, size, counts in self._talks(record, index, targets, broken):
            if not piece:
              long.append(size)
              continue
            pieces.append(piece)
            lengths.append(size)
            media.append(counts)
          continue
        if source.text == "document":
          total = len(self._document(record, source))
          # The last token of a piece is the first of the next, where it is context and no target.
          starts = range(0, max(1, total - 1), max(1, self.length - 1))
          pieces += [Piece(index, -1, at, min(at + self.length, total)) for at in starts]
          lengths += [min(self.length, total - at) for at in starts]
          media += [[0] * len(counts)] * len(starts)
          continue
        size = self._most(record, source)
      except UserError as error:
        broken.append(f"{source.name}[{index}]: {error}")
        counts, size = [0] * len(self.modalities), 0
      if size > self.length:
        long.append(size)
        continue
      pieces.append(Piece(index))
      lengths.append(size)
      media.append(counts)
    if source.text == "conversation":
      self._say_of_conversations(source, pieces, targets, broken)
    self._say_of_long(source, long, len(source))
    shape = (len(pieces), len(self.modalities))
    return pieces, np.array(lengths, np.int64), np.array(media, np.int64).reshape(shape)

  def _say_of_long(self, source: Source, long: Sequence[int], total: int) -> None:
    """Prints how many examples no row has room for, and the tokens of the longest."""
    if long:
      line = (
        f"{source.name}: {len(long):,} of {total:,} examples are longer than data.sequence.length "
        f"{self.length} and left out; the longest has {max(long)} tokens"
      )
      print(printable(line), file=sys.stderr, flush=True)

  def _judged(self, source: Source) -> tuple[list[Piece], np.ndarray, np.ndarray]:
    """`examples` of a source of preferences: its answers stay together, whole. Raises UserError:
    there is none that fits.
    """
    fitting: list[tuple[Piece, int, list[int]]] = []
    long: list[int] = []
    broken: list[str] = []
    targets: list[int] = []
    places = pairs_of(source, broken)
    others = places[1:] + places[:1] if asks_others(self.config) else [None] * len(places)
    for place, other in zip(places, others, strict=True):
      piece = Piece(*place, other=other if other != place else None)
      try:
        answers = self._answers(source[piece.record], source, piece)
      except UserError as error:
        broken.append(f"{source.name}[{piece.record}]: {error}")
        continue
      size, counts = sum(self.size(parts) for _, parts in answers), self.slots_of(answers[0][1])
      if size > self.length or max(counts, default=0) > self.slots:
        long.append(size)
        continue
      fitting.append((piece, size, counts))
      targets += [
        sum(len(part.tokens) for part in parts if isinstance(part, Span) and part.target)
        for side, parts in answers
        if SIDES[side] != "other"
      ]
    if not fitting:
      if not long:
        raise UserError(f"{source.name}: no preference can be used ({(broken or ['none'])[0]})")
      raise UserError(
        f"{source.name}: no preference fits data.sequence.length {self.length} and slots "
        f"{self.slots}; the shortest has {min(long)} tokens. Raise them"
      )
    lines = [
      f"{source.name}: {len(fitting):,} preferences with {len(targets):,} answers, "
      f"{np.mean(targets):.1f} target tokens each (from {min(targets):,} to {max(targets):,})"
    ]
    if broken:
      lines.append(f"{source.name}: {len(broken):,} faults, such as {broken[0]}")
    print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    self._say_of_long(source, long, len(places))
    pieces, lengths, media = (list(column) for column in zip(*fitting, strict=True))
    return (
      pieces,
      np.array(lengths, np.int64),
      np.array(media, np.int64).reshape(len(pieces), len(self.modalities)),
    )

  def _talks(
    self, record: Record, index: int, targets: list[int], broken: list[str]
  ) -> list[tuple[Piece | None, int, list[int]]]:
    """`_fitting` of each conversation of a record; those that cannot be used take no place."""
    found, shown = [], [0] * len(self.modalities)
    for part in range(len(record.get("conversations") or [None])):
      try:
        found.append(self._fitting(record, index, part, targets))
        shown = np.add(shown, found[-1][2]).tolist()
      except UserError as error:
        broken.append(f"{record['id']}: {error}")
        found.append((Piece(index, part), 0, [0] * len(self.modalities)))
    for name, count in zip(self.modalities, shown, strict=True):
      if found[0][1] and not count and record.get(name) is not None:
        broken.append(f"{record['id']}: its {WORDS[name]} stands in no conversation, and is unseen")
    return found

  def _fitting(
    self, record: Record, index: int, part: int, targets: list[int]
  ) -> tuple[Piece | None, int, list[int]]:
    """(a conversation as an example, its places, its media), cut after the last answer that fits a
    row; None and its places where not even the first does. Its target tokens go into `targets`.
    """
    parts = self._conversation(record, part)
    talk = record["conversations"][part]
    stop, whole = 0, self.size(parts)
    while True:
      counts, size = self.slots_of(parts), self.size(parts)
      if size <= self.length and max(counts, default=0) <= self.slots:
        targets.append(sum(len(p.tokens) for p in parts if isinstance(p, Span) and p.target))
        return Piece(index, part, 0, stop), size, counts
      answers = [n for n, turn in enumerate(talk[: stop or None], 1) if turn["role"] == "assistant"]
      ends = [n for n in answers if n < (stop or len(talk))]
      if not ends:
        return None, whole, counts
      stop = ends[-1]
      parts = self._conversation(record, part, stop)

  def _say_of_conversations(
    self, source: Source, pieces: Sequence[Piece], targets: Sequence[int], broken: Sequence[str]
  ) -> None:
    """Prints what is learned of a source. Raises UserError: nothing is."""
    if not sum(targets):
      why = f" ({broken[0]})" if broken else ""
      raise UserError(
        f"{source.name}: no conversation has a target: no turn of an assistant that fits "
        f"data.sequence.length {self.length}{why}"
      )
    cut = sum(piece.stop > 0 for piece in pieces)
    lines = [
      f"{source.name}: {len(targets):,} conversations, {np.mean(targets):.1f} target tokens each "
      f"(from {min(targets):,} to {max(targets):,})"
    ]
    if cut:
      lines.append(
        f"{source.name}: {cut:,} conversations are longer than a row (data.sequence.length "
        f"{self.length}, slots {self.slots}) and end after the last answer that fits"
      )
    if broken:
      lines.append(f"{source.name}: {len(broken):,} faults, such as {broken[0]}")
    print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)

  def _most(self, record: Record, source: Source) -> int:
    """The most places that an example of a record can take, whatever is drawn."""
    fixed = len(self.first) + self.size(self._media(record))
    s = self.config.data.sequence
    if source.text == "question":
      pairs, each = _pairs(record), self.text.per_example
    else:
      pairs, each = [("", text) for text in self._captions(record, source)], 1
    sizes = [len(self._encode(prompted(s, q))) + len(self._encode(a)) + 1 for q, a in pairs]
    return fixed + sum(sorted(sizes)[-each:])

  def table(self, source: Source, packed: bool, seed: int) -> list[list[Piece]]:
    """The rows of an epoch: the examples of each."""
    if self.room:
      return [[piece] for piece in self.prompts(source)]
    pieces, lengths, media = self.examples(source)
    if not pieces:
      raise UserError(
        f"{source.name}: no example fits data.sequence.length {self.length}. Raise it"
      )
    rows = [[i] for i in range(len(pieces))]
    if packed:
      rows = pack(lengths, media, self.length, self.slots, seed)
      print(
        printable(
          f"{source.name}: {len(pieces):,} examples in {len(rows):,} rows of {self.length} tokens, "
          f"{100 * (1 - filling(lengths, rows, self.length)):.1f}% of them padding"
        ),
        file=sys.stderr,
        flush=True,
      )
    return [[pieces[i] for i in row] for row in rows]

  def prompts(self, source: Source) -> list[Piece]:
    """The prompts of an epoch that a model answers itself: all questions, or the end of every
    conversation. Those that leave no room for an answer are left out and counted, with a line on
    stderr; a record that cannot be read is one that fits. Raises UserError: none fits.
    """
    pieces: list[Piece] = []
    sizes: list[int] = []
    long: list[int] = []
    broken: list[str] = []
    kind = "questions" if source.text == "question" else "conversations"
    for index in range(len(source)):
      try:
        count = len(source[index].get(kind) or ()) or 1
      except UserError:
        count = 1
      for piece in (Piece(index, part) for part in range(count)):
        try:
          parts = self.before_answer(source[index], source, piece)
        except UserError as error:
          broken.append(f"{source.name}[{index}]: {error}")
          pieces.append(piece)
          continue
        size = self.size(parts)
        if size > self.length - self.room or max(self.slots_of(parts), default=0) > self.slots:
          long.append(size)
          continue
        pieces.append(piece)
        sizes.append(size)
    if not sizes:
      why = f"the shortest prompt has {min(long):,} tokens; raise them" if long else broken[0]
      raise UserError(
        f"{source.name}: no prompt leaves room for an answer of {self.room} tokens in "
        f"data.sequence.length {self.length}, slots {self.slots} ({why})"
      )
    lines = [
      f"{source.name}: {len(sizes):,} prompts of {min(sizes):,} to {max(sizes):,} tokens, in "
      f"{self.length - self.room:,} places before {self.room:,} for an answer"
    ]
    if broken:
      lines.append(f"{source.name}: {len(broken):,} faults, such as {broken[0]}")
    if long:
      lines.append(
        f"{source.name}: {len(long):,} prompts are too long, the longest {max(long):,} tokens, and "
        "left out"
      )
    print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    return pieces

  def in_order(self, source: Source) -> list[Piece]:
    """The examples of an evaluation, in the order of the records; every question of each."""
    if source.text in ("document", "conversation", "preference"):
      return self.examples(source)[0]
    pieces = []
    for index in range(len(source)):
      count = 1
      if source.text == "question":
        try:
          count = len(source[index].get("questions") or ()) or 1
        except UserError:
          count = 1
      pieces += [Piece(index, part) for part in range(count)]
    return pieces

  # -- Rows as arrays ------------------------------------------------------------------------------

  def blank(self, rows: int, judged: bool = False) -> dict[str, Any]:
    """Arrays of `rows` rows of padding; judged: with those of preferences."""
    filling = dict(tokens=self.pad_id, media_index=-1)

    def make(spec: dict[str, Any]) -> dict[str, Any]:
      return {
        name: make(value)
        if isinstance(value, dict)
        else np.full((rows, *value[0]), filling.get(name, 0), value[1])
        for name, value in spec.items()
      }

    spec = sequence_spec(self.config, self.reader, self.length, self.slots)
    return make(spec | (preference_spec(self.length) if judged else {}))

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
    asked_of(record, source.text, piece.part)
    if source.text == "question":
      return self.prompt(record, source, piece)
    turns, last = answered(record, piece.part)
    return self.turns(record, turns[:last], prompt=True)

  def asked(self, source: Source, piece: Piece) -> Asked | None:
    """The question of such a prompt, its answer and facts; None = it cannot be read."""
    try:
      return asked_of(source[piece.record], source.text, piece.part)
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
    most = {**self.most, "image": 1} if self._are_whole(parts) else self.most
    return [most[name] * counts[name] for name in self.modalities]

  def fill_prompt(
    self,
    batch: dict[str, Any],
    row: int,
    parts: list[Span | Medium] | UserError,
    source: Source,
    index: int,
    rng: np.random.Generator | None = None,
  ) -> list[tuple[str, str]]:
    """Writes a prompt about record `index`, and its `length`; returns (id, reason) if it cannot be.
    parts: of it, or why there are none. rng: of the augmentation of its media.
    """
    batch["sequence"]["length"][row] = 1
    name = f"{source.name}[{index}]"
    try:
      record = source[index]
      name = f"{source.name} {record['id']}"
      if isinstance(parts, UserError):
        raise parts
      self._check_room(parts, 0)
      used = dict.fromkeys(self.modalities, 0)
      size = self._write(batch, row, 0, 1, parts, record, source, used, rng)
    except UserError as error:
      return [(name, str(error))]
    batch["sequence"]["length"][row] = size
    return []

  def fill(
    self,
    batch: dict[str, Any],
    row: int,
    pieces: Sequence[Piece],
    source: Source,
    rng: np.random.Generator | None,
  ) -> list[tuple[str, str]]:
    """Writes the examples of a row; returns (id, reason) of each that could not be used."""
    at, used, failed = 0, dict.fromkeys(self.modalities, 0), []
    for number, piece in enumerate(pieces, 1):
      name = f"{source.name}[{piece.record}]"
      try:
        record = source[piece.record]
        name = f"{source.name} {record['id']}"
        if source.text == "preference":
          at = self._write_answers(batch, row, at, number, piece, record, source, used)
          continue
        parts = self.parts(record, source, piece, rng)
        self._check_room(parts, at)
        at = self._write(batch, row, at, number, parts, record, source, used, rng)
      except UserError as error:
        failed.append((name, str(error)))
    return failed

  def _check_room(self, parts: Sequence[Span | Medium], at: int) -> None:
    """Raises UserError: a row has no room for the parts from place `at` on."""
    if (size := self.size(parts)) > self.length - at:
      most = self.config.data.sequence.length
      raise UserError(f"it has {size} tokens, but data.sequence.length is {most}")

  def _write(
    self,
    batch: dict[str, Any],
    row: int,
    at: int,
    number: int,
    parts: Sequence[Span | Medium],
    record: Record,
    source: Source,
    used: dict[str, int],
    rng: np.random.Generator | None,
  ) -> int:
    """Writes one example from place `at` on; returns the place after it. Media are read first, so
    that one that cannot be read leaves nothing behind.
    """
    read = self._read(parts, record, source, rng)
    return self._place(batch, row, at, number, parts, read, used)

  def _write_answers(
    self,
    batch: dict[str, Any],
    row: int,
    at: int,
    number: int,
    piece: Piece,
    record: Record,
    source: Source,
    used: dict[str, int],
  ) -> int:
    """Writes the answers of a preference, each after its prompt, from place `at` on; returns the
    place after them. Its media are read once, as in evaluation: what a reference made of them
    before (`references`) is of the same pixels.
    """
    answers, preference = self._answers(record, source, piece), batch["preference"]
    known = self.references.get(source.fingerprint)
    if known is not None and not np.isfinite(known[piece.record, piece.part]).all():
      raise UserError(
        "the reference could not read it, so that its answers have no log-probability"
      )
    if (size := sum(self.size(parts) for _, parts in answers)) > self.length - at:
      raise UserError(f"its answers have {size} tokens, too many for a row of {self.length}")
    if number > len(preference["answers"][row]):
      raise UserError(f"its row has more preferences than its {self.length} tokens leave room for")
    read = self._read(answers[0][1], record, source, None)
    first = dict(used)
    for side, parts in answers:
      used.update(first)  # they share the slots of the media
      segment = len(SIDES) * (number - 1) + side + 1
      at = self._place(batch, row, at, segment, parts, read, used)
      preference["answers"][row, number - 1, side] = segment
    if known is not None:
      preference["reference"][row, number - 1] = known[piece.record, piece.part]
    return at

  def _read(
    self,
    parts: Sequence[Span | Medium],
    record: Record,
    source: Source,
    rng: np.random.Generator | None,
  ) -> list[tuple[list[dict[str, Any]], Tiling]]:
    """`_slots_of` each medium among the parts, in their order."""
    kept, alone = getattr(source, "cached", False), not self._are_whole(parts)
    media = [part for part in parts if isinstance(part, Medium)]
    return [self._slots_of(record, medium, kept, rng, alone) for medium in media]

  def _place(
    self,
    batch: dict[str, Any],
    row: int,
    at: int,
    number: int,
    parts: Sequence[Span | Medium],
    read: Sequence[tuple[list[dict[str, Any]], Tiling]],
    used: dict[str, int],
  ) -> int:
    """Writes parts as the example `number` from place `at` on; returns the place after them. read:
    what `_read` gave; used: the slots of each modality that are taken, which it counts on.
    """
    sequence, start, media = batch["sequence"], at, iter(read)
    written: list[Sequence[int] | Places] = []
    for part in parts:
      if not isinstance(part, Medium):
        places = slice(at, at + len(part.tokens))
        sequence["tokens"][row, places] = part.tokens
        sequence["loss_mask"][row, places] = part.target
        at = places.stop
        written.append(part.tokens)
        continue
      modality, first = part.modality, used[part.modality]
      (slots, tiling), arrays = next(media), batch["media"][modality]
      for slot, named in enumerate(slots, first):
        for key, value in named.items():
          arrays[key][row, slot] = value
        arrays["present"][row, slot] = True
      of_modality = self.modalities.index(modality) * self.slots + first
      inner = placeholders(self.config.data, modality, slots, tiling)[1:-1]
      for run in inner:
        if isinstance(run, Places):
          places = slice(at, at + len(run.offsets))
          written.append(run)
          sequence["media_index"][row, places] = of_modality + run.slot
          sequence["media_offset"][row, places] = run.offsets
          if run.weights is not None:
            sequence["media_weight"][row, places] = run.weights
        else:
          tokens = self._encode(run) if run else []
          places = slice(at, at + len(tokens))
          sequence["tokens"][row, places] = tokens
          written.append(tokens)
        at = places.stop
      used[modality] += len(slots)
    sequence["segment_ids"][row, start:at] = number
    axes = axes_of(self.config.model)
    positions, _ = positions_of(written, axes)
    sequence["positions"][row, start:at] = positions if axes > 1 else positions[:, 0]
    return at

  def _slots_of(
    self, record: Record, part: Medium, kept: bool, rng: np.random.Generator | None, alone: bool
  ) -> tuple[list[dict[str, Any]], Tiling]:
    """(the arrays of each slot that a medium of a record fills, how its tiles lie). alone: see
    `cut_into_tiles`. Raises UserError: unreadable.
    """
    reader, own = self.reader(part.modality), medium_of(record, part)
    if self.most[part.modality] == 1:
      arrays, _ = reader.read(own, kept and not part.number, rng)
      return [dict(zip(reader.shapes, arrays[:-1], strict=False))], Tiling()
    tiles, tiling = cut_into_tiles(reader.decode(own[part.modality]), self.config.data.image, alone)
    return [{"pixels": tile} for tile in tiles], tiling


def _pairs(record: Record) -> list[tuple[str, str]]:
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


def sequence_spec(
  config, reader: Callable[[str], Any], length: int = 0, slots: int = 0
) -> dict[str, Any]:
  """{"sequence": {array: (shape of a row, dtype)}, "media": {modality: {...}}} of a batch, and
  "preference" where a source of the config has judged answers.

  length, slots: of a row; 0 = those of data.sequence.
  """
  length, slots = length or config.data.sequence.length, slots or config.data.sequence.slots
  modalities = media_of(config)
  names = dict(tokens=np.int32, positions=np.int32, segment_ids=np.int32, loss_mask=np.bool_)
  if modalities:
    names |= dict(media_index=np.int32, media_offset=np.int32)
  sequence: dict[str, tuple[tuple[int, ...], Any]] = {
    name: ((length,), np.dtype(kind)) for name, kind in names.items()
  }
  if (axes := axes_of(config.model)) > 1:
    sequence["positions"] = ((length, axes), np.dtype(np.int32))
  if "image" in modalities and mixes_tokens(config.data):
    sequence["media_offset"] = ((length, 4), np.dtype(np.int32))
    sequence["media_weight"] = ((length, 4), np.dtype(np.float32))
  judged = any(entry.text == "preference" for entry in config.data.sources.values())
  more = preference_spec(length) if judged else {}
  if not modalities:
    return {"sequence": sequence, **more}
  media: dict[str, Any] = {}
  for name in modalities:
    shapes = {key: value for key, value in reader(name).shapes.items() if key != "key"}
    media[name] = {
      key: ((slots, *shape), np.dtype(dtype)) for key, (shape, dtype) in shapes.items()
    }
    media[name]["present"] = ((slots,), np.dtype(bool))
  return {"sequence": sequence, "media": media, **more}


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
