"""Options of the compiler: named presets for TPUs and for GPUs. On other platforms they mean
nothing.
"""

from __future__ import annotations

import functools
import threading

import jax.monitoring
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


# Those of GPUs are off in XLA by themselves (jaxlib 0.10.2), and none is deprecated. Asynchronous
# collectives on a stream of high priority and pipelined reduce-scatters are on without them. The
# sizes up to which collectives are joined stay XLA's own: with one given, it would no longer join
# pipelined collectives by the memory that is left.
# Products are put between the start of a collective and its end. Without it XLA orders operations
# by memory alone, and what a collective fetches is waited for.
_GPU_SCHEDULER = {"xla_gpu_enable_latency_hiding_scheduler": True}
# The gradients of a layer are summed over devices while the layer before it is computed.
_GPU_GRADIENTS = {"xla_gpu_enable_pipelined_all_reduce": True}
# The parameters of a layer are gathered while the layer before it is computed. Two layers a trip of
# the loop, so that one can be gathered into memory that the other does not use.
_GPU_LAYERS = {
  "xla_gpu_enable_pipelined_all_gather": True,
  "xla_gpu_enable_while_loop_double_buffering": True,
}
# Kernels that give the same numbers every time, chosen without timing them. It goes with every
# preset: they move operations and change none.
_GPU_DETERMINISTIC = {"xla_gpu_deterministic_ops": True}

GPU_PRESETS: dict[str, dict[str, str | bool]] = {
  "none": {},
  "data": {**_GPU_SCHEDULER, **_GPU_GRADIENTS},
  "fsdp": {**_GPU_SCHEDULER, **_GPU_GRADIENTS, **_GPU_LAYERS},
  "tiles": {**_GPU_SCHEDULER, **_GPU_GRADIENTS, **_GPU_LAYERS},  # no tiles to set: as "fsdp"
}


def options(config: FrozenConfigDict, mesh: Mesh) -> dict[str, str | bool] | None:
  """What `jax.stages.Lowered.compile` takes for this run: the preset `train.compiler`, "auto" by
  the sharding (one GPU has nothing to wait for: none), on GPUs with deterministic kernels where
  `train.deterministic`.
  """
  device, name = mesh.devices.flat[0], config.train.compiler
  if name == "auto":
    name = "data" if config.sharding == "replicated" else "fsdp"
    if device.platform == "gpu" and mesh.devices.size == 1:
      name = "none"
  if device.platform == "gpu":
    return (GPU_PRESETS[name] | (_GPU_DETERMINISTIC if config.train.deterministic else {})) or None
  if device.platform != "tpu":
    return None
  without = {"TPU v5 lite": {}, "TPU v5e": {}, "TPU v6 lite": _LAYERS, "TPU v6e": _LAYERS}.get(
    device.device_kind, {**_LAYERS, **_TILES}
  )
  chosen = {key: value for key, value in PRESETS[name].items() if key not in without}
  return chosen or None


def seconds() -> float:
  """What this process has spent on tracing and compiling since this was first called."""
  return _stopwatch()[0]


@functools.cache
def _stopwatch() -> list[float]:
  total, lock = [0.0], threading.Lock()

  def add(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
      with lock:
        total[0] += duration_secs

  jax.monitoring.register_event_duration_secs_listener(add)
  return total
