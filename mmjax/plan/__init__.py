"""`mmjax plan`: compiles the real train step for chips that are not there, and says what it takes.

Read `plan` first: name -> devices -> Program -> the compiler -> figures. `estimate` gives the
time of a step that a run on real chips has compiled anyway.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax import files
from mmjax.config import ConfigError, UserError
from mmjax.models import NESTED
from mmjax.models.stack import REMAT
from mmjax.parallel import rules
from mmjax.parallel.mesh import batch_shards, for_slices, layouts, make_mesh
from mmjax.plan import cost, hlo, memory, schedule, topology
from mmjax.plan.kernels import kernels_of
from mmjax.training.flops import jaxpr_bytes, jaxpr_flops
from mmjax.training.memory import compiled_bytes, state_bytes
from mmjax.training.program import Program
from mmjax.training.statistics import with_statistics

Log = Callable[[str], None]
CACHE = "~/.cache/mmjax/plans"
# Remat policies, each keeps less than the one before.
LEAST_MEMORY = (
  "none",
  "dots",
  "dense_attention",
  "dots_no_batch",
  "dense",
  "projections",
  "attention",
  "offload_dense",
  "full",
  "offload",
)


def plan(
  config: FrozenConfigDict,
  name: str,
  *,
  dump_hlo: str = "",
  cache: str | None = CACHE,
  remedies: bool = True,
  log: Log = lambda line: None,
) -> dict[str, Any]:
  """What a step of `config` takes on the slice `name`: the dict of plan.json.

  dump_hlo: file for the compiled text. cache: folder of earlier answers, None = none. remedies: try
  changes where it does not fit. say: gets a line before everything that takes long. Raises
  UserError: no such slice, or a mesh that does not fit it.
  """
  target = topology.parse(name)
  if changes := for_slices(config.mesh, target.slices):
    config = configs.resolve(config, changes)
  configs.check(config, target.device_count)
  path = Path(cache).expanduser() / f"{_key(config, target)}.json" if cache else None
  if path and not dump_hlo:
    with contextlib.suppress(OSError, ValueError):  # none, or one that is damaged: planned anew
      result = files.read_json(path)
      if result["fits"] or result.get("tried") or not remedies:
        return {**result, "cached": True}
  result = _compile(config, target, dump_hlo, log)
  result["changes"] = list(changes)
  if not result["fits"] and remedies:
    result["tried"] = _remedies(config, target, cache, log)
  if path:
    with contextlib.suppress(OSError):  # a folder that cannot be written: planned again next time
      files.write_whole(path, json.dumps(result))
  return {**result, "cached": False}


def _compile(
  config: FrozenConfigDict, target: topology.Slice, dump_hlo: str, log: Log
) -> dict[str, Any]:
  real = topology.has_libtpu() and not target.is_gpu
  devices = topology.devices(target) if real else topology.simulated(target)
  step, length = make_step(config, make_mesh(config, devices))
  log(f"compiling {_summary(config)} for {target.name} ({target.chips} chips) ...")
  head = dict(
    topology=dict(
      name=target.name,
      chip=target.chip.name,
      chips=target.chips,
      slices=target.slices,
      shape=list(target.shape),
      devices=target.device_count,
      peak_flops=target.chip.peak,
      memory=target.chip.memory,
      bandwidth=target.chip.bandwidth,
      clock=target.chip.clock,
    ),
    compiler=f"libtpu {importlib.metadata.version('libtpu')}" if real else "simulated CPU devices",
    config=settings_of(config, step),
  )
  kinds = {}
  for source in step.sources:  # one kind of step, or one a source (data.mix "steps")
    try:
      with topology.quiet(), tempfile.TemporaryDirectory() as dump, topology.schedules() as left:
        compiled = step.compiled(step.lower(source=source), dump=dump if real else "")
        text = _text(compiled, dump)
        schedules = schedule.read(left, target.chip)
    except jax.errors.JaxRuntimeError as error:
      refusal = memory.out_of_memory(str(error))
      if refusal is None:
        raise UserError(
          f"{target.name}: the compiler refuses this step: {' '.join(str(error).split())[:400]}"
        ) from error
      chip = {part: count * target.chip.devices for part, count in state_bytes(step).items()}
      return {
        **head,
        "fits": False,
        "memory": {**chip, **refusal, "peak": refusal["used"]},
        "warnings": memory.replicated(step),
      }
    kinds[source] = analyse(
      step,
      compiled,
      target,
      text=text,
      schedules=schedules,
      steps=length,
      dump_hlo=dump_hlo,
      timed=real,
      source=source,
    )
  return {**head, **_together(config, kinds)}


def _together(config: FrozenConfigDict, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """The figures of a run whose steps are of several kinds: memory of the one that takes most, times
  of the mean step.
  """
  largest = max(kinds.values(), key=lambda kind: kind["memory"]["peak"])
  if len(kinds) == 1:
    return largest
  shares = {source: config.data.sources[source].weight for source in kinds}
  shares = {source: share / sum(shares.values()) for source, share in shares.items()}

  def mean(part, key):
    return sum(shares[source] * kind[part][key] for source, kind in kinds.items())

  together = {
    **largest,
    "kinds": {
      source: dict(
        share=shares[source],
        peak=kind["memory"]["peak"],
        seconds=kind.get("step", {}).get("seconds"),
      )
      for source, kind in kinds.items()
    },
  }
  for part in ("step", "run"):
    if part in largest:
      together[part] = {
        key: mean(part, key) if isinstance(value, (int, float)) else value
        for key, value in largest[part].items()
      }
  return together


def make_step(config: FrozenConfigDict, mesh: jax.sharding.Mesh) -> tuple[Program, int | None]:
  """(the step of a run, its length where that is known). Data are opened only where durations are
  in epochs.
  """
  config, examples = with_statistics(config), None
  if any(isinstance(value, str) and "epoch" in value for _, value in configs.flatten(config)):
    from mmjax.data.pipeline import Pipeline

    try:
      examples = Pipeline(config).examples
    except (
      UserError
    ):  # the data are elsewhere: the step is the same, only the length of the run stays unknown
      return Program(config, mesh, steps=1000, examples=1000 * config.train.batch_size), None
  length = configs.in_steps(
    config.train.steps, steps=None, batch_size=config.train.batch_size, examples=examples
  )
  return Program(config, mesh, steps=length, examples=examples), length


def analyse(
  step: Program,
  compiled: jax.stages.Compiled,
  target: topology.Slice,
  *,
  text: str | None = None,
  schedules: Mapping[str, schedule.Schedule] | None = None,
  steps: int | None = None,
  dump_hlo: str = "",
  timed: bool = True,
  source: str = "",
) -> dict[str, Any]:
  """The figures of a compiled step. text: the program, where it is known. schedules: of its
  kernels. timed: the compiler estimates cycles (TPU), else memory only. source: the kind of step.
  """
  chip, batch = target.chip, step.config.train.batch_size
  chips = step.mesh.size // chip.devices

  def per_chip(counts):
    return {name: count * chip.devices for name, count in counts.items()}

  used = per_chip({**state_bytes(step), **compiled_bytes(compiled, peak_known=timed)})
  result: dict[str, Any] = dict(
    fits=used["peak"] <= chip.memory, memory={**used, "over": max(0, used["peak"] - chip.memory)}
  )
  text = _text(compiled) if text is None else text
  if dump_hlo:
    with files.disk_errors(dump_hlo, f"--dump-hlo {dump_hlo} cannot be written"):
      files.write_output(dump_hlo, text)
  module = hlo.parse(text)
  found = cost.collectives(module)
  result["collectives"] = found
  widths = {n for x in jax.tree.leaves(step.params_spec) for n in x.shape}
  shards = 1 if batch in widths else batch_shards(step.mesh)
  result["warnings"] = memory.replicated(step) + cost.warnings(
    module, found, batch=batch, shards=shards
  )
  flops, tokens = model_flops(step), tokens_of(step)
  result["model"] = dict(
    parameters=sum(x.size for x in jax.tree.leaves(step.params_spec)),
    flops_per_step=flops["total"],
    flops={name: value for name, value in flops.items() if name != "total"},
    tokens_per_example=tokens,
  )
  left_out = ["data loading, transfers from the host, evaluation and checkpoints"]
  if timed and not text:
    left_out.append(
      f"time and collectives: jax {jax.__version__} cannot read what this libtpu compiled for "
      f"{chip.name}; the pair of versions that jax[tpu] installs may"
    )
  elif timed or target.is_gpu:
    links = cost.link_seconds(found, chip)
    if timed:
      spent = _spent(step, module, text, chip, source, schedules)
      result.update(custom_calls=spent.pop("custom_calls"), largest=spent.pop("largest"))
      left_out += _left_out(spent, links, result["custom_calls"])
      del spent["unknown_loops"], spent["without_estimate"]
    else:
      spent = _estimated(step, chip, chips, source)
      left_out += _LEFT_OUT_OF_ESTIMATES
    seconds = spent.pop("seconds")
    per_second = batch / seconds if seconds else None
    mfu = cost.roofline_seconds(flops["total"], chip, chips) / seconds if seconds else None
    if mfu and mfu > 1:
      left_out.append(
        "operations that were not found in the compiled program: the model's FLOPs alone take "
        "longer at peak than the time that was read"
      )
    result["step"] = dict(
      seconds=seconds,
      mfu=mfu,
      examples_per_second=per_second,
      tokens_per_second=per_second and per_second * sum(tokens.values()),
      collective_seconds=links,
      **spent,
    )
    if steps:
      result["run"] = dict(
        steps=steps, hours=seconds * steps / 3600, chip_hours=seconds * steps * chips / 3600
      )
    else:
      left_out.append("the length of the run: train.steps is in epochs, and the data are not here")
  else:
    left_out.append(
      "time: without libtpu the step is compiled for simulated CPU devices, whose kernels and "
      "buffers differ; memory is rough. pip install 'mmjax[tpu]' works on machines without TPUs"
    )
  if any(policy.startswith("offload") for policy in remat_of(step.config).values()):
    left_out.append("activations on their way to the memory of the host and back (remat offload)")
  result["left_out"] = left_out
  return result


_LEFT_OUT_OF_ESTIMATES = (
  "what kernels of a GPU take: time is an estimate, as if all matrix products ran at peak or at "
  "full bandwidth and nothing else took any; real steps take longer",
  "memory by a GPU's compiler: it is that of the step compiled for simulated CPU devices, which "
  "keep some bfloat16 arrays as float32 and attention weights whole; CUDA itself takes some too",
)


def _estimated(
  step: Program, chip: topology.Chip, chips: int, source: str
) -> dict[str, float | str | None]:
  """The least time of a step by its work: matrix products at peak, or their operands and results
  and twice the state at full bandwidth, whichever takes longer.
  """
  with rules.use(step.mesh, step.rules):
    update = functools.partial(step.step.update, source=source)
    jaxpr = jax.make_jaxpr(update)(*step.inputs_spec(source)).jaxpr
  state = sum(count for part, count in state_bytes(step).items() if part != "batch")
  products = jaxpr_flops(jaxpr) / chips / chip.peak
  moved = (jaxpr_bytes(jaxpr) / chips + 2 * state) / chip.bandwidth
  return dict(
    seconds=max(products, moved),
    product_seconds=products,
    memory_seconds=moved,
    waiting_seconds=None,
    basis="estimate",
  )


def _spent(
  step: Program,
  module: hlo.Module,
  text: str,
  chip: topology.Chip,
  source: str,
  schedules: Mapping[str, schedule.Schedule] | None = None,
) -> dict[str, Any]:
  kernels = []
  if "tpu_custom_call" in text:
    with rules.use(step.mesh, step.rules):
      update = functools.partial(step.step.update, source=source)
      kernels = kernels_of(jax.make_jaxpr(update)(*step.inputs_spec(source)).jaxpr)
  return cost.cost(module, chip, kernels, schedules)


def estimate(step: Program, compiled: jax.stages.Compiled, source: str = "") -> float | None:
  """Seconds of a compiled step by the compiler's cycles; None where they are not known (no TPU, or
  no text).
  """
  chip = topology.chip_of(step.mesh.devices.flat[0])
  if chip is None or not (text := _text(compiled)):
    return None
  return _spent(step, hlo.parse(text), text, chip, source)["seconds"] or None


def _left_out(spent: dict, links: float, calls: Sequence[dict]) -> list[str]:
  lines = []
  if links:
    lines.append(
      f"waiting for collectives: {spent['waiting_seconds'] * 1e3:.2f} ms that the schedule does "
      f"not hide, of {links * 1e3:.2f} ms at the full speed of the links; latency and networks "
      "between slices come on top"
    )
  if spent["unknown_loops"]:
    lines.append(f"{spent['unknown_loops']} loop(s) of unknown length, counted once")
  if spent["without_estimate"]:
    lines.append(f"{spent['without_estimate']} operation(s) that the compiler gives no cycles for")
  estimated = [row for row in calls if row["basis"] == "estimate"]
  if estimated:
    names = ", ".join(dict.fromkeys(row["name"] for row in estimated))
    lines.append(
      f"the schedule of {sum(row['count'] for row in estimated)} custom call(s) ({names}): none to "
      "read, so they count as if they ran at peak or at full bandwidth"
    )
  blind = sum(row["count"] for row in estimated if "unknown" in row["work"])
  if blind:
    lines.append(
      f"FLOPs of {blind} custom call(s) that no traced kernel explains: costed by bytes alone"
    )
  assumed = [row["name"] for row in calls if row["assumed_branches"]]
  if assumed:
    lines.append(
      f"what {', '.join(dict.fromkeys(assumed))} may skip, which depends on data: counted as run"
    )
  return lines


# -- What the model does, apart from any compiler --------------------------------------------------


def model_flops(step: Program) -> dict[str, float]:
  """FLOPs of one step over all devices, forward and backward (`Program.flops_per_step`): {modality:
  ..., "objectives": ..., "total": ...}.
  """
  plain = step.with_plain_attention
  total, by_part = step.flops_per_step(), {}
  for modality in step.config.model.get("encoders", {}):
    if modality in plain.batch_spec:

      def output(
        params: Any, state: Any, batch: dict, teachers: Any, modality: str = modality
      ) -> Any:
        variables = {"params": params, **state}
        encoded: Any = plain.model.apply(variables, modality, batch, method="encode")
        return encoded.tokens.sum() + encoded.pooled.sum()

      by_part[modality] = plain.training_flops(output, plain.batch_spec)
  return {**by_part, "objectives": max(0.0, total - sum(by_part.values())), "total": total}


def tokens_of(step: Program) -> dict[str, int]:
  """Tokens (patches, frames) that an encoder works on, an example."""
  found = {}
  if "sequence" in step.batch_spec:
    found["sequence"] = step.batch_spec["sequence"]["tokens"].shape[1]
  for modality in step.config.model.get("encoders", {}):
    if modality in step.batch_spec:

      def encode(params, state, batch, modality=modality):
        return step.model.apply({"params": params, **state}, modality, batch, method="encode")

      with rules.use(step.mesh, step.rules):
        found[modality] = jax.eval_shape(
          encode, step.params_spec, step.model_state_spec, step.batch_spec
        ).tokens.shape[1]
  return found


def settings_of(config: FrozenConfigDict, step: Program | None = None) -> dict[str, Any]:
  """The settings that decide about memory and time."""
  mesh = dict(step.mesh.shape) if step else config.mesh.to_dict()
  return dict(
    model=config.model.name,
    batch_size=config.train.batch_size,
    microbatches=config.train.microbatches,
    sharding=config.sharding,
    mesh={axis: size for axis, size in mesh.items() if size != 1},
    remat=remat_of(config),
    scan_unroll={path: entry.get("scan_unroll", 0) for path, entry in stacks_of(config).items()},
    optimizer=config.optimizer.name,
    compiler=config.train.compiler,
  )


def remat_of(config: FrozenConfigDict) -> dict[str, str]:
  """{"encoders.image", "fusion", "decoder", ...: remat policy} of every stack of the model, "" of
  a language model's own.
  """
  return {path: entry["remat"] for path, entry in stacks_of(config).items()}


def stacks_of(config: FrozenConfigDict) -> dict[str, Any]:
  """{"encoders.image", "fusion", "decoder", ...: its settings} of every stack of the model, "" for
  a language model's own.
  """
  encoders = {
    f"encoders.{modality}": entry for modality, entry in config.model.get("encoders", {}).items()
  }
  stacks = {"": config.model, **encoders}
  stacks |= {name: config.model.get(name) or {} for name in NESTED}
  return {path: entry for path, entry in stacks.items() if "remat" in entry}


def with_remat(config: FrozenConfigDict, policy: str) -> list[str]:
  """Overrides that give every stack of the model a remat policy."""
  return [f"{key_of(path, 'remat')}={policy}" for path in remat_of(config)]


def key_of(path: str, name: str) -> str:
  """The key of a setting of one of `stacks_of`."""
  return ".".join(filter(None, ("model", path, name)))


# -- Where it does not fit -------------------------------------------------------------------------


def _remedies(
  config: FrozenConfigDict, target: topology.Slice, cache: str | None, log: Log
) -> list[dict[str, Any]]:
  """Tries to keep less (remat), then less at once (microbatches), then state that is smaller or
  split, until it fits:
  what was tried, in that order."""
  tried = []
  kept = min(
    (LEAST_MEMORY.index(policy) for policy in remat_of(config).values()), default=len(LEAST_MEMORY)
  )
  least = with_remat(
    config, max("full", LEAST_MEMORY[min(kept, len(LEAST_MEMORY) - 1)], key=LEAST_MEMORY.index)
  )
  changes = [
    with_remat(config, policy)
    for policy in ("dots_no_batch", "full")
    if LEAST_MEMORY.index(policy) > kept
  ]
  changes += [
    [*least, f"train.microbatches={n}"] for n in (2, 4, 8, 16) if n > config.train.microbatches
  ]
  if config.optimizer.state_dtype == "float32":
    changes.append([*least, "optimizer.state_dtype=bfloat16"])
  if config.sharding == "replicated":
    changes += [[*least, *layout] for layout in layouts(target.device_count, target.slices)[1:2]]
  for overrides in changes:
    try:
      other = plan(
        configs.resolve(config, overrides), target.name, cache=cache, remedies=False, log=log
      )
    except ConfigError:  # the batch cannot be cut so small
      continue
    tried.append(
      dict(
        change=overrides,
        fits=other["fits"],
        peak=other["memory"].get("peak"),
        over=other["memory"].get("over"),
        step=other.get("step"),
      )
    )
    if other["fits"]:
      break
  return tried


# -- Remembering -----------------------------------------------------------------------------------


def _key(config: FrozenConfigDict, target: topology.Slice) -> str:
  """Of the config, the slice, the compiler and this package's source: a change of any of them is
  planned anew.
  """
  digest = hashlib.sha256()
  for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
    digest.update(path.read_bytes())
  versions = [
    jax.__version__,
    importlib.metadata.version("libtpu") if topology.has_libtpu() else "no libtpu",
  ]
  ignored = ("log", "checkpoint", "evaluation")
  kept = {
    key: value for key, value in json.loads(configs.to_json(config)).items() if key not in ignored
  }
  digest.update(
    json.dumps([kept, target.libtpu_name, target.slices, versions], sort_keys=True).encode()
  )
  return digest.hexdigest()[:32]


def _text(compiled: jax.stages.Compiled, dump: str = "") -> str:
  """The compiled program as text, from the compiler's own `dump` where this JAX cannot read what it
  made; "" where that is not there either."""
  try:
    if text := compiled.as_text():
      return text
  except jax.errors.JaxRuntimeError:
    pass
  found = (
    sorted(Path(dump).glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
    if dump
    else []
  )
  return found[-1].read_text() if found else ""


def _summary(config: FrozenConfigDict) -> str:
  chosen = settings_of(config)
  return (
    f"{chosen['model']}, batch {chosen['batch_size']}, {chosen['sharding']}, remat "
    f"{'/'.join(dict.fromkeys(chosen['remat'].values())) or 'none'}, microbatches "
    f"{chosen['microbatches']}"
  )


assert set(LEAST_MEMORY) == set(REMAT)
