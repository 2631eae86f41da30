"""Sensor series: cut, padded, masked, refused."""

from __future__ import annotations

import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax.data.image import Unreadable
from mmjax.data.series import SeriesTransform

RUN = SeriesTransform(ConfigDict(dict(length=6, channels=2)))
VALUES = np.random.default_rng(0).standard_normal((9, 2)).astype(np.float32)


def test_short_ones_are_padded_and_long_ones_cut():
  values, mask = RUN(VALUES[:4])
  assert (
    values.dtype == np.float32
    and values.shape == (6, 2)
    and mask.tolist() == [True] * 4 + [False] * 2
  )
  np.testing.assert_array_equal(values[:4], VALUES[:4])
  assert not values[4:].any()
  values, mask = RUN(VALUES.astype(np.float64))
  np.testing.assert_array_equal(values, VALUES[:6])
  assert mask.all()
  assert SeriesTransform(ConfigDict(dict(length=3, channels=1)))(np.arange(2))[0].tolist() == [
    [0],
    [1],
    [0],
  ]


def test_steps_without_numbers_are_masked():
  broken = VALUES[:6].copy()
  broken[1, 0], broken[3, 1] = np.nan, np.inf
  values, mask = RUN(broken)
  assert (
    mask.tolist() == [True, False, True, False, True, True]
    and np.isfinite(values).all()
    and not values[1].any()
  )


@pytest.mark.parametrize(
  "values, message",
  (
    (np.zeros((0, 2)), "zero length"),
    (np.zeros((4, 3)), "3 channels; data.series.channels is 2"),
    (np.full((4, 2), np.nan), "without one step"),
    (np.zeros((2, 2, 2)), "shape"),
    (["a", "b"], "not numbers"),
  ),
)
def test_what_cannot_be_used_is_one_clear_line(values, message):
  with pytest.raises(Unreadable, match=message) as error:
    RUN(values)
  assert "\n" not in str(error.value)
