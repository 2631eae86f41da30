"""How long the texts, sounds, clips and series of a split are, how large its pictures, which labels
and values it has: one pass over its records, kept beside the data.

`measure("photos", "train")` gives a `Measured`. Media are measured by their headers, so that a pass
takes about as long as reading the files. The lengths of every record are kept in
DATA_DIR/measured/, under the fingerprint of the source (and of the tokenizer, for tokens): the next
call reads them from there.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import files
from mmjax.config import UserError
from mmjax.data.folders import data_dir as default_data_dir
from mmjax.data.image import Unreadable, picture_size
from mmjax.data.sources import Source, open_source
from mmjax.data.text import prepared
from mmjax.data.tokenizers import Tokenizer

_FORM = 1  # of the kept files: another number measures anew
_CHUNK = 128  # records that a thread measures at once
# What is measured of a record that has the medium, NaN where its header cannot be read.
MEDIA = {
  "image": ("height", "width"),
  "audio": ("seconds", "rate"),
  "video": ("seconds", "frames", "fps", "height", "width"),
  "series": ("length", "channels"),
}
TEXTS = ("caption", "question", "answer")


@dataclasses.dataclass(frozen=True)
class Measured:
  """A split, measured.

  `rows`: of the split; `row` int64 [N]: those that were measured, all unless only some were asked
  for; `unreadable`: how many of these cannot be read.
  `labels` {class: rows}, in the order of the classes' numbers, and `unlabelled` rows. A row with
  several labels ("a|b") counts for each.
  `values` float32 [N, K], NaN = none, and `value_names`, their K columns.
  `media` {"audio": {"row" int64 [n], "seconds" float64 [n], ...}}: of the records that have the
  medium; the names are those of MEDIA.
  `texts` {"caption": {"row", "characters", "tokens", "language", "number"}} int64 [n] each, for
  TEXTS that there are: a text each, `language` indexes `languages`, `number` counts the texts of a
  row and language from 0. `tokens`, where there is a tokenizer: without <bos> and <eos>.
  `characters` {language: {character: count}} of captions; of questions and answers under "".
  """

  name: str
  split: str
  rows: int
  row: np.ndarray
  unreadable: int
  labels: dict[str, int]
  unlabelled: int
  values: np.ndarray
  value_names: tuple[str, ...]
  media: dict[str, dict[str, np.ndarray]]
  texts: dict[str, dict[str, np.ndarray]]
  languages: tuple[str, ...]
  characters: dict[str, dict[str, int]]

  @property
  def whole(self) -> bool:
    """Whether all rows of the split were measured."""
    return len(self.row) == self.rows

  @property
  def captions(self) -> dict[str, int]:
    """{language: captions}, the most first."""
    numbers = self.texts["caption"]["language"] if "caption" in self.texts else ()
    counts = collections.Counter(self.languages[number] for number in numbers)
    return dict(counts.most_common())

  def mean(self) -> np.ndarray:
    """Of each column of `values`, float64 [K]; NaN where no row has one."""
    return _over_rows(np.mean, self.values)

  def std(self) -> np.ndarray:
    """Population standard deviation of each column of `values`, float64 [K]."""
    return _over_rows(np.std, self.values)


def measure(
  source: str | Source,
  split: str = "train",
  *,
  tokenizer: Tokenizer | None = None,
  lowercase: bool = False,
  punctuation: bool = True,
  data_dir: str | os.PathLike | None = None,
  path: str = "",
  most: int = 0,
) -> Measured:
  """Measures a split of a data set (or an open source, then `split` only names it), in all its
  languages.

  tokenizer, lowercase, punctuation: as data.text says, to count tokens. path: of the source "tars".
  most: measure so many rows at most, evenly spaced; 0 = all. Raises UserError: no such data set or
  split.
  """
  if isinstance(source, str):
    root = os.fspath(data_dir) if data_dir else None
    source = open_source(dict(name=source, split=split, languages=(), path=path), root)
  folder = default_data_dir(data_dir or None) / "measured"
  row = np.arange(len(source))
  if most and most < len(row):
    row = np.linspace(0, len(row) - 1, most).round().astype(np.int64)
  of_source = [_FORM, source.fingerprint, len(row)]
  kept = _kept(folder, of_source)
  if kept is None:
    kept = _measured(source, row)
    _keep(folder, of_source, kept)
  arrays, facts = kept
  if tokenizer:
    of_tokens = [*of_source, tokenizer.fingerprint, lowercase, punctuation]
    kept = _kept(folder, of_tokens)
    if kept is None:
      kept = _tokens(source, row, tokenizer, lowercase, punctuation), {}
      _keep(folder, of_tokens, kept)
    arrays = {**arrays, **kept[0]}
  known = [*source.labels, *facts["labels"]]
  classes = dict.fromkeys(name for several in known for name in several.split("|") if name)
  return Measured(
    name=source.name,
    split=split,
    rows=len(source),
    row=row,
    unreadable=facts["unreadable"],
    labels={name: facts["labels"].get(name, 0) for name in classes},
    unlabelled=facts["unlabelled"],
    values=arrays["values"],
    value_names=source.values,
    media=_grouped(arrays, MEDIA),
    texts=_grouped(arrays, TEXTS),
    languages=tuple(facts["languages"]),
    characters=facts["characters"],
  )


# -- One pass --------------------------------------------------------------------------------------


def _records(source: Source, row: np.ndarray) -> Iterator[tuple[int, Any, dict[str, tuple]]]:
  """(index, record or None, {medium: what MEDIA names}) of each row, in order; media by threads."""

  def some(rows: Sequence[int]) -> list[tuple[int, Any, dict[str, tuple]]]:
    out: list[tuple[int, Any, dict[str, tuple]]] = []
    for index in rows:
      try:
        record = source[index]
      except UserError:
        out.append((index, None, {}))
        continue
      sizes = {kind: _size(kind, record[kind]) for kind in MEDIA if record.get(kind) is not None}
      for kind in sizes:
        record[kind] = None  # a medium of a chunk that waits is not held
      out.append((index, record, sizes))
    return out

  chunks = [row[at : at + _CHUNK].tolist() for at in range(0, len(row), _CHUNK)]
  workers = min(8, os.cpu_count() or 1)
  with ThreadPoolExecutor(workers) as threads:
    for at in range(0, len(chunks), 4 * workers):
      for chunk in threads.map(some, chunks[at : at + 4 * workers]):
        yield from chunk


def _measured(source: Source, row: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """(arrays, facts) of all but tokens."""
  columns: dict[str, list] = collections.defaultdict(list)
  labels: collections.Counter[str] = collections.Counter()
  characters: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  languages: dict[str, int] = {}
  values = np.full((len(row), len(source.values)), np.nan, np.float32)
  unreadable = unlabelled = 0
  for place, (index, record, sizes) in enumerate(_records(source, row)):
    if record is None:
      unreadable += 1
      continue
    several = [name for name in record["label"].split("|") if name]
    labels.update(several)
    unlabelled += not several
    if source.values and record.get("value") is not None:
      values[place] = record["value"]
    for kind, found in sizes.items():
      columns[f"{kind}/row"].append(index)
      for what, value in zip(MEDIA[kind], found, strict=True):
        columns[f"{kind}/{what}"].append(value)
    for kind, language, number, text in texts_of(record):
      columns[f"{kind}/row"].append(index)
      columns[f"{kind}/characters"].append(len(text))
      columns[f"{kind}/language"].append(languages.setdefault(language, len(languages)))
      columns[f"{kind}/number"].append(number)
      characters[language].update(text)
  whole = {"row", "characters", "language", "number"}
  arrays = {
    name: np.array(column, np.int64 if name.partition("/")[2] in whole else np.float64)
    for name, column in columns.items()
  }
  facts = dict(
    unreadable=unreadable,
    labels=labels,
    unlabelled=unlabelled,
    languages=list(languages),
    characters=characters,
  )
  return arrays | {"values": values}, facts


def _tokens(
  source: Source, row: np.ndarray, tokenizer: Tokenizer, lowercase: bool, punctuation: bool
) -> dict[str, np.ndarray]:
  """The tokens of every text, in the order of `_measured`; those of broken text count 0."""
  counts: dict[str, list[int]] = collections.defaultdict(list)
  for index in row.tolist():
    try:
      record = source[index]
    except UserError:
      continue
    for kind, _, _, text in texts_of(record):
      try:
        number = len(tokenizer.encode(prepared(text, lowercase, punctuation)))
      except UserError:
        number = 0
      counts[f"{kind}/tokens"].append(number)
  return {name: np.array(column, np.int64) for name, column in counts.items()}


def texts_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str, int, str]]:
  """(kind of TEXTS, language, number, text) of every text of a record; language "" of questions."""
  for language, captions in record["captions"].items():
    for number, caption in enumerate(captions):
      yield "caption", language, number, caption
  for number, (question, answer) in enumerate(record.get("questions") or ()):
    yield "question", "", number, question
    yield "answer", "", number, answer


def _size(kind: str, content: Any) -> tuple[float, ...]:
  """What MEDIA names of a medium, by its header; NaN each if it cannot be read."""
  try:
    if kind == "image":
      return picture_size(content)
    if kind == "audio":
      from mmjax.data.audio import audio_length

      samples, rate = audio_length(content)
      return samples / rate, rate
    if kind == "video":
      from mmjax.data.video import clip_size

      return clip_size(content)
    shape = np.shape(content)
    return shape[0], shape[1] if len(shape) > 1 else 1
  except Unreadable:
    return (np.nan,) * len(MEDIA[kind])


def _over_rows(function, values: np.ndarray) -> np.ndarray:
  columns = [column[np.isfinite(column)].astype(np.float64) for column in values.T]
  return np.array([function(column) if len(column) else np.nan for column in columns])


def _grouped(
  arrays: Mapping[str, np.ndarray], kinds: Mapping[str, Any] | Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
  """{"audio/row": ..., ...} as {"audio": {"row": ...}}, of the kinds that are there."""
  out: dict[str, dict[str, np.ndarray]] = {}
  for name, array in arrays.items():
    kind, _, what = name.partition("/")
    if kind in kinds:
      out.setdefault(kind, {})[what] = array
  return {kind: out[kind] for kind in kinds if kind in out}


# -- What is kept ----------------------------------------------------------------------------------


def _file(folder: Path, key: Sequence[Any]) -> Path:
  name = hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
  return folder / f"{name}.npz"


def _kept(folder: Path, key: Sequence[Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
  """What `_keep` wrote, None if it is not there or damaged."""
  try:
    with np.load(_file(folder, key), allow_pickle=False) as saved:
      arrays = {name: saved[name] for name in saved.files}
    facts = json.loads(str(arrays.pop("facts")))
    return arrays, facts
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def _keep(folder: Path, key: Sequence[Any], kept: tuple[dict, dict]) -> None:
  """Writes what was measured; where that cannot be, it is measured again the next time."""
  out = io.BytesIO()
  np.savez_compressed(out, facts=np.array(json.dumps(kept[1])), **kept[0])
  try:
    files.write_whole(_file(folder, key), out.getvalue())
  except OSError:
    pass
