"""A run from start to end: data, model, checkpoint, steps, metrics, evaluation. One call starts or
resumes it.

What makes it exact: the data position is the step, randomness is folded from the step, metrics of a
step are on disk before a checkpoint of that step exists, and lines past the restored step are cut.
So a run that is killed anywhere and started again writes what an unbroken run writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import statistics
import time
import zlib
from collections import deque
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax import evaluation, files, printing
from mmjax.config import UserError
from mmjax.data.examples import class_names
from mmjax.data.pipeline import Pipeline
from mmjax.data.text import Tokenizer, load_tokenizer
from mmjax.evaluation import report
from mmjax.ownership import Owner
from mmjax.parallel import multihost, threads
from mmjax.parallel.mesh import make_mesh
from mmjax.state import checkpoint, schedule
from mmjax.state.storage import disk_errors
from mmjax.training import agreement
from mmjax.training.goodput import Clock
from mmjax.training.metrics import (
  MetricsFile,
  Progress,
  TensorBoard,
  WeightsAndBiases,
  import_wandb,
  memory_in_use,
)
from mmjax.training.profile import Profile, parse
from mmjax.training.recovery import Faults
from mmjax.training.step import Step
from mmjax.training.summary import Estimate, Summary, finished_step
from mmjax.training.watchdog import Watchdog

DONE, STOPPED = 0, 75


def train(
  config: FrozenConfigDict,
  workdir: str | os.PathLike,
  *,
  allow_change: bool = False,
  profile: str = "",
  estimate: Estimate | None = None,
) -> int:
  """Trains `config` in `workdir`, from its newest checkpoint if there is one. profile: steps to
  trace, "START:STOP".
  estimate: says how long a step should take on TPUs (the planner; it stands above this floor).

  Returns: 0 when the run is complete, 75 when SIGTERM or Ctrl-C ended it early with a checkpoint
  saved.
  Ends the process with exit code 1 when it hangs (train.hang_seconds), or waits for one that does.
  Raises UserError: another process trains in the folder, it holds another run, a source changed,
  the mesh does not fit, the processes of this run differ in config, data or code, too many bad
  steps or records.
  """
  begin = time.monotonic()
  if not os.fspath(workdir):
    raise UserError("--workdir is empty: name the run folder")
  profile and parse(profile)
  kept = threads.keep(workdir)
  multihost.initialize(config, shared=str(workdir))
  if kept:
    print_main(kept)
  watchdog = Watchdog(
    config.train.hang_seconds,
    silence=0.75 * multihost.silence_allowed(),
    process=jax.process_index(),
    processes=jax.process_count(),
  )
  # From here on: a signal that comes while compiling is not lost.
  with StopSignal() as stop, watchdog:
    mesh, pipeline = multihost.together(functools.partial(open_data, config))
    with (
      own(workdir, stop) as owner,
      files.Mirror(workdir, active=multihost.is_main(), check=owner and owner.check) as mirror,
    ):
      return _train(
        config,
        mesh,
        pipeline,
        mirror,
        owner,
        stop,
        watchdog,
        begin,
        allow_change,
        profile,
        estimate,
      )


def _train(
  config: FrozenConfigDict,
  mesh: Mesh,
  pipeline: Pipeline,
  mirror: files.Mirror,
  owner: Owner | None,
  stop: StopSignal,
  watchdog: Watchdog,
  begin: float,
  allow_change: bool,
  profile: str,
  estimate: Estimate | None,
) -> int:
  say, workdir, batch_size = print_main, mirror.place, config.train.batch_size

  # -- What the run is: durations, the step, evaluators; the same in every process -----------------
  units = dict(batch_size=batch_size, examples=pipeline.examples)
  steps = configs.in_steps(config.train.steps, steps=None, **units)
  every = {
    name: configs.in_steps(value, steps=steps, **units)
    for name, value in (
      ("checkpoint", config.checkpoint.every),
      ("evaluation", config.evaluation.every),
      ("log", config.log.every),
    )
  }

  def open_run() -> Step:
    open_workdir(workdir, config, allow_change)
    with configs.mistakes():
      step = Step(config, mesh, steps=steps, examples=pipeline.examples)
      step.optimizer  # noqa: B018  made now, for what it refuses
    return step

  step = multihost.together(open_run)
  evaluators = None
  if config.evaluation.evaluators and every["evaluation"]:
    evaluators = evaluation.Evaluation(config, step.apply, mesh, poll=watchdog.alive)
  evaluated = multihost.together(evaluators.check_sources) if evaluators else {}
  if jax.process_count() > 1:
    agreement.check(agreement.facts(config, pipeline, evaluated))
  watchdog.start(workdir)

  saver = checkpoint.Checkpointer(
    workdir, config, steps=steps, examples=pipeline.examples, check=owner and owner.check
  )
  last = saver.finished_step()
  if last >= steps and is_finished(workdir, last, config if evaluators else None):
    say(
      f"{workdir} is complete: {last} of {steps} steps. Raise train.steps to go on, or choose "
      "another --workdir."
    )
    saver.close()
    return DONE
  mirror.fetch("metrics.jsonl", "goodput.json", "eval.json")

  # -- State: restored, or initialised on the mesh -------------------------------------------------
  restored = saver.restore(step.state_spec)
  if restored:
    state, data, start = restored
    check_position(config, data, pipeline, steps, start, allow_change)
    say(f"resume {workdir} at step {start} of {steps}")
  else:
    state, data, start = step.init(config.seed), {}, 0
    if config.init["from"]:
      params, model_state, lines = checkpoint.restore_into(
        state.params, config.init["from"], config.init.map, state.model_state
      )
      lines += other_tokenizer(config)
      state = step.with_params(state, params, model_state)
      for line in lines:
        say(line)
  last = max(start, steps)
  tracer = Profile(profile, mirror.folder, first=start + 1, last=steps, active=multihost.is_main())
  clock = Clock(
    mirror.folder if multihost.is_main() else None,
    begin,
    start,
    productive=data.get("productive", 0.0),
    notify=watchdog.at,
  )
  faults = Faults.of(data)
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  say(
    f"{config.model.name}: {parameters / 1e6:.2f}M parameters on {jax.device_count()} "
    f"{jax.devices()[0].platform} device(s), {pipeline.examples} examples an epoch, {steps} steps "
    f"of {batch_size}"
  )
  if owner:
    owner.check()
    evaluation.replace_file(mirror.folder / "config.json", configs.to_json(config))
    if jax.devices()[0].platform == "cpu" and not threads.recorded(workdir):
      evaluation.replace_file(
        mirror.folder / threads.FILE, json.dumps({"threads": threads.count()})
      )

  # -- Compile ahead, so that a mistake shows before the first batch and the wait has a name -------
  moment = time.monotonic()
  with configs.mistakes(), clock.measure("compilation"):
    summary = Summary(step, step.compile(), estimate)
    stopping = multihost.any_process(stop.received)  # waits for the other processes' compilers
  say(
    f"compiled in {time.monotonic() - moment:.1f} s; first step {time.monotonic() - begin:.1f} s "
    "after the start"
  )
  say(summary.memory())
  if stopping:
    saver.close()
    say(
      f"stopped by {stop.name} before step {start + 1} of {steps}. The same command goes on from "
      "here."
    )
    return STOPPED

  # -- The loop ------------------------------------------------------------------------------------
  outputs = Outputs(mirror, start, config, owner) if multihost.is_main() else None
  progress = Progress(start, steps) if multihost.is_main() else None
  assets = inference_assets(config, pipeline)
  pending: deque = deque()

  def settle(keep: int) -> None:
    """Reads the metrics of all but the `keep` newest dispatched steps: reading the newest would
    stall the device.
    """
    while len(pending) > keep:
      at, metrics = pending.popleft()
      with clock.measure("compute", at):
        metrics = jax.device_get(metrics)
      skipped = bool(metrics["skipped"])
      clock.finished(skipped)
      faults.count(skipped)
      if skipped:
        say(
          f"step {at}: loss or gradient is not finite; update skipped ({faults.skipped} so far; "
          f"ids {', '.join(map(str, pipeline.ids(at - 1)[:4]))}, ...)"
        )
        if faults.skipped_in_a_row >= config.train.max_skipped:
          raise UserError(
            f"{workdir}: {faults.skipped_in_a_row} steps in a row were not finite "
            f"(train.max_skipped), the last is step {at}. Lower optimizer.lr, raise "
            "schedule.warmup or set optimizer.clip; then start again from the last checkpoint"
          )
      if outputs and (at % every["log"] == 0 or at in (1, steps)):
        row = dict(
          step=at,
          time=time.time(),
          **{k: float(v) for k, v in metrics.items()},
          skipped_total=faults.skipped,
        )
        if config.train.rollback:
          row["rollbacks"] = faults.rollbacks
        row["ids_crc32"] = zlib.crc32("\n".join(map(str, pipeline.ids(at - 1))).encode())
        row.update(clock.row(at, batch_size, summary.flops), memory=memory_in_use())
        outputs.write(row)
        progress.log(row)

  def save(at: int, metrics: dict | None, force: bool) -> None:
    due = saver.due(at) or force
    if due or metrics:
      settle(0)
      faults.saving(at, every["checkpoint"])
      saver.protected = faults.good if config.train.rollback else 0
      position = dict(
        step=at,
        steps=steps,
        fingerprint=pipeline.fingerprint(),
        productive=clock.productive,
        **dataclasses.asdict(faults),
      )
      with clock.measure("checkpoint", at):
        outputs and outputs.sync()
        saver.save(
          at, state, data=position, config=config, assets=assets, metrics=metrics, force=due
        )

  def evaluate(at: int) -> dict:
    with clock.measure("evaluation", at):
      results = evaluators.run(step.evaluation_variables(state))
    if outputs:
      outputs.evaluated(at, results)
      for name, result in results.items():
        progress.say(
          f"step {at}: {name}: "
          + "  ".join(f"{k} {v:.4g}" for k, v in list(result.metrics.items())[:4])
        )
    return results

  results = None
  try:
    with jax.set_mesh(mesh), tracer:
      batches = pipeline.iterate(start, steps)
      for at in range(start + 1, steps + 1):
        with tracer.step(at):
          with clock.measure(
            "data", at, busy=lambda: bool(pending) and not pending[-1][1]["loss"].is_ready()
          ):
            batch = next(batches)
          with clock.measure("transfer", at):
            batch = multihost.to_device(batch, mesh)
          with clock.measure("compute", at):
            state, metrics = step.train(state, batch, pipeline.source_of(at - 1))
        if folder := tracer.after(at, metrics):
          say(f"step {at}: trace written to {mirror.name(folder)}")
        pending.append((at, metrics))
        settle(1)
        if outputs and at == min(
          start + 2, steps
        ):  # the first step is told; the devices compute the second
          say(summary.work())
        if faults.decides_now(config):
          settle(0)
        if faults.rollback_due(config) and faults.good:
          now, state = state.step, None  # its memory is needed for the one that is read
          with clock.measure("checkpoint", at):
            state = faults.roll_back(saver, step.state_spec, at, say).replace(step=now)
        if progress:
          progress.step(at)
        results = None
        if evaluators and (at % every["evaluation"] == 0 or at == steps):
          settle(0)
          results = evaluate(at)
        # Processes agree on stopping at logged steps: asking costs a collective.
        with clock.measure("agreement", at):
          stopping = (
            stop.received
            if jax.process_count() == 1
            else at % every["log"] == 0 and multihost.any_process(stop.received)
          )
        save(
          at, evaluation.flat_metrics(results) if results else None, force=stopping or at == steps
        )
        if stopping and at < steps:
          with clock.measure("checkpoint", at):
            saver.wait()
          progress and progress.close()
          say(
            f"stopped by {stop.name} at step {at} of {steps}; checkpoint saved. The same command "
            "goes on from here."
          )
          return STOPPED
      settle(0)
      if (
        evaluators and results is None
      ):  # the last checkpoint is there, but what comes after it is not
        results = evaluate(last)
        save(last, evaluation.flat_metrics(results), force=False)
      with clock.measure("checkpoint", last):
        saver.wait()
    if outputs:
      progress.close()
      say(summary.compare(clock.step_seconds or outputs.step_seconds(batch_size), mirror.folder))
      with clock.measure("report"):
        outputs.finish(config, results)
        summary.finished(mirror.folder, last)
    say(f"done: {steps} steps in {workdir} ({time.monotonic() - begin:.0f} s)")
    return DONE
  finally:
    with contextlib.ExitStack() as ends:  # each of them, whatever the others raise
      ends.callback(saver.close)
      ends.callback(clock.write)
      if outputs:
        ends.callback(outputs.close)
        ends.callback(progress.close)


# -- Parts of the story ----------------------------------------------------------------------------


class StopSignal:
  """Within `with`, SIGTERM and Ctrl-C set `received`; a second Ctrl-C interrupts at once."""

  def __init__(self):
    self.received, self.name = False, "a signal to another process"
    self._before: dict[int, object] = {}

  def is_received(self) -> bool:
    return self.received

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if self.received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received, self.name = True, "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    os.write(2, f"\n{self.name}: finishing this step and saving ...\n".encode())


class Outputs:
  """Everything that the main process writes into the run folder while training."""

  def __init__(
    self, mirror: files.Mirror, step: int, config: FrozenConfigDict, owner: Owner | None = None
  ):
    self._mirror, self._owner = mirror, owner
    if owner:
      owner.check()
    with self._disk_errors():
      self._file = MetricsFile(mirror.folder, step)
      self._boards = [TensorBoard(mirror.folder, step)] if config.log.tensorboard else []
    if config.log.wandb:
      self._boards.append(
        WeightsAndBiases(config.log.wandb, mirror.place, mirror.folder, config.to_dict())
      )

  def write(self, row: dict) -> None:
    if self._owner:
      self._owner.check_known()
    with self._disk_errors():
      self._file.write(row)
      for board in self._boards:
        board.write(row)

  def evaluated(self, step: int, results: dict) -> None:
    """Writes the scores of a step, unless the last line has them: the process before got so far."""
    metrics = evaluation.flat_metrics(results)
    if self._file.last.get("step") != step or not metrics.keys() <= self._file.last.keys():
      self.write(dict(step=step, time=time.time(), **metrics))

  def step_seconds(self, batch_size: int) -> float | None:
    """Seconds a step by what is written: the median; None where no line has a speed."""
    speeds = [row.get("examples_per_second") for row in report.read_metrics(self._file.path)]
    return (
      statistics.median(batch_size / speed for speed in speeds if speed) if any(speeds) else None
    )

  def sync(self) -> None:
    """Everything that was written is on the disk, or at the URL: before a checkpoint that stands
    for it.
    """
    with self._disk_errors():
      self._file.sync()
    self._mirror.push()

  def finish(self, config: FrozenConfigDict, results: dict | None) -> None:
    if self._owner:
      self._owner.check()
    self.sync()
    if results:
      self._mirror.fetch("eval.json")
      evaluation.write_eval_json(self._mirror.folder, results)
    report.write_report(self._mirror.folder, config, results or {}, self._file.path)

  def close(self) -> None:
    with self._disk_errors(), contextlib.ExitStack() as ends:
      for output in (self._file, *self._boards):
        ends.callback(output.close)

  def _disk_errors(self):
    return disk_errors(
      self._mirror.folder,
      f"{self._mirror.place}: metrics cannot be written",
      ". What was saved is intact: free space or mend the folder, then start again",
    )


def open_data(config: FrozenConfigDict) -> tuple[Mesh, Pipeline]:
  """The mesh, and this process's part of the training data on it. Raises UserError: the mesh does
  not fit, data is missing.
  """
  mesh = make_mesh(config)
  configs.check(config, jax.device_count())
  return mesh, Pipeline(config, rows=multihost.local_rows(mesh, config.train.batch_size))


def own(workdir: str | os.PathLike, stop: StopSignal) -> Owner | contextlib.nullcontext:
  """Process 0 as the one owner of the run folder, the others as nobody. MMJAX_OWNER_SECONDS: how
  long to wait for another run in it to end, as launchers set it before they start a run again.
  Raises UserError in every process: it is in use."""

  def claim() -> Owner | contextlib.nullcontext:
    if not multihost.is_main():
      return contextlib.nullcontext()
    text = os.environ.get("MMJAX_OWNER_SECONDS", "0")
    if not text.isdigit():
      raise UserError(f"MMJAX_OWNER_SECONDS is {text!r}, but must be a whole number")
    return Owner(workdir, f"--workdir {workdir}", wait=int(text), stopped=stop.is_received)

  return multihost.together(claim)


def is_finished(workdir: Path, step: int, config: FrozenConfigDict | None) -> bool:
  """Whether everything that a run leaves at its end is in its folder, made at `step`; what process
  0 sees. config: with evaluators.
  """
  finished = False
  if multihost.is_main():
    with files.store_errors(workdir, f"{workdir} cannot be read"):
      scores = evaluation.read_eval_json(workdir)
      finished = finished_step(workdir) == step and (workdir / report.NAME).exists()
    finished &= config is None or set(config.evaluation.evaluators) <= scores.keys()
  return multihost.any_process(finished)


def open_workdir(workdir: Path, config: FrozenConfigDict, allow_change: bool) -> None:
  """Makes the run folder, or checks that the run in it is this one. Raises UserError otherwise."""
  with disk_errors(workdir, f"--workdir {workdir} cannot be written"):
    files.make_folder(workdir)
    probe = workdir / f".writable-{jax.process_index()}"
    probe.write_text("")
    probe.unlink()
  if config.log.wandb:
    import_wandb()
  written = workdir / "config.json"
  if not written.exists():
    return
  try:
    old = configs.from_json(written.read_text(), (*config.allow_code, *configs.own_code(config)))
  except configs.UntrustedCode as error:
    raise UserError(f"{written}: {error}") from error
  except (ValueError, UserError) as error:
    raise UserError(
      f"{written} is not a config of this version ({error}). Choose another --workdir"
    ) from error
  changes = configs.changed_on_resume(old, config)
  if changes and not allow_change:
    raise UserError(
      f"{workdir} holds a run with other settings: {'; '.join(changes)}. Choose another --workdir, "
      "or pass --allow-change to go on with the new ones"
    )


def inference_assets(config, pipeline: Pipeline) -> dict[str, bytes]:
  """What inference needs besides parameters, {file name: content}: the tokenizer of a model that
  reads or writes texts, and classes.json, the names of a classifier's outputs."""
  texts = "text" in config.model.encoders or config.model.get("decoder")
  assets = load_tokenizer(config.data).to_assets() if config.data.text.tokenizer and texts else {}
  names = next(
    filter(None, (class_names(source, config.data.label) for source in pipeline.sources)), ()
  )
  if config.data.label != "none" and names:
    assets["classes.json"] = json.dumps(names).encode()
  return assets


def other_tokenizer(config) -> list[str]:
  """A line that warns where init.from was trained with another tokenizer than this run's, [] where
  not (or where one has none).
  """
  theirs = checkpoint.load_assets(config.init["from"])
  if not config.data.text.tokenizer or not any(name.startswith("tokenizer.") for name in theirs):
    return []
  if Tokenizer.from_assets(theirs).fingerprint == load_tokenizer(config.data).fingerprint:
    return []
  return [
    f"warning: init.from {config.init['from']} was trained with another tokenizer than "
    f"data.text.tokenizer {config.data.text.tokenizer!r}: its embeddings of tokens stand for "
    "other pieces. Use its tokenizer, or leave them new by init.map"
  ]


def check_position(
  config, data: dict, pipeline: Pipeline, steps: int, start: int, allow_change: bool
) -> None:
  """Refuses to go on with other data or another tokenizer, or with a schedule whose past would
  change. Raises UserError.
  """
  if allow_change:
    return
  now, then = json.loads(json.dumps(pipeline.fingerprint())), data["fingerprint"]
  differ = [
    f"{k}: {then[k]!r} -> {now[k]!r}" for k in now if k in then and then[k] != now[k]
  ]  # older ones have no tokenizer
  if differ:
    raise UserError(
      f"the data is not what the checkpoint was trained on ({'; '.join(differ)}). Restore it, or "
      "pass --allow-change"
    )
  past = schedule.make_schedule(config, steps=data["steps"], examples=pipeline.examples)
  future = schedule.make_schedule(config, steps=steps, examples=pipeline.examples)
  if not schedule.same_past(past, future, start):
    raise UserError(
      f"train.steps {data['steps']} -> {steps} would change the learning rate of steps that are "
      f"done (schedule.name={config.schedule.name}). Keep train.steps, use "
      "schedule.name=constant, or pass --allow-change"
    )


def print_main(text: str) -> None:
  if multihost.is_main():
    printing.say(text)
