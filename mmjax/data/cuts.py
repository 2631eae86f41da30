"""What a config will cut: texts of more than data.text.length tokens, sounds of more than
data.audio.seconds, series of more than data.series.length steps, counted over whole splits.

Every text, sound and series of a split is kept whole, cut, or left out (of another language, not
among the first captions, unreadable): the three counts add up to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.examples import modalities_of
from mmjax.data.folders import data_dir
from mmjax.data.measure import Measured, measure
from mmjax.data.sources import open_source
from mmjax.data.tokenizers import load_tokenizer

SAMPLE = 20_000  # rows of a source that a start of training measures at most


class Fit(NamedTuple):
  """How the texts, sounds or series of a source fit a config. `limit` and `longest` in `unit`s;
  `setting` is what the key `key` would have to be for all.
  """

  what: str
  kept: int
  cut: int
  left_out: int
  limit: float
  longest: float
  unit: str
  key: str
  setting: float

  def __str__(self) -> str:
    digits = 1 if self.unit == "s" else 0
    return (
      f"{self.cut:,} of {self.kept + self.cut:,} {self.what} exceed {self.limit:,.{digits}f} "
      f"{self.unit} (the longest has {self.longest:,.{digits}f}); set {self.key}={self.setting:g}"
    )


def fits(config, entry: Mapping[str, Any], measured: Measured) -> list[Fit]:
  """A Fit for each modality of a source that can be cut. entry: of data.sources; measured: with
  tokens where the config has texts.
  """
  data, found = config.data, []
  modalities = modalities_of(config, entry if data.mix == "steps" else None)
  kind = entry.get("text", "caption")
  if "text" in modalities and kind in measured.texts:
    texts = measured.texts[kind]
    drawn = np.ones(len(texts["row"]), bool)
    if kind == "caption" and entry.get("languages"):
      wanted = [name in entry["languages"] for name in measured.languages]
      drawn = np.array(wanted, bool)[texts["language"]]
    if kind == "caption" and entry.get("captions"):
      drawn &= texts["number"] < entry["captions"]
    own = entry.get("length", 0) if data.mix == "steps" else 0
    key = "data.sources.*.length" if own else "data.text.length"
    ends = int(data.text.bos) + int(data.text.eos)
    words = {"caption": "captions", "question": "questions"}[kind]
    tokens = texts["tokens"] + ends
    found.append(_fit(words, tokens, drawn, own or data.text.length, "tokens", key, 8))
  if "audio" in modalities and "audio" in measured.media:
    seconds, rate = measured.media["audio"]["seconds"], data.audio.rate
    samples = np.rint(seconds * rate)
    real = np.isfinite(seconds)
    limit = round(data.audio.seconds * rate)
    fit = _fit("sounds", samples, real, limit, "s", "data.audio.seconds", 1)
    setting = math.ceil(fit.longest / rate * 10) / 10
    found.append(fit._replace(limit=limit / rate, longest=fit.longest / rate, setting=setting))
  if "series" in modalities and "series" in measured.media:
    steps = measured.media["series"]["length"]
    real = np.isfinite(steps)
    found.append(_fit("series", steps, real, data.series.length, "steps", "data.series.length", 8))
  return found


def cut_lines(config, most: int = SAMPLE) -> list[str]:
  """A line for each source and modality of a config that loses something, [] where nothing is cut.
  most: rows of a source that are measured, 0 = all. Raises UserError.
  """
  lines = []
  for name, entry in config.data.sources.items():
    measured = measure_for(config, entry, most)
    part = "" if measured.whole else f" (of {len(measured.row):,} of {measured.rows:,} rows)"
    lines += [
      f"data.sources.{name}: {fit}{part}" for fit in fits(config, entry, measured) if fit.cut
    ]
  return lines


def measure_for(config, entry: Mapping[str, Any], most: int = 0) -> Measured:
  """The split of an entry of data.sources, measured as the config reads it."""
  text = config.data.text
  reads = "text" in modalities_of(config, entry if config.data.mix == "steps" else None)
  source = open_source({**entry, "languages": (), "cache": False}, config)
  return measure(
    source,
    entry.get("split") or "train",
    tokenizer=load_tokenizer(config.data) if reads else None,
    lowercase=text.lowercase,
    punctuation=text.punctuation,
    data_dir=data_dir(config),
    most=most,
  )


def _fit(
  what: str, lengths: np.ndarray, drawn: np.ndarray, limit: int, unit: str, key: str, multiple: int
) -> Fit:
  """drawn: bool, those that are not left out. multiple: of which the setting is one."""
  longest = float(lengths[drawn].max()) if drawn.any() else 0.0
  cut = int((lengths[drawn] > limit).sum())
  setting = math.ceil(longest / multiple) * multiple
  kept = int(drawn.sum()) - cut
  return Fit(what, kept, cut, int((~drawn).sum()), limit, longest, unit, key, setting)
