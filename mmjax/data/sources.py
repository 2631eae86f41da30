"""Where records come from: data sets under `data.dir` (TFDS ArrayRecord), and tars read where they
are. Random access, NumPy only.

`open_source(entry, config)` gives a `Source`: `len(source)`, `source[i]` -> record (see
builders/__init__.py) with the captions of the entry's languages. Adding a kind of source is one
class and one line in `open_source`.
"""

from __future__ import annotations

import collections
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmjax import files, remote
from mmjax.config import UserError
from mmjax.data.builders import BUILDERS
from mmjax.data.builders.schema import Record, example_class, parse_record
from mmjax.data.folders import (
  data_dir,
  find_version,
  finished_versions,
  read_facts,
  read_info,
  split_sizes,
)
from mmjax.data.media import bytes_key
from mmjax.data.order import permute
from mmjax.data.parts import MEDIA
from mmjax.data.tars import TarSource


class Source(Protocol):
  """Records with random access.

  `labels`: class names, sorted or in the order that was given. `values`: names of the numbers of a
  record's `value`. `answers`: to the questions of all splits, sorted. `text`: what the
  text of a row is, "caption" or "question",
  `first_captions`: how many of the first captions training draws from, 0 = all (as the entry says).
  `languages`: those that captions may have. `fingerprint`: changes when the content does.
  `source[i]` raises UserError for a record that cannot be read, and only that.
  """

  name: str
  labels: tuple[str, ...]
  values: tuple[str, ...]
  answers: tuple[str, ...]
  text: str
  first_captions: int
  languages: tuple[str, ...]
  fingerprint: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


def open_source(entry: Mapping[str, Any], config=None) -> Source:
  """Opens the source that an entry of `data.sources` (or any mapping with name, split, languages,
  path) describes.

  Raises UserError: no such data set, split or language, or files are missing.
  """
  name, languages = entry["name"], tuple(entry.get("languages") or ())
  if not re.fullmatch(r"\w[\w.-]*", name):
    raise UserError(f"{name!r:.200} is no name of a data set: it is a word, not a path")
  split = entry.get("split") or "train"
  plain = "+".join(_slice_of(part)[0] for part in split.split("+"))
  if name == "tars":
    if not entry.get("path"):
      raise UserError(
        "a source named 'tars' has no path: give a glob or a brace pattern, such as "
        "'shards/{00000..00009}.tar'"
      )
    source: Source = TarSource(entry["path"], languages, data_dir(config))
  else:
    source = ArrayRecordSource(data_dir(config), name, plain, languages)
  if "[" in split:
    source = PartSource(source, split)
  if entry.get("cache"):
    source = CachedSource(source)
  source.text, source.first_captions = entry.get("text", "caption"), entry.get("captions", 0)
  return source


def label_numbers(source: Source) -> np.ndarray:
  """int32 [N]: of each record the number of its label in order of `source.labels`, -1 = none, or it
  cannot be read.
  """
  numbers = {name: number for number, name in enumerate(source.labels)}
  out = np.full(len(source), -1, np.int32)
  for index in range(len(source)):
    try:
      out[index] = numbers.get(source[index]["label"], -1)
    except UserError:
      continue
  return out


def list_datasets(root: str | os.PathLike) -> list[str]:
  """Names of the finished data sets under `root`, sorted."""
  root = Path(root)
  if url := remote.origin(root):
    with files.store_errors(url, f"{url} cannot be read"):
      available = collections.defaultdict(list)
      for path in files.sizes(url):
        name, _, rest = path.partition("/")
        available[name].append(rest)
    return sorted(name for name, rest in available.items() if finished_versions(rest))
  return (
    sorted(path.name for path in root.iterdir() if find_version(root, path.name))
    if root.is_dir()
    else []
  )


def list_tokenizers(folder: Path) -> list[str]:
  """Names of the tokenizers in a folder, sorted."""
  return (
    sorted(
      path.name if path.is_dir() else path.stem
      for path in folder.iterdir()
      if path.is_dir() or path.suffix in (".model", ".json")
    )
    if folder.is_dir()
    else []
  )


class ArrayRecordSource:
  """A data set that `builders.write_dataset` wrote, or several of its splits ("train+validation")
  one after the other.
  """

  text = "caption"
  first_captions = 0

  def __init__(self, root: Path, name: str, split: str, languages: Sequence[str] = ()):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    example_class()
    folder = find_version(root, name)
    if folder is None:
      raise UserError(
        f"no data set {name!r} under {remote.origin(root) or root}{_how_to_get(root, name)}"
      )
    self.name, self._languages = name, tuple(languages)
    info, facts = read_info(folder), read_facts(folder)
    self.labels, available, content = tuple(facts["labels"]), facts["languages"], facts["content"]
    self.answers = tuple(facts.get("answers", ()))
    self.values = tuple(facts.get("values", ()))
    for language in languages:
      if available and language not in available:  # without captions, none is drawn from
        raise UserError(
          f"data set {name!r} has no captions in {language!r}; its languages: "
          f"{', '.join(available)}{_nearest(language, available)}"
        )
    self.languages = self._languages or tuple(available)
    shards = []
    self.sizes = []
    for part in split.split("+"):
      shards += _shards(folder, info, part.strip())
      self.sizes.append(split_sizes(folder)[part.strip()])
    self._records = ArrayRecordDataSource(shards)
    paths = [Path(shard.rpartition("[")[0]) for shard in shards]
    self._sizes = {path: path.stat().st_size for path in paths}
    mark = hashlib.blake2b(
      json.dumps([content, [os.path.basename(f) for f in shards]]).encode(), digest_size=6
    ).hexdigest()
    self.fingerprint = f"{name}/{folder.name}/{split}: {len(self)} examples, content {mark}"

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    try:
      data = self._records[index]
    except Exception as error:  # array_record raises bare RuntimeErrors
      self._check_files()
      raise UserError(
        f"record {index} of {self.name} cannot be read ({str(error).splitlines()[0]})"
      ) from error
    try:
      return parse_record(data, self._languages)
    except UserError:
      self._check_files()
      raise

  def _check_files(self) -> None:
    """Raises StoreError unless the files are there as they were when they were opened: a record is
    not to blame for a folder that is away, and must not cost a batch its row.
    """
    for path, size in self._sizes.items():
      try:
        with files.open_file(path) as file:
          now = os.fstat(file.fileno()).st_size
        why = "" if now == size else f"it had {size:,} bytes and has {now:,}"
      except OSError as error:
        why = error.strerror or str(error)
      if why:
        raise files.away(path, why)


class PartSource:
  """The rows of a source that the slices of its split name, "train[:10%]": a part drawn at random,
  the same ones each time, in their order. Slices that do not overlap share no row.

  Raises UserError: a slice is not within the split, or empty.
  """

  text = "caption"
  first_captions = 0

  def __init__(self, source: Source, split: str):
    self._source = source
    rows, start = [], 0
    sizes = getattr(source, "sizes", None) or [len(source)]
    for part, size in zip(split.split("+"), sizes, strict=True):
      name, begin, end = _slice_of(part)
      first, last = _bound(begin, 0, size, part), _bound(end, size, size, part)
      if first >= last:
        raise UserError(f"split {part!r} of {source.name!r} is empty: {name} has {size:,} rows")
      sizes_of_rows, key = np.full(size, size, np.uint64), np.ones(size, np.uint64)
      order = permute(np.arange(size, dtype=np.uint64), sizes_of_rows, key)
      rows.append(start + np.sort(order[first:last].astype(np.int64)))
      start += size
    self._rows = np.concatenate(rows)
    self.name, self.labels, self.answers = source.name, source.labels, source.answers
    self.values, self.languages = source.values, source.languages
    self.fingerprint = f"{source.fingerprint}, {split}"

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Record:
    return self._source[int(self._rows[index])]


class CachedSource:
  """Keeps every record of `source` in memory once it was read. For small data sets."""

  text = "caption"
  first_captions = 0
  cached = True

  def __init__(self, source: Source):
    self._source = source
    self._kept: list[Record | None] = [None] * len(source)
    self.name, self.labels, self.answers = source.name, source.labels, source.answers
    self.values = source.values
    self.languages, self.fingerprint = source.languages, source.fingerprint

  def __len__(self) -> int:
    return len(self._kept)

  def __getitem__(self, index: int) -> Record:
    record = self._kept[index]
    if record is None:
      record = self._kept[index] = self._source[index]
    return record


class Joined:
  """Records of a source, each with the media of another after its own. pairs: their numbers."""

  def __init__(self, source: Source, pairs: Sequence[tuple[int, int]]):
    self.name, self._source, self._pairs = source.name, source, pairs

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> Record:
    own, other = (self._source[number] for number in self._pairs[index])
    more = [(name, other[name]) for name in MEDIA if other.get(name) is not None]
    more += other.get("media") or ()
    found = {**own, "media": list(own.get("media") or ())}
    for name, data in more:
      if found.get(name) is None:
        found |= {name: data, "image_key": bytes_key(data)}
      else:
        found["media"].append((name, data))
    return found


def _slice_of(part: str) -> tuple[str, str, str]:
  """(split, begin, end) of "train[10%:20%]"; ("train", "", "") of "train". Raises UserError."""
  found = re.fullmatch(r"([^\[\]]*)(?:\[(\d*\.?\d*%?):(\d*\.?\d*%?)\])?", part.strip())
  if not found or (found[2] is not None and {found[2], found[3]} & {"%", ".", ".%"}):
    raise UserError(
      f"{part!r:.80} is no split: write its name, or a part of it, such as train[:10%], "
      "train[10%:20%] or train[:500]"
    )
  return found[1].strip(), found[2] or "", found[3] or ""


def _bound(text: str, otherwise: int, size: int, part: str) -> int:
  """The row that a bound of a slice names. Raises UserError: it is no row."""
  if not text:
    return otherwise
  percent = text.endswith("%")
  value = float(text.rstrip("%"))
  row = round(value * size / 100) if percent else value
  if row != int(row) or row > size or (percent and value > 100):
    raise UserError(f"split {part!r}: {text} is not within it, which has {size:,} rows")
  return int(row)


def _shards(folder: Path, info: Mapping[str, Any], split: str) -> list[str]:
  """The files of a split as "path[0:count]", which array_record opens only when they are read.
  Raises UserError.
  """
  sizes = split_sizes(folder)
  if split not in sizes:
    raise UserError(
      f"data set {info['name']!r} has no split {split!r}; there are: "
      f"{', '.join(sizes)}{_nearest(split, sizes)}"
    )
  lengths = next(s["shardLengths"] for s in info["splits"] if s["name"] == split)
  files = []
  for number, length in enumerate(lengths):
    path = folder / f"{info['name']}-{split}.array_record-{number:05d}-of-{len(lengths):05d}"
    if not path.is_file():
      raise UserError(
        f"{path} is missing from data set {info['name']!r}. Delete {folder} and make the data set "
        "again"
      )
    if int(length):
      files.append(f"{path}[0:{length}]")
  if not files:
    raise UserError(f"split {split!r} of data set {info['name']!r} is empty")
  return files


def _how_to_get(root: Path, name: str) -> str:
  """The end of an error about a missing data set: the nearest that is there, and the command that
  makes one.
  """
  available = list_datasets(root)
  make = f"`mmjax data build {name}` makes it" if name in BUILDERS else ""
  if near := difflib.get_close_matches(name, sorted({*available, *BUILDERS}), n=1, cutoff=0.5):
    make = make or f"Did you mean {near[0]!r}?" + (
      "" if near[0] in available else f" `mmjax data build {near[0]}` makes it"
    )
  elif not make:
    make = "Make it with `mmjax data convert`, or set $MMJAX_DATA to the folder that has it"
  return f" (there: {', '.join(available) or 'none'}). {make}"


def _nearest(name: str, options: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
  return f". Did you mean {near[0]!r}?" if near else ""
