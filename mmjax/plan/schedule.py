"""What a kernel takes by the compiler's final schedule: its bundles, each as often as it is issued.

A TensorCore issues one bundle of instructions a cycle, or waits. Its scalar unit steers a kernel:
counters of loops and of the grid, comparisons, branches. `run` follows those through the text that
libtpu dumps of a kernel and counts the bundles on the way, and the bytes of the copies that it
starts. Vector and matrix instructions need no meaning here. Stalls are not in the text: the count
is a lower bound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mmjax.plan.topology import Chip

_MOST = 20_000_000  # scalar instructions that are followed at most, some ten seconds
_COMMENT = re.compile(r"/\*(.*?)\*/", re.DOTALL)
_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(?:\w\w)?\s*:[\s>]*\{(.*)$")
_INSTRUCTION = re.compile(r"^(?:%(\w+) = )?([\w.]+)\s*(.*)$")
_PREDICATE = re.compile(r"\((!?)%(\w+)\)")
_VALUE = re.compile(r"(!?)%(\w+)|(?<![\w.#%])(-?\d+)(?![\w.])")
_SPILL = re.compile(r"\[(?:smem|sm|#)[^%]*_spill\]+")


class Schedule(NamedTuple):
  """cycles: bundles that a call issues. bytes: what it copies between memory and chip. assumed:
  branches that depend on data; what they guard is counted as run.
  """

  cycles: int
  bytes: int
  assumed: int


class _Instruction(NamedTuple):
  """One scalar instruction: `name = opcode (predicate) operands`. Operands: names and numbers."""

  name: str
  opcode: str
  predicate: tuple[bool, str] | None  # (negated, name)
  operands: tuple[str | int | None, ...]
  target: str  # of a branch: number of a region


def read(folder: str | Path, chip: Chip) -> dict[str, Schedule]:
  """{name of an operation: its schedule} of every kernel that the compiler left in `folder`; those
  that cannot be followed are left out.
  """
  found = {}
  for path in sorted(Path(folder).glob("*final_bundles.txt")):  # in the order of their making
    with path.open("rb") as file:  # of hundreds of files a few are of kernels: their end says so
      file.seek(max(0, path.stat().st_size - 65536))
      end = file.read().decode(errors="replace")
    name = re.search(r"exit bundle: %(\S+) = [^\n]*\bcustom-call\(", end)
    if name and (schedule := run(path.read_text(errors="replace"), chip)):
      found[name[1]] = schedule
  return found


def run(text: str, chip: Chip) -> Schedule | None:
  """The schedule of one kernel; None where its text or the length of a loop cannot be known."""
  bundles, labels = _parse(text)
  if not bundles:
    return None
  return _follow(_steering(bundles), labels, chip)


def _parse(text: str) -> tuple[list[list[_Instruction]], dict[str, int]]:
  """(scalar instructions of every bundle, {region: the bundle it starts at})."""
  bundles: list[list[_Instruction]] = []
  labels: dict[str, int] = {}
  for line in _COMMENT.sub(_comment, text).splitlines():
    if not (match := _BUNDLE.match(line)):
      continue
    if int(match[1], 16) != len(bundles):
      return [], {}
    for region in re.findall(r"@(\d+)", match[2]):
      labels[region] = len(bundles)
    inside = re.sub(r"@\d+|\}", "", match[2])
    parsed = (_instruction(part.strip()) for part in inside.split(";;"))
    bundles.append([instruction for instruction in parsed if instruction])
  return bundles, labels


def _comment(match: re.Match) -> str:
  """What a comment says about control: regions that start here, the number of this core."""
  regions = re.findall(r"Start(?:/End empty)? region (\d+)", match[1])
  words = {"size_in_granules=": "size ", "core id": " core"}
  return words.get(match[1].strip(), "") + "".join(f" @{region}" for region in regions)


def _instruction(text: str) -> _Instruction | None:
  match = _INSTRUCTION.match(text)
  if not match or match[2][0] == "v":
    return None
  name, opcode, rest = match[1] or "", match[2], match[3]
  predicate = None
  if guard := _PREDICATE.search(rest):
    predicate = (bool(guard[1]), guard[2])
    rest = rest[: guard.start()] + rest[guard.end() :]
  if opcode == "sbr.rel":
    region = re.search(r"\$region(\d+)", rest)
    return _Instruction(name, opcode, predicate, (), region[1] if region else "")
  if opcode.startswith("dma.") and "done" not in opcode:
    size = re.search(r"size (?:%(\w+)|(\d+))", rest)
    sizes = (size[1] or int(size[2]),) if size and "hbm" in opcode else ()
    return _Instruction(name, "dma", predicate, sizes, "")
  if opcode in ("sst", "sld"):
    if opcode == "sld" and rest.endswith("core"):
      return _Instruction(name, "smov", predicate, (0,), "")
    spill = _SPILL.search(rest)
    if opcode == "sld":
      return _Instruction(name, "smov", predicate, (spill[0] if spill else None,), "")
    kept = _VALUE.search(rest, spill.end()) if spill else None
    if not spill or not kept:
      return None
    return _Instruction(spill[0], "smov", predicate, (_operand(kept),), "")
  operands = tuple(_operand(value) for value in _VALUE.finditer(rest))
  return _Instruction(name, opcode, predicate, operands, "") if name else None


def _operand(match: re.Match) -> str | int:
  return match[1] + match[2] if match[2] else int(match[3])


def _steering(bundles: list[list[_Instruction]]) -> list[list[_Instruction]]:
  """What decides about branches and copies alone; phis first, as a bundle reads them first."""
  makes: dict[str, list[_Instruction]] = {}
  for bundle in bundles:
    for instruction in bundle:
      makes.setdefault(instruction.name, []).append(instruction)
  needed, waiting = set(), ["sbr.rel", "dma"]
  ends = [i for bundle in bundles for i in bundle if i.opcode in waiting]
  stack = [name for i in ends for name in _reads(i)]
  while stack:
    name = stack.pop()
    if name not in needed:
      needed.add(name)
      stack += [read for i in makes.get(name, ()) for read in _reads(i)]
  return [
    sorted(
      (i for i in bundle if i.name in needed or i.opcode in waiting),
      key=lambda i: i.opcode != "sphi",
    )
    for bundle in bundles
  ]


def _reads(instruction: _Instruction) -> list[str]:
  guard = [instruction.predicate[1]] if instruction.predicate else []
  return guard + [x.lstrip("!") for x in instruction.operands if isinstance(x, str)]


def _follow(
  bundles: list[list[_Instruction]], labels: Mapping[str, int], chip: Chip
) -> Schedule | None:
  following = [0] * (len(bundles) + 1)  # the next bundle that steers
  following[-1] = len(bundles)
  for place in reversed(range(len(bundles))):
    following[place] = place if bundles[place] else following[place + 1]
  values: dict[str, int | None] = {}
  writers: dict[str, str] = {}  # register -> the name last written to it
  cycles = granules = assumed = steps = place = 0
  landing, target = -1, 0  # where a branch that was taken takes effect, and to where
  while place < len(bundles):
    if not bundles[place]:
      end = following[place]
      if place <= landing <= end:
        end = landing
      cycles, place = cycles + end - place, end
    if place == landing:
      place, landing = target, -1
      continue
    if place == len(bundles):
      break
    for instruction in bundles[place]:
      steps += 1
      guard = _guard(instruction, values)
      if instruction.opcode == "sbr.rel" and guard is not False:
        to = labels.get(instruction.target)
        if to is None or landing >= 0 or guard is None and to <= place:
          return None
        if guard:
          landing, target = place + 1 + chip.delay_slots, to
        assumed += guard is None
      elif instruction.opcode == "dma" and guard is not False:
        granules += sum(_value(size, values) or 0 for size in instruction.operands)
      elif instruction.name:
        _write(instruction, guard, values, writers)
    if steps > _MOST:
      return None
    cycles, place = cycles + 1, place + 1
  return Schedule(cycles, granules * chip.granule, assumed)


def _guard(instruction: _Instruction, values: Mapping[str, int | None]) -> bool | None:
  """Whether an instruction takes effect; None = that depends on data."""
  if instruction.predicate is None:
    return True
  negated, name = instruction.predicate
  value = values.get(name)
  return None if value is None else bool(value) != negated


def _value(operand: str | int | None, values: Mapping[str, int | None]) -> int | None:
  if not isinstance(operand, str):
    return operand
  value = values.get(operand.lstrip("!"))
  return int(not value) if operand[0] == "!" and value is not None else value


def _write(
  instruction: _Instruction,
  guard: bool | None,
  values: dict[str, int | None],
  writers: dict[str, str],
) -> None:
  """One scalar instruction on 32 bits; what is not known gives what is not known (None)."""
  name, opcode, operands = instruction.name, instruction.opcode, instruction.operands
  register = name.rpartition("_")[2]
  result: int | None = None
  if opcode == "sphi":
    chosen = writers.get(register, "")
    result = values.get(chosen) if chosen in operands else None
  elif guard is False:
    return
  elif guard:
    result = _compute(opcode, [_value(x, values) for x in operands])
  values[name] = result
  writers[register] = name


def _compute(opcode: str, x: list[int | None]) -> int | None:
  if opcode == "scalar_select" and x[0] is not None:
    return x[1] if x[0] else x[2]
  if opcode == "smov" and len(x) == 3 and x[0] is not None:  # smov (predicate, otherwise), value
    return x[2] if x[0] else x[1]
  if opcode in ("por", "pnand") and (1 if opcode == "por" else 0) in x:
    return 1
  if not x or any(value is None for value in x):
    return None
  known = [value for value in x if value is not None]
  kind = opcode.split(".")
  a, b = known[0], known[-1]
  if kind[0] == "scmp":
    if "s32" in kind:
      a, b = _signed(a), _signed(b)
    return int(
      {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b}.get(kind[1], a >= b)
    )
  results = {
    "smov": a,
    "pmov": a,
    "sadd": a + b,
    "ssub": a - b,
    "smul": a * b,
    "sand": a & b,
    "sor": a | b,
    "sxor": a ^ b,
    "sshll": a << (b & 31),
    "sshrl": a >> (b & 31),
    "sshra": _signed(a) >> (b & 31),
    "por": int(bool(a or b)),
    "pnand": int(not (a and b)),
    "pneg": int(not a),
  }
  result = results.get(kind[0])
  return None if result is None else result & 0xFFFFFFFF


def _signed(value: int) -> int:
  return value - 2**32 if value & 0x80000000 else value
