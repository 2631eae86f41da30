"""Classification metrics against scikit-learn and against sums written out."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from mmjax.config import UserError
from mmjax.evaluation.metrics.classification import (
  accuracy,
  average_precision,
  expected_calibration_error,
  mean_average_precision,
)

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
