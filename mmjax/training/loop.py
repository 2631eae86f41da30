"""A run from start to end: data, model, checkpoint, steps, metrics, evaluation. One call starts or
resumes it.

What makes it exact: the data position is the step, randomness is folded from the step, metrics of a
step are on disk before a checkpoint of that step exists, and lines past the restored step are cut.
So a run that is killed anywhere and started again writes what an unbroken run writes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time

import jax
from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax import evaluation, remote
from mmjax.config import UserError
from mmjax.parallel import multihost, threads
from mmjax.state import adapters
from mmjax.state.checkpointer import Checkpointer
from mmjax.training import agreement, reference
from mmjax.training.hooks import Hooks
from mmjax.training.metrics import log
from mmjax.training.patience import Patience
from mmjax.training.profile import parse
from mmjax.training.rollouts import Rollouts
from mmjax.training.start import (
  Run,
  first_state,
  is_finished,
  open_data,
  open_program,
  own,
  write_config,
)
from mmjax.training.stop import StopSignal
from mmjax.training.summary import Estimate, Summary
from mmjax.training.watchdog import Watchdog
from mmjax.training.what_is_cut import WhatIsCut

DONE, STOPPED = 0, 75


def train(
  config: FrozenConfigDict,
  workdir: str | os.PathLike,
  *,
  allow_change: bool = False,
  profile: str = "",
  estimate: Estimate | None = None,
) -> int:
  """Trains `config` in `workdir`, from its newest checkpoint if there is one.

  profile: steps to trace, "START:STOP". estimate: says how long a step should take on TPUs (the
  planner; it stands above this floor).

  Returns: 0 when the run is complete, 75 when SIGTERM or Ctrl-C ended it early with a checkpoint
  saved. Ends the process with exit code 1 when it hangs (train.hang_seconds), or waits for one that
  does.
  Raises UserError: another process trains in the folder, it holds another run, a source changed,
  the mesh does not fit, the processes of this run differ in config, data or code, too many bad
  steps or records.
  """
  begin = time.monotonic()
  if not os.fspath(workdir):
    raise UserError("--workdir is empty: name the run folder")
  if profile:
    parse(profile)
  threads_kept = threads.keep(workdir)
  multihost.initialize(config, shared=str(workdir))
  if threads_kept:
    log(threads_kept)
  watchdog = Watchdog(
    config.train.hang_seconds,
    silence=0.75 * multihost.silence_allowed(),
    process=jax.process_index(),
    processes=jax.process_count(),
  )
  # From here on: a signal that comes while compiling is not lost.
  with StopSignal() as stop, watchdog, contextlib.ExitStack() as ends:
    config, mesh, pipeline = multihost.together(functools.partial(open_data, config))
    owner = ends.enter_context(own(workdir, stop))
    mirror = remote.Mirror(workdir, active=multihost.is_main(), check=owner and owner.check)
    ends.enter_context(mirror)
    run = Run(config, mesh, pipeline, mirror, owner, stop, watchdog, begin)
    return _train(run, allow_change, profile, estimate)


def _train(run: Run, allow_change: bool, profile: str, estimate: Estimate | None) -> int:
  config, pipeline, mirror, steps = run.config, run.pipeline, run.mirror, run.steps
  workdir = mirror.place

  # -- What the run is: the program, evaluators, checkpoints; the same in every process ------------
  program = multihost.together(functools.partial(open_program, run, allow_change))
  rollouts = Rollouts.of(config, program, pipeline)
  evaluators = None
  if config.evaluation.evaluators and run.in_steps(config.evaluation.every, steps):
    evaluators = evaluation.Evaluation(
      config, program.apply, run.mesh, poll=run.watchdog.alive, losses=program.losses
    )
  evaluated = multihost.together(evaluators.check_sources) if evaluators else {}
  if jax.process_count() > 1:
    agreement.check(agreement.facts(config, pipeline, evaluated))
  run.watchdog.start(workdir)
  with contextlib.ExitStack() as ends:
    saver = Checkpointer(
      workdir,
      config,
      steps=steps,
      examples=pipeline.examples,
      check=run.owner.check if run.owner else None,
    )
    ends.callback(saver.close)
    last = saver.finished_step()
    ended = last >= steps or Patience.of(saver.data_of(last)).is_over(config)
    if ended and is_finished(workdir, last, config if evaluators else None):
      log(
        f"{workdir} is complete: {last} of {steps} steps. Raise train.steps to go on, or choose "
        "another --workdir."
      )
      return DONE
    mirror.fetch("metrics.jsonl", "goodput.json", "eval.json")

    # -- State: restored, or initialised on the mesh -----------------------------------------------
    state, data, start = first_state(run, program, saver, allow_change)
    reference.give_references(run, program, state, data, start, allow_change)
    hooks = Hooks(run, program, saver, evaluators, data, start, profile)
    if hooks.patience.is_over(config):  # only what comes after the last step is left to do
      steps = start
    clock = hooks.clock
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    log(
      f"{config.model.name}: {parameters / 1e6:.2f}M parameters on {jax.device_count()} "
      f"{jax.devices()[0].platform} device(s), {pipeline.examples} examples an epoch, {steps} "
      f"steps of {config.train.batch_size}"
    )
    if min(program.optimizer.shares.values()) < 1:
      log(adapters.table(program.optimizer.shares, program.params_spec))
    write_config(run)

    cut = ends.enter_context(WhatIsCut(config, mirror.folder)) if multihost.is_main() else None

    # -- Compile ahead, so that a mistake shows before the first batch and the wait has a name -----
    moment = time.monotonic()
    with configs.mistakes(), clock.measure("compilation"):
      summary = Summary(program, program.compile(), estimate)
      if rollouts:
        rollouts.compile()
      # Waits for the other processes' compilers.
      stopping = multihost.any_process(run.stop.received)
    now = time.monotonic()
    log(f"compiled in {now - moment:.1f} s; first step {now - run.begin:.1f} s after the start")
    log(summary.memory())
    if cut:
      cut.report()
    if stopping:
      log(
        f"stopped by {run.stop.name} before step {start + 1} of {steps}. The same command goes on "
        "from here."
      )
      return STOPPED

    # -- The loop ----------------------------------------------------------------------------------
    program.teachers_variables, program.rates  # noqa: B018  now: the loop moves nothing but batches
    hooks.open(summary)
    ends.callback(hooks.close)
    results = None
    train = rollouts.train if rollouts else program.train
    with jax.set_mesh(run.mesh), hooks.tracer:
      batches = pipeline.iterate(start, steps)
      for at in range(start + 1, steps + 1):
        with hooks.tracer.step(at):
          with clock.measure("data", at, busy=hooks.devices_busy):
            batch = next(batches)
          with clock.measure("transfer", at):
            batch = multihost.to_device(batch, run.mesh)
          # Everything that a step reads is on the devices: nothing moves without a word.
          if rollouts:
            with clock.measure("rollouts", at):
              batch = rollouts.answered(state, batch, at)
          with clock.measure("compute", at), jax.transfer_guard("disallow"):
            state, metrics = train(state, batch, pipeline.source_of(at - 1))
        hooks.dispatched(at, metrics)
        if hooks.rollback_due():
          done = state.step
          del state  # its memory is needed for the one that is read
          state = hooks.roll_back(at).replace(step=done)
        results = hooks.evaluate(at, state) if hooks.evaluation_due(at) else None
        if at < steps and hooks.patience.is_over(config):
          steps = at
          hooks.log_line(f"stopped early at step {at}: {hooks.patience.reason(config)}")
        stopping = hooks.stopping(at)
        hooks.save(at, state, results, force=stopping or at == steps)
        if stopping and at < steps:
          hooks.wait_for_checkpoint(at)
          if hooks.progress:
            hooks.progress.close()
          log(
            f"stopped by {run.stop.name} at step {at} of {steps}; checkpoint saved. The same "
            "command goes on from here."
          )
          return STOPPED
        if at == steps:
          break
      hooks.read_metrics()
      last = max(start, steps)
      if evaluators and results is None:  # the last checkpoint is there, but not what comes after
        results = hooks.evaluate(last, state)
        hooks.save(last, state, results)
      hooks.wait_for_checkpoint(last)
    hooks.finish(last, results)
    log(f"done: {steps} steps in {workdir} ({time.monotonic() - run.begin:.0f} s)")
    return DONE
