"""Which platform a program is being traced for.

It looks past the machine that traces: a program compiled ahead of time for TPUs on a laptop, or
exported for several platforms at once, gets what suits its target.
"""

from __future__ import annotations

import jax

Array = jax.Array
# Bytes; 128 MiB where a chip is not named (v5e and v6e).
_VECTOR_MEMORY = {
  "TPU v4": 16 * 2**20,
  "TPU v5": 64 * 2**20,
  "TPU v5p": 64 * 2**20,
  "TPU7x": 64 * 2**20,
}


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
