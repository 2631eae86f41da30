"""What a run finds and checks before its first step: its data, its folder, the run that is in it,
its first state.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax import evaluation, files, remote
from mmjax.config import UserError
from mmjax.data.labels import class_names
from mmjax.data.pipeline import Pipeline
from mmjax.data.statistics import Statistics
from mmjax.data.templates import ASSET
from mmjax.data.tokenizers import Tokenizer, load_tokenizer
from mmjax.evaluation import report
from mmjax.files import disk_errors
from mmjax.ownership import Owner
from mmjax.parallel import multihost, threads
from mmjax.parallel.mesh import make_mesh
from mmjax.state import adapters, checkpoint, schedule
from mmjax.state.checkpointer import Checkpointer
from mmjax.state.optimizer import axes_by_name
from mmjax.state.paths import by_name, map_named
from mmjax.state.train_state import TrainState
from mmjax.state.transfer import merged, origin, others_of, rules_of
from mmjax.training.metrics import import_wandb, log
from mmjax.training.program import Program
from mmjax.training.statistics import with_statistics
from mmjax.training.stop import StopSignal
from mmjax.training.summary import finished_step
from mmjax.training.watchdog import Watchdog


class Run(NamedTuple):
  """What a run has from its start on. owner: of the run folder, None in all processes but the main
  one. begin: time.monotonic() at the start.
  """

  config: FrozenConfigDict
  mesh: Mesh
  pipeline: Pipeline
  mirror: remote.Mirror
  owner: Owner | None
  stop: StopSignal
  watchdog: Watchdog
  begin: float

  def in_steps(self, duration: int | str, steps: int | None = None) -> int:
    """A duration of the config in steps. steps: the length of the run, for percents."""
    batch_size = self.config.train.batch_size
    return configs.in_steps(
      duration, steps=steps, batch_size=batch_size, examples=self.pipeline.examples
    )

  @property
  def steps(self) -> int:
    """Length of the run."""
    return self.in_steps(self.config.train.steps)


def open_data(config: FrozenConfigDict) -> tuple[FrozenConfigDict, Mesh, Pipeline]:
  """The config with what only the data tells, the mesh, and this process's part of the training
  data on it. Raises UserError: the mesh does not fit, data is missing.
  """
  mesh = make_mesh(config)
  configs.check(config, jax.device_count())
  pipeline = Pipeline(config, rows=multihost.local_rows(mesh, config.train.batch_size))
  return with_statistics(config, Statistics(config, pipeline.sources)), mesh, pipeline


def own(workdir: str | os.PathLike, stop: StopSignal) -> Owner | contextlib.nullcontext:
  """Process 0 as the one owner of the run folder, the others as nobody. MMJAX_OWNER_SECONDS: how
  long to wait for another run in it to end, as launchers set it before they start a run again.
  Raises UserError in every process: it is in use."""

  def claim() -> Owner | contextlib.nullcontext:
    if not multihost.is_main():
      return contextlib.nullcontext()
    text = os.environ.get("MMJAX_OWNER_SECONDS", "0")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
      raise UserError(f"MMJAX_OWNER_SECONDS is {text!r}, but must be a whole number")
    return Owner(workdir, f"--workdir {workdir}", wait=int(text), stopped=stop.is_received)

  return multihost.together(claim)


def open_program(run: Run, allow_change: bool) -> Program:
  """The program of a run, and its folder made or checked. Raises UserError: a mistake in the
  config, or the folder holds another run.
  """
  open_workdir(run.mirror.place, run.config, allow_change)
  with configs.mistakes():
    program = Program(run.config, run.mesh, steps=run.steps, examples=run.pipeline.examples)
    program.optimizer  # noqa: B018  made now, for what it refuses
  if multihost.is_main() or run.config.export.hf:
    check_export(run.config, inference_assets(run.config, run.pipeline))
  return program


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
    old = configs.from_json(
      files.read_text(written), (*config.allow_code, *configs.own_code(config))
    )
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


def first_state(
  run: Run, program: Program, saver: Checkpointer, allow_change: bool
) -> tuple[TrainState, dict, int]:
  """(state, `data` of its checkpoint, steps done): of the newest checkpoint, of init.from, or
  new.
  """
  config, workdir, steps = run.config, run.mirror.place, run.steps
  restored = saver.restore(program.state_spec)
  if restored:
    state, data, start = restored
    check_position(config, data, run.pipeline, steps, start, allow_change)
    log(f"resume {workdir} at step {start} of {steps}")
    return state, data, start
  return new_state(config, program, saver=saver), {}, 0


def new_state(
  config: FrozenConfigDict,
  program: Program,
  log: Callable[[str], None] = log,
  saver: Checkpointer | None = None,
) -> TrainState:
  """The state before the first step: initialised, or of init.from. log: takes a line for each
  parameter that is loaded, resized, new or left. saver: of the run's checkpoints, which will leave
  out what an adapter has of init.from."""
  folder, rules = config.init["from"], config.init.map
  if config.lora.params and not folder:
    raise configs.ConfigError(
      f"lora.params is {config.lora.params!r}, but there is no model to adapt: name its checkpoint "
      "in init.from"
    )
  if folder:
    try:
      folder = checkpoint.find_checkpoint(folder)  # once: its run may save a newer one meanwhile
    except UserError as error:
      raise UserError(f"init.from {error}") from error
    rules = (*new_embeddings(config, program), *rules)
  state = program.init(config.seed)
  if folder:
    plain = plain_params(config, program, state.params)
    source = checkpoint.load_params(folder)
    params, model_state, lines = checkpoint.restore_into(
      plain, folder, rules_of("", rules), state.model_state, source
    )
    for other in others_of(rules):
      params, model_state, more = checkpoint.restore_into(
        params, other, rules_of(other, rules), model_state
      )
      lines = merged(lines, more, other)
    if config.lora.base != "float32":
      for name, x in by_name(params).items():
        if isinstance(x, jax.ShapeDtypeStruct):
          raise configs.ConfigError(
            f"lora.base is {config.lora.base!r}, but {name} does not come from init.from, so that "
            "it would be frozen as it is drawn. Name it in lora.full"
          )
      params = adapters.composed({}, by_name(params), program.params_spec)
    state = program.with_params(state, params, model_state)
    for line in lines:
      log(line)
  if saver and config.lora.params:
    shares = program.optimizer.shares
    shares = {adapters.plain_name(name): share for name, share in shares.items()}
    saver.base = adapters.find_base(folder, source, plain, rules_of("", rules), shares)
  return state


def plain_params(config: FrozenConfigDict, program: Program, params: Any) -> Any:
  """The parameters, with specs of float32 kernels in the place of kernels in few bits."""
  if config.lora.base == "float32":
    return params
  lora = {**config.lora.to_dict(), "base": "float32"}
  here = by_name(params)

  def of(name: str, leaf: Any) -> Any:
    return here.get(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

  spec = program.like(FrozenConfigDict({**config.to_dict(), "lora": lora})).params_spec
  return map_named(of, spec)


def check_position(
  config, data: dict, pipeline: Pipeline, steps: int, start: int, allow_change: bool
) -> None:
  """Refuses to go on with other data or another tokenizer, or with a schedule whose past would
  change. Raises UserError.
  """
  if allow_change:
    return
  now, then = json.loads(json.dumps(pipeline.fingerprint())), data["fingerprint"]
  # Checkpoints of older versions say nothing of the tokenizer.
  differ = [f"{k}: {then[k]!r} -> {now[k]!r}" for k in now if k in then and then[k] != now[k]]
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


def new_embeddings(config, program: Program) -> tuple[tuple[str, None], ...]:
  """Rules for init.map that leave new what belongs to single tokens, where a checkpoint was trained
  with another tokenizer and init.tokenizer is "new"; () where the tokenizer is the checkpoint's, or
  nothing of that kind is loaded. Raises ConfigError: it is another one, and init.tokenizer is
  "same".
  """
  if not config.data.text.tokenizer:
    return ()
  of_tokens = [name for name, axes in axes_by_name(program.axes).items() if "vocab" in axes]
  new: list[tuple[str, None]] = []
  for other in ("", *others_of(config.init.map)):
    folder, rules = other or config.init["from"], rules_of(other, config.init.map)
    assets = checkpoint.load_assets(folder)
    if not Tokenizer.is_among(assets):
      continue
    if Tokenizer.from_assets(assets).fingerprint == load_tokenizer(config.data).fingerprint:
      continue
    stored = checkpoint.names_and_shapes(folder)
    loaded = [name for name in of_tokens if origin(name, rules, stored)]
    if loaded and config.init.tokenizer != "new":
      raise configs.ConfigError(
        f"data.text.tokenizer is {config.data.text.tokenizer!r}, but init.from {folder} was "
        f"trained with another one: the embeddings that would be loaded ({', '.join(loaded)}) "
        "stand for other pieces. Use its tokenizer (`mmjax init --from` does), or set "
        "init.tokenizer='new' to leave them new"
      )
    new += [(re.escape(name), None) for name in loaded]
  return tuple(new)


def inference_assets(config, pipeline: Pipeline) -> dict[str, bytes]:
  """What inference needs besides parameters, {file name: content}: the tokenizer of a model that
  reads or writes texts, its chat template, classes.json, the names of a classifier's outputs, and
  values.json, those of the values that it predicts."""
  texts = (
    "text" in config.model.encoders or config.model.get("decoder") or config.data.sequence.length
  )
  assets = load_tokenizer(config.data).to_assets() if config.data.text.tokenizer and texts else {}
  if config.data.sequence.length and config.data.text.template:
    assets[ASSET] = pipeline.template.source.encode()
  names = next(filter(None, (class_names(source, config.data) for source in pipeline.sources)), ())
  if config.data.label != "none" and names:
    assets["classes.json"] = json.dumps(names).encode()
  values = next(filter(None, (source.values for source in pipeline.sources)), ())
  if config.data["values"] and values:
    assets["values.json"] = json.dumps(values).encode()
  return assets


def check_export(config, assets: Mapping[str, bytes]) -> None:
  """Says why transformers cannot express the model, if so. Raises ConfigError: with export.hf."""
  from mmjax.interop import huggingface

  try:
    huggingface.check_export(config, assets)
  except UserError as error:
    if config.export.hf:
      raise configs.ConfigError(f"export.hf is True, but {error}") from error
    why = textwrap.shorten(str(error), 200, placeholder=" ... (export.hf=True says it whole)")
    log(f"note: no export to transformers: {why}")


def write_config(run: Run) -> None:
  """config.json of the run folder, and how many threads this machine's CPU computes with."""
  if not run.owner:
    return
  run.owner.check()
  folder = run.mirror.folder
  files.replace_file(folder / "config.json", configs.to_json(run.config))
  if jax.devices()[0].platform == "cpu" and not threads.recorded(run.mirror.place):
    files.replace_file(folder / threads.FILE, json.dumps({"threads": threads.count()}))
