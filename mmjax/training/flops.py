"""FLOPs of a traced function and of its derivative, counted from matrix products: loops multiplied
out, kernels included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun, no_effects
from jax.extend.core.primitives import closed_call_p
from jax.interpreters import ad
from jax.interpreters.partial_eval import dce_jaxpr


def count_training_flops(loss: Callable[..., Any], params: Any, *args: Any) -> float:
  """`count_flops` of loss(params, *args), a scalar, and of its gradient by `params`: once where
  nothing is differentiated (frozen modules, teachers, what stop_gradient cuts off), three times
  where both factors of a product are. Recomputation is not counted.

  The products of the gradient are those of the directional derivative, transposed. Derivatives that
  modules define themselves are replaced by those of what they compute; operations that have none
  (the largest over devices) count as constants.
  """
  traced = jax.make_jaxpr(loss)(params, *args)
  plain = jaxpr_as_fun(ClosedJaxpr(_without_own_derivatives(traced.jaxpr), traced.consts))
  rest = jax.tree.leaves(args)

  def derivative(leaves: list, tangents: list, rest: list) -> tuple:
    return jax.jvp(lambda leaves: plain(*leaves, *rest)[0], (leaves,), (tangents,))

  leaves = jax.tree.leaves(params)
  both = jax.make_jaxpr(derivative)(leaves, leaves, rest).jaxpr
  return jaxpr_flops(dce_jaxpr(both, [True, True])[0])


def used_inputs(loss: Callable[..., Any], params: Any, *args: Any) -> Any:
  """A tree of bool like `params`: which leaves loss(params, *args), a scalar, depends on.

  Arguments: arrays, tracers or ShapeDtypeStructs. Nothing is computed.
  """
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, *args))
  used = dce_jaxpr(jax.make_jaxpr(loss)(*shapes).jaxpr, [True])[1]
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(tree, used[: len(leaves)])


def _without_own_derivatives(jaxpr: Jaxpr) -> Jaxpr:
  def plain(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr):
      return ClosedJaxpr(_without_own_derivatives(value.jaxpr), value.consts)
    if isinstance(value, Jaxpr):
      return _without_own_derivatives(value)
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value

  stop = jax.make_jaxpr(jax.lax.stop_gradient)(1.0).eqns[0].primitive
  equations = []
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive not in ad.primitive_jvps and not _bodies(params):
      inputs: list[Any] = list(equation.invars)
      for i, x in enumerate(inputs):
        dtype = getattr(x.aval, "dtype", None)  # tokens have none
        if isinstance(x, Var) and dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
          inputs[i] = Var(x.aval)
          equations.append(
            equation.replace(
              invars=[x], outvars=[inputs[i]], primitive=stop, params={}, effects=no_effects
            )
          )
      equation = equation.replace(invars=inputs)
    if equation.primitive.name == "custom_vjp_call":
      equation = equation.replace(
        primitive=closed_call_p, params=dict(call_jaxpr=plain(params["call_jaxpr"]))
      )
    elif equation.primitive.name != "custom_jvp_call":
      equation = equation.replace(params={name: plain(value) for name, value in params.items()})
    equations.append(equation)
  return jaxpr.replace(eqns=equations)


def count_flops(function: Callable[..., Any], *args: Any) -> float:
  """2 m n k for every matrix product (and convolution) that `function` computes over all devices,
  for args given as arrays or ShapeDtypeStructs. Nothing is computed. A loop of unknown length
  counts once."""
  return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_flops(jaxpr: Any) -> float:
  """The same of a traced function."""
  return _total(jaxpr, _flops)


def jaxpr_bytes(jaxpr: Any) -> float:
  """Bytes of the operands and results of every product that `jaxpr_flops` counts."""
  return _total(jaxpr, _bytes)


def _total(jaxpr: Any, of_product: Callable[[Any], float]) -> float:
  return sum(_equation(equation, of_product) for equation in jaxpr.eqns)


def _flops(equation: Any) -> float:
  out = math.prod(equation.outvars[0].aval.shape)
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * out * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
  kernel = equation.invars[1].aval.shape
  outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * out * math.prod(kernel) / outputs


def _bytes(equation: Any) -> float:
  arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
  return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays))


def _equation(equation: Any, of_product: Callable[[Any], float]) -> float:
  name, params = equation.primitive.name, equation.params
  if name in ("dot_general", "conv_general_dilated"):
    return of_product(equation)
  inner = [_total(getattr(value, "jaxpr", value), of_product) for value in _bodies(params)]
  if name == "cond":
    return max(inner, default=0.0)
  return _times(name, params) * sum(inner)


def _bodies(params: dict) -> list:
  """The functions that an equation calls. Of a custom derivative only the function itself, not its
  rules.
  """
  values = [
    v
    for value in params.values()
    for v in (value if isinstance(value, (tuple, list)) else (value,))
  ]
  return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


def _times(name: str, params: dict) -> float:
  if name == "scan":
    return params["length"]
  if name == "shard_map":
    return math.prod(
      size
      for axis, size in params["mesh"].shape.items()
      if axis in params.get("manual_axes", params["mesh"].axis_names)
    )
  if name == "pallas_call":
    return math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
  return 1
