"""The device mesh: five named axes, whatever the machine.

`replica` crosses slices (only gradients travel over it), `data` and `fsdp` split the batch, `fsdp`
also the parameters, `tensor` splits heads and hidden units, `context` splits sequences. An axis of
size 1 costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.contradictions import mesh_shape

AXES = ("replica", "data", "fsdp", "tensor", "context")
BATCH_AXES = ("replica", "data", "fsdp")  # a batch is split over these, in this order
ROW_AXES = (*BATCH_AXES, "context")  # and tokens that are rows of their own over these


def make_mesh(config: FrozenConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of `config.mesh` over `devices` (all of them when None), every axis of type Auto.

  Neighbours along the last axes are neighbours in the machine; slices, where there are several, are
  told apart by `replica`. Raises UserError: the sizes do not multiply to the number of devices, or
  `replica` not to that of slices.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  shape = mesh_shape(config.mesh, len(devices))
  sizes = tuple(shape[axis] for axis in AXES)
  return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
  """A mesh of one device: the same code paths, without collectives."""
  device = jax.devices()[0] if device is None else device
  return Mesh(
    np.array([device]).reshape((1,) * len(AXES)), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def batch_shards(mesh: Mesh) -> int:
  """Number of pieces that a batch is cut into: replica * data * fsdp."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def for_slices(mesh: Mapping[str, int], slices: int) -> tuple[str, ...]:
  """Overrides that make a mesh of one slice one of `slices` slices; none where it crosses slices
  already.
  """
  return () if slices == 1 or mesh["replica"] not in (0, 1) else (f"mesh.replica={slices}",)


def layouts(device_count: int, slices: int = 1) -> list[tuple[str, ...]]:
  """Meshes worth trying on so many devices, as overrides of a config: data, FSDP, both, FSDP with
  tensors split too.
  """
  count = device_count // slices

  def layout(sharding: str, **sizes: int) -> tuple[str, ...]:
    sizes["replica"] = slices
    return (*(f"mesh.{axis}={sizes.get(axis, 1)}" for axis in AXES), f"sharding={sharding}")

  found = [layout("replicated", data=count)]
  if count > 1:
    found.append(layout("fsdp", fsdp=count))
  found += [
    layout("fsdp", data=count // n, fsdp=n) for n in (4, 16, 64) if n < count and count % n == 0
  ]
  found += [
    layout("fsdp_tensor", fsdp=count // n, tensor=n) for n in (2, 4) if n < count and count % n == 0
  ]
  return found


def _arrange(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if devices[0].platform != "tpu":
    return np.array(devices).reshape(sizes)
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  if sizes[0] % slices:
    raise UserError(
      f"mesh.replica is {sizes[0]}, but there are {slices} slices, joined by a slow network. "
      f"Set mesh.replica to a multiple of {slices}"
    )
  return mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
  )
