"""Batch norm and dropout in a step: whole-batch statistics with microbatches, frozen modules as in
evaluation, equal masks in both passes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.config import UserError
from mmjax.objectives import example_mask, objective
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.forward import frozen_modules
from mmjax.training.microbatches import with_batch_statistics
from mmjax.training.program import Program

ROWS = 8
BLOCKS = dict(depth=1, heads=2)
RESNET = dict(kind="resnet", layers=18, blocks=(1,), stem="small", multiplier=0.0625)
VIT = dict(kind="vit", patch=4, **BLOCKS)
TEXT = dict(kind="transformer", **BLOCKS)


@objective(couples_examples=True)
def two_looks(forward, batch, rng):
  """Pairs every picture with another one, twice: with its own view of the batch, and with another
  of two thirds of the rows.
  """
  x, rows = forward("embedding", "image"), example_mask(batch, every=("image",))
  loss = jnp.zeros(())
  for index in (jnp.roll(jnp.arange(ROWS), 1), jnp.arange(ROWS) // 3 * 3):
    view = {**batch, "image": jax.tree.map(lambda leaf, index=index: leaf[index], batch["image"])}
    y = forward("embedding", "image", batch=view)
    loss += jnp.where(rows, jnp.exp((x * y[::-1]).sum(-1)), 0).sum()
  return {"loss": (loss, rows.sum(dtype=jnp.float32))}


@objective(couples_examples=False)
def one_look(forward, batch, rng, *, changed: bool = False):
  view = {**batch, "image": dict(batch["image"])} if changed else None
  x, rows = forward("embedding", "image", batch=view), example_mask(batch, every=("image",))
  return {"loss": (jnp.where(rows, x[:, 0] ** 2, 0).sum(), rows.sum(dtype=jnp.float32))}


TWO, ONE = (dict(kind=f"{__name__}:{name}") for name in ("two_looks", "one_look"))


def make_batch():
  rng = np.random.default_rng(0)

  def integers(high, *shape):
    return rng.integers(0, high, (ROWS, *shape))

  return dict(
    image=dict(
      pixels=integers(256, 8, 8, 3).astype(np.uint8), key=integers(99, 2).astype(np.uint32)
    ),
    text=dict(
      tokens=integers(64, 6).astype(np.int32),
      mask=integers(4, 6) > 0,
      key=integers(99, 2).astype(np.uint32),
    ),
    valid=np.arange(ROWS) != 3,
  )


def make_step(image, *overrides, text=None, fusion=None, **objectives):
  c = configs.base()
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    8,
    6,
    64,
    "none",
  )
  encoders = dict(image=image) | (dict(text=text) if text else {})
  c.model = dict(name="dual_encoder", width=16, encoders=encoders)
  if fusion:
    c.model = dict(name="fusion_encoder", width=16, encoders=encoders, match=True, fusion=fusion)
  c.objectives, c.train.batch_size, c.precision.compute, c.optimizer.lr, c.schedule.warmup = (
    objectives,
    ROWS,
    "float32",
    1e-2,
    0,
  )
  config = configs.resolve(c, overrides)
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch())
  return Program(config, make_mesh(config, jax.devices()[:1]), steps=10, batch_spec=spec)


def random_params(step):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), step.params_spec)


def gradients(step):
  """A function of the parameters: (loss, gradients, sums, model state)."""
  state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), step.model_state_spec)
  batch = multihost.to_device(make_batch(), step.mesh)
  return step.in_mesh(
    jax.jit(
      lambda params: tuple(
        step.step.gradients(params, state, batch, jax.random.key(0), step.objectives)
      )
    )
  )


def assert_microbatches_change_nothing(image, **settings):
  (loss, slopes, sums, state), got = (
    gradients(step)(random_params(step))
    for count in (1, 4)
    for step in [make_step(image, f"train.microbatches={count}", **settings)]
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())),
    got,
    (loss, slopes, sums, state),
  )
  # They did move.
  assert all(np.abs(np.asarray(x) - 1).max() > 1e-3 for x in jax.tree.leaves(state))
  return state


def assert_slopes_are_those_of_the_loss(step, moved):
  """By finite differences. moved: the parts of the model whose parameters move."""
  params, rng = random_params(step), np.random.default_rng(1)
  direction = {
    name: jax.tree.map(
      lambda x, on=name.startswith(moved): on * 1e-3 * rng.normal(size=x.shape).astype(np.float32),
      part,
    )
    for name, part in params.items()
  }
  of = gradients(step)
  slopes = of(params)[1]

  def loss(sign):
    return float(of(jax.tree.map(lambda x, d: x + sign * d, params, direction))[0])

  expected = sum(
    np.vdot(a, b) for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction), strict=True)
  )
  np.testing.assert_allclose((loss(1) - loss(-1)) / 2, expected, rtol=0.02)


def test_microbatches_leave_batch_statistics_whole():
  """Also of an objective that looks at other rows too; and the statistics move once a step, however
  often they are read.
  """
  state = assert_microbatches_change_nothing(RESNET, two=TWO, one=ONE)
  once = gradients(make_step(RESNET, one=ONE))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    state,
    once(random_params(make_step(RESNET, one=ONE)))[3],
  )


@pytest.mark.slow
def test_microbatches_leave_batch_statistics_whole_in_matching():
  pairs = dict(align=dict(kind="contrastive"), match=dict(kind="matching", negatives="hardest"))
  assert_microbatches_change_nothing(
    RESNET, text=TEXT, fusion=dict(kind="cross_attention", **BLOCKS), **pairs
  )


def test_a_part_of_a_batch_has_no_statistics_of_its_own():
  with pytest.raises(
    UserError, match="an objective changes the image of a part.*set train.microbatches to 1"
  ):
    gradients(make_step(RESNET, "train.microbatches=4", one=ONE | dict(changed=True)))(
      random_params(make_step(RESNET, one=ONE))
    )


@pytest.mark.parametrize(
  "rates, stays",
  [((("image/.*", 0.0),), True), (((r"image/.*norm\d?/.*", 0.0),), True), ((), False)],
)
def test_frozen_batch_norm_keeps_its_statistics(rates, stays):
  """A frozen tower, and a trained one whose norms alone are frozen."""
  step = make_step(RESNET, f"optimizer.rates={rates!r}", one=ONE)
  state = step.init(0)
  before = jax.tree.map(np.asarray, (state.params["image"], state.model_state))
  state, _ = step.train(state, multihost.to_device(make_batch(), step.mesh))
  same = jax.tree.map(np.array_equal, before, (state.params["image"], state.model_state))
  assert all(jax.tree.leaves(same[1])) is stays
  assert same[0]["stem"]["kernel"] is (rates == (("image/.*", 0.0),))
  assert step.step.uncut_encoders == (() if stays else ("image",))


def test_a_frozen_tower_drops_nothing():
  dropping = dict(dropout=0.5)
  step = make_step(
    VIT | dropping,
    "optimizer.rates=(('image/.*', 0.0),)",
    text=TEXT | dropping,
    align=dict(kind="contrastive"),
  )
  params, batch = random_params(step), make_batch()
  forward = step.step.forward(params, {}, batch, jax.random.key(0), ())
  for modality, equal in (("image", True), ("text", False)):
    evaluated = step.model.apply({"params": params}, modality, batch, method="embedding")
    assert np.allclose(forward("embedding", modality), evaluated, atol=1e-6) is equal


def test_frozen_modules_have_parameters_and_none_that_is_trained():
  trained = dict(
    image=dict(stem=dict(kernel=False), norm=dict(scale=True)),
    text=dict(layers=dict(bias=False)),
    log_scale=False,
  )
  frozen = frozen_modules(trained)
  assert frozen == {("image", "stem"), ("text",), ("text", "layers")}
  state = {"batch_stats": {name: {"norm": {"mean": 0}} for name in ("image", "text")}}
  assert with_batch_statistics(state, frozen) == ("image",)


def test_a_second_look_drops_the_same_in_both_passes():
  assert_slopes_are_those_of_the_loss(
    make_step(VIT | dict(dropout=0.5), "train.microbatches=4", two=TWO), ("image",)
  )


@pytest.mark.slow
def test_matching_drops_the_same_in_both_passes():
  dropping = dict(dropout=0.5)
  step = make_step(
    VIT | dropping,
    "train.microbatches=4",
    text=TEXT | dropping,
    match=dict(kind="matching", negatives="hardest"),
    fusion=dict(kind="cross_attention", **BLOCKS, **dropping),
  )
  # What comes after the embeddings that choose the negatives.
  assert_slopes_are_those_of_the_loss(step, ("fusion", "matcher"))
