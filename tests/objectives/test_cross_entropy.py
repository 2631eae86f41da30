"""Cross-entropy in chunks against the plain formula over the whole matrix of logits, differentiated
by JAX; and its memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.objectives.captioning import autoregressive, captioning
from mmjax.objectives.cross_entropy import row_cross_entropy, token_cross_entropy
from mmjax.parallel.mesh import AXES, BATCH_AXES

ROWS, WIDTH, VOCABULARY = 30, 8, 50


def arguments(rows=ROWS, seed=0):
  rng = np.random.default_rng(seed)
  targets = np.where(rng.random(rows) < 0.2, -1, rng.integers(0, VOCABULARY, rows)).astype(np.int32)
  return (
    rng.normal(size=(rows, WIDTH)).astype(np.float32),
    rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
    rng.normal(size=VOCABULARY).astype(np.float32),
  ), targets


def dense(hidden, table, bias, targets, smoothing):
  chances = jax.nn.log_softmax(
    jnp.matmul(hidden, table.T, precision="highest") + (0 if bias is None else bias)
  )
  wanted = (1 - smoothing) * jax.nn.one_hot(targets, table.shape[0]) + smoothing / table.shape[0]
  return (-(wanted * chances).sum(-1) * (targets >= 0)).sum()


@pytest.mark.parametrize(
  "rows, chunk, smoothing, with_bias", [(30, 5, 0.0, True), (31, 4, 0.1, True), (30, 0, 0.1, False)]
)
def test_value_and_gradients_equal_the_dense_formula(rows, chunk, smoothing, with_bias):
  (hidden, table, bias), targets = arguments(rows)
  bias = bias if with_bias else None

  def chunked(*a):
    return (
      0.1
      * token_cross_entropy(*a[:2], targets, bias=a[2], label_smoothing=smoothing, chunk=chunk)[0]
    )

  got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(hidden, table, bias)
  want = jax.value_and_grad(lambda *a: 0.1 * dense(*a, targets, smoothing), (0, 1, 2))(
    hidden, table, bias
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)
  assert jax.jit(chunked)(hidden, table, bias) == pytest.approx(float(want[0]), rel=1e-6)
  _, weight, correct = token_cross_entropy(hidden, table, targets, bias=bias, chunk=chunk)
  is_correct = np.argmax(hidden @ table.T + (0 if bias is None else bias), -1) == targets
  assert (weight, correct) == ((targets >= 0).sum(), is_correct.sum())
  np.testing.assert_array_equal(
    row_cross_entropy(hidden, table, targets, bias=bias, chunk=chunk)[1], is_correct
  )


def test_capped_logits_equal_the_dense_formula_and_its_gradients():
  (hidden, table, _), targets = arguments()

  def chunked(hidden, table):
    return row_cross_entropy(hidden, table, targets, cap=3.0, chunk=10)[0]

  def plain(hidden, table):
    logits = 3.0 * jnp.tanh(jnp.matmul(hidden, table.T, precision="highest") / 3.0)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return -(chosen * (targets >= 0)).sum()

  got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, table) for f in (chunked, plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  assert abs(got[0] - row_cross_entropy(hidden, table, targets)[0]) > 1


def test_rows_that_do_not_count_may_hold_anything():
  (hidden, table, _), targets = arguments()
  spoilt = np.where((targets >= 0)[:, None], hidden, np.nan)

  def loss(h):
    return token_cross_entropy(h, table, targets, chunk=10)[0]

  (value, gradient), (clean, _) = jax.value_and_grad(loss)(spoilt), jax.value_and_grad(loss)(hidden)
  assert value == clean and not gradient[targets < 0].any() and np.isfinite(gradient).all()


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2, 1), (1, 2, 1, 2, 2)])
def test_rows_and_vocabulary_split_over_devices_change_nothing(devices, sizes):
  (hidden, table, bias), targets = arguments(32)
  table, bias = table[:48], bias[:48]
  targets = np.minimum(targets, 47)
  mesh = Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  run = jax.jit(
    jax.value_and_grad(
      lambda h, t, b, y: token_cross_entropy(h, t, y, bias=b, chunk=4)[0], (0, 1, 2)
    )
  )
  want = run(hidden, table, bias, targets)

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  with jax.set_mesh(mesh):
    inputs = (
      put(hidden, BATCH_AXES),
      put(table, "tensor"),
      put(bias, "tensor"),
      put(targets, BATCH_AXES),
    )
    compiled = run.lower(*inputs).compile()
    got = compiled(*inputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  # No device ever holds the whole table.
  assert "f32[24,8]" in compiled.as_text() and "f32[48,8]" not in compiled.as_text()


def test_memory_grows_with_the_chunk_and_not_with_the_rows():
  shapes = [
    jax.ShapeDtypeStruct(s, d)
    for s, d in (((2048, 32), jnp.float32), ((8192, 32), jnp.float32), ((2048,), jnp.int32))
  ]

  def temp(f):
    return (
      jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    )

  chunked = temp(lambda h, t, y: token_cross_entropy(h, t, y, chunk=128)[0])
  whole = temp(lambda h, t, y: dense(h, t, None, y, 0.0))
  assert chunked < 2048 * 8192 * 4 / 3 and whole > 4 * chunked


def test_captioning_counts_real_tokens_of_rows_that_count():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(6, 5, WIDTH)).astype(np.float32)
  table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
  best = np.argmax(hidden @ table.T, -1).astype(np.int32)
  mask = np.arange(5) < np.array([5, 3, 1, 4, 2, 0])[:, None]
  tokens = best.copy()
  tokens[0, 2] += 1  # one wrong token
  tokens[1, 4] += 1  # wrong, but padding
  batch = dict(
    text=dict(tokens=tokens, mask=mask),
    image=dict(present=np.array([1, 1, 1, 0, 1, 1], bool)),
    valid=np.arange(6) != 4,
  )
  asked = []

  def forward(method, *args):
    asked.append((method, args))
    return hidden, table

  got = captioning(forward, batch, None, source=("image",))
  targets = np.where(mask & np.array([1, 1, 1, 0, 0, 1], bool)[:, None], tokens, -1).reshape(-1)
  assert got["loss"][0] == pytest.approx(
    float(dense(hidden.reshape(-1, WIDTH), table, None, targets, 0.0)), rel=1e-5
  )
  assert tuple(map(float, got["accuracy"])) == (8, 9) and got["loss"][1] == 9
  assert tuple(map(float, got["sequence_accuracy"])) == (2, 3)
  assert autoregressive(forward, batch, None)["loss"][1] == 9 + 4 and asked[1] == ("decode", ((),))
  several = dict(
    batch,
    text=dict(tokens=tokens.reshape(3, 2, 5), mask=mask.reshape(3, 2, 5)),
    valid=np.array([1, 1, 0], bool),
    image=dict(present=np.array([1, 0, 1], bool)),
  )
  assert captioning(forward, several, None)["loss"][1] == 8
