"""Sensor series -> float32 [length, channels] and which steps are real. NumPy, no JAX.

`SeriesTransform(config.data.series)` is what the pipeline calls. What is longer than `length` keeps
its beginning; a step with a value that is no number (a sensor that was silent) is zeros and masked.
Where data.series.mean and std are given, values are standardised by them, channel by channel.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.image import Unreadable

MAX_STEPS = 100_000_000
_NPY = b"\x93NUMPY"


class SeriesTransform:
  """The series transform of a config: `transform(values [t, C]) -> (values float32 [T, C], mask
  bool [T])`.

  One channel may also come as [t]. Raises Unreadable.
  """

  def __init__(self, config):
    self.length, self.channels = int(config.length), int(config.channels)
    self.mean = _of_channels(config, "mean", 0.0)
    self.std = _of_channels(config, "std", 1.0)

  def __call__(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = as_series(values)
    if values.shape[1] != self.channels:
      raise Unreadable(
        f"a series of {values.shape[1]} channels; data.series.channels is {self.channels}"
      )
    values = values[: self.length]
    real = np.isfinite(values).all(1)
    if not real.any():
      raise Unreadable("a series without one step of numbers")
    out, mask = np.zeros((self.length, self.channels), np.float32), np.zeros(self.length, bool)
    scaled = (values - self.mean) / self.std
    out[: len(values)], mask[: len(values)] = np.where(real[:, None], scaled, 0), real
    return out, mask


def as_series(values: Any) -> np.ndarray:
  """Numbers [t, C], or [t] of one channel, as float32 [t, C]. Raises Unreadable."""
  try:
    values = np.asarray(values, np.float32)
  except (TypeError, ValueError) as error:
    raise Unreadable("a series that is not numbers") from error
  if values.ndim == 1:
    values = values[:, None]
  if values.ndim != 2 or not values.size:
    raise Unreadable(
      "a series of zero length"
      if values.ndim == 2
      else f"a series of shape {values.shape}, not [steps, channels]"
    )
  if len(values) > MAX_STEPS:
    raise Unreadable(f"a series of {len(values)} steps; the limit is {MAX_STEPS}")
  return values


def read_series(data: bytes) -> np.ndarray:
  """float32 [t, C] of a .npy file [t, C] or [t], or of a text: a step a line, channels between
  commas, semicolons, tabs or spaces, with or without a line of names. A blank cell is NaN. Raises
  Unreadable.
  """
  if data.startswith(_NPY):
    try:
      return as_series(_read_npy(data))
    except (ValueError, EOFError, OSError) as error:
      raise Unreadable(f"not a readable .npy file ({error!s:.100})") from error
  try:
    lines = data.decode("utf-8-sig").splitlines()
  except UnicodeError as error:
    raise Unreadable("neither a .npy file nor a text of numbers") from error
  steps: list[list[float]] = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    step = _numbers(line)
    if step is None and not steps and number == 1:
      continue  # the names of the channels
    if step is None:
      raise Unreadable(f"line {number} holds what is no number: {line.strip()!r:.60}")
    if steps and len(step) != len(steps[0]):
      raise Unreadable(f"line {number} has {len(step)} numbers, but the first {len(steps[0])}")
    steps.append(step)
  if not steps:
    raise Unreadable("a series of zero length")
  return as_series(steps)


def _read_npy(data: bytes) -> np.ndarray:
  """The array of a .npy file that holds as much as its header says. Raises ValueError."""
  file = io.BytesIO(data)
  version = np.lib.format.read_magic(file)
  header = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
  shape, _, dtype = getattr(np.lib.format, header)(file)
  if math.prod(shape) * dtype.itemsize > len(data):
    raise ValueError(f"its header says {shape} of {dtype}, which it is too short for")
  if dtype.kind not in "biuf":
    raise ValueError(f"it holds {dtype}, not numbers")
  return np.load(io.BytesIO(data), allow_pickle=False)


def looks_like_series(start: str) -> bool:
  """Whether a text that begins so holds numbers, at most below a line of names."""
  lines = [line for line in start.splitlines() if line.strip()][:3]
  numbers = [_numbers(line) for line in lines]
  return bool(numbers) and numbers[-1] is not None and all(one is not None for one in numbers[1:])


def inline_series(values: Any) -> str:
  """The numbers of a series that stand in a table itself, as a data: URL of a .npy file. Raises
  Unreadable.
  """
  out = io.BytesIO()
  np.save(out, as_series(values))
  return f"data:application/x-npy;base64,{base64.b64encode(out.getvalue()).decode()}"


def _numbers(line: str) -> list[float] | None:
  """The numbers of a line, NaN of a blank cell; None: a cell is no number, or all are blank."""
  delimiter = next((one for one in "\t;," if one in line), None)
  cells = line.strip(" \r\n").split(delimiter)
  try:
    step = [float(cell) if cell.strip() else math.nan for cell in cells]
  except ValueError:
    return None
  return step if not all(map(math.isnan, step)) or "nan" in line.lower() else None


def _of_channels(config, name: str, neutral: float) -> np.ndarray:
  """float32 [C] of data.series.mean or std; `neutral` where it is (). Raises UserError: it has not
  one number a channel."""
  given = tuple(config.get(name) or ())
  if given and len(given) != config.channels:
    raise UserError(
      f"data.series.{name} has {len(given)} numbers, but data.series.channels is "
      f"{config.channels}. Give one for each, or () for none"
    )
  return np.array(given or (neutral,) * config.channels, np.float32)
