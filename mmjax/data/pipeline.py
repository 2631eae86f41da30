"""The batches of a run: `Pipeline(config).batch(step)`, and `EvaluationData` in a fixed order.
NumPy only, no JAX backend.

A global batch is a function of (seed, step) alone: `order.py` says which record stands in which
row, and a random generator keyed by (seed, step, row) draws the caption, the words it loses and the
augmentation of the picture. So hosts, worker processes and threads only decide who does the work, a
process can make just its own rows, and any step can be made first.

A batch is a dict of arrays by modality, of those that the config asks for (B rows):

  image   pixels uint8 [B, H, W, 3]; or, of data.image.resize "naflex", patches (naflex.py)
  text    tokens int32 [B, L], mask bool [B, L]; [B, K, ...] of K = data.text.per_example texts
  audio   waveform int16 [B, S], length int32 [B]
  video   frames uint8 [B, T, H, W, 3], mask bool [B, T]
  series  values float32 [B, T, C], mask bool [B, T]
  label   int32 [B], -1 = none; of data.label "labels" bool [B, classes]
  value   float32 [B, K], NaN = none
  valid   bool [B]; id: a list of texts

Each modality has a `key` uint32 [B, 2] besides: equal keys are equal texts or media.
"""

from __future__ import annotations

import collections
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.data import fitting, workers
from mmjax.data.builders import Record
from mmjax.data.examples import (
  MODALITIES,
  Batch,
  CutMedia,
  Examples,
  ImageReader,
  Row,
  check_classes,
  check_values,
  class_names,
  modalities_of,
  prompt_row_spec,
  report_unreadable,
  row_spec,
  scatter_rows,
  stand_in_id,
  streams,
)
from mmjax.data.media import bytes_key, content_key
from mmjax.data.order import Balance, Order
from mmjax.data.parts import Medium, Span
from mmjax.data.rollouts import Asked, rollout_spec, sampling
from mmjax.data.sequences import Piece
from mmjax.data.sources import Joined, Source, label_numbers, open_source
from mmjax.data.templates import ChatTemplate
from mmjax.data.text import text_key
from mmjax.data.tokenizers import Tokenizer


def batch_spec(config, batch_size: int | None = None, source: str = "") -> dict[str, Any]:
  """The `jax.ShapeDtypeStruct`s of a batch as the train step gets it (no `id`), from the config
  alone.

  source: whose batches, where data.mix is "steps" and sources differ; "" = with every modality that
  there is. Where the model answers prompts itself, a row is an answer (rollouts.py), and the
  pipeline's batches are of `prompt_spec`.
  """
  size = batch_size or config.train.batch_size
  rows = row_spec(config, *_made_of(config, source))
  if entry := sampling(config):
    size *= entry["answers"]
    rows |= rollout_spec(entry, config.data.sequence.length)
  return _structs(rows, size)


def prompt_spec(config) -> dict[str, Any]:
  """The same of a batch of prompts that the model answers itself."""
  return _structs(prompt_row_spec(config), config.train.batch_size)


def _structs(rows: dict[str, Any], size: int) -> dict[str, Any]:
  import jax

  spec = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((size, *x[0]), x[1]),
    rows,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  return {**spec, "valid": jax.ShapeDtypeStruct((size,), np.bool_)}


def _made_of(config, source: str) -> tuple[list[str], int]:
  """(modalities, tokens a text; 0 = data.text.length) of a source's batches; of all batches for ""
  and where sources mix within one.
  """
  entry = config.data.sources[source] if source and config.data.mix == "steps" else None
  return modalities_of(config, entry), entry.length if entry else 0


class Pipeline:
  """The training batches of a config.

  rows: which rows of the global batch this process makes (int array; None = all), as the batch
  sharding deals them.
  Attributes: examples (rows of an epoch), unreadable (records that could not be used so far, each
  counted once).
  Raises UserError for what is missing (data set, split, language, tokenizer).
  """

  def __init__(
    self,
    config,
    rows: Sequence[int] | np.ndarray | None = None,
    tables: list[list[list[Piece]]] | None = None,
    balances: list[Balance | None] | None = None,
    references: Mapping[str, np.ndarray] | None = None,
    reference: str = "",
  ):
    self.config = config
    self.rows = None if rows is None else np.asarray(rows, np.int64)
    self._bad: dict[str, str] = {}
    self._cut = CutMedia()
    self._ids: collections.OrderedDict[int, list[str]] = collections.OrderedDict()
    entries = list(config.data.sources.items())
    self.sources = [_named(name, entry, config) for name, entry in entries]
    check_classes(config, self.sources)
    check_values(config, self.sources)
    self._made_of = [_made_of(config, name) for name, _ in entries]
    self._examples = Examples(config, train=True)
    sequence = config.data.sequence
    if sequence.length and tables is None:  # of a language model: the examples of each row
      tables = [
        fitting.table(self._examples.sequences, source, sequence.pack, config.seed)
        for source in self.sources
      ]
    self.tables = tables
    self.refer(references or {}, reference)
    if balances is None:
      balances = [
        Balance(label_numbers(source)) if entry.balance else None
        for source, (_, entry) in zip(self.sources, entries, strict=True)
      ]
    self.order = Order(
      [len(rows) for rows in tables or self.sources],
      [entry.weight for _, entry in entries],
      config.seed,
      config.train.batch_size,
      whole_steps=config.data.mix == "steps",
      groups=[entry.group for _, entry in entries],
      balances=balances,
    )

  @property
  def examples(self) -> int:
    return self.order.examples

  @property
  def unreadable(self) -> int:
    return len(self._bad)

  @property
  def template(self) -> ChatTemplate:
    """The chat template of the conversations. Raises UserError: there is none."""
    return self._examples.sequences.template

  @property
  def judged(self) -> list[tuple[Source, list[list[Piece]]]]:
    """The sources of judged answers, each once, with the examples of each row of an epoch."""
    found: dict[str, tuple[Source, list[list[Piece]]]] = {}
    for source, table in zip(self.sources, self.tables or (), strict=bool(self.tables)):
      if source.text == "preference":
        found.setdefault(source.fingerprint, (source, table))
    return list(found.values())

  def refer(self, references: Mapping[str, np.ndarray], reference: str) -> None:
    """Gives judged answers what a reference makes of them: {fingerprint of a source: the arrays of
    preferences.py}. reference: names the model.
    """
    self.references, self.reference = dict(references), reference
    if references:
      self._examples.sequences.references = self.references

  def in_order(
    self, source: Source, table: Sequence[Sequence[Piece]]
  ) -> Iterator[tuple[Batch, Sequence[Sequence[Piece]]]]:
    """The rows of an epoch of one source as batches, with the examples of all rows of each; the
    last is filled up with rows that are not valid.
    """
    size = self.config.train.batch_size
    rows = np.arange(size) if self.rows is None else self.rows
    for start in range(0, len(table), size):
      real = start + rows < len(table)
      packs = [(source, table[row]) for row in (start + rows[real]).tolist()]
      batch = self._report(self._examples.rows_of_sequences(packs, [None] * len(packs)))
      yield scatter_rows(batch, real), table[start : start + size]

  def source_of(self, step: int) -> str:
    """The name of the entry of data.sources that a step's rows come from; "" where sources mix
    within a batch.
    """
    return list(self.config.data.sources)[self.order.source(step)] if self.order.whole_steps else ""

  def fingerprint(self) -> dict[str, Any]:
    """What the batches depend on besides the config, JSON-able: a resumed run must find the
    same.
    """
    found = {
      "sources": [source.fingerprint for source in self.sources],
      "order": self.order.fingerprint(),
    }
    tokenizer = None
    if self.tables is not None:
      tokenizer = self._examples.sequences.tokenizer
    elif "text" in self._examples.modalities:
      tokenizer = self._examples.text.tokenizer
    if any(source.text in ("conversation", "preference") for source in self.sources):
      found["template"] = f"content {bytes_key(self.template.source.encode()):016x}"
    if self.reference:
      found["reference"] = self.reference
    if tokenizer is not None:
      found["tokenizer"] = f"{self.config.data.text.tokenizer}: content {tokenizer.fingerprint}"
    return found

  def batch(self, step: int) -> Batch:
    """The batch of a step, counted from 0; only this process's rows. Raises UserError: too many
    unreadable records.
    """
    return self._report(self._make(step))

  def iterate(self, start: int, stop: int) -> Iterator[Batch]:
    """The batches start, start + 1, ..., stop - 1, prepared ahead by data.threads threads or
    data.workers processes.
    """
    import grain

    if start >= stop:
      return
    data = self.config.data
    options = grain.ReadOptions(
      num_threads=max(1, data.threads), prefetch_buffer_size=max(1, data.prefetch)
    )
    batches = grain.MapDataset.range(start, stop).map(_Make(self)).to_iter_dataset(options)
    processes = workers.at_most(data.workers, "data.workers")
    if processes:
      _parse_flags()
      batches = grain.experimental.WithOptionsIterDataset(
        batches, grain.experimental.DatasetOptions(min_shm_size=1 << 16)
      )
      each = -(-max(1, data.prefetch) // processes)
      batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=each),
        _start_worker,
      )
    iterator = iter(batches)
    try:
      for step in range(start, stop):
        batch = self._report(_own(next(iterator)) if processes else next(iterator))
        if self.rows is None:
          self._remember(step, batch["id"])
        yield batch
    finally:
      self._cut.total()
      iterator.close()

  def ids(self, step: int) -> list[str]:
    """The ids of all rows of the global batch of a step."""
    if step not in self._ids:
      source, index, _ = self.order.rows(step)
      self._remember(
        step, [self._id(s, i) for s, i in zip(source.tolist(), index.tolist(), strict=True)]
      )
    return self._ids[step]

  def asked(self, step: int) -> list[Asked | None]:
    """What rewards see of each prompt of a step that the model answers itself; None = it cannot be
    read.
    """
    source, index, _ = self.order.rows(step)
    tables, sequences = self.tables or [], self._examples.sequences
    return [
      sequences.asked(self.sources[s], tables[s][i][0])
      for s, i in zip(source.tolist(), index.tolist(), strict=True)
    ]

  def _id(self, source: int, index: int) -> str:
    if self.tables is not None:
      return stand_in_id(self.sources[source], self.tables[source][index][0].record)
    try:
      return self.sources[source][index]["id"]
    except UserError:
      return stand_in_id(self.sources[source], index)

  def _remember(self, step: int, ids: list[str]) -> None:
    self._ids[step] = ids
    while len(self._ids) > 64:
      self._ids.popitem(last=False)

  def _make(self, step: int) -> Batch:
    """The batch with "unreadable": [(name, reason)] and "cut": [(modality, name, length)], which
    `_report` takes out again. Runs in a worker or a thread."""
    source, index, _ = self.order.rows(step)
    rows = range(len(index)) if self.rows is None else self.rows.tolist()
    if self.tables is not None:
      packs = [(self.sources[source[row]], self.tables[source[row]][index[row]]) for row in rows]
      rngs = streams(self.config.seed, step, rows)
      if sampling(self.config):
        prompts = [(of, piece) for of, (piece,) in packs]
        return self._examples.rows_before_answers(prompts, rngs)
      return self._examples.rows_of_sequences(packs, rngs)
    items = [Row(self.sources[source[row]], int(index[row])) for row in rows]
    return self._examples(items, streams(self.config.seed, step, rows), *self._made_of[source[0]])

  def _report(self, batch: Batch) -> Batch:
    """Counts and names what a batch could not use; raises UserError past data.max_unreadable."""
    self._cut.add(batch.pop("cut"))
    report_unreadable(batch.pop("unreadable"), self._bad, self.config.data.max_unreadable)
    return batch

  def __getstate__(self):
    return {
      "config": self.config,
      "rows": self.rows,
      "tables": self.tables,
      "balances": self.order.balances,
      "references": self.references,
      "reference": self.reference,
    }

  def __setstate__(self, state):
    self.__init__(**state)


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
    # Equal to no other; such a row is not valid.
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


class _Make:
  """`Pipeline._make` as something that grain can send to a worker."""

  def __init__(self, pipeline: Pipeline):
    self._pipeline = pipeline

  def __call__(self, step: int) -> Batch:
    return self._pipeline._make(int(step))


def _named(name: str, entry: Mapping[str, Any], config) -> Source:
  try:
    return open_source(entry, config)
  except UserError as error:
    raise UserError(f"data.sources.{name}: {error}") from error


def _own(tree: Any) -> Any:
  """Copies arrays out of the memory that workers share with this process, which is then free at
  once.
  """
  if isinstance(tree, dict):
    return {name: _own(value) for name, value in tree.items()}
  return np.array(tree, subok=False) if isinstance(tree, np.ndarray) else tree


def _parse_flags() -> None:
  """Grain asks absl for flags when it starts workers, and absl fails unless a command line was
  parsed.
  """
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
  """Runs first in a worker process. It never takes a device, leaves Ctrl-C to the main process, and
  does not outlive it.

  On SIGTERM (often sent to the whole process group) it goes on for a while: the main process may
  still need a batch to stop well.
  """
  import jax

  jax.config.update("jax_platforms", "cpu")
  os.environ["JAX_PLATFORMS"] = "cpu"
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *unused: threading.Timer(30, os._exit, (1,)).start())

  main_process = multiprocessing.parent_process()

  def follow() -> None:
    if main_process is not None:
      main_process.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
