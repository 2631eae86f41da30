"""Reads the text of a compiled program: computations, operations, loops and how often each runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
  "pred": 1,
  "s2": 0.25,
  "u2": 0.25,
  "s4": 0.5,
  "u4": 0.5,
  "f4e2m1fn": 0.5,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
  "c64": 8,
  "c128": 16,
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_NAME = re.compile(r"%([\w.\-]+)")


class Operation(NamedTuple):
  """One line: `name = type opcode(operands), rest`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  def attribute(self, key: str) -> str:
    """The computation that `key=%name` names, or ""."""
    match = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
    return match[1] if match else ""

  def attributes(self, key: str) -> tuple[str, ...]:
    """The names in `key={%a, %b}`."""
    match = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.rest)
    return tuple(word.strip().lstrip("%") for word in match[1].split(",")) if match else ()

  @property
  def cycles(self) -> int | None:
    """The compiler's estimate; None where it has none."""
    match = re.search(r'"estimated_cycles":"?(-?\d+)', self.rest)
    return int(match[1]) if match and 0 <= int(match[1]) < 10**15 else None

  @property
  def source(self) -> str:
    """Where in the model it comes from, as JAX named it."""
    match = re.search(r'op_name="([^"]*)"', self.rest)
    return match[1] if match else ""

  @property
  def target(self) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return match[1] if match else ""


class Module(NamedTuple):
  """computations: {name: its operations in order}; entry: the name of the one that runs."""

  computations: dict[str, list[Operation]]
  entry: str

  def find(self, computation: str, name: str) -> Operation | None:
    return next((op for op in self.computations.get(computation, ()) if op.name == name), None)


class Run(NamedTuple):
  """An operation and how often a step runs it."""

  operation: Operation
  times: int
  computation: str


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
  """[(dtype, dimensions)] of an HLO type, in order; tokens and opaque values left out."""
  return [
    (dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
    for dtype, dims in _ARRAY.findall(type_)
    if dtype in BYTES
  ]


def size(type_: str) -> float:
  """Bytes of a type, padding not counted."""
  return sum(BYTES[dtype] * math.prod(dims) for dtype, dims in arrays(type_))


def parse(text: str) -> Module:
  """The computations of `jax.stages.Compiled.as_text()`."""
  computations: dict[str, list[Operation]] = {}
  entry, current, lines = "", None, [""]
  for line in text.splitlines():
    if current is None:
      if header := _HEADER.match(line):
        current, lines = computations.setdefault(header[2], []), []
        entry = header[2] if header[1] else entry
    elif _END.match(line):
      current += filter(None, map(_operation, lines))
      current = None
    elif _INSTRUCTION.match(line) or not lines:
      lines.append(line)
    else:  # what a kernel says of itself goes on in further lines
      lines[-1] += line
  return Module(computations, entry)


def _operation(line: str) -> Operation | None:
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  rest = line[match.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  type_, rest = rest[:end], rest[end:].lstrip()
  opcode, bracket, _ = rest.partition("(")
  if not bracket:
    return None
  end = _closing(rest, len(opcode))
  inside = rest[len(opcode) + 1 : end]
  operands = (inside,) if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
  return Operation(match[2], type_, opcode.strip(), operands, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
  """The place of the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if not depth:
      return place
  return len(text)


def runs(module: Module, *, inside_fusions: bool = False) -> Iterator[Run]:
  """Every operation that a step runs, loops multiplied out. Of a conditional, the branch with the
  most cycles.

  inside_fusions: also what fusions wrap (collectives hide there); their cycles stand outside.
  """
  yield from _runs(module, module.entry, 1, inside_fusions)


def _runs(module: Module, computation: str, times: int, inside: bool) -> Iterator[Run]:
  for op in module.computations.get(computation, ()):
    yield Run(op, times, computation)
    for count, name in called(module, computation, op):
      yield from _runs(module, name, times * count, inside)
    if inside and op.opcode == "fusion":
      yield from _runs(module, op.attribute("calls"), times, inside)


def called(module: Module, computation: str, op: Operation) -> list[tuple[int, str]]:
  """[(how often, computation)] that one run of an operation runs, fusions left out."""
  if op.opcode == "while":
    return [(trip_count(module, computation, op)[0], op.attribute("body"))]
  if op.opcode == "conditional":
    branches = op.attributes("branch_computations") or (
      op.attribute("true_computation"),
      op.attribute("false_computation"),
    )
    return [(1, max(branches, key=lambda name: _cycles(module, name)))]
  if op.opcode == "call":
    return [(1, op.attribute("to_apply"))]
  if op.opcode == "async-start":
    return [(1, op.attribute("calls"))]
  return []


def _cycles(module: Module, computation: str) -> int:
  return sum(
    (run.operation.cycles or 0) * run.times for run in _runs(module, computation, 1, False)
  )


def trip_count(module: Module, computation: str, loop: Operation) -> tuple[int, bool]:
  """(how often the body of a `while` runs, whether that is known). An unknown count is 1."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
  if known:
    return int(known[1]), True
  condition = module.computations.get(loop.attribute("condition"), [])
  constants = {
    op.name: int(op.operands[0])
    for op in condition
    if op.opcode == "constant"
    and re.fullmatch(r"[su](8|16|32|64)\[\]\S*", op.type)
    and re.fullmatch(r"-?\d+", op.operands[0])
  }
  bounds = [
    constants[name]
    for op in condition
    if op.opcode in ("compare", "fusion")
    for name in op.operands
    if name in constants
  ]
  bounds = bounds or list(constants.values())
  if not bounds:
    return 1, False
  return max(1, max(bounds) - _start(module, computation, loop, condition)), True


def _start(module: Module, computation: str, loop: Operation, condition: list[Operation]) -> int:
  """The counter's first value, where it is a constant that the condition's single counter starts
  from; else 0.
  """
  counters = {
    int(match[1])
    for op in condition
    if op.opcode == "get-tuple-element" and (match := re.search(r"index=(\d+)", op.rest))
  }
  state = module.find(computation, loop.operands[0]) if loop.operands else None
  if len(counters) != 1 or state is None or state.opcode != "tuple":
    return 0
  number = counters.pop()
  first = module.find(computation, state.operands[number]) if number < len(state.operands) else None
  while first is not None and first.opcode == "copy":
    first = module.find(computation, first.operands[0])
  return (
    int(first.operands[0])
    if first is not None
    and first.opcode == "constant"
    and re.fullmatch(r"-?\d+", first.operands[0])
    else 0
  )
