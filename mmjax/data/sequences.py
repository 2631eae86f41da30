"""Rows of a language model: text and media in one sequence, several examples a row.

A record becomes a list of parts: spans of tokens, of which some are targets, and media, which take
as many places as the config gives them. What a source's texts are says how:

  document  the text, all of it a target; longer ones are cut into pieces that fill a row
  caption   the media, then a caption, which is the target
  question  the media and a question, then its answer, which is the target; in training
            data.text.per_example of them one after another, each given those before it

Each target ends with <eos>; <bos> comes first where data.text.bos asks for it. What stands around
media and after them is written as data.sequence.written and data.sequence.prompt say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record
from mmjax.data.media import WORDS
from mmjax.data.packing import filling, pack
from mmjax.data.parts import MEDIA, Medium, Span
from mmjax.data.placeholders import Places, around, placeholders, prompted
from mmjax.data.sources import Source
from mmjax.data.text import Tokenizer, check_texts
from mmjax.printing import printable


class Piece(NamedTuple):
  """An example of a row: record number `record`, of a question the `part`-th (-1 = drawn), of a
  document the tokens from `start` to `stop` (0 = all).
  """

  record: int
  part: int = -1
  start: int = 0
  stop: int = 0


class Sequences:
  """Records as parts, and parts as rows. reader: gives the Reader of a modality."""

  def __init__(self, config, tokenizer: Tokenizer, reader: Callable[[str], Any]):
    s, self.config = config.data.sequence, config
    self.length, self.slots = s.length, s.slots
    self.modalities = media_of(config)
    self.places = {name: s[name] for name in self.modalities}
    self.tokenizer, self.reader, self.text = tokenizer, reader, config.data.text
    pad = self.text.pad_id if self.text.pad_id >= 0 else tokenizer.pad_id
    self.pad_id = max(pad, 0)
    if tokenizer.eos_id < 0:
      raise UserError(
        f"tokenizer {self.text.tokenizer!r} has no <eos>, with which every text of a sequence ends"
      )
    self.first = [tokenizer.bos_id] if self.text.bos else []

  # -- A record as parts ---------------------------------------------------------------------------

  def parts(
    self, record: Record, source: Source, piece: Piece, rng: np.random.Generator | None
  ) -> list[Span | Medium]:
    """The parts of an example. Raises UserError: the record lacks what its source should have."""
    if source.text == "document":
      tokens = self._document(record, source)
      return [Span(tokens[piece.start : piece.stop or None], True)]
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
    """Places that parts take."""
    return sum(
      self.places[part.modality] if isinstance(part, Medium) else len(part.tokens) for part in parts
    )

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

  # -- Which examples make a row -------------------------------------------------------------------

  def examples(self, source: Source) -> tuple[list[Piece], np.ndarray, np.ndarray]:
    """(the examples of an epoch, the most places that each takes int [N], its media int [N, M]).

    Examples that no row has room for are left out and counted, with a line on stderr. A record that
    cannot be read is an example of no place, which costs its row nothing.
    """
    pieces, lengths, media, long = [], [], [], []
    for index in range(len(source)):
      try:
        record = source[index]
        counts = [int(record.get(name) is not None) for name in self.modalities]
        if source.text == "document":
          total = len(self._document(record, source))
          # The last token of a piece is the first of the next, where it is context and no target.
          starts = range(0, max(1, total - 1), max(1, self.length - 1))
          pieces += [Piece(index, -1, at, min(at + self.length, total)) for at in starts]
          lengths += [min(self.length, total - at) for at in starts]
          media += [[0] * len(counts)] * len(starts)
          continue
        size = self._most(record, source)
      except UserError:
        counts, size = [0] * len(self.modalities), 0
      if size > self.length:
        long.append(size)
        continue
      pieces.append(Piece(index))
      lengths.append(size)
      media.append(counts)
    if long:
      print(
        printable(
          f"{source.name}: {len(long):,} of {len(source):,} examples are longer than "
          f"data.sequence.length {self.length} and left out; the longest has {max(long)} tokens"
        ),
        file=sys.stderr,
        flush=True,
      )
    shape = (len(pieces), len(self.modalities))
    return pieces, np.array(lengths, np.int64), np.array(media, np.int64).reshape(shape)

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

  def in_order(self, source: Source) -> list[Piece]:
    """The examples of an evaluation, in the order of the records; every question of each."""
    if source.text == "document":
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

  def blank(self, rows: int) -> dict[str, Any]:
    """Arrays of `rows` rows of padding."""
    filling = dict(tokens=self.pad_id, media_index=-1)

    def make(spec: dict[str, Any]) -> dict[str, Any]:
      return {
        name: make(value)
        if isinstance(value, dict)
        else np.full((rows, *value[0]), filling.get(name, 0), value[1])
        for name, value in spec.items()
      }

    return make(sequence_spec(self.config, self.reader))

  def fill(
    self,
    batch: dict[str, Any],
    row: int,
    pieces: Sequence[Piece],
    source: Source,
    rng: np.random.Generator | None,
    prompts: bool = False,
  ) -> list[tuple[str, str]]:
    """Writes the examples of a row; returns (id, reason) of each that could not be used.

    prompts: only what comes before the first target, and its `length`: what a text is generated
    from.
    """
    at, used, failed = 0, dict.fromkeys(self.modalities, 0), []
    for number, piece in enumerate(pieces, 1):
      name = f"{source.name}[{piece.record}]"
      try:
        record = source[piece.record]
        name = f"{source.name} {record['id']}"
        parts = self.parts(record, source, piece, rng)
        if prompts:
          parts = parts[: next(i for i, p in enumerate(parts) if isinstance(p, Span) and p.target)]
        if self.size(parts) > self.length - at:
          raise UserError(
            f"it has {self.size(parts)} tokens, but data.sequence.length is {self.length}"
          )
        at = self._write(batch, row, at, number, parts, record, source, used, rng)
      except UserError as error:
        failed.append((name, str(error)))
    if prompts:
      batch["sequence"]["length"][row] = max(at, 1)
    return failed

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
    kept = getattr(source, "cached", False)
    read = [
      (
        self.reader(part.modality).read(record, kept, rng)[0][:-1]
        if isinstance(part, Medium)
        else ()
      )
      for part in parts
    ]
    sequence, start = batch["sequence"], at
    for part, arrays in zip(parts, read, strict=True):
      if isinstance(part, Medium):
        modality, slot = part.modality, used[part.modality]
        slots = batch["media"][modality]
        named = dict(zip([k for k in slots if k != "present"], arrays, strict=True))
        for key, value in named.items():
          slots[key][row, slot] = value
        slots["present"][row, slot] = True
        written = placeholders(self.config.data.sequence, modality, named)
        (of_slot,) = (part for part in written if isinstance(part, Places))
        places = slice(at, at + len(of_slot.offsets))
        sequence["media_index"][row, places] = self.modalities.index(modality) * self.slots + slot
        sequence["media_offset"][row, places] = of_slot.offsets
        used[modality] += 1
      else:
        places = slice(at, at + len(part.tokens))
        sequence["tokens"][row, places] = part.tokens
        sequence["loss_mask"][row, places] = part.target
      at = places.stop
    sequence["segment_ids"][row, start:at] = number
    sequence["positions"][row, start:at] = np.arange(at - start)
    return at


def _pairs(record: Record) -> list[tuple[str, str]]:
  """The questions of a record with their answers. Raises UserError: it has none."""
  pairs = record.get("questions") or []
  if not pairs:
    raise UserError("it has no questions")
  return pairs


def sequence_spec(config, reader: Callable[[str], Any]) -> dict[str, Any]:
  """{"sequence": {array: (shape of a row, dtype)}, "media": {modality: {...}}} of a batch."""
  length, slots = config.data.sequence.length, config.data.sequence.slots
  modalities = media_of(config)
  names = dict(tokens=np.int32, positions=np.int32, segment_ids=np.int32, loss_mask=np.bool_)
  if modalities:
    names |= dict(media_index=np.int32, media_offset=np.int32)
  sequence = {name: ((length,), np.dtype(kind)) for name, kind in names.items()}
  if not modalities:
    return {"sequence": sequence}
  media = {}
  for name in modalities:
    shapes = {key: value for key, value in reader(name).shapes.items() if key != "key"}
    media[name] = {
      key: ((slots, *shape), np.dtype(dtype)) for key, (shape, dtype) in shapes.items()
    }
    media[name]["present"] = ((slots,), np.dtype(bool))
  return {"sequence": sequence, "media": media}


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
