"""The numbers that keys and settings take: named ranges for annotations, which config.py checks and
`--docs` shows.

`depth: Depth = 12` in the signature of a kind, or `Key("train.ema", 0.0, Decay, ...)` in keys.py,
states type and range at once. Bounds from above are far beyond what anyone trains, and keep a slip
of the pen from asking for all the memory.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

INT32 = 2**31 - 1
# 1000, "5%" (of train.steps), "2 epochs", "1e6 examples".
Duration = typing.NewType("Duration", object)


class Range(NamedTuple):
  """Bounds of a number, or of each number in a tuple: `least` and `most` belong to it, `above` and
  `below` do not.

  ascending: the numbers of a tuple do not fall, as those of an interval.
  """

  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None
  ascending: bool = False

  def holds(self, value: Any) -> bool:
    """Whether a number, the number of a duration, or all numbers of a (nested) tuple lie in the
    range.
    """
    duration = re.match(r"\s*([0-9.]+(?:e[+-]?\d+)?)", value) if isinstance(value, str) else None
    numbers = [float(duration[1])] if duration else list(_numbers(value))
    return all(self._contains(number) for number in numbers) and not (
      self.ascending and numbers != sorted(numbers)
    )

  def _contains(self, number: float) -> bool:
    return (
      -math.inf < number < math.inf  # also of whole numbers that no float holds
      and (self.least is None or number >= self.least)
      and (self.most is None or number <= self.most)
      and (self.above is None or number > self.above)
      and (self.below is None or number < self.below)
    )

  def __str__(self) -> str:
    least = "" if self.least is None else f"at least {self.least:g}"
    most = (
      "" if self.most is None or self.most >= INT32 else f"at most {self.most:,}".replace(",", "_")
    )
    above = "" if self.above is None else f"above {self.above:g}"
    below = "" if self.below is None else f"below {self.below:g}"
    text = " and ".join(filter(None, (least, above, most, below))) or "a finite number"
    return f"{text}, in ascending order" if self.ascending else text


class Function(NamedTuple):
  """Marks a setting that may name a function, "module:function": config.py asks whether it may be
  imported.
  """

  def holds(self, value: Any) -> bool:
    return True

  def __str__(self) -> str:
    return "module:function"


FunctionName = Annotated[str, Function()]


class Fields(NamedTuple):
  """Marks a setting that is a dict with the parameters of `of`, a dataclass or a function; only
  those that a config names are kept. without: parameters that stand elsewhere.
  """

  of: Any
  without: tuple[str, ...] = ()

  def __str__(self) -> str:
    """Its parameters with what they take."""
    parameters = inspect.signature(self.of, eval_str=True).parameters.items()
    taken = [
      f"{name} ({in_words(p.annotation)}{_usual(p)})"
      for name, p in parameters
      if name not in self.without
    ]
    return f"of {', '.join(taken)}"


def _usual(parameter: inspect.Parameter) -> str:
  return "" if parameter.default is inspect.Parameter.empty else f"; default {parameter.default!r}"


def is_duration(annotation: Any) -> bool:
  """Whether a setting of this annotation is a duration, with a range or without."""
  return Duration in (annotation, *typing.get_args(annotation))


def in_words(annotation: Any) -> str:
  """What a setting of this annotation takes, for people: "int, at least 1"."""
  if typing.get_origin(annotation) is Annotated:
    bare, *ranges = typing.get_args(annotation)
    return ", ".join([in_words(bare), *map(str, ranges)])
  if typing.get_origin(annotation) is typing.Literal:
    return " or ".join(map(repr, typing.get_args(annotation)))
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return " or ".join(in_words(option) for option in typing.get_args(annotation))
  if annotation is Duration:
    return "steps, '5%', '2 epochs' or '1e6 examples'"
  return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _numbers(value: Any) -> Iterator[float]:
  if isinstance(value, bool):
    return
  if isinstance(value, (int, float)):
    yield value
  elif isinstance(value, (tuple, list)):
    for part in value:
      yield from _numbers(part)


# Whole numbers
Count = Annotated[int, Range(0, INT32)]
Size = Annotated[int, Range(1, INT32)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
TokenId = Annotated[int, Range(-1, INT32)]  # -1 = the tokenizer's own
Width = Annotated[int, Range(0, 262_144)]  # channels or hidden units; 0 = by the model
Depth = Annotated[int, Range(1, 1_000)]  # blocks
Heads = Annotated[int, Range(0, 4_096)]  # 0 = width / 64
# Pixels of a picture, a frame or a patch, steps of a patch of time.
Side = Annotated[int, Range(1, 16_384)]
Length = Annotated[int, Range(1, 1_048_576)]  # tokens or time steps of a row
Vocabulary = Annotated[int, Range(1, 16_777_216)]
Batch = Annotated[int, Range(1, 16_777_216)]
Few = Annotated[int, Range(1, 1_024)]
Several = Annotated[int, Range(2, 1_024)]
Examples = Annotated[int, Range(1, 100_000)]  # on one sheet
Threads = Annotated[int, Range(1, 256)]
Processes = Annotated[int, Range(0, 256)]  # of a host
Workers = Annotated[int, Range(1, 256)]
Channels = Annotated[int, Range(1, 65_536)]
Frames = Annotated[int, Range(1, 65_536)]
Grey = Annotated[int, Range(0, 255)]
Magnitude = Annotated[int, Range(0, 10)]
Devices = Annotated[int, Range(-1, 1_048_576)]  # of a mesh axis; -1 = what is left

# Numbers
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]
Share = Annotated[float, Range(0, 1)]  # a probability, or a part of a whole
Portion = Annotated[float, Range(above=0, most=1)]  # a part of a whole, not nothing
Part = Annotated[float, Range(above=0, below=1)]  # neither nothing nor the whole
Dropout = Annotated[float, Range(0, below=1)]
Doubt = Annotated[float, Range(0, below=0.5)]  # a share of labels that are wrong
Decay = Annotated[float, Range(0, below=1)]  # of a moving average
Degrees = Annotated[float, Range(0, 180)]
Hertz = Annotated[int, Range(100, 1_000_000)]
Seconds = Annotated[float, Range(above=0, most=86_400)]
Exponent = Annotated[float, Range(-100, 100)]
Epsilon = Annotated[float, Range(above=0, most=1)]

# Several numbers
Sizes = Annotated[tuple, Range(1, INT32)]
Windows = Annotated[tuple, Range(0, INT32)]  # 0 = all that there is
TokenIds = Annotated[tuple, Range(0, INT32)]
Widths = Annotated[tuple[int, ...], Range(1, 262_144)]  # one or more
# Sizes or strides of one or more convolutions.
Kernels = Annotated[tuple[int, ...], Range(1, 65_536)]
Strengths = Annotated[tuple, Range(0)]
Means = Annotated[tuple, Range()]
Deviations = Annotated[tuple, Range(above=0)]
Area = Annotated[tuple, Range(above=0, most=1, ascending=True)]  # an interval of shares of a whole
Factors = Annotated[tuple, Range(above=0, ascending=True)]  # an interval of factors
Gains = Annotated[tuple, Range(0, ascending=True)]  # an interval of factors, silence included

# Durations
Steps = Annotated[Duration, Range(above=0)]
StepsOrNever = Annotated[Duration, Range(0)]
