"""Contrastive losses in blocks against the plain formulas over the whole matrix, differentiated by
JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmjax.objectives.contrastive import contrastive
from mmjax.parallel import collectives
from mmjax.parallel.mesh import AXES
from mmjax.parallel.rules import batch_sharding, replicated

BATCH, WIDTH = 64, 16


def mesh_of(*sizes):
  count = int(np.prod(sizes))
  return Mesh(
    np.array(jax.devices()[:count]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def make_batch(size=BATCH, *, seed=0, mixup=False, padding=True):
  """Repeated captions, repeated pictures, rows that are padding or lack a modality."""
  rng = np.random.default_rng(seed)

  def key(kinds):
    return np.stack([rng.integers(0, kinds, size), np.zeros(size, int)], 1).astype(np.uint32)

  batch = dict(image=dict(key=key(size)), text=dict(key=key(size // 2)), valid=np.ones(size, bool))
  if padding:
    batch["valid"] = rng.random(size) > 0.1
    batch["text"]["present"] = rng.random(size) > 0.1
  if mixup:
    batch["image"].update(
      mix_weight=rng.random(size).astype(np.float32), mix_row=np.roll(np.arange(size), 1)
    )
  return batch


def make_embeddings(size=BATCH, width=WIDTH, seed=1):
  x, y = np.random.default_rng(seed).normal(size=(2, size, width)).astype(np.float32)
  y = y + 0.5 * x
  return tuple(v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))


def positives_of(batch):
  size = len(batch["image"]["key"])
  same = np.eye(size, dtype=bool)
  for modality in ("image", "text"):
    key = batch[modality]["key"]
    same |= (key[:, None] == key[None]).all(-1)
  positives = same.astype(np.float32)
  if "mix_weight" in batch["image"]:
    w, m = batch["image"]["mix_weight"][:, None], batch["image"]["mix_row"]
    positives = w * positives + (1 - w) * positives[m]
  return positives


def dense(batch, loss, x, y, scale, bias):
  """The formulas of the docstring on the rows that count; mean."""
  keep = np.flatnonzero(batch["valid"] & batch["text"].get("present", True))
  positives = positives_of(batch)[np.ix_(keep, keep)]
  logits = scale * jnp.matmul(x[keep], y[keep].T, precision="highest")
  if loss == "sigmoid":
    logits = logits + bias
    share = np.minimum(positives, 1)
    return -(
      share * jax.nn.log_sigmoid(logits) + (1 - share) * jax.nn.log_sigmoid(-logits)
    ).sum() / len(keep)
  by_row, by_column = (
    positives / positives.sum(1, keepdims=True),
    positives / positives.sum(0, keepdims=True),
  )

  def cross(target, axis):
    return -(target * jax.nn.log_softmax(logits, axis)).sum()

  return 0.5 * (cross(by_row, 1) + cross(by_column, 0)) / len(keep)


def blockwise(batch, loss, chunk):
  """Mean loss and accuracy as functions of embeddings, scale and bias."""

  def function(x, y, scale, bias):
    outputs = dict(embedding={"image": x, "text": y}, temperature=(scale, bias))

    def forward(method, *args):
      return outputs[method][args[0]] if args else outputs[method]

    losses = contrastive(forward, batch, jax.random.key(0), loss=loss, chunk=chunk)
    (total, weight), (correct, rows) = losses["loss"], losses["accuracy"]
    return total / weight, correct / rows

  return function


def arguments(scale=20.0, bias=-4.0, **kwargs):
  return (*make_embeddings(**kwargs), np.float32(scale), np.float32(bias))


def evaluate(function, args, mesh=None):
  gradient = jax.value_and_grad(function, argnums=(0, 1, 2, 3), has_aux=True)
  if mesh is None:
    return jax.jit(gradient)(*args)
  with jax.set_mesh(mesh):
    placed = [
      jax.device_put(a, batch_sharding(mesh) if np.ndim(a) else replicated(mesh)) for a in args
    ]
    return jax.jit(gradient)(*placed)


def assert_close(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-12, np.linalg.norm(
      a - b
    ) / np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_eight_devices_equal_the_dense_formula(loss, chunk):
  batch, args = make_batch(), arguments()
  want = jax.value_and_grad(lambda *a: dense(batch, loss, *a), argnums=(0, 1, 2, 3))(
    *map(jnp.asarray, args)
  )
  (value, _), gradients = evaluate(blockwise(batch, loss, chunk), args, mesh_of(1, 2, 4, 1, 1))
  assert_close((value, gradients), want)


@pytest.mark.parametrize(
  "sizes", [None, (1, 1, 1, 1, 1), (2, 2, 1, 2, 1), (1, 1, 2, 2, 2), (1, 1, 1, 8, 1)]
)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_any_mesh_equals_the_dense_formula_with_mixup(loss, sizes):
  batch, args = make_batch(mixup=True), arguments()
  want = jax.value_and_grad(lambda *a: dense(batch, loss, *a), argnums=(0, 1, 2, 3))(
    *map(jnp.asarray, args)
  )
  (value, _), gradients = evaluate(blockwise(batch, loss, 2), args, sizes and mesh_of(*sizes))
  assert_close((value, gradients), want)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_large_blocks_are_cut_into_tiles(loss, monkeypatch):
  monkeypatch.setattr(collectives, "BLOCK", 100)
  monkeypatch.setattr(collectives, "SIDE", 7)
  batch, args = make_batch(), arguments()
  want = jax.value_and_grad(lambda *a: dense(batch, loss, *a), argnums=(0, 1, 2, 3))(
    *map(jnp.asarray, args)
  )
  for mesh in (None, mesh_of(1, 4, 1, 1, 1)):  # 64 or 16 rows a device, in tiles of 7 or 6
    (value, _), gradients = evaluate(blockwise(batch, loss, 2), args, mesh)
    assert_close((value, gradients), want)


def test_accuracy_counts_any_positive():
  batch, (x, y, scale, bias) = make_batch(), arguments()
  keep = np.flatnonzero(batch["valid"] & batch["text"]["present"])
  nearest = (x[keep] @ y[keep].T).argmax(1)
  want = positives_of(batch)[np.ix_(keep, keep)][np.arange(len(keep)), nearest].mean()
  for mesh in (None, mesh_of(1, 8, 1, 1, 1)):
    for loss in ("softmax", "sigmoid"):
      (_, accuracy), _ = evaluate(blockwise(batch, loss, 2), (x, y, scale, bias), mesh)
      np.testing.assert_allclose(accuracy, want, rtol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_rows_that_do_not_count_change_nothing(loss):
  batch, (x, y, scale, bias) = make_batch(), arguments()
  out = ~(batch["valid"] & batch["text"]["present"])
  bad = np.where(out[:, None], np.nan, x), np.where(out[:, None], 1e4, y).astype(np.float32)
  want, got = (evaluate(blockwise(batch, loss, 2), (a, b, scale, bias)) for a, b in ((x, y), bad))
  assert_close(got, want, 0)
  assert not np.asarray(got[1][0])[out].any()


def test_extreme_scales_stay_finite():
  batch = make_batch()
  for loss in ("softmax", "sigmoid"):
    for scale in (0.0, 1e4):
      assert all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(evaluate(blockwise(batch, loss, 1), arguments(scale)))
      )


def test_batch_without_any_valid_row_has_no_weight():
  batch = make_batch()
  batch["valid"][:] = False
  x, y, scale, bias = arguments()

  def forward(method, *args):
    return {"image": x, "text": y}[args[0]] if args else (scale, bias)

  losses = contrastive(forward, batch, jax.random.key(0))
  assert losses["loss"] == (0, 0)


def temporary_bytes(loss, devices, rows, width, chunk=1):
  """Temporary memory a device of the compiled value and gradient, `rows` rows a device."""
  size, mesh = rows * devices, mesh_of(1, devices, 1, 1, 1)
  batch = make_batch(size, padding=False)
  gradient = jax.value_and_grad(
    lambda *a: blockwise(a[4], loss, chunk)(*a[:4])[0], argnums=(0, 1, 2, 3)
  )
  with jax.set_mesh(mesh):

    def place(a):
      return jax.ShapeDtypeStruct(
        np.shape(a),
        np.asarray(a).dtype,
        sharding=batch_sharding(mesh) if np.ndim(a) else replicated(mesh),
      )

    x = np.zeros((size, width), np.float32)
    compiled = (
      jax.jit(gradient)
      .lower(*jax.tree.map(place, (x, x, np.float32(1), np.float32(1), batch)))
      .compile()
    )
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_memory_a_device_hardly_grows_with_the_batch(loss):
  one, eight = (temporary_bytes(loss, devices, rows=256, width=64) for devices in (1, 8))
  assert eight <= 1.7 * one, (one, eight)


def test_a_device_never_holds_64_mb_of_similarities():
  compiled = temporary_bytes("softmax", 1, rows=8192, width=16)  # the matrix would be 256 MB
  assert compiled < 64e6, compiled
