"""Time of a compiled step: the compiler's cycles, loops multiplied out; kernels by their schedule,
else by their work; collectives by kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.plan import hlo
from mmjax.plan.kernels import Kernel, match
from mmjax.plan.schedule import Schedule
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
# Custom calls that move no bytes.
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
)
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


def cost(
  module: hlo.Module,
  chip: Chip,
  kernels: Sequence[Kernel] = (),
  schedules: Mapping[str, Schedule] | None = None,
) -> dict[str, Any]:
  """{"cycles", "compiler_cycles", "custom_call_cycles", "seconds", "waiting_seconds",
  "custom_calls", "largest", "unknown_loops", "without_estimate"} of one step on one device; waiting
  for collectives comes on top of the seconds. kernels: those of the traced step. schedules: by the
  name of an operation; calls alike are compiled once, under one of their names.
  """
  total, unknown, silent = 0.0, 0, 0
  calls: dict[Any, dict] = {}
  largest: dict[Any, dict] = {}
  types = {
    name: {op.name: op.type for op in operations}
    for name, operations in module.computations.items()
  }
  scheduled = _scheduled(module, types, schedules or {})
  each: dict[str, float] = {}  # cycles of one run of a custom call
  for op, times, computation in hlo.runs(module):
    cycles = op.cycles
    total += (cycles or 0) * times
    if op.opcode == "while":
      unknown += not hlo.trip_count(module, computation, op)[1]
    if op.opcode == "custom-call" and op.target not in FREE:
      operands = [types[computation].get(name, "") for name in op.operands]
      row = _custom_call(op, operands, chip, kernels, scheduled.get(_likeness(op, operands)))
      cycles = each[op.name] = row["cycles_each"]
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
    waiting_seconds=waiting(module, chip, each),
    custom_calls=sorted(calls.values(), key=lambda row: -row["cycles_added"]),
    largest=sorted(largest.values(), key=lambda row: -row["cycles"])[:20],
    unknown_loops=unknown,
    without_estimate=silent,
  )


def _scheduled(
  module: hlo.Module, types: Mapping[str, Mapping[str, str]], schedules: Mapping[str, Schedule]
) -> dict[Any, Schedule]:
  """{what calls alike have in common: their schedule}."""
  return {
    _likeness(op, [types[computation].get(name, "") for name in op.operands]): schedules[op.name]
    for computation, operations in module.computations.items()
    for op in operations
    if op.opcode == "custom-call" and op.name in schedules
  }


def _likeness(op: hlo.Operation, operands: list[str]) -> tuple[str, ...]:
  """What decides how a call is compiled: types with layouts and memories, and its kernel."""
  return (op.target, op.type, *operands, op.rest.partition("backend_config=")[2])


def _custom_call(
  op: hlo.Operation,
  operands: list[str],
  chip: Chip,
  kernels: Sequence[Kernel],
  schedule: Schedule | None,
) -> dict[str, Any]:
  """FLOPs, bytes and cycles of one call. Work: of the kernel in the traced step, else the estimate
  given with it, else its operands and results alone. Cycles: by its schedule, else by its work."""
  arrays = [array for type_ in operands for array in hlo.arrays(type_)]
  least = sum(map(hlo.size, operands)) + hlo.size(op.type)
  kernel = match(kernels, tuple(arrays), tuple(hlo.arrays(op.type)))
  given = {
    key: float(m[1])
    for key in ("flops", "bytes_accessed")
    if (m := re.search(rf'"{key}":\s*"?(\d+)', op.rest))
  }
  if kernel:
    flops, moved, work = kernel.flops, max(kernel.bytes, least), "blocks of the kernel"
  elif given.get("flops"):
    flops, moved, work = (
      given["flops"],
      max(given.get("bytes_accessed", 0), least),
      "estimate given by the kernel",
    )
  else:
    flops, moved, work = 0.0, least, "operands and results only: FLOPs unknown"
  if schedule:
    moved, busy = schedule.bytes, schedule.cycles / chip.clock
  else:
    busy = flops / (chip.peak / chip.devices)
  cycles = max(busy, moved / (chip.bandwidth / chip.devices)) * chip.clock
  name = re.sub(r"\.\d+$", "", op.name)
  if kernel is not None and kernel.name != "pallas_call":
    name = kernel.name
  return dict(
    name=name,
    target=op.target,
    flops=flops,
    bytes=moved,
    work=work,
    cycles_each=cycles,
    basis="schedule" if schedule else "estimate",
    assumed_branches=schedule.assumed if schedule else 0,
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
    entry = found.setdefault(kind, dict(count=0, bytes=0.0))
    entry["count"] += times
    entry["bytes"] += _transferred(op, kind, types[computation]) * times
  return dict(sorted(found.items()))


def _transferred(op: hlo.Operation, kind: str, types: Mapping[str, str]) -> float:
  """Bytes of a collective: what is gathered, or what goes in."""
  inputs, result = sum(hlo.size(types.get(name, "")) for name in op.operands), hlo.size(op.type)
  if kind != "all-gather":
    return inputs
  return result - inputs if op.opcode.endswith("-start") and result > inputs else result


def link_seconds(found: dict[str, dict[str, float]], chip: Chip) -> float:
  """Time of all collectives at the full speed of a chip's links, if nothing hid them."""
  return sum(_link_seconds(kind, entry["bytes"], chip) for kind, entry in found.items())


def waiting(module: hlo.Module, chip: Chip, cycles: Mapping[str, float]) -> float:
  """Seconds of one step in which a device waits for collectives. cycles: {operation: cycles of one
  run} where they are not the compiler's.

  Each takes its bytes at the full speed of a chip's links, after those before it; what the schedule
  puts between its start and its end hides it. Latency and slower networks are not counted.
  """
  types = {
    name: {op.name: op.type for op in operations}
    for name, operations in module.computations.items()
  }
  return _timeline(module, types, module.entry, chip, cycles)[1]


def _timeline(
  module: hlo.Module,
  types: Mapping[str, Mapping[str, str]],
  computation: str,
  chip: Chip,
  cycles: Mapping[str, float],
) -> tuple[float, float]:
  """(seconds of one run of a computation, those of them spent waiting)."""
  operations = module.computations.get(computation, [])
  touched = [_touched(module, types, computation, op, chip) for op in operations]
  last = {key: place for place, found in enumerate(touched) for key in found}
  now = waited = free = 0.0  # free: when the links have nothing left to do
  started: set[str] = set()
  flying: dict[str, float] = {}  # collective -> when it is through
  for place, (op, found) in enumerate(zip(operations, touched, strict=True)):
    for key, seconds in found.items():
      if seconds and key not in started:
        started.add(key)
        flying[key] = free = max(now, free) + seconds
    if not (found and op.opcode == "async-start"):  # else a collective, no work of this device
      for times, name in hlo.called(module, computation, op):
        spent, idle = _timeline(module, types, name, chip, cycles)
        now, waited = now + times * spent, waited + times * idle
    now += cycles.get(op.name, op.cycles or 0) / chip.clock
    for key in found:
      if key in flying and place == last[key]:
        late = max(0.0, flying.pop(key) - now)
        now, waited = now + late, waited + late
  return now, waited


def _touched(
  module: hlo.Module,
  types: Mapping[str, Mapping[str, str]],
  computation: str,
  op: hlo.Operation,
  chip: Chip,
) -> dict[str, float]:
  """{collective: its seconds} of those that an operation is, starts, carries on or ends, under one
  key from start to end. Fusions that share one know it by its channel.
  """
  if op.opcode.endswith("-done") and op.operands:
    return {op.operands[0]: 0.0}
  if kind := _kind(op):
    return {op.name: _link_seconds(kind, _transferred(op, kind, types[computation]), chip)}
  found: dict[str, float] = {}
  if op.opcode in ("fusion", "async-start"):
    name = op.attribute("calls")
    for inner in module.computations.get(name, ()):
      channel = re.search(r"channel_id=(\d+)", inner.rest)
      for key, seconds in _touched(module, types, name, inner, chip).items():
        if op.opcode == "async-start":
          key = op.name
        elif channel:
          key = channel[1]
        if seconds:
          found[key] = seconds
  return found


def _link_seconds(kind: str, count: float, chip: Chip) -> float:
  return PASSES.get(kind, 1.0) * count / (chip.links / chip.devices)


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
