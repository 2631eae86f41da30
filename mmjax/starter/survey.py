"""What a data set holds, as far as a config has to know it: splits, media, languages, labels,
values, questions, and lengths that fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mmjax.config import UserError
from mmjax.data import fitting
from mmjax.data.builders import Record
from mmjax.data.examples import Examples
from mmjax.data.folders import data_dir, find_version, split_sizes
from mmjax.data.measure import Measured, measure
from mmjax.data.sources import open_source
from mmjax.data.tokenizers import Tokenizer

MOST = 20_000  # records that are measured; of more, so many evenly spaced ones
SAMPLE = 256  # records that are read for what is not measured
MEDIA = ("image", "audio", "video", "series")
LENGTHS = {"audio": "seconds", "video": "seconds", "series": "length"}


@dataclasses.dataclass(frozen=True)
class Survey:
  """A data set, looked through. `train`: the split that is trained on; `held_out`: the others;
  `measured`: of `train`; `folder`: of the data sets."""

  name: str
  folder: Path
  train: str
  held_out: tuple[str, ...]
  measured: Measured

  @property
  def rows(self) -> int:
    """Rows to train on that can be read."""
    return self.measured.rows - self.measured.unreadable

  @property
  def media(self) -> dict[str, float]:
    """{medium: share of the rows that have it}, of those that at least half of them have."""
    shares = {
      kind: len(found["row"]) / max(1, len(self.measured.row))
      for kind, found in self.measured.media.items()
    }
    return {kind: shares[kind] for kind in MEDIA if shares.get(kind, 0) >= 0.5}

  @property
  def languages(self) -> tuple[str, ...]:
    """Of the captions, the commonest first."""
    return tuple(self.measured.captions)

  @property
  def answers(self) -> tuple[str, ...]:
    """To the questions of all splits: classes of a classifier."""
    return tuple(self._source().answers)

  @property
  def several_labels(self) -> bool:
    """Whether a record may have more than one label."""
    return any("|" in label for label in self._source().labels)

  @property
  def conversations(self) -> bool:
    """Whether records hold conversations."""
    return any(record.get("conversations") for record in self._sample())

  @property
  def skew(self) -> float:
    """How many times as often as the rarest the commonest class comes."""
    counts = [count for count in self.measured.labels.values() if count]
    return max(counts) / min(counts) if counts else 1.0

  @property
  def questions(self) -> int:
    """Questions of a record: the median."""
    found = self.measured.texts.get("question")
    if found is None or not len(found["row"]):
      return 0
    return int(np.median(np.unique(found["row"], return_counts=True)[1]))

  def with_tokenizer(self, tokenizer: Tokenizer, lowercase: bool) -> Survey:
    """The survey with the tokens of its texts counted."""
    again = measure(
      self.name,
      self.train,
      tokenizer=tokenizer,
      lowercase=lowercase,
      data_dir=self.folder,
      most=MOST,
    )
    return dataclasses.replace(self, measured=again)

  def media_values(self, kind: str, what: str) -> np.ndarray:
    """What was measured of a medium ("audio", "seconds"), of those that can be read."""
    values = self.measured.media.get(kind, {}).get(what, np.zeros(0))
    return values[np.isfinite(values)]

  def text_values(self, kind: str, what: str = "tokens") -> np.ndarray:
    return self.measured.texts.get(kind, {}).get(what, np.zeros(0, np.int64))

  def talks(self, config) -> tuple[np.ndarray, np.ndarray]:
    """(places of each conversation in the rows of a language model, int64 [N], and its media, int64
    [N, M]) by a resolved config whose rows hold them all.
    """
    source = self._source()
    source.text = "conversation"
    sequences = Examples(config, train=False).sequences
    return fitting.examples(sequences, source)[1:]

  def series_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel, over at most SAMPLE records."""
    found = [record["series"] for record in self._sample() if record.get("series") is not None]
    values = np.concatenate([np.atleast_2d(np.asarray(one, np.float64)) for one in found])
    values = values[np.isfinite(values).all(1)]
    std = values.std(0)
    std[std < 1e-12] = 1.0  # a channel that never changes stays as it is
    return tuple(_rounded(values.mean(0))), tuple(_rounded(std))

  def _sample(self) -> Iterator[Record]:
    """At most SAMPLE records that can be read, evenly spaced."""
    source = self._source()
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLE).round().astype(int))
    for index in chosen.tolist():
      with contextlib.suppress(UserError):
        yield source[index]

  def _source(self):
    return open_source(dict(name=self.name, split=self.train, languages=()), str(self.folder))


def survey(name: str, split: str = "", folder: str = "") -> Survey:
  """Looks through data set `name`. split: to train on; "" = "train", or the only one. folder: of
  the data sets. Raises UserError: no such data set, split, or one of tars.
  """
  root = data_dir(folder or None)
  if name == "tars":
    raise UserError(
      "a config for tars cannot be measured: convert some of them with `mmjax data convert "
      "webdataset`, and start from that"
    )
  version = find_version(root, name)
  sizes = (
    {split: count for split, count in split_sizes(version).items() if count} if version else {}
  )
  chosen = split or ("train" if "train" in sizes or not sizes else next(iter(sizes)))
  open_source(dict(name=name, split=chosen, languages=()), str(root))  # or it says what is wrong
  parts = {part.split("[")[0].strip() for part in chosen.split("+")}
  held_out = tuple(sorted((split for split in sizes if split not in parts), key=_order))
  measured = measure(name, chosen, data_dir=root, most=MOST)
  if measured.unreadable == len(measured.row):
    raise UserError(f"data set {name!r}, split {chosen}: no record can be read")
  return Survey(name, root, chosen, held_out, measured)


@dataclasses.dataclass(frozen=True)
class Fit:
  """A length that fits: `value`, `cut` of `total` exceed it, `longest` is the longest."""

  value: float
  cut: int
  total: int
  longest: float

  def says(self, what: str) -> str:
    """A comment: "the longest of 764 captions has 23 tokens" or how many are cut."""
    if self.cut:
      return f"{self.cut:,} of {self.total:,} {what} are longer and will be cut"
    return f"the longest of {self.total:,} {what} fits"


def fit(lengths: np.ndarray, step: float, most: float) -> Fit:
  """A length for these, a multiple of `step`: the longest one, unless a hundredth of them is much
  longer than the rest; `most` at most."""
  longest = float(lengths.max())
  usual = float(np.percentile(lengths, 99, method="higher"))
  wanted = longest if longest <= 1.5 * usual else usual
  value = min(most, math.ceil(wanted / step - 1e-9) * step)
  return Fit(value, int((lengths > value).sum()), len(lengths), longest)


def _order(split: str) -> tuple[int, str]:
  """Validation before test before what else there is."""
  for number, start in enumerate(("val", "dev", "test")):
    if split.startswith(start):
      return number, split
  return 3, split


def _rounded(values: Mapping | np.ndarray) -> list[float]:
  return [float(f"{value:.4g}") for value in np.asarray(values)]
