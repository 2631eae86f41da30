"""Options of the compiler: on TPUs named presets, on GPUs deterministic kernels. On other platforms
they mean nothing.
"""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

# More of a chip's 128 MiB of vector memory for one fusion than the 16 MiB that the compiler allows
# itself: larger tiles, fewer trips to memory for the same product (4% fewer cycles for the layers
# of siglip_b16.py), but it compiles many times as long. On v5e and v6e, which have so much.
_TILES = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
# Gradients are summed over devices while the backward pass goes on, not after it.
_GRADIENTS = {
  "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
  "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# Parameters are gathered, and gradients scattered, piece by piece inside the products that need or
# make them (collective fusion), over several steps of a loop over layers. On v5e alone: the
# compiler refuses it for other chips.
_LAYERS = {
  "xla_enable_async_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
}
# Blocks of a ring (contrastive loss, ring attention) travel while the ones before them are computed
# with.
_RINGS = {"xla_enable_async_collective_permute": "true"}

PRESETS: dict[str, dict[str, str | bool]] = {
  "none": {},  # the compiler's own
  "data": {**_GRADIENTS, **_RINGS},
  "fsdp": {**_GRADIENTS, **_LAYERS, **_RINGS},
  "tiles": {**_TILES, **_GRADIENTS, **_LAYERS, **_RINGS},
}


def options(config: FrozenConfigDict, mesh: Mesh) -> dict[str, str | bool] | None:
  """What `jax.stages.Lowered.compile` takes for this run: on TPUs the preset `train.compiler`
  ("auto" is chosen by the sharding), on GPUs kernels that give the same numbers every time, chosen
  without timing them, where `train.deterministic`."""
  device = mesh.devices.flat[0]
  if device.platform == "gpu":
    return {"xla_gpu_deterministic_ops": True} if config.train.deterministic else None
  if device.platform != "tpu":
    return None
  name = config.train.compiler
  if name == "auto":
    name = "data" if config.sharding == "replicated" else "fsdp"
  without = {"TPU v5 lite": {}, "TPU v5e": {}, "TPU v6 lite": _LAYERS, "TPU v6e": _LAYERS}.get(
    device.device_kind, {**_LAYERS, **_TILES}
  )
  chosen = {key: value for key, value in PRESETS[name].items() if key not in without}
  return chosen or None
