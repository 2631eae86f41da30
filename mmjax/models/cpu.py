"""What is there only because XLA's CPU backend needs it; on TPUs and GPUs each function is the
plain operation.

The backend fuses an element-wise producer into the operand of a matrix product, or into each of its
readers, and then computes it again and again (tests/bench/train_step.py). A barrier makes it write
the producer to memory once. TPU and GPU compilers fuse such producers well, so they must not see
one: also where a CPU traces a program for them, ahead of time or for export.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def barrier(x: Array, *, forward: bool = True) -> Array:
  """`x`; on CPUs it is written to memory before anything reads it, and so is its cotangent.
  forward=False: the cotangent alone.
  """
  return _barrier_p.bind(x, now=forward)


def einsum(equation: str, *operands: Array, **settings: Any) -> Array:
  """`jnp.einsum` whose operands and result (and their cotangents) stand in memory."""
  return barrier(jnp.einsum(equation, *map(barrier, operands), **settings))


def matmul(x: Array, kernel: Array, bias: Array | None = None) -> Array:
  """x [N, I] @ kernel [I, O] + bias [O]. Dense layers call it with all dimensions flattened to
  matrices: the backend transposes whole activations in memory for the kernel's gradient when it has
  to contract over several dimensions.
  """
  y = _matmul(x, kernel)
  return y if bias is None else y + bias


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
  """x [N, I] @ kernel [I, O]; the kernel's gradient is computed wide rather than tall, which Eigen
  does in half the time.
  """
  return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return x @ kernel, (x, kernel)


def _matmul_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  x, kernel = kept
  tall = kernel.shape[0] > kernel.shape[1]
  return cotangent @ kernel.T, barrier(cotangent.T @ x).T if tall else x.T @ cotangent


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _identity(x: Array, *, now: bool) -> Array:
  return x


def _lower(x: Array, *, now: bool) -> Array:
  return jax.lax.optimization_barrier(x) if now else x


def _transpose(cotangent: Any, _: Any, *, now: bool) -> list[Array]:
  return [_barrier_p.bind(ad.instantiate_zeros(cotangent), now=True)]


_barrier_p = Primitive("cpu_barrier")
_barrier_p.def_impl(_identity)
_barrier_p.def_abstract_eval(_identity)
ad.deflinear2(_barrier_p, _transpose)
batching.defvectorized(_barrier_p)
mlir.register_lowering(_barrier_p, mlir.lower_fun(_identity, multiple_results=False))
mlir.register_lowering(_barrier_p, mlir.lower_fun(_lower, multiple_results=False), platform="cpu")
