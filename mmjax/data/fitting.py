"""Which examples of a source make the rows of an epoch of a language model, and what is said of it:
what has no room is left out and counted, what cannot be read is named.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.contradictions import asks_side_by_side
from mmjax.data.builders import Record
from mmjax.data.media import WORDS
from mmjax.data.packing import filling, pack
from mmjax.data.parts import Span
from mmjax.data.placeholders import prompted
from mmjax.data.preferences import SIDES, asks_others, pairs_of
from mmjax.data.sequences import Piece, Sequences, questions_of
from mmjax.data.sources import Source
from mmjax.printing import log


def examples(sequences: Sequences, source: Source) -> tuple[list[Piece], np.ndarray, np.ndarray]:
  """(the examples of an epoch, the most places that each takes int [N], its media int [N, M]).

  Examples that no row has room for are left out and counted, with a line on stderr. A record that
  cannot be read is an example of no place, which costs its row nothing.
  """
  if source.text == "preference":
    return _judged(sequences, source)
  pieces, lengths, media, long = [], [], [], []
  targets: list[int] = []
  broken: list[str] = []
  for index in range(len(source)):
    try:
      record = source[index]
      counts = [sequences.most[m] * (record.get(m) is not None) for m in sequences.modalities]
      if source.text == "conversation":
        for piece, size, counts in _talks(sequences, record, index, targets, broken):
          if not piece:
            long.append(size)
            continue
          pieces.append(piece)
          lengths.append(size)
          media.append(counts)
        continue
      if source.text == "document":
        total = len(sequences.document(record, source))
        # The last token of a piece is the first of the next, where it is context and no target.
        starts = range(0, max(1, total - 1), max(1, sequences.length - 1))
        pieces += [Piece(index, -1, at, min(at + sequences.length, total)) for at in starts]
        lengths += [min(sequences.length, total - at) for at in starts]
        media += [[0] * len(counts)] * len(starts)
        continue
      size = _most(sequences, record, source)
    except UserError as error:
      broken.append(f"{source.name}[{index}]: {error}")
      counts, size = [0] * len(sequences.modalities), 0
    if size > sequences.length:
      long.append(size)
      continue
    pieces.append(Piece(index))
    lengths.append(size)
    media.append(counts)
  if source.text == "conversation":
    _tell_of_conversations(sequences, source, pieces, targets, broken)
  _tell_of_long(sequences, source, long, len(source))
  shape = (len(pieces), len(sequences.modalities))
  return pieces, np.array(lengths, np.int64), np.array(media, np.int64).reshape(shape)


def _tell_of_long(sequences: Sequences, source: Source, long: Sequence[int], total: int) -> None:
  """Prints how many examples no row has room for, and the tokens of the longest."""
  if long:
    line = (
      f"{source.name}: {len(long):,} of {total:,} examples are longer than data.sequence.length "
      f"{sequences.length} and left out; the longest has {max(long)} tokens"
    )
    _print(source, [line])


def _judged(sequences: Sequences, source: Source) -> tuple[list[Piece], np.ndarray, np.ndarray]:
  """`examples` of a source of preferences: its answers stay together, whole. Raises UserError:
  there is none that fits.
  """
  fitting: list[tuple[Piece, int, list[int]]] = []
  long: list[int] = []
  broken: list[str] = []
  targets: list[int] = []
  places = pairs_of(source, broken)
  others = places[1:] + places[:1] if asks_others(sequences.config) else [None] * len(places)
  for place, other in zip(places, others, strict=True):
    piece = Piece(*place, other=other if other != place else None)
    try:
      answers = sequences.answers(source[piece.record], source, piece)
    except UserError as error:
      broken.append(f"{source.name}[{piece.record}]: {error}")
      continue
    size = sum(sequences.size(parts) for _, parts in answers)
    counts = sequences.slots_of(answers[0][1])
    if size > sequences.length or max(counts, default=0) > sequences.slots:
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
      f"{source.name}: no preference fits data.sequence.length {sequences.length} and slots "
      f"{sequences.slots}; the shortest has {min(long)} tokens. Raise them"
    )
  line = (
    f"{source.name}: {len(fitting):,} preferences with {len(targets):,} answers, "
    f"{np.mean(targets):.1f} target tokens each (from {min(targets):,} to {max(targets):,})"
  )
  _print(source, [line], broken)
  _tell_of_long(sequences, source, long, len(places))
  pieces, lengths, media = (list(column) for column in zip(*fitting, strict=True))
  return (
    pieces,
    np.array(lengths, np.int64),
    np.array(media, np.int64).reshape(len(pieces), len(sequences.modalities)),
  )


def _talks(
  sequences: Sequences, record: Record, index: int, targets: list[int], broken: list[str]
) -> list[tuple[Piece | None, int, list[int]]]:
  """`_fitting` of each conversation of a record; those that cannot be used take no place."""
  found, shown = [], [0] * len(sequences.modalities)
  each = sequences.text.loss == "each"
  for part, talk in enumerate(record.get("conversations") or [[]]):
    try:
      for stop in _answers(talk) if each else [0]:
        found.append(_fitting(sequences, record, index, part, targets, stop))
        shown = np.add(shown, found[-1][2]).tolist()
    except UserError as error:
      broken.append(f"{record['id']}: {error}")
      found.append((Piece(index, part), 0, [0] * len(sequences.modalities)))
  for name, count in zip(sequences.modalities, shown, strict=True):
    if found[0][1] and not count and record.get(name) is not None:
      broken.append(f"{record['id']}: its {WORDS[name]} stands in no conversation, and is unseen")
  return found


def _fitting(
  sequences: Sequences, record: Record, index: int, part: int, targets: list[int], stop: int
) -> tuple[Piece | None, int, list[int]]:
  """(a conversation as an example, its places, its media), cut after the last answer that fits a
  row; None and its places where not even the first does. Its target tokens go into `targets`.
  stop: turns up to the one answer that is learned; 0 = all, which may be cut.
  """
  parts = sequences.conversation(record, part, stop)
  talk = record["conversations"][part]
  one, whole = stop > 0, sequences.size(parts)
  while True:
    counts, size = sequences.slots_of(parts), sequences.size(parts)
    if size <= sequences.length and max(counts, default=0) <= sequences.slots:
      targets.append(sum(len(p.tokens) for p in parts if isinstance(p, Span) and p.target))
      return Piece(index, part, 0, stop), size, counts
    ends = [n for n in _answers(talk) if n < (stop or len(talk))]
    if one or not ends:
      return None, whole, counts
    stop = ends[-1]
    parts = sequences.conversation(record, part, stop)


def _answers(talk: Sequence[Mapping[str, Any]]) -> list[int]:
  """After how many turns each answer of the assistant ends."""
  return [n for n, turn in enumerate(talk, 1) if turn["role"] == "assistant"]


def _tell_of_conversations(
  sequences: Sequences,
  source: Source,
  pieces: Sequence[Piece],
  targets: Sequence[int],
  broken: Sequence[str],
) -> None:
  """Prints what is learned of a source. Raises UserError: nothing is."""
  if not sum(targets):
    why = f" ({broken[0]})" if broken else ""
    raise UserError(
      f"{source.name}: no conversation has a target: no turn of an assistant that fits "
      f"data.sequence.length {sequences.length}{why}"
    )
  each = sequences.text.loss == "each"
  cut = 0 if each else sum(piece.stop > 0 for piece in pieces)
  lines = [
    f"{source.name}: {len(targets):,} {'answers' if each else 'conversations'}, "
    f"{np.mean(targets):.1f} target tokens each "
    f"(from {min(targets):,} to {max(targets):,})"
  ]
  if cut:
    lines.append(
      f"{source.name}: {cut:,} conversations are longer than a row (data.sequence.length "
      f"{sequences.length}, slots {sequences.slots}) and end after the last answer that fits"
    )
  _print(source, lines, broken)


def _most(sequences: Sequences, record: Record, source: Source) -> int:
  """The most places that an example of a record can take, whatever is drawn."""
  fixed = len(sequences.first) + sequences.size(sequences.media(record))
  s = sequences.config.data.sequence
  if source.text == "question":
    pairs, each = questions_of(record), sequences.text.per_example
    if not asks_side_by_side(sequences.config):
      fixed *= min(each, len(pairs))
  else:
    pairs, each = [("", text) for text in sequences.captions(record, source)], 1
  sizes = [len(sequences.encode(prompted(s, q))) + len(sequences.encode(a)) + 1 for q, a in pairs]
  return fixed + sum(sorted(sizes)[-each:])


def table(sequences: Sequences, source: Source, packed: bool, seed: int) -> list[list[Piece]]:
  """The rows of an epoch: the examples of each."""
  if sequences.room:
    return [[piece] for piece in prompts(sequences, source)]
  pieces, lengths, media = examples(sequences, source)
  if not pieces:
    raise UserError(
      f"{source.name}: no example fits data.sequence.length {sequences.length}. Raise it"
    )
  rows = [[i] for i in range(len(pieces))]
  if packed:
    rows = pack(lengths, media, sequences.length, sequences.slots, seed)
    padding = 100 * (1 - filling(lengths, rows, sequences.length))
    line = (
      f"{source.name}: {len(pieces):,} examples in {len(rows):,} rows of {sequences.length} "
      f"tokens, {padding:.1f}% of them padding"
    )
    _print(source, [line])
  return [[pieces[i] for i in row] for row in rows]


def prompts(sequences: Sequences, source: Source) -> list[Piece]:
  """The prompts of an epoch that a model answers itself: all questions, or the end of every
  conversation, or (data.text.loss "each") each answer of it. Those that leave no room for an answer
  are left out and counted, with a line on stderr; a record that cannot be read is one that fits.
  Raises UserError: none fits.
  """
  pieces: list[Piece] = []
  sizes: list[int] = []
  long: list[int] = []
  broken: list[str] = []
  for index in range(len(source)):
    for piece in _asked(sequences, source, index):
      try:
        parts = sequences.before_answer(source[index], source, piece)
      except UserError as error:
        broken.append(f"{source.name}[{index}]: {error}")
        pieces.append(piece)
        continue
      size, slots = sequences.size(parts), max(sequences.slots_of(parts), default=0)
      if size > sequences.length - sequences.room or slots > sequences.slots:
        long.append(size)
        continue
      pieces.append(piece)
      sizes.append(size)
  if not sizes:
    why = (
      f"the shortest prompt has {min(long):,} tokens; raise them"
      if long
      else (broken or ["it is empty"])[0]
    )
    raise UserError(
      f"{source.name}: no prompt leaves room for an answer of {sequences.room} tokens in "
      f"data.sequence.length {sequences.length}, slots {sequences.slots} ({why})"
    )
  lines = [
    f"{source.name}: {len(sizes):,} prompts of {min(sizes):,} to {max(sizes):,} tokens, in "
    f"{sequences.length - sequences.room:,} places before {sequences.room:,} for an answer"
  ]
  if long:
    lines.append(
      f"{source.name}: {len(long):,} prompts are too long, the longest {max(long):,} tokens, and "
      "left out"
    )
  _print(source, lines, broken)
  return pieces


def _asked(sequences: Sequences, source: Source, index: int) -> list[Piece]:
  """The prompts of a record; one where it has none, or is broken."""
  if source.text == "question":
    return _questions(source, index)
  try:
    talks = source[index].get("conversations") or [[]]
  except UserError:
    talks = [[]]
  each = sequences.text.loss == "each"
  return [
    Piece(index, part, 0, stop)
    for part, talk in enumerate(talks)
    for stop in (each and _answers(talk)) or [0]
  ]


def in_order(sequences: Sequences, source: Source) -> list[Piece]:
  """The examples of an evaluation, in the order of the records; every question of each."""
  if source.text in ("document", "conversation", "preference"):
    return examples(sequences, source)[0]
  if source.text == "question":
    return [piece for index in range(len(source)) for piece in _questions(source, index)]
  return [Piece(index, 0) for index in range(len(source))]


def _questions(source: Source, index: int) -> list[Piece]:
  """The questions of a record; one where it has none, or is broken."""
  try:
    count = len(source[index].get("questions") or ()) or 1
  except UserError:
    count = 1
  return [Piece(index, part) for part in range(count)]


def _print(source: Source, lines: Sequence[str], broken: Sequence[str] = ()) -> None:
  """Prints lines about a source, and how many faults it has."""
  faults = f"{source.name}: {len(broken):,} faults, such as {broken[0]}" if broken else ""
  for line in filter(None, (*lines, faults)):
    log(line, sys.stderr)
