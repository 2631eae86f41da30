"""Classification metrics against scikit-learn and against sums written out."""

import numpy as np
import pytest
from sklearn.metrics import (
  average_precision_score,
  f1_score,
  mean_absolute_error,
  precision_recall_fscore_support,
  r2_score,
  roc_auc_score,
  root_mean_squared_error,
  top_k_accuracy_score,
)

from mmjax.config import UserError
from mmjax.evaluation.metrics.classification import (
  accuracy,
  average_precision,
  best_threshold,
  expected_calibration_error,
  mean_average_precision,
  per_class,
  reliability,
  roc_auc,
  softmax,
)
from mmjax.evaluation.metrics.regression import errors

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(200, 5)) * 2, RNG.integers(0, 5, 200)


def test_accuracy_leaves_out_rows_without_a_label():
  assert accuracy(LOGITS, LABELS) == pytest.approx((LOGITS.argmax(1) == LABELS).mean())
  assert accuracy(LOGITS, LABELS, top=2) == pytest.approx(top_k_accuracy_score(LABELS, LOGITS, k=2))
  padded = np.where(np.arange(200) < 50, LABELS, -1)
  assert accuracy(LOGITS, padded) == accuracy(LOGITS[:50], LABELS[:50])
  with pytest.raises(UserError, match="no row has a label"):
    accuracy(LOGITS, np.full(200, -1))
  with pytest.raises(UserError, match="logits"):
    accuracy(LOGITS, LABELS[:3])


@pytest.mark.parametrize("decimals", [6, 0])  # 0: many equal scores
def test_average_precision_equals_scikit_learn(decimals):
  scores, labels = RNG.normal(size=(60, 4)).round(decimals), RNG.random((60, 4)) > 0.8
  labels[:, 3] = False
  want = [average_precision_score(labels[:, c], scores[:, c]) for c in range(3)]
  assert mean_average_precision(scores, labels) == pytest.approx(np.mean(want))
  assert average_precision(scores[:, 0], labels[:, 0]) == pytest.approx(want[0])
  with pytest.raises(UserError, match="positive"):
    mean_average_precision(scores, labels & False)


def test_calibration_error_equals_the_sum_over_bins():
  chances = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
  confidence, correct = chances.max(1), chances.argmax(1) == LABELS
  want = 0.0
  for low in np.arange(10) / 10:
    here = (confidence > low) & (confidence <= low + 0.1)
    if here.any():
      want += here.mean() * abs(correct[here].mean() - confidence[here].mean())
  assert expected_calibration_error(LOGITS, LABELS, bins=10) == pytest.approx(want)
  assert expected_calibration_error(
    np.array([[99.0, 0], [0, 99.0]]), np.array([0, 1])
  ) == pytest.approx(0)


@pytest.mark.parametrize("decimals", [6, 0])  # 0: many equal scores
def test_the_area_under_the_curve_equals_scikit_learn(decimals):
  scores, positives = RNG.normal(size=100).round(decimals), RNG.random(100) > 0.7
  assert roc_auc(scores, positives) == pytest.approx(roc_auc_score(positives, scores))
  assert roc_auc(np.zeros(100), positives) == 0.5
  with pytest.raises(UserError, match="a positive and a negative"):
    roc_auc(scores, positives | True)


def test_scores_of_classes_equal_scikit_learn():
  predicted, classes = LOGITS.argmax(1) % 4, np.eye(5, dtype=bool)  # class 4 is never said
  found = per_class(classes[predicted], classes[LABELS])
  want = precision_recall_fscore_support(LABELS, predicted, labels=range(5), zero_division=0)
  for ours, theirs in zip(found, want, strict=True):
    np.testing.assert_allclose(ours, theirs)


@pytest.mark.parametrize("decimals", [6, 1])
def test_no_threshold_has_a_higher_f1(decimals):
  scores, positives = RNG.normal(size=80).round(decimals), RNG.random(80) > 0.7
  ours = f1_score(positives, scores >= best_threshold(scores, positives))
  assert ours == max(f1_score(positives, scores >= t) for t in scores)


def test_the_bins_of_reliability_make_up_the_calibration_error():
  shares = softmax(LOGITS)
  bins = reliability(shares.max(1), shares.argmax(1) == LABELS, bins=15)
  error = sum(count * abs(correct - sure) for sure, correct, count in bins) / 200
  assert error == pytest.approx(expected_calibration_error(LOGITS, LABELS))


def test_errors_of_values_equal_scikit_learn():
  true = RNG.normal(size=50)
  predicted = true + RNG.normal(size=50)
  want = (
    mean_absolute_error(true, predicted),
    root_mean_squared_error(true, predicted),
    r2_score(true, predicted),
    50,
  )
  assert errors(predicted, true) == pytest.approx(want)
  gaps = np.append(true, np.nan)
  assert errors(np.append(predicted, 9.0), gaps) == pytest.approx(want), "no value, no error"
  with pytest.raises(UserError, match="no row has a value"):
    errors(predicted, predicted * np.nan)
