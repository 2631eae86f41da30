"""Memory of a step on one device: what the state takes, and what the compiler adds."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from mmjax.training.program import Program


def state_bytes(step: Program) -> dict[str, float]:
  """Bytes on one device, padding not counted: parameters, optimizer, average (EMA), model_state,
  batch.
  """
  state = step.state_spec
  parts = dict(
    parameters=state.params,
    optimizer=state.opt_states,
    average=state.ema,
    model_state=state.model_state,
    batch=step.batch_spec,
  )
  return {name: float(sum(map(local_bytes, jax.tree.leaves(tree)))) for name, tree in parts.items()}


def compiled_bytes(compiled: jax.stages.Compiled, *, peak_known: bool = True) -> dict[str, float]:
  """Bytes on one device by the compiler's count; arguments: state and batch; temporaries:
  activations, gradients.

  peak_known: the compiler knows what is alive at once (TPU); otherwise everything is added up.
  Zeros where it tells nothing.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return dict(arguments=0.0, temporaries=0.0, output=0.0, peak=0.0)
  arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
  output = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
  peak = getattr(analysis, "peak_memory_in_bytes", 0) if peak_known else 0
  return dict(
    arguments=float(arguments),
    temporaries=float(temporaries),
    output=float(output),
    peak=float(peak if peak >= arguments else arguments + temporaries + output),
  )


def local_bytes(leaf: Any) -> float:
  """Bytes on one device of an array of this shape, dtype and sharding."""
  dtype = leaf.dtype
  width = np.dtype(dtype).itemsize if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else 8
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * width


def gib(count: float | None) -> str:
  if count is None:
    return "?"
  return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
