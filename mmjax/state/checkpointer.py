"""The checkpoints of one run: when they are saved, which stay, what a restart goes on from.

In runs of several processes all of them call `save` and `restore`; process 0 alone lists, checks,
renames and deletes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from mmjax import files
from mmjax.config import UserError, in_steps
from mmjax.files import disk_errors
from mmjax.state import adapters, manifest, storage
from mmjax.state.checkpoint import best_mode, checked, is_step, metrics_of, read_base
from mmjax.state.manifest import Corrupt
from mmjax.state.storage import DELETED, TEMPORARY, from_main
from mmjax.state.train_state import TrainState, clamped

log = logging.getLogger("mmjax")

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
    # Steps that were found unusable: they do not count, and are overwritten or deleted.
    self._bad: set[int] = set()
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
        state, data = checked(folder, functools.partial(self._read, folder, spec))
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
    """Waits, and frees what Orbax holds. A folder without one checkpoint vanishes."""
    try:
      self.wait()
    finally:
      if self._writer is not None:
        self._writer.close()
        self._writer = None
      if jax.process_index() == 0 and not files.is_url(self._root):
        with contextlib.suppress(OSError):
          os.rmdir(self._root)

  def _read(self, folder: epath.Path, spec: TrainState) -> tuple[TrainState, dict]:
    self.base = adapters.Base.of(manifest.read(folder))
    params = storage.read_arrays(folder / "params", adapters.without(spec.params, self.base))
    rest = storage.read_arrays(folder / "rest", _rest(spec, self.base))
    if self.base:
      left_out = read_base(folder, self.base, spec.params)
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
        or (is_step(path) and int(path.name) not in keep)
      ):
        storage.delete(path)
    self._present = set(self._steps())

  def _known_metrics(self) -> dict[int, float]:
    """{step: the metric of checkpoint.best} of what is saved."""
    values = {step: self._best_of(metrics_of(self._root / str(step))) for step in self._steps()}
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
        return is_step(path) and not (path / manifest.NAME).exists()
    return path.name.endswith(TEMPORARY)

  def _steps(self) -> list[int]:
    return [
      int(path.name)
      for path in self._listing()
      if is_step(path) and int(path.name) not in self._bad and not self._is_half_written(path)
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


def _rest(state: TrainState, base: adapters.Base | None) -> dict[str, Any]:
  return dict(
    step=state.step,
    model_state=state.model_state,
    opt_states=state.opt_states,
    ema=adapters.without(state.ema, base),
  )


def _plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
  return {name: float(value) for name, value in metrics.items()}
