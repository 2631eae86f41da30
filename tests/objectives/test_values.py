"""Regression and ordinal losses against PyTorch and the formulas of the papers; that they are the
same however a batch is cut and placed; and what a run fills in from its data.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mmjax.config as configs
from mmjax.config import ConfigError, UserError
from mmjax.data.statistics import Statistics
from mmjax.models.ordinal import OrdinalHead
from mmjax.objectives.ordinal import ordinal
from mmjax.objectives.regression import regression
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.program import Program
from mmjax.training.statistics import with_statistics

ROWS, VALUES, CLASSES = 16, 2, 4
MEAN, STD = (10.0, -3.0), (2.0, 0.5)


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  value = rng.normal(MEAN, STD, (ROWS, VALUES)).astype(np.float32)
  value[rng.random(value.shape) < 0.2] = np.nan
  return dict(
    image=dict(
      pixels=rng.integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8),
      key=rng.integers(0, 9, (ROWS, 2)).astype(np.uint32),
      present=rng.random(ROWS) > 0.2,
    ),
    series=dict(
      values=rng.normal(size=(ROWS, 8, 2)).astype(np.float32), mask=np.ones((ROWS, 8), bool)
    ),
    value=value,
    label=rng.integers(-1, CLASSES, ROWS).astype(np.int32),
    valid=rng.random(ROWS) > 0.2,
  )


@pytest.mark.parametrize(
  ("loss", "reference"),
  [
    ("l2", torch.nn.functional.mse_loss),
    ("l1", torch.nn.functional.l1_loss),
    ("huber", torch.nn.functional.huber_loss),
  ],
)
def test_regression_losses_are_those_of_pytorch(loss, reference):
  batch = make_batch()
  out = np.random.default_rng(1).normal(0, 2, (ROWS, VALUES)).astype(np.float32)
  delta = dict(delta=0.7) if loss == "huber" else {}
  got = regression(lambda *_: jnp.asarray(out), batch, None, loss=loss, mean=MEAN, std=STD, **delta)
  counts = (batch["valid"] & batch["image"]["present"])[:, None] & ~np.isnan(batch["value"])
  target = (batch["value"].astype(np.float64) - MEAN) / STD
  want = reference(
    torch.from_numpy(out[counts]).double(), torch.from_numpy(target[counts]), **delta
  )
  assert float(got["loss"][1]) == counts.sum()
  np.testing.assert_allclose(float(got["loss"][0]) / counts.sum(), float(want), rtol=1e-5)
  off = np.abs(out * STD + MEAN - batch["value"])[counts].mean()
  np.testing.assert_allclose(float(got["mae"][0] / got["mae"][1]), off, rtol=1e-5)


@pytest.fixture(scope="module")
def head():
  """(log-probabilities float32 [ROWS, CLASSES], the scores, the thresholds) of an ordinal head."""
  module = OrdinalHead(CLASSES)
  x = jax.random.normal(jax.random.key(0), (ROWS, 6)) * 3
  variables = module.init(jax.random.key(1), x)
  params = nn.unbox(variables)["params"]
  scores = np.asarray(x, np.float64) @ np.asarray(params["score"]["kernel"], np.float64)
  scores = scores + np.asarray(params["score"]["bias"], np.float64)
  steps = np.log1p(np.exp(np.asarray(params["steps"], np.float64)))
  thresholds = float(params["first"]) + np.concatenate([[0.0], np.cumsum(steps)])
  return np.asarray(module.apply(variables, x)), scores, thresholds


def test_an_ordinal_head_is_a_cumulative_link_model(head):
  log_shares, scores, thresholds = head
  above = 1 / (1 + np.exp(-(scores - thresholds)))
  bounds = np.concatenate([np.ones((ROWS, 1)), above, np.zeros((ROWS, 1))], axis=1)
  np.testing.assert_allclose(np.exp(log_shares), bounds[:, :-1] - bounds[:, 1:], atol=1e-6)
  far = OrdinalHead(3)
  x = jnp.array([[300.0], [-300.0]])
  extreme = far.apply(far.init(jax.random.key(0), x), x)
  assert np.isfinite(extreme).all(), "no class has probability 0, however far the score is off"


def test_ordinal_losses_are_those_of_the_papers(head):
  log_shares, scores, thresholds = head
  batch = make_batch()
  counts = batch["valid"] & batch["image"]["present"] & (batch["label"] >= 0)
  weights = (1.0, 2.0, 0.5, 3.0)
  label = batch["label"]
  levels = torch.from_numpy((label[:, None] > np.arange(CLASSES - 1)).astype(np.float64))
  coral = torch.nn.functional.binary_cross_entropy_with_logits(
    torch.from_numpy(scores - thresholds), levels, reduction="none"
  ).sum(1)
  likelihood = -log_shares[np.arange(ROWS), np.maximum(label, 0)]
  weight = np.where(counts, np.array(weights)[np.maximum(label, 0)], 0)
  for loss, each in (("coral", coral.numpy()), ("likelihood", likelihood)):
    got = ordinal(lambda *_: jnp.asarray(log_shares), batch, None, loss=loss, class_weights=weights)
    np.testing.assert_allclose(
      got["loss"], ((weight * each).sum(), weight.sum()), rtol=1e-4, err_msg=loss
    )
  off = np.abs(log_shares.argmax(1) - label)[counts]
  np.testing.assert_allclose(got["mae"], (off.sum(), counts.sum()))


def make_config(*overrides):
  c = configs.base()
  c.data.series.length, c.data.series.channels = 8, 2
  c.data.label, c.data.classes, c.data.values, c.data.missing = "label", CLASSES, VALUES, "mask"
  c.model = dict(
    name="encoder",
    width=8,
    classes=CLASSES,
    ordinal=True,
    encoders=dict(series=dict(kind="series", patch=4, depth=1, heads=2)),
  )
  both = ("series",)
  c.objectives.grade = dict(kind="ordinal", modalities=both, class_weights=(1.0, 2.0, 0.5, 3.0))
  c.objectives.size = dict(kind="regression", modalities=both, loss="huber", mean=MEAN, std=STD)
  c.train.batch_size, c.precision.compute = ROWS, "float32"
  return configs.resolve(c, overrides)


@pytest.mark.slow
def test_losses_do_not_depend_on_how_a_batch_is_cut_or_placed(devices):
  batch, found = make_batch(), []
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  in_parts = ("mesh.data=1", "mesh.fsdp=2", "sharding=fsdp", "train.microbatches=2")
  for overrides, count in (((), 1), (in_parts, 2)):
    config = make_config(*overrides)
    program = Program(config, make_mesh(config, devices[:count]), steps=10, batch_spec=spec)
    params = program.init(0).params

    def gradients(params, batch, step=program.step):
      return step.gradients(params, {}, batch, jax.random.key(0), step.objectives)[:2]

    placed = multihost.to_device(batch, program.mesh)
    found.append(program.in_mesh(jax.jit(gradients))(params, placed))
  (loss, whole), (other, parts) = found
  assert float(loss) > 0 and float(other) == pytest.approx(float(loss), rel=1e-5)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=jax.tree_util.keystr(path))


class Records(list):
  """A source of records: of labels and values."""

  labels = ("bad", "good", "odd")


def test_weights_and_scale_come_from_the_training_data():
  value = np.random.default_rng(0).normal(1e6, 3.0, (50, 2))
  value[3, 1] = np.nan
  one = Records(
    dict(label="good" if i < 40 else "bad" if i < 48 else "", value=value[i]) for i in range(50)
  )
  c = configs.base()
  c.data.label, c.data.classes, c.data.values = "label", 3, 2
  c.model = dict(name="multitask", encoders=dict(image=dict(kind="vit")))
  c.data.sources.one = dict(name="one")
  c.objectives.kind = dict(kind="classification", class_weights="balanced")
  c.objectives.size = dict(kind="regression")
  config = configs.resolve(c)
  statistics = Statistics(config, [one])
  filled = with_statistics(config, statistics)
  assert filled.objectives.kind.class_weights == (48 / 2 / 8, 48 / 2 / 40, 1.0)
  np.testing.assert_allclose(filled.objectives["size"].mean, np.nanmean(value, 0), rtol=1e-12)
  np.testing.assert_allclose(filled.objectives["size"].std, np.nanstd(value, 0), rtol=1e-6)
  assert configs.from_json(configs.to_json(filled)) == filled, "the checkpoint keeps the numbers"
  assert with_statistics(filled, statistics) == filled
  planned = with_statistics(config)
  assert planned.objectives["size"].std == (1.0, 1.0)
  with pytest.raises(UserError, match="no values for 2 of the 2"):
    with_statistics(config, Statistics(config, [Records([dict(label="good")])]))


def test_what_cannot_be_learned_is_refused_before_any_device_work():
  for override, message in (
    ("data.values=0", "objectives.size predicts values, but data.values is 0"),
    ("data.label=none", "data.label is 'none'"),
    ("data.label=labels", "needs one label a record"),
    ("objectives.grade.class_weights=(1.0, 2.0)", "has 2 numbers, but data.classes is 4"),
    ("objectives.size.delta=0.0", "above 0"),
  ):
    with pytest.raises(ConfigError, match=message):
      make_config(override)
