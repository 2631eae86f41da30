"""Time of a compiled step: the compiler's cycles, loops multiplied out; kernels by their work;
collectives by kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mmjax.plan import hlo
from mmjax.plan.kernels import Kernel, match
from mmjax.plan.topology import Chip

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
PASSES = {"all-reduce": 2.0}  # how often the bytes of a collective cross a chip's links, at most
FREE = (
  "AllocateBuffer",
  "ConcatBitcast",
  "SplitBitcast",
  "ConsumeBuffer",
  "Sharding",
  "SPMDFullToShardShape",
  "SPMDShardToFullShape",
  "LayoutConstraint",
  "AssumeGatherIndicesInBound",
)  # custom calls that move nothing
_NO_WORK = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "iota",
  "partition-id",
  "replica-id",
  "optimization-barrier",
  "add-dependency",
)
_TRANSFER = (
  "copy-start",
  "copy-done",
  "async-start",
  "async-update",
  "async-done",
  "slice-start",
  "slice-done",
)


def cost(module: hlo.Module, chip: Chip, kernels: Sequence[Kernel] = ()) -> dict[str, Any]:
  """{"cycles", "compiler_cycles", "custom_call_cycles", "seconds", "custom_calls", "largest",
  "unknown_loops", "without_estimate"} of one step on one device."""
  total, unknown, silent = 0.0, 0, 0
  calls: dict[Any, dict] = {}
  largest: dict[Any, dict] = {}
  types = {
    name: {op.name: op.type for op in operations}
    for name, operations in module.computations.items()
  }
  for op, times, computation in hlo.runs(module):
    cycles = op.cycles
    total += (cycles or 0) * times
    if op.opcode == "while":
      unknown += not hlo.trip_count(module, computation, op)[1]
    if op.opcode == "custom-call" and op.target not in FREE:
      operands = [types[computation].get(name, "") for name in op.operands]
      row = _custom_call(op, operands, chip, kernels)
      cycles = row["cycles_each"]
      entry = calls.setdefault(tuple(row.values()), {**row, "count": 0, "cycles_added": 0.0})
      entry["count"] += times
      entry["cycles_added"] += max(0.0, cycles - (op.cycles or 0)) * times
    elif (
      cycles is None
      and op.opcode not in (*_NO_WORK, *_TRANSFER)
      and _kind(op) is None
      and hlo.size(op.type) > 4096
    ):
      silent += 1
    if cycles:
      entry = largest.setdefault(
        (op.name, computation),
        dict(operation=op.name, source=op.source, type=_short(op.type), count=0, cycles=0),
      )
      entry["count"] += times
      entry["cycles"] += cycles * times
  added = sum(entry["cycles_added"] for entry in calls.values())
  return dict(
    cycles=total + added,
    compiler_cycles=total,
    custom_call_cycles=added,
    seconds=(total + added) / chip.clock,
    custom_calls=sorted(calls.values(), key=lambda row: -row["cycles_added"]),
    largest=sorted(largest.values(), key=lambda row: -row["cycles"])[:20],
    unknown_loops=unknown,
    without_estimate=silent,
  )


def _custom_call(
  op: hlo.Operation, operands: list[str], chip: Chip, kernels: Sequence[Kernel]
) -> dict[str, Any]:
  """FLOPs, bytes and cycles of one call: from the kernel in the traced step, else from the estimate
  given with it, else from its operands and results alone."""
  arrays = [array for type_ in operands for array in hlo.arrays(type_)]
  least = sum(map(hlo.size, operands)) + hlo.size(op.type)
  kernel = match(kernels, tuple(arrays), tuple(hlo.arrays(op.type)))
  given = {
    key: float(m[1])
    for key in ("flops", "bytes_accessed")
    if (m := re.search(rf'"{key}":\s*"?(\d+)', op.rest))
  }
  if kernel:
    flops, moved, basis = kernel.flops, max(kernel.bytes, least), "blocks of the kernel"
  elif given.get("flops"):
    flops, moved, basis = (
      given["flops"],
      max(given.get("bytes_accessed", 0), least),
      "estimate given by the kernel",
    )
  else:
    flops, moved, basis = 0.0, least, "operands and results only: FLOPs unknown"
  cycles = (
    max(flops / (chip.peak / chip.devices), moved / (chip.bandwidth / chip.devices)) * chip.clock
  )
  name = re.sub(r"\.\d+$", "", op.name)
  if kernel is not None and kernel.name != "pallas_call":
    name = kernel.name
  return dict(
    name=name, target=op.target, flops=flops, bytes=moved, cycles_each=cycles, basis=basis
  )


# -- Collectives -----------------------------------------------------------------------------------


def collectives(module: hlo.Module) -> dict[str, dict[str, float]]:
  """{kind: {"count", "bytes"}} of one step on one device. Bytes: what is gathered, or what goes
  in.
  """
  found: dict[str, dict[str, float]] = {}
  visited: set[Any] = set()
  types = {
    name: {op.name: op.type for op in operations}
    for name, operations in module.computations.items()
  }
  for op, times, computation in hlo.runs(module, inside_fusions=True):
    kind = _kind(op)
    if kind is None:
      continue
    # A collective that the compiler spreads over several fusions keeps its channel in each of them.
    channel = re.search(r"channel_id=(\d+)", op.rest)
    key = (channel[1], times) if channel and "fus" in computation else (op.name, computation, times)
    if key in visited:
      continue
    visited.add(key)
    inputs = sum(hlo.size(types[computation].get(name, "")) for name in op.operands)
    result = hlo.size(op.type)
    if kind == "all-gather":
      inputs = result - inputs if op.opcode.endswith("-start") and result > inputs else result
    entry = found.setdefault(kind, dict(count=0, bytes=0.0))
    entry["count"] += times
    entry["bytes"] += inputs * times
  return dict(sorted(found.items()))


def link_seconds(found: dict[str, dict[str, float]], chip: Chip) -> float:
  """Time of all collectives at the full speed of a chip's links, if nothing hid them."""
  return sum(PASSES.get(kind, 1.0) * entry["bytes"] for kind, entry in found.items()) / (
    chip.links / chip.devices
  )


def _kind(op: hlo.Operation) -> str | None:
  name = op.opcode.removesuffix("-start")
  return name if name in KINDS else None


# -- What should not be there ----------------------------------------------------------------------


def warnings(
  module: hlo.Module, found: dict[str, dict[str, float]], *, batch: int, shards: int
) -> list[str]:
  """What a compiled step of a global batch, cut into `shards`, should not hold: one line each.

  A similarity matrix is told by its rows and columns, the batch both: give shards = 1 where a width
  of the model equals the batch.
  """
  lines = []
  for kind in ("all-to-all", "ragged-all-to-all"):
    if kind in found:
      lines.append(
        f"{found[kind]['count']:.0f} {kind} a step ({found[kind]['bytes'] / 2**20:.1f} MiB a "
        "chip): an array changes its split on the way; look for a missing constraint on an "
        "activation or a mesh that does not suit the model"
      )
  if shards > 1:
    for op, _, computation in hlo.runs(module, inside_fusions=True):
      if (
        any(tuple(n for n in dims if n > 1) == (batch, batch) for _, dims in hlo.arrays(op.type))
        and op.opcode not in _NO_WORK
      ):
        how = f"gathered by {op.opcode}" if _kind(op) else f"held by {op.opcode}"
        lines.append(
          f"{_short(op.type)} {how} ({op.name} in {computation}): a global similarity matrix of "
          f"the batch of {batch} on every chip; compare block by block (parallel/collectives.py)"
        )
        break
  return lines


def _short(type_: str) -> str:
  shapes = [f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in hlo.arrays(type_)]
  return (
    shapes[0]
    if len(shapes) == 1
    else f"({', '.join(shapes[:3])}{', ...' if len(shapes) > 3 else ''})"
  )


def roofline_seconds(flops: float, chip: Chip, chips: int) -> float:
  """Time of `flops` at the peak of all chips."""
  return flops / (chip.peak * chips) if chips else math.inf
