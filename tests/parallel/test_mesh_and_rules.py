"""Meshes, and where arrays come to lie on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mmjax.config as configs
from mmjax.config import UserError
from mmjax.parallel import rules
from mmjax.parallel.mesh import AXES, batch_shards, make_mesh, single_device_mesh


def config_of(**mesh):
  c = configs.base()
  c.mesh.update(mesh)
  return c


def boxed(shape, *names):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_mesh_has_five_auto_axes_and_takes_what_is_left(devices):
  mesh = make_mesh(config_of(data=-1, tensor=2))
  assert mesh.axis_names == AXES and dict(mesh.shape) == dict(
    replica=1, data=4, fsdp=1, tensor=2, context=1
  )
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert batch_shards(mesh) == 4
  assert batch_shards(single_device_mesh()) == 1


def test_mesh_that_does_not_fit_is_refused(devices):
  with pytest.raises(UserError, match="does not divide the 8 devices"):
    make_mesh(config_of(tensor=3))
  with pytest.raises(UserError, match="Set one axis to -1"):
    make_mesh(config_of(data=2, fsdp=2))


@pytest.mark.parametrize(
  "strategy, names, shape, want",
  [
    ("replicated", ("layers", "embed", "mlp"), (2, 64, 256), P(None, None, None)),
    ("fsdp", ("layers", "embed", "mlp"), (2, 64, 256), P(None, "fsdp", None)),
    ("fsdp_tensor", ("layers", "embed", "mlp"), (2, 64, 256), P(None, "fsdp", "tensor")),
    (
      "fsdp_tensor",
      ("embed", "qkv", "heads", "kv"),
      (64, 3, 4, 16),
      P("fsdp", None, "tensor", None),
    ),
    ("fsdp_tensor", ("vocab", "embed"), (500, 64), P("tensor", "fsdp")),
    (
      "fsdp_tensor",
      ("vocab", "embed"),
      (501, 64),
      P(None, "fsdp"),
    ),  # 501 is odd: that dimension stays whole
    ("fsdp", ("embed", "mlp"), (66, 256), P(None, None)),
    ("fsdp", ("layers", "embed"), (24, 1024), P()),  # small by layer
  ],
)
def test_parameters_lie_where_their_axes_say(devices, strategy, names, shape, want):
  mesh = make_mesh(config_of(data=1, fsdp=4, tensor=2))
  shardings = rules.param_shardings(dict(x=boxed(shape, *names)), mesh, rules.RULES[strategy])
  assert shardings["x"].spec == want
  tree = dict(
    moments=(dict(x=jax.ShapeDtypeStruct(shape, jnp.float32)), jax.ShapeDtypeStruct((), jnp.int32))
  )
  state = rules.axes_shardings(dict(moments=(dict(x=names), ())), tree, mesh, rules.RULES[strategy])
  assert state["moments"][0]["x"].spec == want and state["moments"][1].spec == P()


def test_a_logical_constraint_takes_effect(devices):
  """Only under `rules.use` does a constraint reach the compiler: the text must name the
  sharding.
  """
  mesh = make_mesh(config_of(data=2, fsdp=2, tensor=2))

  def function(x):
    return nn.with_logical_constraint(x * 2, ("batch", "length", "mlp")).sum()

  x = jnp.ones((8, 3, 4))
  with rules.use(mesh, rules.RULES["fsdp_tensor"]):
    text = jax.jit(function).lower(x).as_text()
    compiled = jax.jit(function).lower(x).compile().as_text()
  assert '{"replica", "data", "fsdp"}' in text and '{"tensor"}' in text, text
  assert "f32[2,3,2]" in compiled  # 8 / 4 rows and 4 / 2 units a device
  assert "sharding_constraint" not in jax.jit(function).lower(x).as_text()


def test_gathered_parameters_have_scattered_gradients(devices):
  mesh = make_mesh(config_of(data=1, fsdp=8))
  tree = dict(
    table=boxed((128, 64), "vocab", "embed"), stack=boxed((2, 64, 64), "layers", "embed", "mlp")
  )
  shardings = rules.param_shardings(tree, mesh, rules.RULES["fsdp"])
  spec = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(tree), shardings
  )
  params = jax.tree.map(lambda s: jax.device_put(np.ones(s.shape, s.dtype), s.sharding), spec)
  rows = jax.device_put(np.arange(16), rules.batch_sharding(mesh))

  def loss(params):
    whole = rules.gather_parameters(params, spec, rules.param_axes(tree))
    return (whole["table"][rows] ** 2).sum() + (whole["stack"] ** 2).sum()

  with rules.use(mesh, rules.RULES["fsdp"]):
    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    slopes = compiled(params)
  assert "all-to-all" not in compiled.as_text()
  np.testing.assert_array_equal(
    slopes["table"], 2.0 * (np.arange(128) < 16)[:, None] * np.ones((128, 64))
  )
  np.testing.assert_array_equal(slopes["stack"], 2.0)
