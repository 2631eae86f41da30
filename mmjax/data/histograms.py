"""Labels and lengths of a measured split as bars: lines of text, and HTML for the sample sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmjax.data.measure import Measured
from mmjax.printing import in_html, printable

BINS = 10
MOST = 40  # bars of labels; the commonest, where there are more
_WIDTH = 30  # characters of the longest bar
_LENGTHS = (  # what of a split has a histogram: (kind, measure, title)
  ("caption", "characters", "captions, characters"),
  ("caption", "tokens", "captions, tokens"),
  ("question", "characters", "questions, characters"),
  ("question", "tokens", "questions, tokens"),
  ("audio", "seconds", "sounds, seconds"),
  ("video", "seconds", "clips, seconds"),
  ("series", "length", "series, steps"),
  ("image", "width", "pictures, pixels wide"),
  ("image", "height", "pictures, pixels high"),
)


class Histogram(NamedTuple):
  """`bars` [(name, count)], and a `title` that says what is counted."""

  title: str
  bars: list[tuple[str, int]]


def histograms(measured: Measured) -> list[Histogram]:
  """Of labels, values, and the lengths of texts and media, over all rows that were measured."""
  found = []
  if measured.labels:
    bars = sorted(measured.labels.items(), key=lambda pair: -pair[1])
    rest = sum(count for _, count in bars[MOST:])
    bars = bars[:MOST] + ([(f"{len(bars) - MOST} more", rest)] if rest else [])
    without = f", {measured.unlabelled:,} rows without" if measured.unlabelled else ""
    found.append(Histogram(f"{len(measured.labels):,} labels{without}", bars))
  for name, column in zip(measured.value_names, measured.values.T, strict=True):
    found += _of_numbers(name, column)
  for kind, what, title in _LENGTHS:
    lengths = {**measured.texts, **measured.media}.get(kind, {}).get(what)
    if lengths is not None:
      found += _of_numbers(title, lengths)
  return found


def in_text(histogram: Histogram) -> list[str]:
  """Lines for a terminal."""
  names = [printable(name)[:40] for name, _ in histogram.bars]
  wide, most = max(map(len, names)), max(count for _, count in histogram.bars) or 1
  return [printable(histogram.title)] + [
    f"  {name:>{wide}} {'█' * -(-_WIDTH * count // most)} {count:,}"
    for name, (_, count) in zip(names, histogram.bars, strict=True)
  ]


def as_html(found: Sequence[Histogram]) -> str:
  """A figure each."""
  figures = []
  for histogram in found:
    most = max(count for _, count in histogram.bars) or 1
    rows = "".join(
      f'<dt>{in_html(name)}</dt><dd><i style="width:{70 * count / most:.1f}%"></i> {count:,}</dd>'
      for name, count in histogram.bars
    )
    figures.append(f"<figure><em>{in_html(histogram.title)}</em><dl>{rows}</dl></figure>")
  return f'<div class="bars">{"".join(figures)}</div>' if figures else ""


def _of_numbers(title: str, numbers: np.ndarray) -> list[Histogram]:
  """The histogram of what is finite, [] where nothing is."""
  real = np.asarray(numbers, np.float64)
  real = real[np.isfinite(real)]
  if not real.size:
    return []
  low, high = real.min(), real.max()
  whole = bool((real == np.rint(real)).all())
  if low == high:
    bars = [(_number(low), real.size)]
  elif whole and high - low < BINS:
    values, counts = np.unique(real, return_counts=True)
    bars = [(_number(value), int(n)) for value, n in zip(values, counts, strict=True)]
  else:
    step = np.ceil((high - low + 1) / BINS) if whole else (high - low) / BINS
    edges = low + step * np.arange(BINS + 1)
    bins = np.minimum(((real - low) / step).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    ends = edges[1:] - 1 if whole else edges[1:]
    bars = [
      (f"{_number(a)} to {_number(b)}", int(n))
      for a, b, n in zip(edges, ends, counts, strict=False)
      if a <= high
    ]
  median = _number(float(np.median(real)))
  return [Histogram(f"{title}: {real.size:,}, median {median}, at most {_number(high)}", bars)]


def _number(value: float) -> str:
  return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"
