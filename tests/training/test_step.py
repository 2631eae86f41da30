"""The train step on a tiny dual encoder: same numbers however it is cut, placed or split over
devices.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.objectives import objective
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.flops import count_flops
from mmjax.training.mixup import mixup
from mmjax.training.program import Program

SIZE, TOKENS, BATCH = 8, 6, 32
FSDP = ("mesh.data=1", "mesh.fsdp=8", "sharding=fsdp")


def make_config(*overrides, **objectives):
  c = configs.base()
  c.seed = 3
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    SIZE,
    TOKENS,
    128,
    "none",
  )
  c.model = dict(
    name="dual_encoder",
    width=32,
    bias=True,
    encoders=dict(
      image=dict(kind="vit", patch=4, depth=1, heads=2),
      text=dict(kind="transformer", depth=1, heads=2),
    ),
  )
  c.objectives = objectives or dict(
    align=dict(kind="contrastive", between=("image", "text"), chunk=2)
  )
  c.train.batch_size, c.precision.compute = BATCH, "float32"
  return configs.resolve(c, overrides)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)

  def integers(high, *shape):
    return rng.integers(0, high, (BATCH, *shape))

  return dict(
    image=dict(
      pixels=integers(256, SIZE, SIZE, 3).astype(np.uint8), key=integers(99, 2).astype(np.uint32)
    ),
    text=dict(
      tokens=integers(128, TOKENS).astype(np.int32),
      mask=integers(4, TOKENS) > 0,
      key=integers(5, 2).astype(np.uint32),
    ),
    valid=integers(9) > 0,
    id=[str(i) for i in range(BATCH)],
  )


def make_step(*overrides, devices=8, steps=100, **objectives):
  config = make_config(*overrides, **objectives)

  def spec(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

  batch = {name: jax.tree.map(spec, value) for name, value in make_batch().items() if name != "id"}
  return Program(config, make_mesh(config, jax.devices()[:devices]), steps=steps, batch_spec=batch)


def gradients(step, params, batch):
  """(loss, gradients, sums) as `update` gets them, with the same random numbers every time."""
  return step.in_mesh(gradients_of(step))(params, multihost.to_device(batch, step.mesh))


@functools.cache
def gradients_of(step):
  """The function of a program, compiled once."""

  def function(params, batch):
    return step.step.gradients(params, {}, batch, jax.random.key(0), step.objectives)[:3]

  return jax.jit(function)


def on(step, params):
  return jax.tree.map(
    lambda x, spec: jax.device_put(np.asarray(x), spec.sharding), params, step.params_spec
  )


def assert_close(got, want, tolerance=1e-5):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-7)
    assert error <= tolerance, (jax.tree_util.keystr(path), error)


@objective(couples_examples=False)
def shrink(forward, batch, rng, *, only: str = "image"):
  """A loss of single examples: mean over valid rows of |sum of the embedding|^2, weighted by how
  many tokens a row has.
  """
  share = batch["text"]["mask"].sum(-1) * batch["valid"].astype(jnp.float32)
  x = forward("embedding", only).sum(-1) ** 2
  return {"loss": ((x * share).sum(), share.sum()), "largest": (x.max() * share.sum(), share.sum())}


BOTH = dict(
  align=dict(kind="contrastive", loss="sigmoid"), small=dict(kind=f"{__name__}:shrink", weight=0.5)
)


@pytest.fixture(scope="module")
def reference():
  """Parameters, and gradients of both objectives at once on one device."""
  step = make_step(devices=1, **BOTH)
  params = jax.tree.map(np.asarray, step.init(3).params)
  return params, gradients(step, params, make_batch())


@pytest.mark.parametrize(
  "devices, overrides",
  [
    (1, ("train.microbatches=8",)),
    (8, ("train.microbatches=4",)),
    (8, ("train.microbatches=4", *FSDP)),
    (8, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "sharding=fsdp_tensor")),
  ],
)
def test_gradients_do_not_depend_on_microbatches_or_mesh(reference, devices, overrides):
  params, (loss, want, sums) = reference
  step = make_step(*overrides, devices=devices, **BOTH)
  got_loss, got, got_sums = gradients(step, on(step, params), make_batch())
  assert_close((got_loss, got), (loss, want))
  assert_close({k: got_sums[k]["loss"] for k in got_sums}, {k: sums[k]["loss"] for k in sums})


def test_eight_microbatches_on_eight_devices(reference):
  """64 rows: eight microbatches of one row a device."""
  params, _ = reference
  double = jax.tree.map(
    lambda a, b: np.concatenate([a, b]),
    *({k: v for k, v in make_batch(s).items() if k != "id"} for s in (0, 1)),
  )
  whole, parts = (make_step("train.batch_size=64", f"train.microbatches={n}") for n in (1, 8))
  want, got = (gradients(step, on(step, params), double)[:2] for step in (whole, parts))
  assert_close(got, want)


def test_dropout_is_the_same_in_both_passes():
  """With dropout, the two passes must meet the same masks: then the embeddings of pass two give
  back the loss of pass one.
  """
  step = make_step(
    "train.microbatches=4",
    "model.encoders.image.dropout=0.5",
    "model.encoders.text.dropout=0.5",
    devices=1,
  )
  params = step.init(0).params
  batch = make_batch()
  direction = jax.tree.map(
    lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32) * 1e-3, params
  )
  loss, slope, _ = gradients(step, params, batch)

  def move(sign):
    return gradients(
      step, on(step, jax.tree.map(lambda x, d: np.asarray(x) + sign * d, params, direction)), batch
    )[0]

  measured = (move(1) - move(-1)) / 2
  expected = sum(
    np.vdot(a, b) for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True)
  )
  np.testing.assert_allclose(measured, expected, rtol=0.05)


@pytest.fixture(scope="module")
def fsdp():
  step = make_step(*FSDP, "train.ema=0.5", "optimizer.lr=0.01", "schedule.warmup=0")
  return step, step.compile()[0]


def test_parameters_and_optimizer_state_are_split(fsdp):
  step, _ = fsdp
  state = step.init(0)
  for tree in (state.params, state.ema, state.opt_states):
    kernels = [
      x
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
      if "up" in str(path) and "kernel" in str(path)
    ]
    assert kernels and all(x.addressable_shards[0].data.size == x.size // 8 for x in kernels)
  assert jax.tree.map(lambda x: x.sharding, step.state_spec) == jax.tree.map(
    lambda x: x.sharding, state
  )


def test_fsdp_moves_parameters_and_never_activations(fsdp):
  _, compiled = fsdp
  text = compiled.as_text()
  assert not re.search(r"\ball-to-all", text)
  gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
  assert gathered  # parameters


def test_initial_state_is_the_same_on_any_mesh(fsdp):
  step, _ = fsdp
  assert_close(step.init(0).params, make_step(devices=1).init(0).params, 1e-6)


def test_a_step_learns_and_reports(fsdp):
  step, _ = fsdp
  state, losses = step.init(0), []
  for _ in range(8):
    state, metrics = step.train(state, multihost.to_device(make_batch(), step.mesh))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.9 * losses[0]
  assert set(metrics) == {
    "loss",
    "align/loss",
    "align/accuracy",
    "grad_norm",
    "param_norm",
    "update_norm",
    "lr",
    "scale",
    "skipped",
  }
  assert int(state.step) == 8 and float(metrics["skipped"]) == 0
  norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(state.params)))
  np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-5)
  assert step.flops_per_step() > 0


def test_another_rate_compiles_nothing():
  """Nor another schedule, nor a longer run: all are inputs of one program."""

  first = make_step("optimizer.lr=0.001", "schedule.name=cosine", "schedule.warmup=10", devices=1)
  changes = "optimizer.lr=0.5", "schedule.name=cooldown", "schedule.warmup=7"
  other = make_step(*changes, devices=1, steps=900)
  assert first.lower().as_text() == other.lower().as_text()
  for program in (first, other):
    np.testing.assert_allclose(
      program.rates["main"][:99], program.optimizer.groups["main"].schedule(np.arange(99)), 1e-6
    )


def test_a_run_too_long_for_a_table_takes_its_rates_from_the_schedule():
  changes = "optimizer.lr=0.01", "schedule.warmup=2"
  runs = [make_step(*changes, devices=1, steps=steps) for steps in (100, 10**9)]
  assert runs[0].rates and not runs[1].rates
  batch, rates = make_batch(), []
  for run in runs:
    state = run.init(0)
    for _ in range(3):
      state, metrics = run.train(state, multihost.to_device(batch, run.mesh))
      rates.append(float(metrics["lr"]))
  np.testing.assert_allclose(rates, [0.005, 0.01, 0.01] * 2, rtol=1e-2)


def test_the_average_follows_the_parameters(fsdp):
  step, _ = fsdp
  state = step.init(0)
  before = jax.tree.map(np.asarray, state.params)
  state, _ = step.train(state, multihost.to_device(make_batch(), step.mesh))
  want = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * np.asarray(b), before, state.params)
  assert_close(step.evaluation_variables(state)["params"], want, 1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(fsdp):
  step, _ = fsdp
  state = step.init(0)
  broken = jax.tree.map(jnp.copy, state)
  broken.params["log_scale"] = jax.device_put(
    np.float32(np.nan), step.params_spec["log_scale"].sharding
  )
  before = jax.tree.map(np.asarray, broken)
  after, metrics = step.train(broken, multihost.to_device(make_batch(), step.mesh))
  assert float(metrics["skipped"]) == 1 and int(after.step) == 1
  jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, step=before.step), before)


def test_embeddings_of_a_batch(fsdp):
  step, _ = fsdp
  params = step.init(0).params
  batch = multihost.to_device(make_batch(), step.mesh)
  for modality in ("image", "text"):
    x = step.apply({"params": params}, "embedding", (modality,), {modality: batch[modality]})
    assert x.shape == (BATCH, 32) and x.dtype == jnp.float32
    want = step.model.apply(
      {"params": jax.tree.map(np.asarray, params)}, modality, make_batch(), method="embedding"
    )
    np.testing.assert_allclose(x, want, atol=1e-5)


def test_other_parameters_are_copied_into_the_state(fsdp):
  step, _ = fsdp
  state, other = step.init(0), jax.tree.map(np.asarray, step.init(1).params)
  state = step.with_params(state, other)
  # Both copies can be donated.
  state, metrics = step.train(state, multihost.to_device(make_batch(), step.mesh))
  assert float(metrics["skipped"]) == 0


def test_frozen_parameters_cost_no_backward_pass():
  step = make_step("optimizer.rates=(('image/.*', 0.0),)", devices=1)
  _, slopes, _ = gradients(step, step.init(0).params, make_batch())
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(slopes["image"]))
  assert all(np.asarray(x).any() for x in jax.tree.leaves(slopes["text"]["layers"]["mlp"]))

  def flops(s):
    return (
      s.in_mesh(
        jax.jit(lambda p, b: s.step.gradients(p, {}, b, jax.random.key(0), s.objectives)[1]).lower
      )(s.params_spec, s.batch_spec)
      .compile()
      .cost_analysis()["flops"]
    )

  assert flops(step) < 0.8 * flops(make_step(devices=1))


def test_mixup_gives_soft_targets_and_keeps_bytes():
  batch = {k: v for k, v in make_batch().items() if k != "id"}
  mixed = mixup(batch, 0.4, jax.random.key(0))["image"]
  weight, row = np.asarray(mixed["mix_weight"]), np.asarray(mixed["mix_row"])
  assert mixed["pixels"].dtype == np.uint8
  pixels = batch["image"]["pixels"].astype(np.float64)
  want = weight[:, None, None, None] * pixels + (1 - weight[:, None, None, None]) * pixels[row]
  assert np.abs(want - np.asarray(mixed["pixels"], np.float64)).max() <= 0.51
  assert (weight[~batch["valid"][row]] == 1).all()
  assert ((weight >= 0) & (weight <= 1)).all() and len(np.unique(weight)) > BATCH // 2


def test_mixup_in_training_is_the_same_with_microbatches(reference):
  params, _ = reference
  results = []
  for n in (1, 4):
    step = make_step("train.mixup=0.3", f"train.microbatches={n}", devices=2)
    state = step.with_params(step.init(0), params)
    results.append(step.train(state, multihost.to_device(make_batch(), step.mesh))[1])
  np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-5)
  np.testing.assert_allclose(results[0]["grad_norm"], results[1]["grad_norm"], rtol=1e-4)


def test_the_scale_is_stored_within_its_limit():
  """However far an update would move it; what is read from the parameters is what is used."""
  limit = np.float32(np.log(20.0))
  step = make_step(
    "model.scale_max=20.0",
    "optimizer.lr=5.0",
    "optimizer.clip=0.0",
    "schedule.warmup=0",
    "train.ema=0.5",
    devices=1,
  )
  above = jax.tree.map(np.asarray, step.init(0).params) | dict(log_scale=np.float32(6.49))
  state = step.with_params(step.init(0), above)
  assert state.params["log_scale"] == state.ema["log_scale"] == limit  # a checkpoint of before
  seen = set()
  for _ in range(3):
    state, metrics = step.train(state, multihost.to_device(make_batch(), step.mesh))
    assert state.params["log_scale"] <= limit and state.ema["log_scale"] <= limit
    np.testing.assert_allclose(
      step.model.apply({"params": state.params}, method="temperature")[0],
      np.exp(state.params["log_scale"]),
      rtol=1e-6,
    )
    seen.add(float(state.params["log_scale"]))
  assert len(seen) > 1 or limit not in seen  # it moves


def test_flops_are_those_of_what_is_differentiated():
  """Three times the forward pass where all is trained, but for products with pixels and with the
  weights of a mean, which nothing is differentiated by; once for frozen towers."""
  step = make_step(devices=1)
  of = {}
  for modality in ("image", "text"):
    batch = {modality: step.batch_spec[modality]}

    def apply(params, batch, modality=modality):
      return step.model.apply({"params": params}, modality, batch, method="embedding")

    of[modality] = step.in_mesh(count_flops)(apply, step.params_spec, batch)
  pairs = 2 * BATCH**2 * 32
  patches, mean = 2 * BATCH * 4 * (4 * 4 * 3) * 32, 2 * BATCH * 4 * 32
  assert step.flops_per_step() == 3 * (of["image"] + of["text"] + pairs) - patches - mean
  frozen = make_step("optimizer.rates=(('image.*', 0.0),)", devices=1)
  assert frozen.flops_per_step() == of["image"] + 3 * of["text"] + 2 * pairs
