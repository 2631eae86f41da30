"""Examples of a language model written into the arrays of a batch, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.contradictions import asks_side_by_side
from mmjax.data.builders import Record
from mmjax.data.parts import Medium, Span
from mmjax.data.placeholders import Places, axes_of, mixes_tokens, placeholders, positions_of
from mmjax.data.preferences import SIDES, preference_spec
from mmjax.data.sequences import Piece, Sequences, media_of, medium_of
from mmjax.data.sources import Source
from mmjax.data.tiles import Tiling, cut_into_tiles


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
  if asks_side_by_side(config):
    names["trunks"] = np.int32
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


def blank(sequences: Sequences, rows: int, judged: bool = False) -> dict[str, Any]:
  """Arrays of `rows` rows of padding; judged: with those of preferences."""
  filling = dict(tokens=sequences.pad_id, media_index=-1)

  def make(spec: dict[str, Any]) -> dict[str, Any]:
    return {
      name: make(value)
      if isinstance(value, dict)
      else np.full((rows, *value[0]), filling.get(name, 0), value[1])
      for name, value in spec.items()
    }

  spec = sequence_spec(sequences.config, sequences.reader, sequences.length, sequences.slots)
  return make(spec | (preference_spec(sequences.length) if judged else {}))


def fill_prompt(
  sequences: Sequences,
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
    _check_room(sequences, parts, 0)
    used = dict.fromkeys(sequences.modalities, 0)
    size = _write(sequences, batch, row, 0, 1, parts, record, source, used, rng)
  except UserError as error:
    return [(name, str(error))]
  batch["sequence"]["length"][row] = size
  return []


def fill(
  sequences: Sequences,
  batch: dict[str, Any],
  row: int,
  pieces: Sequence[Piece],
  source: Source,
  rng: np.random.Generator | None,
) -> list[tuple[str, str]]:
  """Writes the examples of a row; returns (id, reason) of each that could not be used."""
  at, used, failed = 0, dict.fromkeys(sequences.modalities, 0), []
  trunk = 1  # the segment of the next example
  for number, piece in enumerate(pieces, 1):
    name = f"{source.name}[{piece.record}]"
    try:
      record = source[piece.record]
      name = f"{source.name} {record['id']}"
      if source.text == "preference":
        at = _write_answers(sequences, batch, row, at, number, piece, record, source, used)
        continue
      parts, branches = sequences.branches(record, source, piece, rng)
      _check_room(sequences, [*parts, *itertools.chain(*branches)], at)
      if not parts:
        read = _read(sequences, branches[0], record, source, rng)
        at = _place_all(sequences, batch, row, at, dict(enumerate(branches, trunk)), read, used)
        trunk += len(branches)
        continue
      start, at = at, _write(sequences, batch, row, at, trunk, parts, record, source, used, rng)
      ahead = 1 + int(batch["sequence"]["positions"][row, start:at].max(initial=-1))
      for segment, branch in enumerate(branches, trunk + 1):
        places = slice(at, _place(sequences, batch, row, at, segment, branch, [], used))
        batch["sequence"]["trunks"][row, places] = trunk
        batch["sequence"]["positions"][row, places] += ahead
        at = places.stop
      trunk += 1 + len(branches)
    except UserError as error:
      failed.append((name, str(error)))
  return failed


def _check_room(sequences: Sequences, parts: Sequence[Span | Medium], at: int) -> None:
  """Raises UserError: a row has no room for the parts from place `at` on."""
  if (size := sequences.size(parts)) > sequences.length - at:
    most = sequences.config.data.sequence.length
    raise UserError(f"it has {size} tokens, but data.sequence.length is {most}")


def _write(
  sequences: Sequences,
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
  read = _read(sequences, parts, record, source, rng)
  return _place(sequences, batch, row, at, number, parts, read, used)


def _write_answers(
  sequences: Sequences,
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
  answers, preference = sequences.answers(record, source, piece), batch["preference"]
  known = sequences.references.get(source.fingerprint)
  if known is not None and not np.isfinite(known[piece.record, piece.part]).all():
    raise UserError("the reference could not read it, so that its answers have no log-probability")
  if (size := sum(sequences.size(parts) for _, parts in answers)) > sequences.length - at:
    raise UserError(f"its answers have {size} tokens, too many for a row of {sequences.length}")
  if number > len(preference["answers"][row]):
    raise UserError(
      f"its row has more preferences than its {sequences.length} tokens leave room for"
    )
  first = len(SIDES) * (number - 1) + 1
  for side, _ in answers:
    preference["answers"][row, number - 1, side] = first + side
  read = _read(sequences, answers[0][1], record, source, None)
  segments = {first + side: parts for side, parts in answers}
  at = _place_all(sequences, batch, row, at, segments, read, used)
  if known is not None:
    preference["reference"][row, number - 1] = known[piece.record, piece.part]
  return at


def _read(
  sequences: Sequences,
  parts: Sequence[Span | Medium],
  record: Record,
  source: Source,
  rng: np.random.Generator | None,
) -> list[tuple[list[dict[str, Any]], Tiling]]:
  """`_slots_of` each medium among the parts, in their order."""
  kept, alone = getattr(source, "cached", False), not sequences.are_whole(parts)
  media = [part for part in parts if isinstance(part, Medium)]
  return [_slots_of(sequences, record, medium, kept, rng, alone) for medium in media]


def _place(
  sequences: Sequences,
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
    of_modality = sequences.modalities.index(modality) * sequences.slots + first
    inner = placeholders(sequences.config.data, modality, slots, tiling)[1:-1]
    for run in inner:
      if isinstance(run, Places):
        places = slice(at, at + len(run.offsets))
        written.append(run)
        sequence["media_index"][row, places] = of_modality + run.slot
        sequence["media_offset"][row, places] = run.offsets
        if run.weights is not None:
          sequence["media_weight"][row, places] = run.weights
      else:
        tokens = sequences.encode(run) if run else []
        places = slice(at, at + len(tokens))
        sequence["tokens"][row, places] = tokens
        written.append(tokens)
      at = places.stop
    used[modality] += len(slots)
  sequence["segment_ids"][row, start:at] = number
  axes = axes_of(sequences.config.model)
  positions, _ = positions_of(written, axes)
  sequence["positions"][row, start:at] = positions if axes > 1 else positions[:, 0]
  return at


def _place_all(
  sequences: Sequences,
  batch: dict[str, Any],
  row: int,
  at: int,
  examples: Mapping[int, Sequence[Span | Medium]],
  read: Sequence[tuple[list[dict[str, Any]], Tiling]],
  used: dict[str, int],
) -> int:
  """As `_place`, of {number: parts}: examples that share the slots of their media."""
  first = dict(used)
  for number, parts in examples.items():
    used.update(first)
    at = _place(sequences, batch, row, at, number, parts, read, used)
  return at


def _slots_of(
  sequences: Sequences,
  record: Record,
  part: Medium,
  kept: bool,
  rng: np.random.Generator | None,
  alone: bool,
) -> tuple[list[dict[str, Any]], Tiling]:
  """(the arrays of each slot that a medium of a record fills, how its tiles lie). alone: see
  `cut_into_tiles`. Raises UserError: unreadable.
  """
  reader, own = sequences.reader(part.modality), medium_of(record, part)
  if sequences.most[part.modality] == 1:
    arrays, _ = reader.read(own, kept and not part.number, rng)
    return [dict(zip(reader.shapes, arrays[:-1], strict=False))], Tiling()
  tiles, tiling = cut_into_tiles(
    reader.decode(own[part.modality]), sequences.config.data.image, alone
  )
  return [{"pixels": tile} for tile in tiles], tiling
