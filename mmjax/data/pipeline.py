"""The batches of a run: `Pipeline(config).batch(step)`. NumPy only, no JAX backend.

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
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data import fitting, workers
from mmjax.data.examples import (
  Batch,
  Examples,
  Row,
  modalities_of,
  prompt_row_spec,
  row_spec,
  scatter_rows,
  stand_in_id,
  streams,
)
from mmjax.data.faults import CutMedia, report_unreadable
from mmjax.data.labels import check_classes, check_values
from mmjax.data.media import bytes_key
from mmjax.data.order import Balance, Order
from mmjax.data.rollouts import Asked, rollout_spec, sampling
from mmjax.data.sequences import Piece
from mmjax.data.sources import Source, label_numbers, open_source
from mmjax.data.templates import ChatTemplate


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
