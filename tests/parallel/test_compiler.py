"""Presets of compiler options: chosen by the sharding, for the chips that take them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.parallel import compiler


def mesh_of(platform, kind):
  return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform, device_kind=kind)]))


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
def test_gpus_are_asked_for_deterministic_kernels(deterministic):
  config = configs.base()
  config.train.deterministic = deterministic
  options = compiler.options(config, mesh_of("gpu", "NVIDIA H100 80GB HBM3"))
  assert options == ({"xla_gpu_deterministic_ops": True} if deterministic else None)
  jax.jit(jnp.sin, compiler_options=options)(
    1.0
  )  # an option that this version of XLA does not know is refused on any platform
