"""Which platform a program is being traced for, and a barrier that only the CPU compiler sees.

Both look past the machine that traces: a program compiled ahead of time for TPUs on a laptop, or
exported for several platforms at once, gets what suits its target.
"""

from __future__ import annotations

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array
_VECTOR_MEMORY = {
  "TPU v4": 16 * 2**20,
  "TPU v5": 64 * 2**20,
  "TPU v5p": 64 * 2**20,
  "TPU7x": 64 * 2**20,
}  # v5e and v6e: 128 MiB


def platform() -> str:
  """ "cpu", "tpu" or "gpu": the devices of the mesh that `jax.set_mesh` made current, else JAX's
  default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = (
    f"{device.platform} {device.device_kind}".lower()
    if device is not None
    else jax.default_backend()
  )
  if "tpu" in kind:
    return "tpu"
  return "cpu" if "cpu" in kind else "gpu"


def vector_memory() -> int:
  """Bytes of vector memory that a TPU kernel may use: three quarters of what a core of the mesh's
  chip has (jax's tpu_info.py).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind if device is not None else ""
  return 3 * _VECTOR_MEMORY.get(kind, 128 * 2**20) // 4


def on_lone_cpu() -> bool:
  """Whether the program being traced is for one CPU device."""
  mesh = jax.sharding.get_abstract_mesh()
  return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def materialise(x: Array, *, forward: bool = True) -> Array:
  """`x`; on CPUs it is written to memory before anything reads it, and so is its cotangent.
  Elsewhere: nothing at all.

  XLA's CPU backend fuses an element-wise producer into the operand of a matrix product, or into
  each of its readers, and then computes it again and again (tests/bench/train_step.py); TPU and GPU
  compilers fuse such producers well, so they must not see a barrier. forward=False: the cotangent
  alone.
  """
  return _materialise_p.bind(x, now=forward)


def _lower(x: Array, *, now: bool) -> Array:
  return jax.lax.optimization_barrier(x) if now else x


_materialise_p = Primitive("cpu_materialise")
_materialise_p.def_impl(lambda x, now: x)
_materialise_p.def_abstract_eval(lambda x, now: x)
ad.deflinear2(
  _materialise_p,
  lambda cotangent, _, now: [_materialise_p.bind(ad.instantiate_zeros(cotangent), now=True)],
)
batching.defvectorized(_materialise_p)
mlir.register_lowering(_materialise_p, mlir.lower_fun(lambda x, now: x, multiple_results=False))
mlir.register_lowering(
  _materialise_p, mlir.lower_fun(_lower, multiple_results=False), platform="cpu"
)
