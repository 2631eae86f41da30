"""Reference log-probabilities of judged answers: what the model that a run starts from makes of
them.

They are computed once, before the first step, and kept in reference.npz of the run folder, so that
a run that goes on reads them. The file says of which data and which model they are; checkpoints
say it too (`Pipeline.fingerprint`), so that another model in their place is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import files
from mmjax.config import UserError
from mmjax.data.pipeline import Pipeline
from mmjax.data.preferences import asks_others
from mmjax.objectives.preference import JUDGED
from mmjax.parallel import multihost, rules
from mmjax.state.paths import by_name
from mmjax.state.train_state import TrainState
from mmjax.training.metrics import log
from mmjax.training.program import Program
from mmjax.training.start import Run, new_state

Array = jax.Array
FILE = "reference.npz"


def give_references(
  run: Run, program: Program, state: TrainState, data: dict, start: int, allow_change: bool
) -> None:
  """Gives the pipeline of a run the reference log-probabilities of its judged answers; nothing
  where it has none. state: of the run at step `start`; data: of its checkpoint.

  Raises UserError: the run goes on, what it had is lost, and its start is another model now.
  """
  if not run.pipeline.judged:
    return
  about = _about(run.config, run.pipeline)
  known = data.get("fingerprint", {}).get("reference", "")
  model = known if start else fingerprint(state, run.mesh)
  kept = _read(run, about, model)
  if multihost.any_process(kept is None):
    if start:
      log("reference log-probabilities are computed again, by the model that the run started from")
      state = new_state(run.config, program, log=lambda line: None)
      model = fingerprint(state, run.mesh)
      if known and model != known and not allow_change:
        raise UserError(
          f"{run.mirror.place / FILE} is lost or of other data, and the model that the run starts "
          "from is another now. Restore the one or the other (init.from), or pass --allow-change"
        )
    kept = computed(run.pipeline, program, state, run.watchdog.alive)
    if multihost.is_main():
      _write(run, {**about, "model": model}, kept)
  run.pipeline.refer(kept or {}, model)


def fingerprint(state: TrainState, mesh: Mesh) -> str:
  """Of the parameters of a state, and what else its model keeps: equal bits give equal ones, on any
  mesh.
  """
  tree = {"params": state.params, "model_state": state.model_state}

  def sums_of(tree: Any) -> Any:
    return jax.tree.map(_sum_of_bits, tree)

  sums = jax.device_get(jax.jit(sums_of, out_shardings=rules.replicated(mesh))(tree))
  marks = [
    f"{name} {x.dtype} {x.shape} {int(total)}"
    for (name, x), total in zip(by_name(tree).items(), by_name(sums).values(), strict=True)
  ]
  return hashlib.blake2b("\n".join(marks).encode(), digest_size=8).hexdigest()


def _sum_of_bits(x: Array) -> Array:
  """uint32: the sum of the elements' bits modulo 2^32, each times an odd number of its own."""
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return (x.astype(jnp.uint32) * (place * jnp.uint32(2654435761) * 2 + 1)).sum(dtype=jnp.uint32)


def computed(
  pipeline: Pipeline, program: Program, state: TrainState, poll: Callable[[], None] | None = None
) -> dict[str, np.ndarray]:
  """{fingerprint of a source: float32 [records, most preferences of one, 3]} by the model of
  `state`, NaN of those that no row has. poll: called after every batch.
  """
  found: dict[str, np.ndarray] = {}
  variables = {"params": state.params, **state.model_state}
  with jax.set_mesh(program.mesh):
    for source, table in pipeline.judged:
      begin, pieces = time.monotonic(), [piece for row in table for piece in row]
      shape = (len(source), 1 + max(piece.part for piece in pieces), 3)
      values = found[source.fingerprint] = np.full(shape, np.nan, np.float32)
      for batch, rows in pipeline.in_order(source, table):
        most = max(map(len, rows))
        placed = multihost.to_device(batch, program.mesh)
        judged = multihost.gather_rows(program.apply(variables, JUDGED, (most,), placed))
        for row, its_pieces in enumerate(rows):
          for number, piece in enumerate(its_pieces):
            log_probs, tokens = judged[row, number].T
            if tokens.any():
              values[piece.record, piece.part] = log_probs
        if poll:
          poll()
      log(
        f"{source.name}: reference log-probabilities of {len(pieces):,} preferences "
        f"({time.monotonic() - begin:.0f} s)"
      )
  return found


def _about(config, pipeline: Pipeline) -> dict[str, Any]:
  """What the values depend on besides the model, JSON-able."""
  read = {name: config.data[name] for name in ("text", "sequence", *config.model.encoders)}
  read |= {"precision": config.precision, "others": asks_others(config)}
  text = json.dumps({name: getattr(x, "to_dict", lambda x=x: x)() for name, x in read.items()})
  marks = {
    name: mark for name, mark in pipeline.fingerprint().items() if name in ("template", "tokenizer")
  }
  sources = [source.fingerprint for source, _ in pipeline.judged]
  return {"settings": hashlib.blake2b(text.encode()).hexdigest()[:16], "sources": sources, **marks}


def _read(run: Run, about: dict[str, Any], model: str) -> dict[str, np.ndarray] | None:
  """The values that are kept of this data and this model; None where there are none."""
  try:
    content = io.BytesIO((run.mirror.place / FILE).read_bytes())
    with np.load(content, allow_pickle=False) as saved:
      told = json.loads(str(saved["about"]))
      values = {name: saved[f"source{n}"] for n, name in enumerate(told["sources"])}
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  return values if told == {**about, "model": model} else None


def _write(run: Run, about: dict[str, Any], values: dict[str, np.ndarray]) -> None:
  out = io.BytesIO()
  arrays: dict[str, Any] = {f"source{n}": values[name] for n, name in enumerate(about["sources"])}
  np.savez_compressed(out, about=np.array(json.dumps(about)), **arrays)
  if run.owner:
    run.owner.check()
  with files.disk_errors(run.mirror.folder, f"{run.mirror.folder / FILE} cannot be written"):
    files.write_whole(run.mirror.folder / FILE, out.getvalue())
