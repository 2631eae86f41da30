"""What hand-written (Pallas) kernels compute and move, by their blocks: the compiler has no
estimate of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.plan import hlo
from mmjax.training.flops import jaxpr_flops

Arrays = tuple[tuple[str, tuple[int, ...]], ...]  # ((HLO dtype, dimensions), ...)


class Kernel(NamedTuple):
  """One call of a kernel on one device: what it is given and gives, FLOPs, and bytes between memory
  and chip.
  """

  name: str
  operands: Arrays
  results: Arrays
  flops: float
  bytes: float


def kernels_of(jaxpr: Any) -> list[Kernel]:
  """The kernels in a traced function, one entry a call in the source; inside a shard_map, of one
  device.
  """
  return [_kernel(equation) for equation in _calls(jaxpr)]


def match(kernels: Sequence[Kernel], operands: Arrays, results: Arrays) -> Kernel | None:
  """The kernel with these operands and results, or else with these results alone. Ties: the most
  FLOPs.
  """
  found = [k for k in kernels if k.results == results]
  exact = [k for k in found if sorted(k.operands) == sorted(operands)]
  found = exact or found
  return max(found, key=lambda k: k.flops, default=None)


def _calls(jaxpr: Any) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _calls(inner)


def _kernel(equation: Any) -> Kernel:
  mapping = equation.params["grid_mapping"]
  grid = [n if isinstance(n, int) else 1 for n in mapping.grid]
  body = equation.params["jaxpr"]
  moved = sum(_moved(block, grid) for block in mapping.block_mappings)
  moved += sum(_bytes(v.aval) for v in equation.invars[: mapping.num_index_operands])
  name = (
    equation.params.get("name")
    or str(getattr(equation.params.get("name_and_src_info"), "name", ""))
    or "pallas_call"
  )
  return Kernel(
    name,
    _arrays(v.aval for v in equation.invars),
    _arrays(v.aval for v in equation.outvars),
    math.prod(grid) * jaxpr_flops(getattr(body, "jaxpr", body)),
    moved,
  )


def _moved(block: Any, grid: list[int]) -> float:
  """Bytes of one operand: a block moves with the innermost grid dimension that its index depends
  on.
  """
  depends = _dependent(block.index_map_jaxpr.jaxpr, len(grid))
  inner = max((i for i in depends if grid[i] > 1), default=-1)
  sizes = [getattr(n, "block_size", n) for n in block.block_shape]
  elements = math.prod(n for n in sizes if isinstance(n, int))
  return elements * np.dtype(block.array_aval.dtype).itemsize * math.prod(grid[: inner + 1])


def _dependent(jaxpr: Any, dimensions: int) -> set[int]:
  """Which of the first `dimensions` inputs the outputs depend on."""
  reach: dict[Any, set[int]] = {var: {i} for i, var in enumerate(jaxpr.invars[:dimensions])}
  for equation in jaxpr.eqns:
    found = set().union(*(reach.get(v, set()) for v in equation.invars if not hasattr(v, "val")))
    for var in equation.outvars:
      reach[var] = found
  return set().union(*(reach.get(v, set()) for v in jaxpr.outvars if not hasattr(v, "val")), set())


def _arrays(avals: Any) -> Arrays:
  return tuple((_hlo_dtype(a.dtype), tuple(a.shape)) for a in avals if hasattr(a, "dtype"))


def _bytes(aval: Any) -> float:
  return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _hlo_dtype(dtype: Any) -> str:
  name = np.dtype(dtype).name
  if name in ("bool", "bfloat16"):
    return {"bool": "pred", "bfloat16": "bf16"}[name]
  short = name.replace("uint", "u").replace("int", "s").replace("float", "f")
  return short if short in hlo.BYTES else name
