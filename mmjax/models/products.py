"""Matrix products of eight bits in training: int8 and fp8 operands, scaled anew at every product.

Of the three products of a dense layer two are in eight bits (SwitchBack, Wortsman et al. 2023,
arXiv:2304.13013; int8 as in AQT, github.com/google/aqt):

  y = x @ kernel            x by token, kernel by output channel
  dx = dy @ kernel^T        dy by token, kernel by input channel
  dkernel = x^T @ dy        in full, of x and dy as they were

Each vector that a product sums over has a scale of its own: its largest absolute value becomes the
largest number of the format, and the scales multiply the sum outside. So a token's result depends
on no other token, and rows may be packed, split over devices or decoded alone. The kernel's
gradient sums over all tokens of a batch: the longest sum of the three, over which the errors of
rounding would add up, and along which tokens can have no scales of their own.

Rounding is to the nearest, ties to even, so that a run stays reproducible. The derivative passes
straight through it (Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
Products = Literal["full", "int8", "fp8"]
Plain = Callable[[Array, Array], Array]
TINY = 1e-30  # vectors below this count as zeros: the inverse of their scale has no float32


class _Format(NamedTuple):
  """forward: of x and kernels, backward: of cotangents (dtype, largest number); total: of sums."""

  forward: tuple[Any, float]
  backward: tuple[Any, float]
  total: Any


# fp8: more digits forward, more range for gradients (Micikevicius et al. 2022, arXiv:2209.05433).
_FORMATS = {
  "int8": _Format((jnp.int8, 127), (jnp.int8, 127), jnp.int32),
  "fp8": _Format((jnp.float8_e4m3fn, 448), (jnp.float8_e5m2, 57344), jnp.float32),
}


def quantise(x: Array, axes: tuple[int, ...], dtype: Any, largest: float) -> tuple[Array, Array]:
  """(codes, scale) of x, codes * scale near x: scale float32 is the largest absolute value over
  `axes` / `largest`, with these axes of length 1. What is not finite makes its scale so too.
  """
  x = x.astype(jnp.float32)
  most = jnp.abs(x).max(axes, keepdims=True)
  unit = x * jnp.where(most > TINY, largest / most, 0)
  codes = (jnp.round(unit) if jnp.issubdtype(dtype, jnp.integer) else unit).astype(dtype)
  return codes, most / largest


def multiply(
  products: Products, plain: Plain, n: int, x: Array, kernel: Array, label: str = ""
) -> Array:
  """plain(x, kernel), x [..., *inputs] times kernel [*inputs, *features] over `n` dimensions of
  inputs, computed as `products` says, in the dtype of x. The kernel's gradient is that of `plain`.
  label: of x as the backward pass keeps it, for rematerialisation.
  """
  return plain(x, kernel) if products == "full" else _multiply(products, plain, n, label, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _multiply(
  products: Products, plain: Plain, n: int, label: str, x: Array, kernel: Array
) -> Array:
  return _forward(products, plain, n, x, kernel)


def _multiply_forward(
  products: Products, plain: Plain, n: int, label: str, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
  kept = checkpoint_name(x, label) if label else x
  return _forward(products, plain, n, x, kernel), (kept, kernel)


def _multiply_backward(
  products: Products, plain: Plain, n: int, label: str, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  x, kernel = kept
  (slope,) = jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](cotangent)
  features = tuple(range(n, kernel.ndim))
  form = _FORMATS[products]
  return _product(form, form.backward, cotangent, kernel, features), slope


_multiply.defvjp(_multiply_forward, _multiply_backward)


# Where FLOPs are counted (training/flops.py), rounding has no derivative, and the products of the
# gradient are those of the plain one.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _forward(products: Products, plain: Plain, n: int, x: Array, kernel: Array) -> Array:
  form = _FORMATS[products]
  return _product(form, form.forward, x, kernel, tuple(range(n)))


@_forward.defjvp
def _forward_derivative(
  products: Products, plain: Plain, n: int, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
  (x, kernel), (dx, dkernel) = primals, tangents
  return _forward(products, plain, n, x, kernel), plain(dx, kernel) + plain(x, dkernel)


def _product(
  form: _Format, of_x: tuple[Any, float], x: Array, kernel: Array, over: tuple[int, ...]
) -> Array:
  """x [..., *A] times kernel over those of its dimensions, which are A: [..., *B], B the others."""
  last = tuple(range(x.ndim - len(over), x.ndim))
  codes, scale = quantise(x, last, *of_x)
  kernel_codes, kernel_scale = quantise(kernel, over, *form.forward)
  total = jax.lax.dot_general(
    codes, kernel_codes, ((last, over), ((), ())), preferred_element_type=form.total
  )
  rows = x.shape[: x.ndim - len(over)]
  others = tuple(size for i, size in enumerate(kernel.shape) if i not in over)
  scale = scale.reshape(*rows, *(1 for _ in others))
  y = total.astype(jnp.float32) * scale * kernel_scale.reshape(others)
  return y.astype(x.dtype)
