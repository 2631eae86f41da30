"""The linear probe against scikit-learn's ridge, and its choice of regularisation."""

from __future__ import annotations

import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.evaluation.linear_probe import choose, part_of, ridge
from tests.evaluation.fakes import Data, evaluation


def problem(count, seed, noise=0.6):
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(9).normal(size=(3, 6))
  labels = rng.integers(0, 3, count)
  return (centres[labels] + noise * rng.normal(size=(count, 6))).astype(np.float32), labels


def test_ridge_equals_scikit_learn():
  linear_model = pytest.importorskip("sklearn.linear_model")
  x, y = problem(80, 0)
  for strength, (weights, bias) in zip((1e-3, 1.0), ridge(x, y, 3, (1e-3, 1.0)), strict=True):
    alpha = strength * np.square(x - x.mean(0, dtype=np.float64)).sum() / x.shape[1]
    reference = linear_model.Ridge(alpha=alpha).fit(
      x.astype(np.float64), 2.0 * (y[:, None] == np.arange(3)) - 1
    )
    np.testing.assert_allclose(weights.T, reference.coef_, atol=1e-8)
    np.testing.assert_allclose(bias, reference.intercept_, atol=1e-8)


def test_probe_reads_separable_classes_and_maps_labels_by_name():
  x, y = problem(90, 1, 0.2)
  x_test, y_test = problem(40, 2, 0.2)
  names = ("a", "b", "c")
  train = Data(x, batch_size=8, labels=y, label_names=names, valid=np.arange(90) != 5)
  swapped = np.array([2, 1, 0])  # the test split lists its labels in another order
  test = Data(x_test, batch_size=8, labels=swapped[y_test], label_names=names[::-1])

  def run(devices):
    return evaluation(
      {"p": dict(kind="linear_probe", source="s", split="test")},
      dict(train=train, test=test),
      devices,
    ).run(1.0)["p"]

  metrics = run(8).metrics
  assert (
    metrics["accuracy"] == 1.0 and metrics["train_examples"] == 89 and metrics["unreadable"] == 1
  )
  assert run(1).metrics == metrics


def test_noise_asks_for_more_regularisation_and_ties_take_the_strongest():
  x, y = problem(40, 3, 0.1)
  assert choose(x, y, x, y, 3, (1e-6, 1e-4, 1e-2)) == 1e-2
  rng = np.random.default_rng(0)
  wide = rng.normal(size=(60, 50)).astype(np.float32)
  labels = (wide[:, 0] > 0).astype(int)
  held = rng.normal(size=(400, 50)).astype(np.float32)
  assert choose(wide, labels, held, (held[:, 0] > 0).astype(int), 2, (1e-8, 1.0)) == 1.0


def test_equal_pictures_stay_on_one_side_whatever_the_order():
  keys = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)
  part = part_of(keys)
  assert 0.15 < part.mean() < 0.25
  np.testing.assert_array_equal(part_of(keys[::-1]), part[::-1])
  assert (part_of(np.concatenate([keys, keys])) == np.concatenate([part, part])).all()


def test_fitting_on_the_tested_split_is_refused():
  with pytest.raises(UserError, match="both 'test'"):
    evaluation(
      {"p": dict(kind="linear_probe", source="s", split="test", train_split="test")},
      Data(np.eye(3)),
    ).run(1.0)
  with pytest.raises(UserError, match="grid"):
    evaluation({"p": dict(kind="linear_probe", source="s", grid=(-1.0,))}, Data(np.eye(3))).run(1.0)
