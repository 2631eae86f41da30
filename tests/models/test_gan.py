"""The GAN: its discriminator, R1 and losses against PyTorch, two players in one step, drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.objectives.gan import move
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.program import Program
from tests.training.test_step import assert_close

SIZE, BATCH = 8, 16
SETTINGS = dict(r1_rows=1, shift=0.0, reconstruction=2.0)


def make_step(*overrides, devices=1, **objective):
  c = configs.base()
  c.seed, c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    3,
    SIZE,
    5,
    32,
    "none",
  )
  c.data.modalities = ("image", "text")
  c.model = dict(
    name="text_to_image_gan",
    width=16,
    noise=4,
    channels=(16, 8),
    discriminator=(8, 16),
    encoders=dict(text=dict(kind="transformer", depth=1, heads=2, pooling="mean")),
  )
  c.objectives = dict(draw=dict(kind="gan", noise=4, **objective))
  c.optimizers.discriminator = dict(name="adamw", params="discriminator/.*", lr=0.01, clip=0.0)
  c.train.batch_size, c.precision.compute, c.schedule.warmup, c.train.ema = BATCH, "float32", 0, 0.5
  config = configs.resolve(c, overrides)
  return Program(config, make_mesh(config, jax.devices()[:devices]), steps=100)


def make_batch():
  rng = np.random.default_rng(0)
  return dict(
    image=dict(
      pixels=rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8),
      key=np.zeros((BATCH, 2), np.uint32),
    ),
    text=dict(
      tokens=rng.integers(0, 32, (BATCH, 5)).astype(np.int32),
      mask=np.ones((BATCH, 5), bool),
      key=np.repeat(rng.integers(0, 99, (BATCH // 2, 2)), 2, axis=0).astype(np.uint32),
    ),
    valid=rng.integers(5, size=BATCH) > 0,
  )


@pytest.fixture(scope="module")
def trained():
  """A step, its first state's parameters on the host, and what its objective and gradients are."""
  step = make_step(**SETTINGS)
  params = jax.tree.map(np.asarray, step.init(3).params)
  return step, params, gradients(step, params)


def gradients(step, params):
  place = jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), params, step.params_spec)

  def of(p, b):
    return step.step.gradients(p, {}, b, jax.random.key(0), step.objectives)[:3]

  return step.in_mesh(jax.jit(of))(place, multihost.to_device(make_batch(), step.mesh))


def test_losses_r1_and_the_discriminators_gradient_equal_torch(trained):
  """The discriminator again in PyTorch (conv2d), R1 by autograd, on the same drawn pictures."""
  torch = pytest.importorskip("torch")
  step, params, (_, slopes, sums) = trained
  batch, model = make_batch(), step.model
  rng = jax.random.split(
    jax.random.fold_in(jax.random.key(0), __import__("zlib").crc32(b"draw")), 3
  )[0]
  text = model.apply({"params": params}, batch, method="condition")
  fake = np.asarray(
    model.apply({"params": params}, text, jax.random.normal(rng, (BATCH, 4)), method="draw")
  )
  d = jax.tree.map(lambda x: torch.tensor(np.array(x), requires_grad=True), params["discriminator"])

  def leaky(x):
    return torch.nn.functional.leaky_relu(x, 0.2)

  def score(x, text):
    def dense(x, name):
      return x @ d[name]["kernel"] + d[name]["bias"]

    x = (
      x.reshape(len(x), 4, 2, 4, 2, 3)
      .permute(0, 1, 3, 2, 4, 5)
      .reshape(len(x), 4, 4, 12)
      .permute(0, 3, 1, 2)
    )
    for i in range(2):
      layer = d[f"convolution{i}"]["dense"]
      kernel = layer["kernel"].reshape(3, 3, x.shape[1], -1).permute(3, 2, 0, 1)
      x = leaky(
        torch.nn.functional.conv2d(x, kernel, layer["bias"], stride=2 if i else 1, padding=1)
      )
    h = leaky(dense(x.permute(0, 2, 3, 1).flatten(1), "features"))
    return (
      dense(h, "real") + h @ dense(leaky(dense(text, "text_hidden")), "text").T / h.shape[1] ** 0.5
    )

  valid, soft = torch.tensor(batch["valid"]), torch.nn.functional.softplus
  real = torch.tensor(batch["image"]["pixels"] / 127.5 - 1, dtype=torch.float32, requires_grad=True)
  t, f = torch.tensor(np.array(text)), torch.tensor(fake)
  on_real, on_fake = score(real, t), score(f, t)
  (slope,) = torch.autograd.grad(on_real.diagonal()[valid].sum(), real, create_graph=True)
  squares = slope.square().sum((1, 2, 3))[valid]
  key = batch["text"]["key"]
  # Each row's own text, and the valid ones that differ from it, one row at a time.
  rows = np.flatnonzero(batch["valid"])
  choices = [[i] + [j for j in rows if (key[j] != key[i]).any()] for i in rows]
  assert any(len(c) < len(rows) for c in choices)

  def entropy(scores):
    return torch.stack(
      [-scores[i, c].log_softmax(0)[0] for i, c in zip(rows, choices, strict=True)]
    ).mean()

  def own(scores):
    return scores.diagonal()[valid]

  opponent = (
    (soft(-own(on_real)) + soft(own(on_fake))).mean() + entropy(on_real) + 0.5 * squares.mean()
  )
  loss = (
    soft(-own(on_fake)).mean()
    + entropy(on_fake)
    + 2 * (f - real).abs().mean((1, 2, 3))[valid].mean()
  )
  losses = {k: float(v[0] / v[1]) for k, v in sums["draw"].items()}
  np.testing.assert_allclose(
    [losses["opponent"], losses["loss"], losses["r1"]],
    [opponent.item(), loss.item(), squares.mean().item()],
    rtol=1e-4,
  )
  opponent.backward()
  assert_close(slopes["discriminator"], jax.tree.map(lambda x: x.grad.numpy(), d), 1e-3)


def test_the_generator_does_not_move_the_discriminator_nor_the_reverse(trained):
  """Scaling one player's loss scales its gradient (the text encoder is the generator's here) and
  leaves the other's.
  """
  step, params, (_, slopes, _) = trained
  other = make_step("objectives.draw.weight=3.0", **SETTINGS)
  _, more, _ = gradients(other, params)
  assert_close(more["discriminator"], slopes["discriminator"], 1e-5)
  for part in ("generator", "text"):
    assert_close(more[part], jax.tree.map(lambda x: 3 * x, slopes[part]), 1e-5)


def test_eight_devices_give_the_same_step(trained):
  step, params, (want_loss, want, _) = trained
  loss, got, _ = gradients(make_step(devices=8, r1_rows=1, shift=0.0, reconstruction=2.0), params)
  assert_close((loss, got), (want_loss, want), 1e-4)


def test_microbatches_give_the_same_step(trained):
  _, params, whole = trained
  parts = gradients(make_step("train.microbatches=2", devices=2, **SETTINGS), params)
  assert_close(parts[:2], whole[:2], 1e-4)


def test_the_text_encoder_learns_with_the_player_that_owns_it(trained):
  _, params, (_, slopes, _) = trained
  step = make_step("optimizers.discriminator.params='(discriminator|text)/.*'", **SETTINGS)
  _, other, _ = gradients(step, params)
  for part in ("generator", "discriminator"):
    assert_close(other[part], slopes[part], 1e-4)
  one, two = (np.asarray(tree["text"]["embedding"]) for tree in (slopes, other))
  assert np.abs(two).max() > 0 and np.abs(one - two).max() > 0.1 * np.abs(one).max()


def test_two_players_take_a_step_each(trained):
  step, params, _ = trained
  before = step.with_params(step.init(3), params)
  after, metrics = step.train(before, multihost.to_device(make_batch(), step.mesh))
  assert set(after.opt_states) == {"main", "discriminator"} and float(metrics["skipped"]) == 0
  largest = {
    part: max(
      np.abs(np.asarray(a) - b).max()
      for a, b in zip(
        jax.tree.leaves(after.params[part]), jax.tree.leaves(params[part]), strict=True
      )
    )
    for part in params
  }
  assert (
    0.005 < largest["discriminator"] < 0.011
    and 0 < largest["generator"] < 0.0011
    and 0 < largest["text"] < 0.0011
  )


def test_it_learns_to_draw_what_the_text_says():
  """Two texts, dark above and dark below: no picture is near both, so that neither a white one nor
  any other that leaves the text out passes."""
  batch = make_batch()
  below = np.arange(BATCH) % 2
  pictures = np.full((2, SIZE, SIZE, 3), 255, np.uint8)
  pictures[0, : SIZE // 2], pictures[1, SIZE // 2 :] = 0, 0
  batch["image"]["pixels"] = pictures[below]
  batch["text"]["tokens"] = np.stack([np.full(5, 7), np.full(5, 23)])[below].astype(np.int32)
  batch["text"]["key"] = np.stack([below, below], axis=1).astype(np.uint32)
  step = make_step("optimizer.lr=0.01", r1_rows=1, shift=0.0, reconstruction=10.0)
  state, rows = step.init(0), multihost.to_device(batch, step.mesh)
  for _ in range(60):
    state, _ = step.train(state, rows)
  drawn = step.apply(step.evaluation_variables(state), "generate", (0,), {"text": rows["text"]})
  difference = np.asarray(drawn)[:, None].astype(np.float32) - pictures  # [B, 2, H, W, 3]
  far = np.sqrt(np.square(difference / 255).mean((2, 3, 4)))
  own, other = far[np.arange(BATCH), below], far[np.arange(BATCH), 1 - below]
  assert own.max() < 0.3 and other.min() > 0.8, (own, other)  # white: 0.71 from both, grey 0.5


def test_a_drawing_depends_on_text_and_seed_alone(trained):
  step, params, _ = trained
  batch = {"text": make_batch()["text"]}

  def draw(seed, rows):
    return np.asarray(
      step.model.apply(
        {"params": params}, seed, jax.tree.map(lambda x: x[rows], batch), method="generate"
      )
    )

  order = np.random.default_rng(1).permutation(BATCH)
  whole = draw(0, np.arange(BATCH))
  assert whole.shape == (BATCH, SIZE, SIZE, 3) and whole.dtype == np.uint8
  assert np.abs(draw(0, order).astype(int) - whole[order]).max() <= 1
  assert np.abs(draw(0, np.arange(3)).astype(int) - whole[:3]).max() <= 1
  assert np.abs(draw(1, order).astype(int) - whole[order]).max() > 3


def test_moving_pictures():
  pictures = np.random.default_rng(0).uniform(-1, 1, (40, 8, 8, 3)).astype(np.float32)
  moved = np.asarray(move(jnp.asarray(pictures), 0.25, jax.random.key(0)))
  padded = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1)
  found = set()
  for before, after in zip(padded, moved, strict=True):
    places = [
      (i, j)
      for i in range(5)
      for j in range(5)
      if np.allclose(before[i : i + 8, j : j + 8], after, atol=1e-6)
    ]
    assert len(places) == 1
    found.add(places[0])
  assert len(found) > 10


@pytest.mark.parametrize(
  "override, words",
  [
    ("model.channels=(8, 8, 8, 8)", ["data.image.size 8", "model.channels"]),
    ("model.discriminator=(0,)", ["model.discriminator"]),
  ],
)
def test_mistakes_are_named(override, words):
  with pytest.raises(UserError) as error:
    make_step(override)
  assert all(word in str(error.value) for word in words)
