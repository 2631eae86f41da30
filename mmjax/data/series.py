"""Sensor series -> float32 [length, channels] and which steps are real. NumPy, no JAX.

`SeriesTransform(config.data.series)` is what the pipeline calls. What is longer than `length` keeps
its beginning; a step with a value that is no number (a sensor that was silent) is zeros and masked.
"""

from __future__ import annotations

import numpy as np

from mmjax.data.image import Unreadable

MAX_STEPS = 100_000_000


class SeriesTransform:
  """The series transform of a config: `transform(values [t, C]) -> (values float32 [T, C], mask
  bool [T])`.

  One channel may also come as [t]. Raises Unreadable.
  """

  def __init__(self, config):
    self.length, self.channels = int(config.length), int(config.channels)

  def __call__(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
      values = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
      raise Unreadable("a series that is not numbers") from error
    if values.ndim == 1:
      values = values[:, None]
    if values.ndim != 2 or not len(values):
      raise Unreadable(
        "a series of zero length"
        if values.ndim == 2
        else f"a series of shape {values.shape}, not [steps, channels]"
      )
    if values.shape[1] != self.channels:
      raise Unreadable(
        f"a series of {values.shape[1]} channels; data.series.channels is {self.channels}"
      )
    if len(values) > MAX_STEPS:
      raise Unreadable(f"a series of {len(values)} steps; the limit is {MAX_STEPS}")
    values = values[: self.length]
    real = np.isfinite(values).all(1)
    if not real.any():
      raise Unreadable("a series without one step of numbers")
    out, mask = np.zeros((self.length, self.channels), np.float32), np.zeros(self.length, bool)
    out[: len(values)], mask[: len(values)] = np.where(real[:, None], values, 0), real
    return out, mask
