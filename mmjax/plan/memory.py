"""Memory of a step on one chip: what the state takes, what the compiler adds, and by how much it does not fit."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np

from mmjax.plan.topology import GIB
from mmjax.training.step import Step

LARGE = 64 * 2**20  # bytes from which a parameter that every chip holds whole deserves a line
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def state_bytes(step: Step) -> dict[str, float]:
  """Bytes on one device, padding not counted: parameters, optimizer, average (EMA), model_state, batch."""
  state = step.state_spec
  parts = dict(
    parameters=state.params,
    optimizer=state.opt_states,
    average=state.ema,
    model_state=state.model_state,
    batch=step.batch_spec,
  )
  return {name: float(sum(map(_local_bytes, jax.tree.leaves(tree)))) for name, tree in parts.items()}


def compiled_bytes(compiled: jax.stages.Compiled, *, peak_known: bool = True) -> dict[str, float]:
  """Bytes on one device by the compiler's count; arguments: state and batch; temporaries: activations, gradients.

  peak_known: the compiler knows what is alive at once (TPU); otherwise everything is added up.
  """
  analysis = compiled.memory_analysis()
  arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
  output = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
  peak = getattr(analysis, "peak_memory_in_bytes", 0) if peak_known else 0
  return dict(
    arguments=float(arguments),
    temporaries=float(temporaries),
    output=float(output),
    peak=float(peak if peak >= arguments else arguments + temporaries + output),
  )


def out_of_memory(message: str) -> dict[str, Any] | None:
  """{"used", "limit", "over", "largest": [{"bytes", "shape", "source"}]} of a refusal; None for other errors."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  numbers = {
    name: _bytes(m[1], m[2])
    for name, pattern in (
      ("used", r"Used ([\d.]+)([KMGT]?) of"),
      ("limit", r"Used [\d.]+[KMGT]? of ([\d.]+)([KMGT]?)"),
      ("over", r"Exceeded \w+ capacity by ([\d.]+)([KMGT]?)"),
    )
    if (m := re.search(pattern, message))
  }
  largest = []
  for block in re.split(r"\n\s*\d+\. Size: ", message)[1:8]:
    size = re.match(r"([\d.]+)([KMGT]?)", block)
    shape, source = re.search(r"Shape: (\w+\[[\d,]*\])", block), re.search(r'op_name="([^"]*)"', block)
    if size:
      largest.append(
        dict(bytes=_bytes(size[1], size[2]), shape=shape[1] if shape else "", source=source[1] if source else "")
      )
  return dict(used=numbers.get("used"), limit=numbers.get("limit"), over=numbers.get("over"), largest=largest)


def replicated(step: Step) -> list[str]:
  """Large state that every device holds whole although the config splits parameters: one line each."""
  if step.config.sharding == "replicated" or step.mesh.size == 1:
    return []
  lines = []
  for part, tree in (("parameter", step.params_spec), ("optimizer state", step.state_spec.opt_states)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if leaf.sharding.is_fully_replicated and _local_bytes(leaf) >= LARGE:
        lines.append(
          f"{part} {jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.dtype}{list(leaf.shape)} "
          f"({_local_bytes(leaf) / 2**20:.0f} MiB) is whole on every chip: no axis of it is divisible by the mesh"
        )
  return lines


def gib(count: float | None) -> str:
  if count is None:
    return "?"
  return f"{count / GIB:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _local_bytes(leaf: Any) -> float:
  dtype = leaf.dtype
  width = np.dtype(dtype).itemsize if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else 8
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * width


def _bytes(number: str, unit: str) -> float:
  return float(number) * _UNITS[unit]
