"""Presets of compiler options: chosen by the sharding, for the chips that take them."""

import mmap
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.parallel import compiler

DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


def mesh_of(platform, kind, size=1):
  return SimpleNamespace(
    devices=np.array([SimpleNamespace(platform=platform, device_kind=kind)] * size)
  )


@pytest.mark.parametrize(
  "platform, kind, sharding, preset, want",
  [
    ("cpu", "cpu", "fsdp", "auto", None),
    ("tpu", "TPU v5 lite", "replicated", "auto", compiler.PRESETS["data"]),
    ("tpu", "TPU v5 lite", "fsdp", "auto", compiler.PRESETS["fsdp"]),
    ("tpu", "TPU v5", "fsdp", "auto", compiler.PRESETS["data"]),
    ("tpu", "TPU v5 lite", "fsdp", "none", None),
  ],
)
def test_a_preset_is_chosen(platform, kind, sharding, preset, want):
  config = configs.base()
  config.sharding, config.train.compiler = sharding, preset
  assert compiler.options(config, mesh_of(platform, kind)) == want


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
  "size, sharding, preset, want",
  [
    (1, "replicated", "auto", "none"),
    (1, "fsdp", "auto", "none"),
    (1, "replicated", "data", "data"),
    (8, "replicated", "auto", "data"),
    (8, "fsdp", "auto", "fsdp"),
    (8, "fsdp_tensor", "auto", "fsdp"),
    (8, "fsdp", "none", "none"),
    (8, "fsdp", "tiles", "tiles"),
  ],
)
def test_gpus_have_presets_of_their_own(size, sharding, preset, want, deterministic):
  """And kernels that give the same numbers every time, beside any of them."""
  config = configs.base()
  config.sharding, config.train.compiler = sharding, preset
  config.train.deterministic = deterministic
  want = {**compiler.GPU_PRESETS[want], **(DETERMINISTIC if deterministic else {})}
  found = compiler.options(config, mesh_of("gpu", "NVIDIA H100 80GB HBM3", size))
  assert found == (want or None)


def test_every_preset_is_there_for_both():
  assert compiler.PRESETS.keys() == compiler.GPU_PRESETS.keys()


def test_xla_knows_every_option_of_gpus():
  """jaxlib holds the compiler of GPUs without one: an option that this version does not have is
  refused on any platform, and its name stands in the library."""
  names = {name for preset in compiler.GPU_PRESETS.values() for name in preset} | {*DETERMINISTIC}
  assert all(name.startswith("xla_gpu_") for name in names)
  everything = {name: True for name in names}
  assert jax.jit(jnp.negative, compiler_options=everything)(1.0) == -1
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_never"):
    jax.jit(jnp.negative, compiler_options={"xla_gpu_never": True})(1.0)
  libraries = pathlib.Path(jaxlib.__file__).parent.glob("*.so")
  library = max(libraries, key=lambda path: path.stat().st_size)
  with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
    assert {name for name in names if text.find(name.encode()) < 0} == set()
