"""Products of eight bits against the formula in NumPy, their gradients against what they state, and
where they run: stacks, meshes, packed rows, adapters and quantised kernels.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import AxisType, NamedSharding

import mmjax.config as configs
from mmjax.config import UserError
from mmjax.models.attention import AttentionMask
from mmjax.models.block import BlockConfig
from mmjax.models.layers import Dense, affine
from mmjax.models.lora import with_factors
from mmjax.models.products import multiply
from mmjax.models.quantised import quantise as in_few_bits
from mmjax.models.stack import Stack
from mmjax.parallel.mesh import make_mesh
from mmjax.training.program import Program

KINDS = ("int8", "fp8")
FORMATS = dict(
  int8=((np.int8, 127), (np.int8, 127)),
  fp8=((ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e5m2, 57344)),
)


def codes_of(x, axis, dtype, largest):
  """(what the codes of x [.., ..] stand for, before the scale; scale) in NumPy, as float64."""
  most = np.abs(x).max(axis, keepdims=True)
  with np.errstate(divide="ignore"):
    unit = x * np.where(most > 1e-30, np.float32(largest) / most, np.float32(0))
  codes = np.round(unit) if dtype == np.int8 else unit.astype(dtype)
  return codes.astype(np.float64), (most / np.float32(largest)).astype(np.float64)


def formula(kind, x, kernel, backward=False):
  """x [N, I] times kernel [I, O], each row of x and column of the kernel in eight bits."""
  a, b = FORMATS[kind][backward], FORMATS[kind][0]
  (x, x_scale), (kernel, kernel_scale) = codes_of(x, 1, *a), codes_of(kernel, 0, *b)
  return (x @ kernel) * x_scale * kernel_scale


def draw(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def dot(n, x, kernel):
  return jnp.tensordot(x, kernel, n)


@functools.partial(jax.jit, static_argnums=(0, 1))
def product(kind, n, x, kernel):
  return multiply(kind, functools.partial(dot, n), n, x, kernel)


def close(got, want, tolerance=1e-6):
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs, features", [((24,), (10,)), ((3, 8), (2, 5))])
def test_the_product_equals_the_formula(kind, inputs, features):
  x, kernel = draw(0, (2, 7, *inputs), (*inputs, *features))
  want = formula(kind, x.reshape(14, 24), kernel.reshape(24, 10)).reshape(2, 7, *features)
  close(product(kind, len(inputs), x, kernel), want)


def test_sums_of_int8_are_exact():
  """More than float32 could hold: 127 * 127 * 4,096, and 1 more."""
  x, kernel = np.full((1, 4097), 127, np.float32), np.full((4097, 1), 127, np.float32)
  x[0, 0] = kernel[0, 0] = 1
  assert 127 * 127 * 4096 + 1 > 2**24
  close(product("int8", 1, x, kernel), np.float64([[127 * 127 * 4096 + 1]]), 1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs, features", [((24,), (10,)), ((3, 8), (2, 5))])
def test_gradients_equal_the_formulas(kind, inputs, features):
  """Of the input: the cotangent by row and the kernel by input channel, in eight bits. Of the
  kernel: in full."""
  x, kernel, cotangent = draw(1, (14, *inputs), (*inputs, *features), (14, *features))
  n = len(inputs)
  dx, slope = jax.vjp(functools.partial(product, kind, n), x, kernel)[1](cotangent)
  flat = cotangent.reshape(14, 10)
  want = formula(kind, flat, kernel.reshape(24, 10).T, backward=True)
  close(dx, want.reshape(x.shape))
  close(slope, (x.reshape(14, 24).T @ flat).reshape(kernel.shape))


sizes = st.integers(1, 20)


@settings(max_examples=50, deadline=None)
@given(st.data(), sizes, sizes, sizes, st.sampled_from(KINDS))
def test_the_error_is_bounded(data, rows, inputs, outputs, kind):
  """Half a step for each operand: of int8 a step is the scale; of e4m3 it is 1/8 of the number or,
  below the normal ones, 2^-9 of the scale."""
  numbers = st.floats(-(2.0**40), 2.0**40, width=32)
  x = data.draw(arrays.arrays(np.float32, (rows, inputs), elements=numbers))
  kernel = data.draw(arrays.arrays(np.float32, (inputs, outputs), elements=numbers))
  a, b = np.abs(x).astype(np.float64), np.abs(kernel).astype(np.float64)
  largest = FORMATS[kind][0][1]
  a_scale, b_scale = a.max(1, keepdims=True) / largest, b.max(0, keepdims=True) / largest
  if kind == "int8":
    da, db = a_scale / 2 + 0 * a, b_scale / 2 + 0 * b
  else:
    da, db = (np.maximum(y / 16, s * 2.0**-10) for y, s in ((a, a_scale), (b, b_scale)))
  bound = (
    (da @ b + a @ db + da @ db) * (1 + 1e-5) + 1e-6 * (a @ b) + 2e-30 * (1 + a.max() + b.max())
  )
  error = np.abs(product(kind, 1, x, kernel) - x.astype(np.float64) @ kernel.astype(np.float64))
  assert (error <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other_row(kind):
  x, kernel = draw(2, (9, 24), (24, 10))
  together = product(kind, 1, x, kernel)
  x[:4] *= 1000
  np.testing.assert_array_equal(product(kind, 1, x, kernel)[4:], together[4:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(kind, bad):
  """So that a step of it is skipped; zeros are zeros."""
  x, kernel = draw(3, (3, 24), (24, 10))
  x[0, 5], x[1] = bad, 0
  y = product(kind, 1, x, kernel)
  assert not np.isfinite(y[0]).any() and np.isfinite(y[1:]).all() and (y[1] == 0).all()
  kernel[5, 2] = bad
  assert not np.isfinite(product(kind, 1, x, kernel)[:, 2]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_split, kernel_split", [("batch", "in"), ("in", "in"), (None, "out")])
def test_split_over_devices_it_is_the_same(kind, x_split, kernel_split, devices):
  """Also where a vector of one scale lies on several devices."""
  x, kernel, cotangent = draw(4, (8, 32), (32, 12), (8, 12))
  mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=devices[:4])

  def run(x, kernel):
    y, back = jax.vjp(functools.partial(product, kind, 1), x, kernel)
    return y, *back(jnp.asarray(cotangent))

  def put(x, split, first):
    spec = {first: jax.P("d"), "in": jax.P("d") if first == "in" else jax.P(None, "d")}
    spec |= {"out": jax.P(None, "d"), None: jax.P()}
    return jax.device_put(x, NamedSharding(mesh, spec[split]))

  split = jax.jit(run)(put(x, x_split, "batch"), put(kernel, kernel_split, "in"))
  y, dx, slope = run(x, kernel)
  if kind == "int8":  # integers add up to the same in any order
    np.testing.assert_array_equal(split[0], y)
    np.testing.assert_array_equal(split[1], dx)
  jax.tree.map(functools.partial(close, tolerance=1e-5), split, (y, dx, slope))


CONFIG = BlockConfig(width=32, depth=3, heads=2, mlp=64)
X = np.random.default_rng(5).standard_normal((2, 6, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
  return nn.unbox(jax.jit(Stack(CONFIG).init)(jax.random.key(0), X))["params"]


def gradient(config, params, x=X, mask=None):
  def loss(params, x):
    return jnp.square(Stack(config).apply({"params": params}, x, mask)).mean()

  return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_near_the_full_one_however_it_is_run(kind, params):
  config = dataclasses.replace(CONFIG, products=kind)
  full, want = gradient(CONFIG, params), gradient(config, params)

  def apart(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)

  assert 1e-3 < apart(want, full) < (0.03 if kind == "int8" else 0.2)
  changes = (dict(remat="full"), dict(remat="dense"), dict(scan_unroll=1))
  for change in (*changes, dict(scan_unroll=2, remat="dense_attention")):
    assert apart(gradient(dataclasses.replace(config, **change), params), want) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_packed_segments_are_as_alone(kind, params):
  config = dataclasses.replace(CONFIG, products=kind, causal=True)
  run = jax.jit(lambda x, mask: Stack(config).apply({"params": params}, x, mask))
  segments = jnp.array([[1, 1, 1, 1, 2, 2]])
  packed = run(X[:1], AttentionMask(segments=segments, key_segments=segments))
  close(packed[:, :4], run(X[:1, :4], None), 1e-5)
  close(packed[:, 4:], run(X[:1, 4:], None), 1e-5)


@pytest.mark.parametrize("kind, dtype", [("int8", "s8"), ("fp8", "f8e4m3fn")])
def test_the_dense_layers_multiply_eight_bits_and_nothing_else_does(kind, dtype, params):
  """The four of a block forward, and the four of the inputs' gradients."""
  dots = {"full": 0, kind: 0}
  for products in dots:
    config = dataclasses.replace(CONFIG, products=products, scan_unroll=1)
    loss = jax.grad(lambda p, x, c=config: Stack(c).apply({"params": p}, x).sum(), argnums=(0, 1))
    text = jax.jit(loss).lower(params, X).as_text("hlo")
    types = dict(re.findall(r"^\s*(?:ROOT )?(\S+) = (\w+)\[", text, re.M))
    operands = re.findall(r" dot\((\S+), (\S+)\)", text)
    dots[products] = sum(types[b] == dtype for _, b in operands)
  assert dots == {"full": 0, kind: 8}


@pytest.mark.parametrize("few_bits", [None, "int8", "nf4"])
def test_adapters_and_quantised_kernels(few_bits):
  """The base multiplies in eight bits, the factors beside it in full; a kernel that is stored in
  int8 keeps its codes."""
  x, b = draw(6, (5, 32), (1, 4, 12))
  layer = Dense((12,), ("embed", "mlp"), jnp.float32, products="int8")
  with with_factors(4, 0.5, 0.0):
    params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
  params = {**params, "lora_b": b}
  kernel = np.asarray(params["kernel"])
  if few_bits:
    leaves = in_few_bits(kernel, 1, few_bits)
    params = {**params, **leaves}
    del params["kernel"]
  if few_bits == "int8":
    kernel = leaves["kernel_int8"] * leaves["kernel_scale"]
  factors = 0.5 * x @ np.asarray(params["lora_a"])[:, 0] @ b[0]

  def run(learned):
    return layer.apply({"params": {**params, **learned}}, x)

  y, back = jax.vjp(run, {name: params[name] for name in ("lora_a", "lora_b")})
  if few_bits == "nf4":
    near = x @ kernel + factors
    assert np.linalg.norm(y - near) < 0.2 * np.linalg.norm(near)
  else:
    close(y, formula("int8", x, kernel) + factors, 1e-5)
  (slopes,) = back(jnp.ones_like(y))
  close(slopes["lora_b"][0], 0.5 * (x @ np.asarray(params["lora_a"])[:, 0]).T @ np.ones((5, 12)))


def test_rows_of_a_tpu_multiply_the_same(monkeypatch):
  """There rows [N, I] take another way (layers.py)."""
  x, kernel, bias, cotangent = draw(7, (8, 24), (24, 2, 6), (2, 6), (8, 2, 6))

  def run(x, kernel, bias):
    return affine(x, kernel, bias, 1, ("heads", "kv"), products="int8", input_label="attended")

  y, back = jax.vjp(run, x, kernel, bias)
  monkeypatch.setattr("mmjax.models.layers.platform", lambda: "tpu")
  got, got_back = jax.vjp(run, x, kernel, bias)
  close(got, y)
  jax.tree.map(close, got_back(jnp.asarray(cotangent)), back(jnp.asarray(cotangent)))


def make_config(*overrides, products="full"):
  c = configs.base()
  c.data.image.size, c.data.text.length, c.data.text.vocab_size = 8, 6, 128
  c.data.text.tokenizer = "none"
  block = dict(products=products)
  c.model = dict(
    name="dual_encoder",
    width=32,
    encoders=dict(
      image=dict(kind="vit", patch=4, depth=2, heads=4, block=block),
      text=dict(kind="transformer", depth=2, heads=4, block=block),
    ),
  )
  c.objectives = dict(align=dict(kind="contrastive", between=("image", "text")))
  c.train.batch_size, c.precision.compute = 16, "float32"
  return configs.resolve(c, overrides)


def make_program(*overrides, devices=1, products="full"):
  config = make_config(*overrides, products=products)
  shapes = dict(
    image=dict(pixels=((8, 8, 3), jnp.uint8), key=((2,), jnp.uint32)),
    text=dict(tokens=((6,), jnp.int32), mask=((6,), jnp.bool_), key=((2,), jnp.uint32)),
    valid=((), jnp.bool_),
  )
  spec = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((16, *x[0]), x[1]),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  mesh = make_mesh(config, jax.devices()[:devices])
  return Program(config, mesh, steps=100, batch_spec=spec)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_counts_the_flops_of_the_full_one(kind):
  assert make_program(products=kind).flops_per_step() == make_program().flops_per_step()


FSDP = ("mesh.data=1", "mesh.fsdp=4", "sharding=fsdp")
TENSOR = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "sharding=fsdp_tensor")


@pytest.mark.parametrize(
  "kind, meshes", [("int8", ((), TENSOR, ("train.microbatches=4", *FSDP))), ("fp8", (TENSOR,))]
)
def test_a_train_step_is_the_same_on_every_mesh(kind, meshes):
  """Up to codes that a last bit of their number sends the other way."""
  rng = np.random.default_rng(8)
  batch = dict(
    image=dict(pixels=rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)),
    text=dict(tokens=rng.integers(0, 128, (16, 6)).astype(np.int32), mask=np.ones((16, 6), bool)),
    valid=np.ones(16, bool),
  )
  for medium in ("image", "text"):
    batch[medium]["key"] = rng.integers(0, 99, (16, 2)).astype(np.uint32)
  alone = make_program(products=kind)
  start = jax.tree.map(np.asarray, alone.init(3).params)

  def gradients(program):
    def function(params, batch):
      return program.step.gradients(params, {}, batch, jax.random.key(0), program.objectives)[:2]

    params = jax.tree.map(
      lambda x, spec: jax.device_put(x, spec.sharding), start, program.params_spec
    )
    loss, found = program.in_mesh(jax.jit(function))(params, batch)
    return float(loss), np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])

  want_loss, want = gradients(alone)
  for overrides in meshes:
    loss, found = gradients(make_program(*overrides, devices=4, products=kind))
    assert abs(loss - want_loss) < 2e-3 * want_loss
    assert np.linalg.norm(found - want) < 0.02 * np.linalg.norm(want)


def test_parameters_that_are_split_travel_in_eight_bits():
  """FSDP gathers the codes of the kernels, not the kernels."""
  text = make_program(*FSDP, devices=4, products="int8").lower().compile().as_text()
  gathered = re.findall(r"= (\w+)\[(\d+),(\d+)\]\S* all-gather", text)
  kernels = [kind for kind, rows, columns in gathered if {rows, columns} == {"32", "128"}]
  assert kernels.count("s8") >= 16 and kernels.count("f32") <= 1, gathered


def test_another_word_is_refused():
  with pytest.raises(UserError, match="products is 'int4'.*'full', 'int8', 'fp8'"):
    make_config(products="int4")
