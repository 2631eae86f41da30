"""Checkpoints: a thin layer over Orbax that saves in the background and never trusts a file that it
has not checked.

A checkpoint is a folder with the items `params`, `rest` (step, optimizer, model state, moving
average), `data`, `config`, `assets` (tokenizer and the like, base64 in JSON) and a manifest
(manifest.py). A run keeps them in WORKDIR/checkpoints/STEP; an import folder has the items params,
config and assets, and model_state where the model keeps any (batch statistics). Leaves are stored
under their names, "image/layers/mlp/up/kernel", so that a checkpoint restores onto any mesh and
into any program that knows the names.

A save is written to STEP.orbax-checkpoint-tmp and renamed when everything, the manifest last, is in
it: killed at any moment, a process leaves the earlier checkpoints as they were. At a URL of an
object store, which has no rename, a folder STEP counts from when it has its manifest. In runs of
several processes all of them call `save` and `restore`;
process 0 alone lists, checks, renames and deletes.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from mmjax import files
from mmjax.config import UntrustedCode, UserError, from_json, in_steps
from mmjax.files import disk_errors
from mmjax.ownership import new_folder
from mmjax.state import adapters, manifest, storage
from mmjax.state.manifest import Corrupt
from mmjax.state.paths import by_name
from mmjax.state.storage import DELETED, TEMPORARY, from_main
from mmjax.state.train_state import TrainState, clamped
from mmjax.state.transfer import transfer, transfer_state

log = logging.getLogger("mmjax")

BEST = "best"  # RUN/best and RUN/checkpoints/best stand for the best step of a run
# Metrics of which the smallest is the best.
_SMALLER = r"(loss|error|error_rate|mae|rmse|mse|perplexity)(@[^/]*)?$"
_CLOCK_STEPS = 10  # several processes agree on the clock (checkpoint.minutes) every so many steps


class Checkpointer:
  """Saves and restores the checkpoints of one run, as config.checkpoint says."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    config: FrozenConfigDict,
    *,
    steps: int,
    examples: int | None = None,
    check: Callable[[], None] | None = None,
  ):
    """`steps`: length of the run, for durations in percent; `examples`: of an epoch. `check`:
    called before anything is changed or becomes visible; what it raises, `save` and `wait` raise.
    Raises UserError: unwritable folder."""
    self._check = check
    self._root = files.as_path(workdir) / "checkpoints"

    def convert(value):
      return in_steps(value, steps=steps, batch_size=config.train.batch_size, examples=examples)

    self._config, self._options = config, config.checkpoint
    self._every, self._keep_every = convert(self._options.every), convert(self._options.keep_every)
    self._writer: storage.Writer | None = None
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._bad: set[int] = (
      set()
    )  # found unusable; they count for nothing and are overwritten or deleted
    self._saved_at = time.monotonic()
    self._present: set[int] = set()  # as this process last left them
    self.protected = 0  # a step that is never deleted, 0 = none
    self.base: adapters.Base | None = None  # what this run's checkpoints leave out
    if jax.process_index() == 0:
      with disk_errors(self._root, f"cannot write checkpoints to {self._root}"):
        files.make_folder(self._root)
        (self._root / ".writable").write_text("")
        (self._root / ".writable").unlink()

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    data: Mapping | None = None,
    config: FrozenConfigDict | Mapping | str | None = None,
    assets: Mapping[str, bytes] | None = None,
    metrics: Mapping[str, float] | None = None,
    force: bool = False,
  ) -> bool:
    """Saves if it is time to (call it every step), or if `force`; returns whether it did. Writing
    goes on in the background.

    The state may be donated or changed as soon as this returns. A step that is already saved is not
    saved again; new `metrics` of it are noted (for checkpoint.best). Waits for the save before it,
    if that is still being written.
    Raises UserError: the disk is full or unwritable, now or during the save before.
    """
    self._raise_early()
    metrics = metrics or {}
    better = self._best_of(metrics) is not None
    if not (force or better or self.due(step)):
      return False
    self.wait()
    if self._check:
      self._check()
    decision = self._decide(step, metrics, force) if jax.process_index() == 0 else ""
    decision = ("", "note", "save")[from_main([("", "note", "save").index(decision)])[0]]
    if decision == "note" and jax.process_index() == 0:
      with disk_errors(self._root, f"cannot note metrics in {self._root / str(step)}"):
        manifest.update(self._root / str(step), metrics=_plain_metrics(metrics))
      self._prune()
    if decision != "save":
      return False
    facts = dict(
      step=int(step),
      time=time.time(),
      metrics=_plain_metrics(metrics),
      average=state.ema is not None,
      **(dict(base=self.base._asdict()) if self.base else {}),
    )
    items = dict(
      params=adapters.without(state.params, self.base),
      rest=_rest(state, self.base),
      data=dict(data or {}),
      config=storage.config_dict(config),
      assets=storage.encode(assets),
    )
    with self._saving(step):
      self._writer = writer = self._writer or storage.Writer(self._root, self._check)
      writer.start(self._root / str(step), items, facts)
    self._saved_at = time.monotonic()
    self._thread = threading.Thread(target=self._finish, args=(step, writer), name="checkpoint")
    self._thread.start()
    return True

  def restore(
    self, spec: TrainState, only: int | None = None
  ) -> tuple[TrainState, dict, int] | None:
    """(state, data, step) of the newest usable checkpoint, or None if there is none at all; `only`:
    of that step or none.

    spec: TrainState of ShapeDtypeStruct with shardings: any mesh. One that is corrupt or
    half-written is named in a warning, and the one before it is used. Raises UserError: none is
    usable though some exist, or the newest is of another model (a leaf is missing, extra, or of
    another shape or dtype; nothing is ever cast).
    """
    self.wait()
    steps = from_main(sorted(self._steps(), reverse=True) if jax.process_index() == 0 else [])
    steps = [step for step in steps if only in (None, step)]
    for path in self._listing() if jax.process_index() == 0 else []:
      if self._is_half_written(path):
        log.warning("checkpoint %s is half-written (the run ended meanwhile); it is not used", path)
    for step in steps:
      folder = self._root / str(step)
      try:
        state, data = _checked(folder, functools.partial(self._read, folder, spec))
      except Corrupt as error:
        log.warning("checkpoint %s is corrupt: %s; trying the one before", folder, error)
        self._bad.add(step)
        continue
      return state, data, step
    if steps:
      raise UserError(
        f"{self._root}: no usable checkpoint, all are corrupt ({', '.join(map(str, steps))}). "
        "Restore one from a copy, or delete the folder to start anew"
      )
    return None

  def latest_step(self) -> int | None:
    """The newest step that is completely saved (its files are not checked)."""
    return max(self._steps(), default=None)

  def data_of(self, step: int) -> dict:
    """The `data` of a step that is saved, {} of none; in every process."""
    folder = self._root / str(step)
    return storage.read_json(folder / "data") if step and (folder / "data").exists() else {}

  def finished_step(self) -> int:
    """The newest step, if its files are all there with the sizes that they had, else 0; in every
    process what 0 sees.
    """
    step = 0
    if jax.process_index() == 0:
      with contextlib.suppress(Corrupt):
        newest = self.latest_step() or 0
        if newest:
          manifest.check_structure(self._root / str(newest))
        step = newest
    return from_main([step])[0]

  def wait(self) -> None:
    """Until everything is written. Raises UserError if it could not be."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def _raise_early(self) -> None:
    """Does not wait for a save in progress, but says so if one has failed."""
    if self._thread is not None and not self._thread.is_alive():
      self.wait()

  def close(self) -> None:
    """Waits, and frees what Orbax holds."""
    try:
      self.wait()
    finally:
      if self._writer is not None:
        self._writer.close()
        self._writer = None

  def _read(self, folder: epath.Path, spec: TrainState) -> tuple[TrainState, dict]:
    self.base = adapters.Base.of(manifest.read(folder))
    params = storage.read_arrays(folder / "params", adapters.without(spec.params, self.base))
    rest = storage.read_arrays(folder / "rest", _rest(spec, self.base))
    if self.base:
      left_out = _read_base(folder, self.base, spec.params)
      params = adapters.composed(params, left_out, spec.params)
      if spec.ema is not None:
        rest["ema"] = adapters.composed(rest["ema"], left_out, spec.ema)
    state = TrainState(params=params, **rest)

    def within(tree):
      return None if tree is None else clamped(tree, self._config)

    state = dataclasses.replace(state, params=within(state.params), ema=within(state.ema))
    return state, storage.read_json(folder / "data")

  def due(self, step: int) -> bool:
    """Whether the step count or the clock asks for a checkpoint; the same in every process."""
    if self._every and step % self._every == 0:
      return True
    if not self._options.minutes:
      return False
    late = time.monotonic() - self._saved_at >= 60 * self._options.minutes
    if jax.process_count() == 1:
      return late
    return step % _CLOCK_STEPS == 0 and bool(from_main([int(late)])[0])

  def _decide(self, step: int, metrics: Mapping[str, float], force: bool) -> str:
    """ "save", "note" (the metrics of a step that is saved) or ""; process 0 only."""
    self._name_missing()
    if step in self._steps():
      with contextlib.suppress(Corrupt):  # then it is written anew
        manifest.read(self._root / str(step))
        return "note" if metrics else ""
    best = self._best_of(metrics)
    if force or (self._every and step % self._every == 0) or best is None:
      return "save"
    sign = 1 if best_mode(self._options) == "max" else -1
    known = [sign * value for value in self._known_metrics().values()]
    return "save" if not known or sign * best > max(known) else ""

  def _name_missing(self) -> None:
    """Warns of checkpoints that somebody else deleted while the run goes on; the folder is made
    again.
    """
    gone = sorted(self._present - set(self._steps()))
    if gone:
      log.warning(
        "%s: %s no longer there, though this run did not delete %s; the next save is whole again",
        self._root,
        f"checkpoint {gone[0]} is"
        if len(gone) == 1
        else f"checkpoints {', '.join(map(str, gone))} are",
        "it" if len(gone) == 1 else "them",
      )
      self._present -= set(gone)
    with disk_errors(self._root, f"cannot write checkpoints to {self._root}"):
      files.make_folder(self._root)

  @contextlib.contextmanager
  def _saving(self, step: int) -> Iterator[None]:
    try:
      latest = self.latest_step()
      safe = (
        f"checkpoint {latest} is intact" if latest is not None else "there is no earlier checkpoint"
      )
    except UserError:  # a store that does not answer
      safe = "earlier checkpoints are intact"
    hint = f"; {safe}. Free space or mend the folder, then start again"
    with disk_errors(self._root, f"cannot save checkpoint {self._root / str(step)}", hint):
      try:
        yield
      except BaseException:
        if jax.process_index() == 0:
          storage.delete(
            self._root / (str(step) if files.is_url(self._root) else f"{step}{TEMPORARY}"),
            patience=5.0,
          )
        raise

  def _finish(self, step: int, writer: storage.Writer) -> None:
    """In the background: waits for the files, then deletes what config.checkpoint does not keep."""
    try:
      with self._saving(step):
        writer.wait_until_finished()
      self._bad.discard(step)
      self._prune()
    except BaseException as error:
      self._error = error

  def _prune(self) -> None:
    if jax.process_index() != 0:
      return
    keep = kept(
      self._steps(),
      self._known_metrics(),
      keep=self._options.keep,
      keep_every=self._keep_every,
      mode=best_mode(self._options),
    ) | {self.protected}
    for path in self._listing():
      if (
        self._is_half_written(path)
        or path.name.endswith(DELETED)
        or (_is_step(path) and int(path.name) not in keep)
      ):
        storage.delete(path)
    self._present = set(self._steps())

  def _known_metrics(self) -> dict[int, float]:
    """{step: the metric of checkpoint.best} of what is saved."""
    values = {step: self._best_of(_metrics_of(self._root / str(step))) for step in self._steps()}
    return {step: value for step, value in values.items() if value is not None}

  def _best_of(self, metrics: Mapping[str, float]) -> float | None:
    value = metrics.get(self._options.best) if self._options.best else None
    return value if value is not None and math.isfinite(value) else None

  def _listing(self) -> list[epath.Path]:
    with disk_errors(self._root, f"cannot read {self._root}"):
      return list(self._root.iterdir()) if self._root.exists() else []

  def _is_half_written(self, path: epath.Path) -> bool:
    """Whether a save of this checkpoint was not finished."""
    if files.is_url(path):
      with disk_errors(self._root, f"cannot read {path}"):
        return _is_step(path) and not (path / manifest.NAME).exists()
    return path.name.endswith(TEMPORARY)

  def _steps(self) -> list[int]:
    return [
      int(path.name)
      for path in self._listing()
      if _is_step(path) and int(path.name) not in self._bad and not self._is_half_written(path)
    ]


def kept(
  steps: list[int], metrics: Mapping[int, float], *, keep: int, keep_every: int, mode: str
) -> set[int]:
  """The steps that stay: the latest `keep`, multiples of `keep_every` (0 = none), and the best by
  `metrics`.
  """
  chosen = set(sorted(steps)[-max(1, keep) :]) | {
    step for step in steps if keep_every and step % keep_every == 0
  }
  known = sorted(step for step in steps if step in metrics)  # of equal ones the first is kept
  if known:
    chosen.add((max if mode == "max" else min)(known, key=lambda step: metrics[step]))
  return chosen


def best_mode(options: Mapping) -> str:
  """ "max" or "min": what `best_mode` of config.checkpoint means for its `best`."""
  if options["best_mode"] != "auto":
    return options["best_mode"]
  return "min" if re.search(_SMALLER, options["best"]) else "max"


# -- reading without a run -------------------------------------------------------------------------


def find_checkpoint(path: str | os.PathLike) -> epath.Path:
  """The checkpoint at `path`: a run folder (its newest usable step), RUN/best (by its
  checkpoint.best), a step folder, or an import folder; files checked.

  Raises UserError: there is none, or none that is intact. Corrupt ones that are passed over are
  named in a warning.
  """
  root = files.as_path(path)
  with files.store_errors(path, f"{path} cannot be read"):
    if root.name == BEST and not root.exists():
      return _find_best(path, root.parent)
    return _find_checkpoint(path, root)


def _find_best(path: str | os.PathLike, run: epath.Path) -> epath.Path:
  """The step with the best metric among those that a run kept. Raises UserError."""
  newest = _find_checkpoint(run, run)
  options = storage.read_json(newest / "config")["checkpoint"]
  known = {
    folder: _metrics_of(folder)[options["best"]]
    for folder in sorted(newest.parent.iterdir(), key=lambda p: p.name.zfill(20))
    if _is_step(folder) and options["best"] in _metrics_of(folder)
  }
  if not known:
    what = (
      f"no checkpoint has {options['best']!r}" if options["best"] else "checkpoint.best is empty"
    )
    raise UserError(
      f"{path}: {what}, so that none is the best. Name a metric of an evaluator in "
      f"checkpoint.best before training, or give {run} for the newest"
    )
  return _verified_or_error(
    (max if best_mode(options) == "max" else min)(known, key=known.__getitem__)
  )


def _is_step(path: epath.Path) -> bool:
  """Whether a path is a step's, as a run names it: no copy "0020", and no file or pipe."""
  name = path.name
  number = name.isascii() and name.isdecimal() and len(name) < 19 and str(int(name)) == name
  return number and (files.is_url(path) or os.path.isdir(path))


def _verified_or_error(folder: epath.Path) -> epath.Path:
  try:
    return _verified(folder)
  except Corrupt as error:
    raise UserError(f"checkpoint {folder} is corrupt: {error}. Restore it from a copy") from error


def _find_checkpoint(path: str | os.PathLike, root: epath.Path) -> epath.Path:
  steps_root = next(
    (r for r in (root / "checkpoints", root) if r.is_dir() and any(map(_is_step, r.iterdir()))),
    None,
  )
  if steps_root is None:
    if not (root / manifest.NAME).exists() and not (root / "params").exists():
      raise UserError(
        f"{path}: no checkpoint here. Give a run folder (with checkpoints/ in it), a step folder "
        "or an import folder"
      )
    candidates = [root]
  else:
    candidates = sorted(filter(_is_step, steps_root.iterdir()), key=lambda p: -int(p.name))
  for folder in candidates:
    try:
      return _verified(folder)
    except Corrupt as error:
      problem = f"checkpoint {folder} is corrupt: {error}"
      if folder != candidates[-1]:
        log.warning("%s; trying the one before", problem)
  raise UserError(
    f"{problem}. "
    + ("No other one is usable. " if len(candidates) > 1 else "")
    + "Restore it from a copy"
  )


def load_params(path: str, spec: Any = None, *, average: bool = True) -> Any:
  """Parameters of a checkpoint: nested dict of NumPy arrays, or arrays sharded as `spec` (tree of
  ShapeDtypeStruct) says.

  `average`: the moving average where the run kept one, as evaluation does. Raises UserError: no
  checkpoint, or one of another model than `spec` (names, shapes and dtypes must agree).
  """
  folder = find_checkpoint(path)
  facts = manifest.read(folder)
  base = adapters.Base.of(facts)
  own = adapters.without(spec, base)
  if average and facts["average"]:
    params = storage.read_arrays(
      folder / "rest", None if own is None else {"ema": own}, only="ema/"
    )["ema"]
  else:
    params = storage.read_arrays(folder / "params", own)
  if base:
    params = adapters.composed(params, _read_base(folder, base, spec), spec)
  return clamped(
    params, storage.read_json(folder / "config")
  )  # older runs clipped where the scale is used


def load_model_state(path: str, spec: Any = None) -> Any:
  """What the model of a checkpoint keeps besides parameters (batch statistics), {collection: nested
  dict}; {} if nothing.

  NumPy arrays, or arrays sharded as `spec` (tree of ShapeDtypeStruct) says. Raises UserError as
  `load_params`.
  """
  folder = find_checkpoint(path)
  if (folder / "model_state").exists():
    return storage.read_arrays(folder / "model_state", spec)
  if not (folder / "rest").exists() or not any(
    name.startswith("model_state/") for name in storage.stored_leaves(folder / "rest")
  ):
    return {}
  manifest.verify(folder, ("rest",))
  return storage.read_arrays(
    folder / "rest", None if spec is None else {"model_state": spec}, only="model_state/"
  )["model_state"]


def load_assets(path: str) -> dict[str, bytes]:
  """{name: content} of what travels with the weights: tokenizer, preprocessing."""
  folder = find_checkpoint(path) / "assets"
  texts = storage.read_json(folder)
  with storage.damage(folder):
    return {name: base64.b64decode(text) for name, text in texts.items()}


def load_config(path: str, allow_code: Sequence[str] = ()) -> FrozenConfigDict:
  """The resolved config of the run that wrote the checkpoint, or of the import. It may come from a
  stranger: its kinds are those of this package, or of the modules in `allow_code`. Raises
  UserError: it names others, or is no config of this version."""
  folder = find_checkpoint(path)
  return read_config(folder, json.dumps(storage.read_json(folder / "config")), allow_code)


def read_config(
  folder: str | os.PathLike, text: str, allow_code: Sequence[str] = ()
) -> FrozenConfigDict:
  """The resolved config that was stored as `text` in the checkpoint `folder`; as `load_config`."""
  try:
    return from_json(text, allow_code)
  except UntrustedCode as error:
    raise UntrustedCode(f"checkpoint {folder}: {error}") from error
  except (UserError, ValueError) as error:
    raise UserError(f"checkpoint {folder}: its config is none of this version ({error})") from error


def save_import(
  folder: str,
  params: Any,
  config: FrozenConfigDict | Mapping | str,
  assets: Mapping[str, bytes],
  model_state: Mapping[str, Any] | None = None,
) -> None:
  """Writes an import folder: the weights of another program, with the config and assets that make
  them a model here.

  model_state: what the model keeps besides parameters, {collection: nested dict}; an item of its
  own where there is any.
  Raises UserError: the folder exists and is not empty, or cannot be written.
  """
  path = files.as_path(folder)
  with disk_errors(path, f"cannot write {folder}"), contextlib.ExitStack() as ends:
    if files.is_url(path):
      if path.exists() and any(path.iterdir()):
        raise UserError(f"{folder}: exists and is not empty. Choose another folder, or delete it")
    else:  # so that no two imports write the same files
      path = epath.Path(ends.enter_context(new_folder(path)))
      path.rmdir()  # Orbax makes it, of one that it writes beside it
    writer = storage.Writer(path, copies=False)
    params = jax.tree.map(np.asarray, params)  # scalars too
    items = dict(params=params, config=storage.config_dict(config), assets=storage.encode(assets))
    if model_state:
      items["model_state"] = model_state
    try:
      writer.start(path, items, dict(step=None, metrics={}, average=False))
    finally:
      writer.close()


def restore_into(
  params: Any,
  path: str,
  rules: tuple = ((".*", r"\g<0>"),),
  model_state: Any = None,
  source: Any = None,
) -> tuple[Any, Any, list[str]]:
  """Starts `params` from the checkpoint at `path` (config.init.from) by the rules of
  config.init.map; see transfer.py.

  params: initialised arrays, which keep their shardings. model_state: what the model keeps besides
  them (batch statistics), which follows the parameters of its module. source: what `load_params`
  has read of it. Returns both and the report, a line for each that was loaded, resized, new or
  left.
  Raises UserError: a rule or a name that matches nothing, shapes that do not agree, or statistics
  that are not there.
  """
  folder = find_checkpoint(path)  # once: a run that goes on may save a newer one meanwhile
  source = load_params(folder) if source is None else source
  source, rules = adapters.fitted(source, params, rules)
  loaded, lines = transfer(params, source, rules, path)
  if model_state:
    model_state, more = transfer_state(
      model_state, load_model_state(folder), params, source, rules, path
    )
    lines += more
  return loaded, model_state or {}, lines


def names_and_shapes(path: str) -> dict[str, jax.ShapeDtypeStruct]:
  """{name: shape and dtype} of the parameters of a checkpoint, without reading them."""
  folder = find_checkpoint(path)
  held = storage.stored_leaves(folder / "params")
  base = adapters.Base.of(manifest.read(folder))
  if base:
    there = names_and_shapes(_base_folder(folder, base))
    held |= {name: there[origin] for name, origin in base.names.items() if origin in there}
  return held


def _read_base(folder: epath.Path, base: adapters.Base, spec: Any) -> dict[str, Any]:
  """{name: NumPy array} of what the checkpoint `folder` leaves out. Raises UserError: its base is
  missing or another, or it was of another model than `spec`.
  """
  known = base.names if spec is None else map(adapters.plain_name, by_name(spec))
  unknown = set(base.names) - set(known)
  if unknown:
    raise UserError(
      f"checkpoint {folder} is an adapter of another model, which has {min(unknown)}. Use the "
      "config that wrote it"
    )
  return base.parameters(load_params(_base_folder(folder, base)), f"checkpoint {folder}")


def _base_folder(folder: epath.Path, base: adapters.Base) -> str:
  """The checkpoint that has the base of the one in `folder`. Raises UserError: there is none, or an
  adapter that is its own base.
  """
  try:
    found = at = find_checkpoint(base.place())
    seen = {str(folder)}
    while above := adapters.Base.of(manifest.read(at)):  # an adapter may be a base itself
      if str(at) in seen:
        raise UserError(f"{at} is its own base")
      seen.add(str(at))
      at = find_checkpoint(above.place())
    return str(found)
  except UserError as error:
    raise UserError(
      f"checkpoint {folder} is an adapter and needs its base {base.folder}: {error}, or say with "
      "MMJAX_BASE=DIR where that model is"
    ) from error


def _checked(folder: epath.Path, read: Callable[[], Any]) -> Any:
  """`read()` of a checkpoint whose files are as they were written, in every process. Raises
  Corrupt.
  """
  if jax.process_count() > 1:
    problem = None
    if jax.process_index() == 0:
      try:
        manifest.verify(folder)
      except Corrupt as error:
        problem = error
    if from_main([int(problem is not None)])[0]:
      raise problem or Corrupt("process 0 says why")
    return read()
  large = manifest.check_structure(folder)
  with ThreadPoolExecutor(1) as pool:  # large files are checked while they are being read
    check = pool.submit(manifest.check_content, folder, large)
    try:
      value = read()
    except Exception:
      check.result()
      raise
    check.result()
    return value


_intact: set[tuple[str, str]] = set()  # checkpoints that this process has checked


def _verified(folder: epath.Path) -> epath.Path:
  """Checks what inference reads, once a process. Raises Corrupt."""
  content = manifest.read(folder)
  key = (str(folder), json.dumps(content["files"], sort_keys=True))
  if key not in _intact:
    manifest.verify(
      folder,
      ("params", "config", "assets", "model_state", *(("rest",) if content["average"] else ())),
    )
    _intact.add(key)
  return folder


def _rest(state: TrainState, base: adapters.Base | None) -> dict[str, Any]:
  return dict(
    step=state.step,
    model_state=state.model_state,
    opt_states=state.opt_states,
    ema=adapters.without(state.ema, base),
  )


def _plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
  return {name: float(value) for name, value in metrics.items()}


def _metrics_of(folder: epath.Path) -> dict[str, float]:
  try:
    return manifest.read(folder)["metrics"]
  except Corrupt:
    return {}
