"""Evaluators: named measurements of a model on held-out data, in the loop and by `mmjax eval`.

An evaluator is a kind (see mmjax.config): `evaluator(context, *, settings...) -> Result`. It asks
its `Context` for data and for rows of any method of the model and never sees parameters, a model or
a device mesh's axes, so a new one is one file and one line of `kinds.KINDS`.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import fnmatch
import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax import config as config_lib
from mmjax import files
from mmjax.config import UserError
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.examples import modalities_of
from mmjax.data.sources import open_source
from mmjax.data.tokenizers import Tokenizer, load_tokenizer
from mmjax.parallel import multihost

# (variables, method of the model, its arguments, batch on the devices) -> rows [B, ...]
Apply = Callable[[Any, str, tuple, Any], jax.Array]


class Result(NamedTuple):
  """What an evaluator found: numbers for eval.json, and figures (plain dicts with a `kind`) for
  report.html.
  """

  metrics: dict[str, float]
  figures: dict[str, dict[str, Any]]


class Embedded(NamedTuple):
  """Embeddings on the host: vectors float32 [N, D]; valid bool [N], False where a record could not
  be read.
  """

  vectors: np.ndarray
  valid: np.ndarray


def sample_evenly(total: int, count: int) -> list[int]:
  """At most `count` of range(total), evenly spread, the first and the last among them."""
  if not count:
    return []
  return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()


class Context:
  """What one evaluator may use: `config`, `name`, `mesh`, its data, and embeddings of batches."""

  def __init__(self, evaluation: Evaluation, name: str, params: Any, embedded: dict):
    self.config, self.mesh, self.name = evaluation.config, evaluation.mesh, name
    self._evaluation, self._params, self._embedded = evaluation, params, embedded

  def data(self, source: str, split: str, languages: Sequence[str] = (), text: str = "caption"):
    """The `EvaluationData` of a split, in a fixed order and without augmentation; opened once a
    run.

    languages: of the captions; () = `languages`. text: what the text of a row is, "caption" or
    "question".
    """
    languages = tuple(languages) or self.languages(source)
    return self._evaluation.data(source, split, languages, text)

  def languages(self, source: str) -> tuple[str, ...]:
    """Those that the run reads of a data set, as its entries of data.sources say; () = all."""
    return languages_of(self.config, source)

  def embed(self, modality: str, batches: Iterable[dict]) -> Embedded:
    """Embeds every row of `batches` (padding included), on the mesh; each process gets all the
    rows.
    """

    def pick(batch):
      return {name: batch[name] for name in (modality, "valid")}

    vectors, valid = self.apply("embedding", (modality,), map(pick, batches))
    return Embedded(vectors.astype(np.float32).reshape(len(valid), -1 if len(valid) else 0), valid)

  def apply(
    self, method: str, args: tuple, batches: Iterable[dict], also: Sequence[str] = ()
  ) -> tuple[np.ndarray, ...]:
    """(rows, valid bool [N], then each array of the batch that `also` names) of every row of
    `batches`, padding included.

    rows: what `method(*args, batch)` of the model returns, [B, ...] or [B * K, ...] for a batch of
    B. Runs on the mesh; each process gets all rows.
    """
    waiting: collections.deque = collections.deque()
    taken: list[list[np.ndarray]] = []

    def take():
      taken.append([np.asarray(multihost.gather_rows(x)) for x in waiting.popleft()])

    for batch in batches:
      placed = multihost.to_device(batch, self.mesh)
      kept = [placed.pop("valid"), *(placed.pop(name) for name in also)]
      for name in ("label", "value"):
        placed.pop(name, None)
      waiting.append([self._evaluation.apply(self._params, method, args, placed), *kept])
      if len(waiting) > 2:
        take()
      self._evaluation.poll()
    while waiting:
      take()
    if not taken:
      return (np.zeros((0,), np.float32), np.zeros(0, bool), *(np.zeros(0) for _ in also))
    return tuple(np.concatenate(parts) for parts in zip(*taken, strict=True))

  def losses(self, batches: Iterable[dict], names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """{objective: {metric: its mean}} over all rows of `batches` that count."""
    if self._evaluation.losses is None:
      raise UserError("the objectives are known only to a run and to `mmjax eval`")
    sums: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for batch in batches:
      placed = multihost.to_device(batch, self.mesh)
      found = jax.device_get(self._evaluation.losses(self._params, placed, names))
      for name in names:
        for key, pair in found[name].items():
          sums[name][key] = sums[name].get(key, np.zeros(2)) + np.asarray(pair, np.float64)
      self._evaluation.poll()
    return {
      name: {key: float(total / weight) if weight else 0.0 for key, (total, weight) in of.items()}
      for name, of in sums.items()
    }

  @property
  def modalities(self) -> list[str]:
    """Those of the batches of training."""
    return modalities_of(self.config)

  def tokenizer(self) -> Tokenizer:
    """The tokenizer of the checkpoint, or else of the config."""
    return self._evaluation.tokenizer

  def images(self, data) -> Embedded:
    """The pictures of an `EvaluationData`, one row an example; evaluators of one run on the same
    split share the work.
    """
    return self.media(data, "image")

  def media(self, data, modality: str) -> Embedded:
    """One modality of an `EvaluationData`, one row an example, shared as `images`."""
    split = getattr(getattr(data, "source", None), "fingerprint", None)
    if split is None or (split, modality) not in self._embedded:
      embedded = self.embed(
        modality, data.images() if modality == "image" else data.media(modality)
      )
      self._embedded[split, modality] = Embedded(
        embedded.vectors[: len(data)], embedded.valid[: len(data)]
      )
    return self._embedded[split, modality]

  def texts(self, data, texts: Sequence[str]) -> np.ndarray:
    """Embeddings float32 [N, D] of any texts, with the tokenizer of the checkpoint or else of the
    config.
    """
    return self.embed("text", data.texts(list(texts))).vectors[: len(texts)]


class Evaluation:
  """All evaluators of a config, run as often as wanted; the data is opened once.

  `apply(variables, method, args, batch)` gives rows [B, ...] of a batch on the devices. `assets`:
  of a checkpoint; its tokenizer is then used, and none needs to be under data.dir. `poll` is called
  after every batch (to ask whether the machine is about to be taken away). `losses(variables,
  batch, names)`: {objective: {metric: (sum, weight)}} of a batch, for the evaluator "loss".
  """

  def __init__(
    self,
    config,
    apply: Apply,
    mesh: jax.sharding.Mesh,
    *,
    assets: Mapping[str, bytes] | None = None,
    poll: Callable[[], None] | None = None,
    losses: Callable[[Any, dict, tuple], dict] | None = None,
  ):
    self.config, self.apply, self.mesh, self.losses = config, apply, mesh, losses
    self.poll = poll or (lambda: None)
    self._data: dict = {}
    self._assets = dict(assets or {})

  def run(self, params: Any, names: str | Sequence[str] | None = None) -> dict[str, Result]:
    """Runs the evaluators (all, or those that `names` picks, wildcards allowed) in the order of the
    config.

    Raises UserError: a name picks none, or an evaluator cannot run (its data set is missing, say),
    which is named.
    """
    evaluators = self.config.evaluation.evaluators
    results: dict[str, Result] = {}
    embedded: dict[str, Any] = {}
    for name in pick(self.config, names):
      kind = config_lib.kind_function(evaluators[name], "evaluator")
      with _naming(name):
        results[name] = kind(
          Context(self, name, params, embedded),
          **config_lib.settings(evaluators[name], "evaluator"),
        )
    return results

  def check_sources(self, names: str | Sequence[str] | None = None) -> dict[str, str]:
    """Opens the data of the evaluators, so that a missing set or split shows before any work.

    Returns {evaluator: fingerprint of its data}. Raises UserError.
    """
    found = {}
    for name in pick(self.config, names):
      entry = self.config.evaluation.evaluators[name]
      with _naming(name):
        for key in ("split", "train_split", "threshold_split"):
          if entry.get("source") and entry.get(key):
            languages = entry.get("languages", ()) or languages_of(self.config, entry.source)
            source = dict(name=entry.source, split=entry[key], languages=languages, path="")
            found[f"{name} ({key})"] = open_source(source, self.config).fingerprint
    return found

  def data(self, source: str, split: str, languages: tuple[str, ...], text: str = "caption"):
    key = (source, split, languages, text)
    if key not in self._data:
      rows = multihost.local_rows(self.mesh, self.batch_size) if jax.process_count() > 1 else None
      cache = any(
        entry.name == source and entry.cache for entry in self.config.data.sources.values()
      )
      entry = dict(name=source, split=split, languages=languages, path="", cache=cache, text=text)
      self._data[key] = EvaluationData(
        self.config, entry, self.batch_size, rows=rows, tokenizer=self._own_tokenizer
      )
    return self._data[key]

  @property
  def batch_size(self) -> int:
    return self.config.evaluation.batch_size or self.config.train.batch_size

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return self._own_tokenizer or load_tokenizer(self.config.data)

  @functools.cached_property
  def _own_tokenizer(self) -> Tokenizer | None:
    """The tokenizer of the checkpoint, for every text; None where it brought none."""
    return Tokenizer.from_assets(self._assets) if Tokenizer.is_among(self._assets) else None


def languages_of(config, source: str) -> tuple[str, ...]:
  """The languages that entries of data.sources read of a data set; () where one reads all, or none
  reads it.
  """
  chosen = [entry.languages for entry in config.data.sources.values() if entry.name == source]
  return tuple(dict.fromkeys(itertools.chain(*chosen))) if chosen and all(chosen) else ()


@contextlib.contextmanager
def _naming(name: str):
  """Puts the evaluator's name before the message of a UserError that lacks it."""
  try:
    yield
  except UserError as error:
    where = f"evaluation.evaluators.{name}"
    raise error if str(error).startswith(where) else type(error)(f"{where}: {error}") from error


def pick(config, names: str | Sequence[str] | None) -> list[str]:
  """The evaluators that `names` picks ("retrieval/*" is a wildcard), in the order of the config;
  None picks all.

  Raises UserError, with the nearest name, where one picks none.
  """
  known = list(config.evaluation.evaluators)
  if names is None:
    return known
  wanted = [names] if isinstance(names, str) else list(names)
  for name in wanted:
    if not any(fnmatch.fnmatchcase(k, name) for k in known):
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
      hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known) or 'none'}"
      raise UserError(f"evaluation.evaluators has no {name!r}. {hint}")
  return [k for k in known if any(fnmatch.fnmatchcase(k, name) for name in wanted)]


def flat_metrics(results: dict[str, Result]) -> dict[str, float]:
  """{"<evaluator>/<metric>": value}, as in metrics.jsonl and `checkpoint.best`."""
  return {
    f"{name}/{metric}": float(value)
    for name, result in results.items()
    for metric, value in result.metrics.items()
  }


PROVENANCE = "provenance"  # the entry of eval.json that is no evaluator


def provenance(
  config, fingerprints: Mapping[str, str], checkpoint: str, step: int | None
) -> dict[str, dict[str, Any]]:
  """{evaluator: what its scores are of}: checkpoint, step, a digest of the config, the data set and
  split with its content, versions. fingerprints: of `Evaluation.check_sources`.
  """
  digest = hashlib.blake2b(config_lib.to_json(config).encode(), digest_size=8).hexdigest()
  versions = {name: importlib.metadata.version(name) for name in ("mmjax", "jax", "flax", "numpy")}
  found = {}
  for name, entry in config.evaluation.evaluators.items():
    data = [mark for key, mark in fingerprints.items() if key.startswith(f"{name} (")]
    found[name] = dict(
      checkpoint=checkpoint,
      step=step,
      config=digest,
      source=entry.get("source", ""),
      split=entry.get("split", ""),
      data="; ".join(data),
      versions=versions,
    )
  return found


def write_eval_json(
  workdir: str | Path,
  results: dict[str, Result],
  about: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
  """Writes {evaluator: {metric: value}} as eval.json of a run folder; evaluators that were not run
  now keep their values. about: {evaluator: `provenance`}, which stands under "provenance".
  """
  path = Path(workdir) / "eval.json"
  table: dict[str, Any] = {
    **read_eval_json(workdir),
    **{name: {k: float(v) for k, v in r.metrics.items()} for name, r in results.items()},
  }
  known = read_provenance(workdir) | {n: dict(about[n]) for n in results if about and n in about}
  if known:
    table[PROVENANCE] = known
  files.replace_file(path, json.dumps(table, indent=2) + "\n")
  return path


def read_eval_json(workdir: str | Path) -> dict[str, dict[str, float]]:
  """{evaluator: {metric: value}} of `write_eval_json`; {} without a file, or of one that is no such
  table.
  """
  return {name: scores for name, scores in _eval_json(workdir).items() if name != PROVENANCE}


def read_provenance(workdir: str | Path) -> dict[str, dict[str, Any]]:
  """{evaluator: its `provenance`} of what `write_eval_json` wrote."""
  found = _eval_json(workdir).get(PROVENANCE, {})
  return {name: about for name, about in found.items() if isinstance(about, dict)}


def _eval_json(workdir: str | Path) -> dict[str, dict[str, Any]]:
  try:
    table = files.read_json(files.as_path(workdir) / "eval.json")
  except (OSError, ValueError):
    return {}
  return {k: v for k, v in table.items() if isinstance(v, dict)} if isinstance(table, dict) else {}
