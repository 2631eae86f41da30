"""FLOPs of a traced function, counted from its matrix products: loops multiplied out, kernels included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *args: Any) -> float:
  """2 m n k for every matrix product (and convolution) that `function` computes over all devices, for args given as
  arrays or ShapeDtypeStructs. Nothing is computed. A loop of unknown length counts once."""
  return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_flops(jaxpr: Any) -> float:
  """The same of a traced function."""
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
  inner = [jaxpr_flops(getattr(value, "jaxpr", value)) for value in _bodies(params)]
  if name == "cond":
    return max(inner, default=0.0)
  return _times(name, params) * sum(inner)


def _bodies(params: dict) -> list:
  """The functions that an equation calls. Of a custom derivative only the function itself, not its rules."""
  values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
  return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


def _times(name: str, params: dict) -> float:
  if name == "scan":
    return params["length"]
  if name == "shard_map":
    return math.prod(size for axis, size in params["mesh"].shape.items() if axis in params.get("manual_axes", params["mesh"].axis_names))
  if name == "pallas_call":
    return math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
  return 1
