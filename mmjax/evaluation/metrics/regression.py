"""How far predicted values are off. Values that are NaN do not count."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmjax.config import UserError

Array = np.ndarray


class Errors(NamedTuple):
  """mae: mean absolute error; rmse: root of the mean squared error; r2: 1 - squared error / squared
  difference to the mean (NaN where all are equal); examples: that count.
  """

  mae: float
  rmse: float
  r2: float
  examples: int


def errors(predicted: Array, true: Array) -> Errors:
  """Of float [N] each. Raises UserError: no value is there."""
  predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
  known = np.isfinite(true)
  if not known.any():
    raise UserError("no row has a value, so that there is nothing to measure")
  off, true = (predicted - true)[known], true[known]
  squares, spread = np.square(off).sum(), np.square(true - true.mean()).sum()
  r2 = float(1 - squares / spread) if spread else float("nan")
  return Errors(float(np.abs(off).mean()), float(np.sqrt(squares / len(off))), r2, len(off))
