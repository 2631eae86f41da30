"""A split as an evaluation reads it: in its stored order, not augmented, with every caption."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data import fitting
from mmjax.data.builders import Record
from mmjax.data.examples import MODALITIES, Batch, Examples, Row, scatter_rows
from mmjax.data.faults import CutMedia, report_unreadable
from mmjax.data.labels import class_names
from mmjax.data.media import content_key
from mmjax.data.modality_readers import ImageReader
from mmjax.data.parts import Medium, Span
from mmjax.data.sources import Joined, Source, open_source
from mmjax.data.text import text_key
from mmjax.data.tokenizers import Tokenizer


class Caption(NamedTuple):
  """A caption of an evaluation: `key` is the uint64 of its text key, `example` the index of its
  picture.
  """

  text: str
  language: str
  key: int
  example: int


class EvaluationData:
  """A split in its stored order, without augmentation, with every caption.

  entry: name, split, languages (and path, and text = "caption" or "question"). rows: which rows of
  each batch this process makes (None = all). labels int32 [N] (-1 = none) index label_names;
  class_names: of the labels that `batches` gives;
  values float32 [N, K] of all records, NaN = none, K = 0 where the source has none;
  media_keys {modality: uint64 [N]}, equal = the same content; captions: every one in the entry's
  languages; facts: what each record says about itself ({} = nothing);
  items [(example, part)], of a language model [Piece]: the rows of `batches` (several an example
  where its questions do not fit one row).
  tokenizer: of a checkpoint; None = the one that the config names, where texts are asked for.
  Raises UserError: no such data set, split or language; while reading: too many unreadable records.
  """

  def __init__(
    self,
    config,
    entry: Mapping[str, Any],
    batch_size: int,
    rows: Sequence[int] | np.ndarray | None = None,
    tokenizer: Tokenizer | None = None,
  ):
    self.config, self.batch_size = config, batch_size
    self.rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    self.source = open_source(entry, config)
    self.label_names = self.source.labels
    self.class_names = class_names(self.source, config.data)
    self.captions: list[Caption] = []
    self.facts: list[dict] = []
    self.items: list[Any] = []
    self._examples = Examples(config, train=False, tokenizer=tokenizer)
    self._bad: dict[str, str] = {}
    self._cut = CutMedia()
    self._read_facts()

  def __len__(self) -> int:
    return len(self.source)

  @property
  def unreadable(self) -> int:
    return len(self._bad)

  def images(self) -> Iterator[Batch]:
    """All pictures: {"image": {"pixels", "key"}, "valid", "id", "label"}; the last batch is filled
    up with rows that are not valid.
    """
    return self.media("image")

  def media(self, modality: str) -> Iterator[Batch]:
    """One modality of every example: {modality: {...}, "valid", "id", "label"}, `label` by
    `label_names`; filled up at the end.
    """
    for batch, index in self._batches([(i, -1) for i in range(len(self))], (modality,)):
      batch["label"] = np.where(index < 0, -1, self.labels[index]).astype(np.int32)
      yield batch

  def batches(self, modalities: Sequence[str]) -> Iterator[Batch]:
    """Every row of `items` with several modalities, and `label` where data.label has one; filled
    up at the end. Of a language model the sequences, one example a row.
    """
    for batch, _ in self._batches(self.items, tuple(modalities)):
      yield batch

  def prompts(self, modalities: Sequence[str]) -> Iterator[Batch]:
    """What texts are generated from: `batches`, and of a language model the sequences up to their
    first target.
    """
    if not self.config.data.sequence.length:
      yield from self.batches(modalities)
      return
    sequences = self._examples.sequences
    yield from self._prompts(
      (piece.record, functools.partial(sequences.prompt, source=self.source, piece=piece))
      for piece in self.items
    )

  def check_talk(self, record: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError: the turns are no conversation about the record, or none is answered."""
    parts = self._examples.sequences.turns(record, turns)
    if not any(isinstance(part, Span) and part.target for part in parts):
      raise UserError("no turn is the assistant's")

  def replies(
    self, asked: Sequence[tuple[int, Sequence[Mapping[str, Any]]]], others: Sequence[int] = ()
  ) -> Iterator[Batch]:
    """What a language model's next turns are generated from: (example, the turns so far), one a
    row, as long as the longest; filled up at the end. others: of each row, an example whose media
    the turns have after its own; () = of none.
    """
    turns = self._examples.sequences.turns
    source: Any = self.source
    places: Sequence[int] = [example for example, _ in asked]
    if others:
      source = Joined(self.source, list(zip(places, others, strict=True)))
      places = range(len(asked))
    yield from self._prompts(
      (
        (place, functools.partial(turns, messages=messages, prompt=True))
        for place, (_, messages) in zip(places, asked, strict=True)
      ),
      source,
    )

  def have_room(self, example: int, messages: Sequence[Mapping[str, Any]], other: int) -> bool:
    """Whether turns about the media of two examples can be read and fit into a row."""
    sequences = self._examples.sequences
    try:
      parts = sequences.turns(Joined(self.source, [(example, other)])[0], messages, prompt=True)
    except UserError:
      return False
    return sequences.size(parts) <= sequences.length

  def _prompts(
    self,
    asked: Iterable[tuple[int, Callable[[Record], list[Span | Medium]]]],
    source: Source | None = None,
  ) -> Iterator[Batch]:
    """Prompts, (example, what makes the parts of one of its record), one a row, in rows that are as
    long, and have as many slots, as these need. source: of the examples, None = `self.source`.
    """
    source = self.source if source is None else source
    rows: list[tuple[int, list[Span | Medium] | UserError]] = []
    for example, make in asked:
      try:
        rows.append((example, make(source[example])))
      except UserError as error:
        rows.append((example, error))
    narrow = self._examples.sequences.narrowed(x for _, x in rows if isinstance(x, list))
    for start in range(0, len(rows), self.batch_size):
      row = start + self.rows
      real = row < len(rows)
      chosen = [(source, *rows[i]) for i in row[real].tolist()]
      batch = self._examples.rows_of_prompts(chosen, [None] * len(chosen), narrow)
      yield self._filled_up(batch, real)
    self._cut.total()

  def _batches(
    self, items: list, modalities: tuple[str, ...]
  ) -> Iterator[tuple[Batch, np.ndarray]]:
    """(batch, example of each row, -1 = none)."""
    for start in range(0, len(items), self.batch_size):
      row = start + self.rows
      real = row < len(items)
      chosen = [items[i] for i in row[real].tolist()]
      alone = [None] * len(chosen)
      if self.config.data.sequence.length:
        rows = [(self.source, [piece]) for piece in chosen]
        judged = self.source.text == "preference"
        batch = self._examples.rows_of_sequences(rows, alone, judged)
      else:
        batch = self._examples([Row(self.source, *place) for place in chosen], alone, modalities)
      index = np.full(len(row), -1)
      index[real] = [item[0] for item in chosen]
      yield self._filled_up(batch, real), index
    self._cut.total()

  def _filled_up(self, batch: Batch, real: np.ndarray) -> Batch:
    """A batch with rows that are not valid where `real` is False; says what it could not use."""
    self._cut.add(batch.pop("cut"))
    report_unreadable(batch.pop("unreadable"), self._bad, self.config.data.max_unreadable)
    return scatter_rows(batch, real)

  def texts(self, texts: Sequence[str]) -> Iterator[Batch]:
    """Any texts, tokenised: {"text": {"tokens", "mask", "key"}, "valid"}, filled up as `images`."""
    for start in range(0, len(texts), self.batch_size):
      index = start + self.rows
      real = index < len(texts)
      rows = self._examples.text([texts[i] for i in index[real].tolist()])
      yield scatter_rows({"text": rows, "valid": np.ones(int(real.sum()), bool)}, real)

  def question(self, item: Any) -> tuple[str, str]:
    """(question, answer) of one of `items`. Raises UserError: the record cannot be read."""
    return self.source[item[0]]["questions"][max(item[1], 0)]

  def picture(self, index: int) -> np.ndarray:
    """One picture as the model sees it, uint8 [H, W, 3]; white if it cannot be read."""
    try:
      return ImageReader(self.config.data, False).picture(self.source[index]["image"] or b"")
    except UserError:
      return np.full((self.config.data.image.size,) * 2 + (3,), 255, np.uint8)

  def film(self, index: int, frames: int = 6) -> np.ndarray:
    """Some frames of a clip side by side, uint8 [H, frames * W, 3]; white if it cannot be read."""
    try:
      (clip, mask, _), _ = self._examples.reader("video").read(self.source[index], False, None)
    except UserError:
      return np.full((self.config.data.video.size,) * 2 + (3,), 255, np.uint8)
    chosen = np.linspace(0, max(0, int(mask.sum()) - 1), frames).round().astype(int)
    return np.concatenate(list(clip[chosen]), axis=1)

  def media_of(self, record: Mapping[str, Any], modality: str) -> dict[str, np.ndarray]:
    """The arrays of one modality of a record as the model gets them; {} if it cannot be read."""
    reader = self._examples.reader(modality)
    try:
      arrays, _ = reader.read(dict(record), False, None)
    except UserError:
      return {}
    return {name: np.asarray(x) for name, x in zip(reader.shapes, arrays, strict=True)}

  def _read_facts(self) -> None:
    """One pass over the records for captions, labels and the keys of media."""
    number = {label: i for i, label in enumerate(self.label_names)}
    asks, each = self.source.text == "question", self.config.data.text.per_example
    self.labels = np.full(len(self), -1, np.int32)
    self.values = np.full((len(self), len(self.source.values)), np.nan, np.float32)
    # A key that equals no other, until the record is read.
    absent = np.arange(2**63, 2**63 + len(self), dtype=np.uint64)
    self.media_keys = {name: absent.copy() for name in MODALITIES if name != "text"}
    for i in range(len(self)):
      try:
        record = self.source[i]
      except UserError:
        self.facts.append({})
        self.items.append((i, 0))
        continue
      self.facts.append(record.get("facts") or {})
      rows = -(-len(record.get("questions") or ()) // each) if asks else 1
      self.items += [(i, part) for part in range(rows)]
      self.labels[i] = number.get(record["label"], -1)
      if self.values.size and record.get("value") is not None:
        self.values[i] = record["value"]
      for name, keys in self.media_keys.items():
        if record.get(name) is not None:
          keys[i] = content_key(record, name)
      for language, captions in record["captions"].items():
        for caption in captions:
          high, low = text_key(caption)
          self.captions.append(Caption(caption, language, high << 32 | low, i))
    if self.config.data.sequence.length:
      self.items = list(fitting.in_order(self._examples.sequences, self.source))
