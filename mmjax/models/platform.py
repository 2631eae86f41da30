"""Which platform a program is being traced for, and a barrier that only the CPU compiler sees.

Both look past the machine that traces: a program compiled ahead of time for TPUs on a laptop, or exported for several
platforms at once, gets what suits its target.
"""

from __future__ import annotations

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def platform() -> str:
  """"cpu", "tpu" or "gpu": the devices of the mesh that `jax.set_mesh` made current, else JAX's default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind.lower() if device is not None else jax.default_backend()
  if "tpu" in kind:
    return "tpu"
  return "cpu" if "cpu" in kind else "gpu"


def materialise(x: Array) -> Array:
  """`x`; on CPUs it is written to memory before anything reads it, and so is its cotangent. Elsewhere: nothing at all.

  XLA's CPU backend fuses an element-wise producer into the operand of a matrix product and then computes it again and
  again (the transformer of 128 channels in tests/bench/train_step.py loses half its time this way); TPU and GPU
  compilers fuse such producers well, so they must not see a barrier.
  """
  return _materialise_p.bind(x)


_materialise_p = Primitive("cpu_materialise")
_materialise_p.def_impl(lambda x: x)
_materialise_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_materialise_p, lambda cotangent, _: [_materialise_p.bind(ad.instantiate_zeros(cotangent))])
batching.defvectorized(_materialise_p)
mlir.register_lowering(_materialise_p, mlir.lower_fun(lambda x: x, multiple_results=False))
mlir.register_lowering(_materialise_p, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False), platform="cpu")

