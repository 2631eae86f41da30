"""What happens around the steps of a run: time is measured, metrics are read and written, steps
that are not finite are counted, a trace is taken, checkpoints are saved and evaluators run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mmjax import evaluation
from mmjax.config import UserError
from mmjax.parallel import compiler, multihost
from mmjax.state.checkpointer import Checkpointer
from mmjax.state.train_state import TrainState
from mmjax.training.goodput import Clock
from mmjax.training.metrics import Progress, log, memory_in_use
from mmjax.training.outputs import Outputs
from mmjax.training.patience import Patience
from mmjax.training.profile import Profile
from mmjax.training.program import Program
from mmjax.training.recovery import Faults
from mmjax.training.start import Run, inference_assets
from mmjax.training.summary import Summary


class Hooks:
  """The hooks of the steps `start` + 1 to `run.steps`.

  saver: of the checkpoints. evaluators: None = none in the loop. data: the item of that name of the
  checkpoint that the run goes on from, {} for a new run. profile: steps to trace, "START:STOP".
  Raises ConfigError: those are not steps of this start.
  """

  def __init__(
    self,
    run: Run,
    program: Program,
    saver: Checkpointer,
    evaluators: evaluation.Evaluation | None,
    data: dict,
    start: int,
    profile: str = "",
  ):
    self.run, self.program, self.saver, self.evaluators = run, program, saver, evaluators
    self.config, self.steps, self.start = run.config, run.steps, start
    self.log_every, self.evaluate_every, self.save_every = (
      run.in_steps(entry.every, self.steps)
      for entry in (run.config.log, run.config.evaluation, run.config.checkpoint)
    )
    main, folder = multihost.is_main(), run.mirror.folder
    last = max(start, self.steps)
    self.tracer = Profile(profile, folder, first=start + 1, last=last, active=main)
    self.clock = Clock(
      folder if main else None,
      run.begin,
      start,
      productive=data.get("productive", 0.0),
      notify=run.watchdog.at,
    )
    self.faults, self.patience = Faults.of(data), Patience.of(data)
    self._pending: deque[tuple[int, dict]] = deque()  # steps whose metrics are not read yet

  def open(self, summary: Summary) -> None:
    """Opens what the main process writes; called once the step is compiled."""
    self.summary = summary
    self.outputs: Outputs | None = None
    self.progress: Progress | None = None
    if multihost.is_main():
      self.outputs = Outputs(self.run.mirror, self.start, self.config, self.run.owner)
      self.progress = Progress(self.start, self.steps, evaluate_every=self.evaluate_every)
    self._assets = inference_assets(self.config, self.run.pipeline)

  def close(self) -> None:
    with contextlib.ExitStack() as ends:  # each of them, whatever the others raise
      ends.callback(self.clock.write)
      if self.outputs:
        ends.callback(self.outputs.close)
      if self.progress:
        ends.callback(self.progress.close)

  # -- A step --------------------------------------------------------------------------------------

  def devices_busy(self) -> bool:
    """Whether the devices still compute a step that was dispatched."""
    return bool(self._pending) and not self._pending[-1][1]["loss"].is_ready()

  def dispatched(self, at: int, metrics: dict) -> None:
    """After a step is dispatched. metrics: on the devices, perhaps not computed yet."""
    if folder := self.tracer.after(at, metrics):
      log(f"step {at}: trace written to {self.run.mirror.name(folder)}")
    self._pending.append((at, metrics))
    self.read_metrics(keep=1)
    # The first step is told; the devices compute the second.
    if self.outputs and at == min(self.start + 2, self.steps):
      log(self.summary.work())
    if self.faults.decides_now(self.config):
      self.read_metrics()
    if self.progress:
      self.progress.step(at)

  def read_metrics(self, keep: int = 0) -> None:
    """Reads the metrics of all but the `keep` newest dispatched steps: reading the newest would
    stall the device. Raises UserError: too many steps in a row were not finite.
    """
    while len(self._pending) > keep:
      at, metrics = self._pending.popleft()
      with self.clock.measure("compute", at):
        metrics = jax.device_get(metrics)
      skipped = bool(metrics["skipped"])
      self.clock.finished(skipped)
      self.faults.count(skipped)
      if skipped:
        self._skipped(at)
      if self.outputs and self.progress and (at % self.log_every == 0 or at in (1, self.steps)):
        row = self._row(at, metrics)
        self.outputs.write(row)
        self.progress.log(row)

  def _skipped(self, at: int) -> None:
    ids = ", ".join(map(str, self.run.pipeline.ids(at - 1)[:4]))
    log(
      f"step {at}: loss or gradient is not finite; update skipped ({self.faults.skipped} so far; "
      f"ids {ids}, ...)"
    )
    if self.faults.skipped_in_a_row >= self.config.train.max_skipped:
      raise UserError(
        f"{self.run.mirror.place}: {self.faults.skipped_in_a_row} steps in a row were not finite "
        f"(train.max_skipped), the last is step {at}. Lower optimizer.lr, raise schedule.warmup or "
        "set optimizer.clip; then start again from the last checkpoint"
      )

  def _row(self, at: int, metrics: dict) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    ids = "\n".join(map(str, self.run.pipeline.ids(at - 1)))
    row: dict[str, Any] = dict(step=at, time=time.time())
    row.update((name, float(x)) for name, x in metrics.items())
    row["skipped_total"] = self.faults.skipped
    if self.config.train.rollback:
      row["rollbacks"] = self.faults.rollbacks
    row["ids_crc32"] = zlib.crc32(ids.encode())
    row.update(self.clock.row(at, self.config.train.batch_size, self.summary.flops))
    row["memory"] = memory_in_use()
    return row

  # -- After a step --------------------------------------------------------------------------------

  def rollback_due(self) -> bool:
    return self.faults.rollback_due(self.config) and bool(self.faults.good)

  def roll_back(self, at: int) -> TrainState:
    """The state of the last good checkpoint, its own step in it."""
    with self.clock.measure("checkpoint", at):
      return self.faults.roll_back(self.saver, self.program.state_spec, at, log)

  def evaluation_due(self, at: int) -> bool:
    due = self.evaluate_every and at % self.evaluate_every == 0
    return bool(self.evaluators) and (due or at == self.steps)

  def evaluate(self, at: int, state: TrainState) -> dict[str, evaluation.Result]:
    """Runs the evaluators and writes what they found."""
    self.read_metrics()
    begin, compiled = time.monotonic(), compiler.seconds()
    with self.clock.measure("evaluation", at):
      variables = self.program.evaluation_variables(state)
      results = self.evaluators.run(variables) if self.evaluators else {}
    if self.progress:
      self.progress.evaluated(time.monotonic() - begin, compiler.seconds() - compiled)
    self.patience.see(at, evaluation.flat_metrics(results), self.config)
    if self.outputs and self.progress:
      self.outputs.evaluated(at, results)
      for line in score_lines(results, self.config.checkpoint.best):
        self.progress.log_line(f"step {at}: {line}")
    return results

  def save(self, at: int, state: TrainState, results: dict | None, *, force: bool = False) -> None:
    """Saves a checkpoint where one is due or `force` says so; with results, offers it as the
    best.
    """
    due = self.saver.due(at) or force
    metrics = evaluation.flat_metrics(results) if results else None
    if not due and not metrics:
      return
    self.read_metrics()
    self.faults.saving(at, self.save_every)
    self.saver.protected = self.faults.good if self.config.train.rollback else 0
    position = dict(
      step=at,
      steps=self.steps,
      fingerprint=self.run.pipeline.fingerprint(),
      productive=self.clock.productive,
      patience=dataclasses.asdict(self.patience),
      **dataclasses.asdict(self.faults),
    )
    with self.clock.measure("checkpoint", at):
      if self.outputs:
        self.outputs.sync()
      self.saver.save(
        at,
        state,
        data=position,
        config=self.config,
        assets=self._assets,
        metrics=metrics,
        force=due,
      )

  def stopping(self, at: int) -> bool:
    """Whether all processes stop after this step. They agree on it at logged steps: asking costs a
    collective.
    """
    with self.clock.measure("agreement", at):
      if jax.process_count() == 1:
        return self.run.stop.received
      return at % self.log_every == 0 and multihost.any_process(self.run.stop.received)

  def log_line(self, text: str) -> None:
    """A line among those of the progress."""
    if self.progress:
      self.progress.log_line(text)

  def wait_for_checkpoint(self, at: int) -> None:
    with self.clock.measure("checkpoint", at):
      self.saver.wait()

  def finish(self, last: int, results: dict | None) -> None:
    """The last lines and the report of a run that is complete."""
    if not self.outputs or not self.progress:
      return
    self.progress.close()
    seconds = self.clock.step_seconds or self.outputs.step_seconds(self.config.train.batch_size)
    log(self.summary.compare(seconds, self.run.mirror.folder))
    with self.clock.measure("report"):
      marks = self.evaluators.check_sources() if self.evaluators and results else {}
      about = evaluation.provenance(self.config, marks, f"checkpoints/{last}", last)
      self.outputs.finish(self.config, results, about)
      self.summary.finished(self.run.mirror.folder, last)


def score_lines(results: Mapping[str, evaluation.Result], best: str) -> Iterator[str]:
  """A line for each evaluator, with the first four of its metrics. The metric that checkpoints are
  kept by, `best` ("EVALUATOR/METRIC"), comes before all others, whichever evaluator has it.
  """
  kept = {best.removeprefix(f"{name}/") for name in results if best.startswith(f"{name}/")}
  for name, result in results.items():
    names = [*kept.intersection(result.metrics), *(m for m in result.metrics if m not in kept)][:4]
    yield f"{name}: " + "  ".join(f"{metric} {result.metrics[metric]:.4g}" for metric in names)
