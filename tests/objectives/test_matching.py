"""Matching: no positive is ever a negative, hard ones are likelier, and the step's numbers do not
depend on how it is cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmjax.config
from mmjax.config import UserError
from mmjax.objectives.matching import matching
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.forward import Forward
from mmjax.training.microbatches import Recorder
from mmjax.training.program import Program

ROWS = 8


def make_batch(seed, rows=ROWS, kinds=5):
  """Few different texts and pictures, so that many rows are positives; rows that do not count."""
  rng = np.random.default_rng(seed)

  def key():
    return np.stack([rng.integers(0, kinds, rows), np.zeros(rows, int)], 1).astype(np.uint32)

  return dict(
    image=dict(row=np.arange(rows), key=key(), present=rng.random(rows) > 0.2),
    text=dict(row=np.arange(rows), key=key()),
    valid=rng.random(rows) > 0.2,
  )


def run(batch, x, y, scale=5.0, seed=0, **kwargs):
  """(losses, views): the matching head of the fake model sees the numbers of the two rows that a
  pair is made of.
  """
  views = []

  def forward(method, *args, batch=batch):
    if method == "match":
      views.append((np.asarray(batch["image"]["row"]), np.asarray(batch["text"]["row"])))
      return jnp.sin(jnp.asarray(batch["image"]["row"] * 3.0 + batch["text"]["row"]))
    return {
      "embedding": lambda: {"image": x, "text": y}[args[0]],
      "temperature": lambda: (jnp.float32(scale), jnp.float32(0)),
    }[method]()

  return matching(forward, batch, jax.random.key(seed), **kwargs), views


def embeddings(seed, rows=ROWS):
  x, y = np.random.default_rng(seed).normal(size=(2, rows, 4)).astype(np.float32)
  return tuple(jnp.asarray(v / np.linalg.norm(v, axis=-1, keepdims=True)) for v in (x, y))


def allowed(batch):
  def same(m):
    return (batch[m]["key"][:, None] == batch[m]["key"][None]).all(-1)

  counts = batch["valid"] & batch["image"]["present"]
  return counts[:, None] & counts[None] & ~(
    same("image") | same("text") | np.eye(len(counts), dtype=bool)
  ), counts


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 10**6), kinds=st.integers(1, 9), how=st.sampled_from(["sampled", "hardest"])
)
def test_no_positive_is_a_negative_and_the_loss_is_the_formula(seed, kinds, how):
  batch, (x, y) = make_batch(seed, kinds=kinds), embeddings(seed)
  losses, views = run(batch, x, y, seed=seed, negatives=how)
  open_, counts = allowed(batch)
  assert (
    np.array_equal(views[0], [np.arange(ROWS)] * 2)
    and np.array_equal(views[1][0], views[0][0])
    and np.array_equal(views[2][1], views[0][1])
  )
  found = open_.any(1)
  assert all(open_[i, views[1][1][i]] and open_[views[2][0][i], i] for i in np.flatnonzero(found))
  if how == "hardest":
    similar = np.where(open_, np.asarray(x @ y.T), -9)
    np.testing.assert_array_equal(views[1][1][found], similar.argmax(1)[found])
    np.testing.assert_array_equal(views[2][0][found], similar.argmax(0)[found])
  logits = [np.sin(a * 3.0 + b) for a, b in views]
  losses_of = [
    np.log1p(np.exp(-logits[0]))[counts],
    *(np.log1p(np.exp(x))[found] for x in logits[1:]),
  ]
  np.testing.assert_allclose(
    losses["loss"],
    (sum(x.sum() for x in losses_of), counts.sum() + 2 * found.sum()),
    rtol=1e-5,
    atol=1e-5,
  )
  correct = (logits[0] > 0)[counts].sum() + sum((x < 0)[found].sum() for x in logits[1:])
  assert float(losses["accuracy"][0]) == correct


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_hardest_do_not_depend_on_the_order_of_the_batch(seed):
  batch, (x, y) = make_batch(seed), embeddings(seed)
  order = np.random.default_rng(seed).permutation(ROWS)
  losses = run(batch, x, y, negatives="hardest")[0]
  shuffled = run(jax.tree.map(lambda v: v[order], batch), x[order], y[order], negatives="hardest")[
    0
  ]
  np.testing.assert_allclose(
    jax.tree.leaves(shuffled), jax.tree.leaves(losses), rtol=1e-5, atol=1e-6
  )


def test_negatives_are_drawn_from_the_softmax_of_the_similarities():
  rows = 400  # the same two texts to choose from, many times over
  batch = dict(
    image=dict(row=np.arange(rows), key=np.zeros((rows, 2), np.uint32)),
    text=dict(row=np.arange(rows), key=np.zeros((rows, 2), np.uint32)),
  )
  batch["image"]["key"][:, 0] = batch["text"]["key"][:, 0] = np.where(
    np.arange(rows) < rows - 2, 0, np.arange(rows)
  )
  x, y = np.zeros((2, rows, 2), np.float32)
  x[:], y[-1], y[-2] = (1, 0), (1, 0), (0, 1)  # cosines 1 and 0 with the last two
  _, views = run(batch, jnp.asarray(x), jnp.asarray(y), scale=np.log(3.0))
  chosen = views[1][1][:-2]
  assert set(chosen) == {rows - 1, rows - 2}
  assert abs((chosen == rows - 1).mean() - 0.75) < 5 * (0.75 * 0.25 / rows) ** 0.5


COUPLED = dict(match=dict(kind="matching", weight=0.5), align=dict(kind="contrastive"))
EVERY = dict(
  COUPLED,
  classes=dict(kind="classification", modalities=("image", "text")),
  tokens=dict(kind="masked_tokens", context=("image",), rate=0.5),
  patches=dict(kind="masked_patches"),
)


def make_step(*overrides, devices, objectives):
  """All objectives or two on a tiny fusion encoder."""
  c = mmjax.config.base()
  c.seed, c.data.classes, c.data.label = 3, 5, "label"
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    8,
    6,
    64,
    "none",
  )
  block = dict(depth=1, heads=2)
  c.model = dict(
    name="fusion_encoder",
    width=16,
    match=True,
    masked_text=True,
    masked_patches=("image",),
    fusion=dict(kind="cross_attention", **block),
    encoders=dict(image=dict(kind="vit", patch=4, **block), text=dict(kind="transformer", **block)),
  )
  c.objectives = objectives
  c.train.batch_size, c.precision.compute = 16, "float32"
  config = mmjax.config.resolve(c, overrides)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), real_batch())
  return Program(config, make_mesh(config, jax.devices()[:devices]), steps=10, batch_spec=batch)


def real_batch():
  rng = np.random.default_rng(0)

  def integers(high, *shape):
    return rng.integers(0, high, (16, *shape))

  return dict(
    image=dict(
      pixels=integers(256, 8, 8, 3).astype(np.uint8), key=integers(99, 2).astype(np.uint32)
    ),
    text=dict(
      tokens=integers(64, 6).astype(np.int32),
      mask=integers(4, 6) > 0,
      key=integers(3, 2).astype(np.uint32),
    ),
    label=integers(5).astype(np.int32),
    valid=integers(9) > 0,
  )


def gradients(step, params):
  def function(params, batch):
    return step.step.gradients(params, {}, batch, jax.random.key(0), step.objectives)[:3]

  params = jax.tree.map(
    lambda x, spec: jax.device_put(np.asarray(x), spec.sharding), params, step.params_spec
  )
  return jax.tree.map(
    np.asarray,
    step.in_mesh(jax.jit(function))(params, multihost.to_device(real_batch(), step.mesh)),
  )


@pytest.mark.parametrize(
  "objectives, overrides",
  [
    pytest.param(COUPLED, ("train.microbatches=2",), id="microbatches", marks=pytest.mark.slow),
    pytest.param(
      EVERY, (), id="devices", marks=pytest.mark.slow
    ),  # gradients too; values of each: tests/models/test_properties.py
  ],
)
def test_microbatches_and_devices_change_nothing(objectives, overrides):
  step = make_step(devices=1, objectives=objectives)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), step.params_spec
  )
  want = gradients(step, params)
  assert all(losses["loss"][1] > 0 for losses in want[2].values())
  got = gradients(make_step(*overrides, devices=8, objectives=objectives), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()), rtol=1e-3),
    got,
    want,
  )


def test_what_cannot_be_matched_or_cut_is_said():
  x, y = embeddings(0)
  with pytest.raises(UserError, match=r"set data\.text\.per_example to 1"):
    run(make_batch(0), x, jnp.concatenate([y, y]))
  recorder = Recorder(Forward(None, {}, {}, {}, jax.random.key(0)), lambda request, views: None)
  with pytest.raises(
    UserError, match=r"set train\.microbatches to 1, or let the objective pass them as batch="
  ):
    recorder("encode", x)
