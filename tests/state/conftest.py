"""Configs and states without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax import config as config_lib
from mmjax.state.train_state import TrainState


@pytest.fixture(scope="session")
def make_config():
  """make_config("adamw", schedule=..., checkpoint=dict(...), **optimizer settings) -> resolved
  config without a model.
  """

  def make(name="adamw", schedule="constant", warmup=0, checkpoint=None, **settings):
    c = config_lib.base()
    c.optimizer = dict(name=name, **{"lr": 1e-2, **settings})
    c.schedule = dict(
      schedule if isinstance(schedule, dict) else dict(name=schedule), warmup=warmup
    )
    c.checkpoint.update(checkpoint or {})
    raw, common = c.to_dict(), {key.path: key for key in config_lib.KEYS}
    for part in ("optimizer", "schedule", "checkpoint"):
      raw[part] = config_lib._resolve_node(raw[part], part, part, common, None)
    return config_lib.FrozenConfigDict(raw)

  return make


def mesh_of(count):
  return jax.make_mesh(
    (count,), ("fsdp",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,)
  )


@pytest.fixture(scope="session")
def make_state():
  """make_state(value, devices=8) -> TrainState on a mesh; every leaf depends on `value`."""

  def make(value, devices=8, ema=False):
    mesh = mesh_of(devices)

    def put(x, *axes):
      return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    rng = np.random.default_rng(value)
    params = {
      "image": {
        "layers": {"kernel": put(rng.normal(size=(2, 16, 8)).astype(np.float32), None, "fsdp")},
        "position": put(rng.normal(size=(17, 8)).astype(np.float32)),
      },
      "scale": put(np.float32(value)),
    }
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return TrainState(
      step=put(np.int32(value)),
      params=params,
      model_state={},
      opt_states={"main": (half, {"count": put(np.int32(value))})},
      ema=jax.tree.map(lambda x: x * 2, params) if ema else None,
    )

  return make


@pytest.fixture(scope="session")
def spec_on(make_state):
  """spec_on(devices, ema=False) -> spec of the states of make_state on a mesh of so many
  devices.
  """

  def make(devices, ema=False):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      make_state(0, devices, ema),
    )

  return make


@pytest.fixture(scope="session")
def same():
  """same(a, b): trees of equal structure, dtypes and bits."""

  def check(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()

  return check
