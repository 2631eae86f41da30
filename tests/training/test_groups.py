"""Objectives that need more than one optimizer, or a teacher: disjoint groups, exact gradients, the
same on any mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.objectives import objective
from mmjax.parallel import multihost
from mmjax.state import checkpoint
from mmjax.state.checkpointer import Checkpointer
from mmjax.state.paths import by_name
from tests.training.test_step import assert_close, gradients, make_batch, make_config, make_step, on

PLAY = (
  "model.discriminator=16",
  "optimizers.adversary.params='discriminator/.*'",
  "optimizers.adversary.lr=0.02",
  "optimizers.adversary.clip=0.0",
  "schedule.warmup=0",
)
FOOL = dict(align=dict(kind="contrastive"), fool=dict(kind="modality_adversary", weight=0.1))


def adversarial(*overrides, devices=1, objectives=FOOL):
  return make_step(*PLAY, *overrides, devices=devices, **objectives)


@pytest.fixture(scope="module")
def player():
  step = adversarial()
  return step, jax.tree.map(np.asarray, step.init(3).params)


def log_softmax(x):
  return (
    x
    - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    - x.max(-1, keepdims=True)
  )


def test_the_game_is_a_gradient_reversal(player):
  """By hand: the discriminator descends the cross-entropy, the embeddings climb it by `weight`."""
  step, params = player
  batch = make_batch()
  x = [
    np.asarray(step.model.apply({"params": params}, m, batch, method="embedding"), np.float64)
    for m in ("image", "text")
  ]
  d = jax.tree.map(lambda p: np.asarray(p, np.float64), params["discriminator"])
  valid = np.tile(batch["valid"], 2)
  x, target = np.concatenate(x), np.repeat(np.eye(2), len(batch["valid"]), axis=0)
  inputs = x * np.sqrt(x.shape[1])
  hidden = inputs @ d["hidden"]["kernel"] + d["hidden"]["bias"]
  logits = np.maximum(hidden, 0) @ d["out"]["kernel"] + d["out"]["bias"]
  dlogits = (np.exp(log_softmax(logits)) - target) * valid[:, None] / valid.sum()
  into = (dlogits @ d["out"]["kernel"].T) * (hidden > 0)
  want = {
    "hidden": {"kernel": inputs.T @ into, "bias": into.sum(0)},
    "out": {"kernel": np.maximum(hidden, 0).T @ dlogits, "bias": dlogits.sum(0)},
  }
  alone = adversarial(objectives=dict(fool=FOOL["fool"]))
  _, got, sums = gradients(alone, on(alone, params), batch)
  assert_close(got["discriminator"], want)
  entropy = -(log_softmax(logits) * target).sum(-1) @ valid / valid.sum()
  np.testing.assert_allclose(
    sums["fool"]["opponent"][0] / sums["fool"]["opponent"][1], entropy, rtol=1e-5
  )
  # The encoders: minus the weight times the derivative of the cross-entropy, through the
  # embeddings.
  slopes = -0.1 * into @ d["hidden"]["kernel"].T * np.sqrt(x.shape[1])

  def pulled(p):
    y = jnp.concatenate(
      [step.model.apply({"params": p}, m, batch, method="embedding") for m in ("image", "text")]
    )
    return (y * slopes).sum()

  expected = jax.jit(jax.grad(pulled))(params)
  assert_close(
    {k: got[k] for k in ("image", "text")}, {k: expected[k] for k in ("image", "text")}, 1e-4
  )


@pytest.fixture(scope="module")
def whole(player):
  """(loss, gradients) of the batch at once on one device."""
  step, params = player
  return gradients(step, on(step, params), make_batch())[:2]


def test_the_game_is_the_same_on_any_mesh_and_in_microbatches(player, whole):
  _, params = player
  other = adversarial(
    "train.microbatches=4", "mesh.data=1", "mesh.fsdp=8", "sharding=fsdp", devices=8
  )
  assert_close(gradients(other, on(other, params), make_batch())[:2], whole)


def test_each_group_has_its_own_optimizer_and_state(player, whole):
  """One step: each group moves as AdamW at its own rate would move it alone, and keeps moments of
  its own parameters only.
  """
  step, params = player
  state = step.with_params(step.init(0), params)
  assert set(state.opt_states) == {"main", "adversary"}
  slopes = whole[1]
  after, metrics = step.train(state, multihost.to_device(make_batch(), step.mesh))
  moved = by_name(jax.tree.map(lambda a, b: np.asarray(a) - b, after.params, params))
  slopes = by_name(slopes)
  norm = np.sqrt(
    sum(
      (np.asarray(g) ** 2).sum()
      for name, g in slopes.items()
      if not name.startswith("discriminator/")
    )
  )
  for name, change in moved.items():
    rate, scale = (0.02, 1.0) if name.startswith("discriminator/") else (1e-3, min(1.0, 1.0 / norm))
    g = np.asarray(slopes[name]) * scale
    np.testing.assert_allclose(
      change, -rate * g / (np.abs(g) + 1e-8), rtol=1e-2, atol=rate * 1e-3, err_msg=name
    )

  def owned(group):
    return {name.split("mu/")[1] for name in by_name(after.opt_states[group]) if "mu/" in name}

  assert owned("adversary") == {n for n in moved if n.startswith("discriminator/")} and owned(
    "main"
  ) == set(moved) - owned("adversary")
  assert float(metrics["adversary/lr"]) == np.float32(0.02) and float(metrics["lr"]) == np.float32(
    1e-3
  )


def test_the_state_is_saved_and_restored(player, tmp_path):
  step, params = player
  state, _ = step.train(
    step.with_params(step.init(0), params), multihost.to_device(make_batch(), step.mesh)
  )
  saver = Checkpointer(str(tmp_path), step.config, steps=10)
  saver.save(1, state, config=step.config, force=True)
  saver.wait()
  restored, _, at = saver.restore(step.state_spec)
  saver.close()
  assert at == 1 and set(restored.opt_states) == {"main", "adversary"}
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  batch = multihost.to_device(make_batch(1), step.mesh)
  jax.tree.map(
    np.testing.assert_array_equal, step.train(restored, batch)[1], step.train(state, batch)[1]
  )


@pytest.mark.parametrize(
  "override, words",
  [
    (
      "optimizers.adversary.params='discriminatr/.*'",
      ["optimizers.adversary.params", "matches no parameter", "discriminator/"],
    ),
    ("optimizers.adversary.params='.*'", ["optimizers", "every parameter"]),
    (
      "optimizers.other.params='.*/hidden/.*'",
      ["optimizers.adversary.params", "optimizers.other.params", "disjoint"],
    ),
    ("objectives.fool.group='advresary'", ["objectives.fool.group", "adversary"]),
    ("optimizers.adversary.params='('", ["optimizers.adversary.params", "regular expression"]),
    ("model.discriminator=0", ["discriminator"]),
  ],
)
def test_mistakes_of_groups_are_named(override, words):
  with pytest.raises(UserError) as error:
    step = adversarial(override)
    gradients(step, step.init(0).params, make_batch())
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
    error.value
  )


# -- Teachers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
  """(folder of a teacher of another width, its parameters, its model)."""
  folder = str(tmp_path_factory.mktemp("teacher") / "import")
  teacher = make_step("model.width=16", devices=1)
  params = jax.tree.map(np.asarray, teacher.init(7).params)
  checkpoint.save_import(folder, params, teacher.config, {})
  return folder, params, teacher.model


def student_program(folder, *overrides, devices=1, **objectives):
  return make_step(
    *overrides,
    devices=devices,
    **(objectives or dict(distil=dict(kind="similarity_distillation", teacher=folder))),
  )


def learns(folder, *overrides, devices=1):
  """A pupil of the teacher's width with both kinds of embedding distillation."""
  return student_program(
    folder,
    "model.width=16",
    *overrides,
    devices=devices,
    also=dict(kind="similarity_distillation", teacher=folder),
    distil=dict(
      kind="embedding_distillation", teacher=folder, modalities=("image", "text"), weight=0.5
    ),
  )


def student_gradients(step, params):
  def function(params, batch, distilled):
    return step.step.gradients(params, {}, batch, jax.random.key(0), step.objectives, distilled)[:2]

  return step.in_mesh(jax.jit(function))(
    on(step, params), multihost.to_device(make_batch(), step.mesh), step.teachers_variables
  )


@pytest.fixture(scope="module")
def student(distilled):
  """(a pupil's step, its parameters, loss and gradients on one device)."""
  step = learns(distilled[0])
  params = jax.tree.map(np.asarray, step.init(3).params)
  return step, params, student_gradients(step, params)


def test_distillation_equals_torch(distilled, student):
  torch = pytest.importorskip("torch")
  (_, theirs, model), (step, params, (loss, _)), batch = distilled, student, make_batch()

  def look(model, params):
    x, y = (
      torch.tensor(np.asarray(model.apply({"params": params}, m, batch, method="embedding")))
      for m in ("image", "text")
    )
    rows = torch.tensor(batch["valid"])
    return x[rows], y[rows], float(np.exp(params["log_scale"])) * (x[rows] @ y[rows].T)

  (x, y, mine), (their_x, their_y, aim) = look(step.model, params), look(model, theirs)

  def kl(a, b):
    return torch.nn.functional.kl_div(
      a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean"
    )

  cosine = torch.nn.functional.cosine_similarity(
    torch.cat([x, y]), torch.cat([their_x, their_y])
  ).mean()
  want = (kl(mine, aim) + kl(mine.T, aim.T)) / 2 + 0.5 * (1 - cosine)
  np.testing.assert_allclose(loss, float(want), rtol=1e-4)


def test_distillation_is_the_same_on_devices_and_in_microbatches(distilled, student):
  step = learns(
    distilled[0], "train.microbatches=4", "mesh.data=1", "mesh.fsdp=8", "sharding=fsdp", devices=8
  )
  assert_close(student_gradients(step, student[1]), student[2])


def test_a_teacher_is_no_part_of_the_state_and_learning_from_oneself_is_done(distilled, student):
  """A pupil with the teacher's parameters agrees with it; a train step leaves the teacher as it
  is.
  """
  (folder, theirs, _), step = distilled, student[0]
  state, metrics = step.train(
    step.with_params(step.init(3), theirs), multihost.to_device(make_batch(), step.mesh)
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.map(np.asarray, step.teachers_variables[folder]["params"]),
    theirs,
  )
  assert (
    jax.tree.structure(state.params) == jax.tree.structure(theirs) and float(metrics["loss"]) < 1e-3
  )
  assert float(metrics["distil/cosine"]) > 0.999 and float(metrics["also/agreement"]) > 0.9


@pytest.mark.parametrize(
  "override, words",
  [
    ("data.image.size=16", ["data.image.size", "8", "16"]),
    ("data.text.lowercase=True", ["data.text.lowercase"]),
    ("data.text.length=7", ["data.text.length", "6"]),
  ],
)
def test_a_teacher_of_other_inputs_is_refused(distilled, override, words):
  with pytest.raises(UserError) as error:
    student_program(distilled[0], override).teachers  # noqa: B018
  assert distilled[0] in str(error.value) and all(word in str(error.value) for word in words), (
    error.value
  )


def test_a_missing_teacher_and_other_widths_are_named(distilled, tmp_path):
  with pytest.raises(UserError, match="no checkpoint here"):
    student_program(str(tmp_path / "none")).teachers  # noqa: B018
  step = student_program(
    distilled[0], distil=dict(kind="embedding_distillation", teacher=distilled[0])
  )
  with pytest.raises(UserError, match="model.width"):
    step.lower()


@objective(couples_examples=False)
def ask(forward, batch, rng, *, teacher: str):
  x = forward.teacher(teacher, "embedding", "audio")
  return {"loss": (x.sum(), jnp.ones(()))}


def test_a_teacher_without_a_modality_says_so(distilled):
  with pytest.raises(UserError, match="no encoder for 'audio'") as error:
    student_program(distilled[0], distil=dict(kind=f"{__name__}:ask", teacher=distilled[0])).lower()
  assert distilled[0] in str(error.value)


def test_old_configs_have_one_group():
  config = make_config()
  assert config.optimizers.to_dict() == {}
  tree = config.to_dict()
  del tree["optimizers"]
  assert configs.changed_on_resume(configs.resolve(tree), config) == []
  assert set(make_step(devices=1).state_spec.opt_states) == {"main"}
