"""Records to the rows of a batch: media, texts, labels; random streams of rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record
from mmjax.data.labels import blank_labels, blank_values, class_names
from mmjax.data.modality_readers import READERS, Absent, Reader
from mmjax.data.parts import Medium, Span
from mmjax.data.rollouts import sampling
from mmjax.data.row_arrays import blank, fill, fill_prompt, sequence_spec
from mmjax.data.sequences import Piece, Sequences
from mmjax.data.sources import Source
from mmjax.data.text import TextTransform, drop_words
from mmjax.data.tokenizers import Tokenizer, check_texts, load_tokenizer

Batch = dict[str, Any]
MODALITIES = ("image", "text", "audio", "video", "series")


@dataclasses.dataclass(frozen=True)
class Row:
  """What a row of a batch is made of: record `index` of `source`; `part` chooses among its
  questions in evaluation (-1 = drawn at random).
  """

  source: Source
  index: int
  part: int = -1


class Examples:
  """Records to a batch: reading, transforms, a caption or questions, tokens, labels.

  An unusable record becomes a row of zeros that is not valid. With data.missing "mask" a record
  that only lacks a modality is usable: `<modality>.present` bool [B] is False there.
  """

  def __init__(self, config, train: bool, tokenizer: Tokenizer | None = None):
    """tokenizer: None = the one that the config names, where texts are asked for."""
    self.config, self.train, self.modalities = config, train, modalities_of(config)
    self._tokenizer = tokenizer
    self.drop_words = config.data.text.drop_words if train else 0.0
    self._readers: dict[str, Reader] = {}
    self._text: TextTransform | None = None
    self._numbers: dict[int, dict[str, int]] = {}
    if train:
      for name in self.modalities:
        self._open(name)  # now, so that a missing tokenizer shows at once

  def _open(self, modality: str) -> TextTransform | Reader:
    """What reads a modality."""
    return self.text if modality == "text" else self.reader(modality)

  @property
  def text(self) -> TextTransform:
    if self._text is None:
      self._text = TextTransform(
        self.config.data.text, self._tokenizer or load_tokenizer(self.config.data)
      )
    return self._text

  @functools.cached_property
  def sequences(self) -> Sequences:
    """Records as rows of a language model."""
    tokenizer = self._tokenizer or load_tokenizer(self.config.data)
    return Sequences(self.config, tokenizer, self.reader)

  def rows_of_sequences(
    self,
    rows: Sequence[tuple[Source, Sequence[Piece]]],
    rngs: Iterable[np.random.Generator | None],
    judged: bool = False,
  ) -> Batch:
    """A batch of a language model: the examples of each row. judged: with the arrays of
    preferences, also where no source of the config has some.
    """
    arrays = blank(self.sequences, len(rows), judged)
    batch: Batch = {**arrays, "valid": np.zeros(len(rows), bool), "id": [], "cut": []}
    batch["unreadable"] = []
    for number, ((source, pieces), rng) in enumerate(zip(rows, rngs, strict=True)):
      batch["id"].append(stand_in_id(source, pieces[0].record))
      failed = fill(self.sequences, arrays, number, pieces, source, rng)
      batch["valid"][number] = len(failed) < len(pieces)
      batch["unreadable"] += failed
    return batch

  def rows_of_prompts(
    self,
    rows: Sequence[tuple[Source, int, list[Span | Medium] | UserError]],
    rngs: Iterable[np.random.Generator | None],
    sequences: Sequences,
  ) -> Batch:
    """A batch of prompts: (source, record, the parts of one about it, or why there are none), one a
    row.
    """
    arrays = blank(sequences, len(rows))
    arrays["sequence"]["length"] = np.ones(len(rows), np.int32)
    batch: Batch = {**arrays, "valid": np.zeros(len(rows), bool), "id": [], "cut": []}
    batch["unreadable"] = []
    for number, ((source, index, parts), rng) in enumerate(zip(rows, rngs, strict=True)):
      batch["id"].append(stand_in_id(source, index))
      failed = fill_prompt(sequences, arrays, number, parts, source, index, rng)
      batch["valid"][number] = not failed
      batch["unreadable"] += failed
    return batch

  def rows_before_answers(
    self, rows: Sequence[tuple[Source, Piece]], rngs: Iterable[np.random.Generator | None]
  ) -> Batch:
    """A batch of prompts that the model answers itself while it trains, one a row."""
    prompts: list[tuple[Source, int, list[Span | Medium] | UserError]] = []
    for source, piece in rows:
      try:
        parts: Any = self.sequences.before_answer(source[piece.record], source, piece)
      except UserError as error:
        parts = error
      prompts.append((source, piece.record, parts))
    return self.rows_of_prompts(prompts, rngs, self.sequences.without_room())

  def reader(self, modality: str) -> Reader:
    if modality not in self._readers:
      self._readers[modality] = READERS[modality](self.config.data, self.train)
    return self._readers[modality]

  def __call__(
    self,
    rows: Sequence[Row],
    rngs: Iterable[np.random.Generator | None],
    modalities: Sequence[str] | None = None,
    length: int = 0,
  ) -> Batch:
    data, modalities, count = self.config.data, modalities or self.modalities, len(rows)
    batch: Batch = {"valid": np.zeros(count, bool), "id": [""] * count, "unreadable": [], "cut": []}
    each = data.text.per_example
    texts, labels = [[""] * each for _ in rows], blank_labels(self.config, count)
    values = blank_values(self.config, count)
    media = {name: self.reader(name).blank(count) for name in modalities if name != "text"}
    present = {name: np.ones(count, bool) for name in modalities}
    for number, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
      batch["id"][number] = stand_in_id(row.source, row.index)
      try:
        record = row.source[row.index]
        batch["id"][number] = record["id"]
        answers: list[str] = []
        for name in ("text", *media):  # texts first: the draws of a row come in this order
          try:
            if name == "text":
              texts[number], answers = self._texts(record, row, rng, wanted="text" in modalities)
              check_texts(texts[number])
            else:
              kept = getattr(row.source, "cached", False)
              arrays, surplus = self.reader(name).read(record, kept, rng)
              for array, value in zip(media[name].values(), arrays, strict=True):
                array[number] = value
              if surplus:
                batch["cut"].append((name, f"{row.source.name} {record['id']}", surplus))
          except Absent:
            if data.missing == "skip":
              raise
            if name in present:
              present[name][number] = False
        if labels is not None:
          self._label(labels[number : number + 1], record, row.source, answers)
        if values is not None and record.get("value") is not None:
          values[number] = record["value"]
        batch["valid"][number] = True
      except UserError as error:
        texts[number] = [""] * each
        for array in (array for arrays in media.values() for array in arrays.values()):
          array[number] = 0
        batch["unreadable"].append((f"{row.source.name} {batch['id'][number]}", str(error)))
    batch.update(media)
    if "text" in modalities:
      tokens = self.text([text for of_row in texts for text in of_row], length)
      batch["text"] = {
        k: v.reshape(count, each, *v.shape[1:]) if each > 1 else v for k, v in tokens.items()
      }
    if data.missing == "mask":
      for name in modalities:
        batch[name] = {**batch[name], "present": present[name]}
    if labels is not None:
      batch["label"] = labels
    if values is not None:
      batch["value"] = values
    return batch

  def _texts(
    self, record: Record, row: Row, rng: np.random.Generator | None, wanted: bool
  ) -> tuple[list[str], list[str]]:
    """(texts, answers) of a row, `per_example` each; answers [] where texts are captions. Questions
    are drawn even if only their answers are wanted. Raises Absent."""
    each = self.config.data.text.per_example
    if getattr(row.source, "text", "caption") == "question":
      return self._questions(record, row.part, rng)
    return [self._caption(record, row.source, rng) if wanted else "" for _ in range(each)], []

  def _caption(self, record: Record, source: Source, rng: np.random.Generator | None) -> str:
    """One of the captions: first a language, then one of its captions, then the words that stay.
    Without rng: the first.
    """
    languages = [
      language
      for language in source.languages or record["captions"]
      if record["captions"].get(language)
    ]
    if not languages:
      raise Absent(f"no caption in {', '.join(source.languages) or 'any language'}")
    if rng is None:
      return record["captions"][languages[0]][0]
    captions = record["captions"][languages[rng.integers(len(languages))]]
    captions = captions[: getattr(source, "first_captions", 0) or None]
    caption = captions[rng.integers(len(captions))]
    return drop_words(caption, self.drop_words, rng) if self.drop_words else caption

  def _questions(
    self, record: Record, part: int, rng: np.random.Generator | None
  ) -> tuple[list[str], list[str]]:
    """(questions, answers), `per_example` each: drawn, or the `part`-th so many, filled up with
    "".
    """
    pairs, each = record.get("questions") or [], self.config.data.text.per_example
    if not pairs:
      raise Absent("it has no questions")
    if rng is None:
      chosen = pairs[max(part, 0) * each :][:each]
    else:
      order = rng.permutation(len(pairs))
      chosen = [pairs[order[i % len(pairs)]] for i in range(each)]
    chosen = [*chosen, *[("", "")] * (each - len(chosen))]
    return [question for question, _ in chosen], [answer for _, answer in chosen]

  def _label(self, out: np.ndarray, record: Record, source: Source, answers: list[str]) -> None:
    """Writes the row [1, ...] of labels."""
    kind, numbers = self.config.data.label, self._class_numbers(source)
    if kind == "answer":
      out[:] = np.array([numbers.get(answer, -1) for answer in answers] or [-1], np.int32).reshape(
        out.shape
      )
    elif kind == "labels":
      for name in filter(None, record["label"].split("|")):
        out[0, numbers[name]] = True
    else:
      out[:] = numbers.get(record["label"], -1)

  def _class_numbers(self, source: Source) -> dict[str, int]:
    """{class: number} of a source."""
    if id(source) not in self._numbers:
      self._numbers[id(source)] = {
        name: number for number, name in enumerate(class_names(source, self.config.data))
      }
    return self._numbers[id(source)]


def row_spec(config, modalities: Sequence[str], length: int = 0) -> dict[str, Any]:
  """{modality: {array: (shape of an example, dtype)}}, and "label" where the config has one.
  length: tokens; 0 = data.text.length.
  """
  data, length = config.data, length or config.data.text.length
  if data.sequence.length:
    return sequence_spec(config, lambda name: READERS[name](data, False))
  spec: dict[str, Any] = {}
  for name in modalities:
    if name == "text":
      each = (data.text.per_example,) if data.text.per_example > 1 else ()
      spec[name] = {
        "tokens": ((*each, length), np.int32),
        "mask": ((*each, length), np.bool_),
        "key": ((*each, 2), np.uint32),
      }
      if data.text.words:
        spec[name]["words"] = ((*each, length), np.int32)
    else:
      spec[name] = dict(READERS[name](data, False).shapes)
    if data.missing == "mask":
      spec[name]["present"] = ((), np.bool_)
  if (labels := blank_labels(config, 1)) is not None:
    spec["label"] = (labels.shape[1:], labels.dtype)
  if (values := blank_values(config, 1)) is not None:
    spec["value"] = (values.shape[1:], values.dtype)
  return spec


def streams(seed: int, step: int, rows: Sequence[int]) -> Iterator[np.random.Generator]:
  """A stream of random numbers for each row: Philox (Salmon et al. 2011), whose counters differ in
  (step, row) and never meet.

  It is one generator that is set to the next row's counter: use each before taking the next. Making
  one takes 5 times as long.
  """
  bits = np.random.Philox(key=seed % 2**64)
  generator, state = np.random.Generator(bits), bits.state
  for row in rows:
    state["state"]["counter"][:] = (0, 0, row, step)
    bits.state = state
    yield generator


def prompt_row_spec(config) -> dict[str, Any]:
  """`row_spec` of prompts that the model answers itself: rows that end where an answer begins, and
  the tokens of each.
  """
  data, entry = config.data, sampling(config)
  length = data.sequence.length - (entry["max_length"] if entry else 0)
  spec = sequence_spec(config, lambda name: READERS[name](data, False), length)
  spec["sequence"]["length"] = ((), np.dtype(np.int32))
  return spec


def modalities_of(config, source: Mapping[str, Any] | None = None) -> list[str]:
  """The modalities of the batches: those of the source's entry, else of data.modalities, else of
  model.encoders.
  """
  key, chosen = "model.encoders", list(config.model.encoders)
  if config.data.modalities:
    key, chosen = "data.modalities", list(config.data.modalities)
  if source and source.get("modalities"):
    key, chosen = "data.sources.*.modalities", list(source["modalities"])
  for name in chosen:
    if name not in MODALITIES:
      raise UserError(
        f"{key}: the data has no modality {name!r}; there are: {', '.join(MODALITIES)}"
      )
  return [name for name in MODALITIES if name in chosen]


def stand_in_id(source: Source, index: int) -> str:
  """The id of a record whose own cannot be read."""
  return f"{source.name}[{index}]"


def scatter_rows(batch: Batch, real: np.ndarray) -> Batch:
  """Puts the rows of a batch where `real` bool [B] is true, and rows that are not valid (zeros,
  empty ids, label -1, value NaN) elsewhere.
  """
  if real.all():
    return batch

  def spread(name: str, value: Any) -> Any:
    if isinstance(value, dict):
      return {k: spread(k, v) for k, v in value.items()}
    if isinstance(value, list):
      rest = iter(value)
      return [next(rest) if here else "" for here in real]
    blank = {"label": False if value.dtype == bool else -1, "value": np.nan}.get(name, 0)
    out = np.full((len(real), *value.shape[1:]), blank, value.dtype)
    out[real] = value
    return out

  return spread("", batch)
