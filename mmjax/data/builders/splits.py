"""Which split a row of a source goes into: by its folder, by what it says itself, or by shares of
the content, "train:80,validation:10,test:10".

By shares, the split of a record is a function of its content alone (a hash of its media, or of the
text of a document), so that the same files fall the same way again. Records that share a medium or
a group, and pictures that are nearly equal (scaled, compressed again), are kept together: they
follow the smallest hash among them.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

from mmjax.config import UserError
from mmjax.data import image
from mmjax.data.builders.summary import Entry
from mmjax.data.image import Unreadable
from mmjax.data.media import content_key
from mmjax.data.readers.cells import Skip
from mmjax.data.readers.columns import MEDIA
from mmjax.data.readers.folder import SPLITS
from mmjax.data.readers.rows import Row, Where
from mmjax.files import check_name

_CHUNK = 64  # rows that a thread reads at once
_SIDE = 16  # pixels of the grey thumbnail that near-duplicates are told by
_NEAR = 3.0  # grey levels of 255 that two thumbnails may differ by, on average
_BANDS = 16  # of a thumbnail's bits; pictures that share one are compared


def shares_of(split: str) -> dict[str, float]:
  """{split: share, of a sum of 1} of "train:80,test:20"; {} of a plain name. Raises UserError."""
  if ":" not in split:
    return {}
  shares: dict[str, float] = {}
  for part in split.split(","):
    name, _, text = part.strip().partition(":")
    check_name("a split", name)
    try:
      share = float(text)
    except ValueError:
      share = 0.0
    if not 0 < share < float("inf") or name in shares:
      raise UserError(
        f"--split {split}: {part!r} is no share. Write each split once, with a positive number, as "
        "in train:80,validation:10,test:10"
      )
    shares[name] = share
  return {name: share / sum(shares.values()) for name, share in shares.items()}


def divide(reader, rows: Sequence[Row], shares: Mapping[str, float]) -> dict[str, list[Row]]:
  """The rows of each split, in their order. Raises UserError: a split would have none."""
  keys, thumbnails = _content(reader, rows)
  owner = list(range(len(rows)))  # of each row, a row of its group; union-find

  def find(row: int) -> int:
    while owner[row] != row:
      owner[row] = row = owner[owner[row]]
    return row

  first: dict[Any, int] = {}
  for row, some in enumerate(keys):
    for key in some:
      owner[find(row)] = find(first.setdefault(key, row))
  for one, other in _near_duplicates(thumbnails):
    owner[find(one)] = find(other)
  smallest: dict[int, int] = {}
  for row, some in enumerate(keys):
    place = min(_hash(key) for key in some)
    smallest[find(row)] = min(place, smallest.get(find(row), place))
  ends = np.cumsum(list(shares.values()))
  names = list(shares)
  parts: dict[str, list[Row]] = {name: [] for name in names}
  for number, record in enumerate(rows):
    # hashed again: the smallest of several is not uniform
    uniform = _hash(smallest[find(number)]) / 2**64
    at = int(np.searchsorted(ends, uniform, side="right"))
    parts[names[min(at, len(names) - 1)]].append(record)
  if empty := [name for name in names if not parts[name]]:
    raise UserError(
      f"none of the {len(rows):,} records falls into split {empty[0]!r}, in {len(smallest):,} "
      "groups that stay together: give it a larger share, or make it of files that you choose"
    )
  return parts


def _content(reader, rows: Sequence[Row]) -> tuple[list[set], dict[int, np.ndarray]]:
  """(the keys of each row: of its media and groups, {row: thumbnail of its picture})."""

  def some(start: int) -> list[tuple[str, set, np.ndarray | None]]:
    out = []
    for name, record, _ in reader.read(rows[start : start + _CHUNK]):
      if isinstance(record, Skip):
        continue
      found: set[Any] = {
        (kind, content_key(record, kind)) for kind in MEDIA if record.get(kind) is not None
      }
      if not found and record["captions"]:
        found.add(("text", record["image_key"]))  # of a document, which has no medium
      found |= {("group", group) for group in record.get("groups", ())}
      out.append((name, found, _thumbnail(record.get("image"))))
    return out

  number = {row.name: at for at, row in enumerate(rows)}
  keys: list[set] = [set() for _ in rows]
  thumbnails: dict[int, np.ndarray] = {}
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
    for chunk in threads.map(some, range(0, len(rows), _CHUNK)):
      for name, found, thumbnail in chunk:
        keys[number[name]] |= found
        if thumbnail is not None:
          thumbnails[number[name]] = thumbnail
  for row, some_keys in zip(rows, keys, strict=True):
    if not some_keys:  # it cannot be read, and will be left out of the split that it falls into
      some_keys.add(("name", row.name))
  return keys, thumbnails


def _thumbnail(data: bytes | None) -> np.ndarray | None:
  """A picture as grey levels uint8 [_SIDE, _SIDE]; None of none, and of one that cannot be read."""
  if not data:
    return None
  try:
    grey = cv2.cvtColor(image.decode(data, 2), cv2.COLOR_RGB2GRAY)
  except Unreadable:
    return None
  return cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def _near_duplicates(thumbnails: Mapping[int, np.ndarray]) -> Iterable[tuple[int, int]]:
  """Pairs of rows whose thumbnails are nearly equal.

  Candidates share one of _BANDS bands of the bits "brighter than the median", so that the pairs to
  compare stay few among many pictures.
  """
  rows = np.array(list(thumbnails), np.int64)
  if not len(rows):
    return
  pixels = np.stack(list(thumbnails.values())).reshape(len(rows), -1).astype(np.float32)
  bits = pixels > np.median(pixels, axis=1, keepdims=True)
  packed = np.packbits(bits, axis=1).reshape(len(rows), _BANDS, -1)
  for band in range(_BANDS):
    buckets: dict[bytes, list[int]] = defaultdict(list)
    for at, key in enumerate(packed[:, band]):
      buckets[key.tobytes()].append(at)
    for bucket in buckets.values():
      for place, at in enumerate(bucket[1:], start=1):
        # a bucket of many pictures alike, such as those on white ground, is not compared whole
        others = np.array(bucket[max(0, place - 1000) : place])
        near = np.abs(pixels[others] - pixels[at]).mean(1) <= _NEAR
        for other in others[near].tolist():
          yield int(rows[at]), int(rows[other])


def _hash(key: Any) -> int:
  return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def parts_of(
  reader, rows: list[Row], skipped: list[Entry], split: str | None, shares: Mapping[str, float]
) -> dict[str, tuple[list[Row], list[Entry]]]:
  """{split: (its rows, what is left out of it already)}; that belongs to the first split where
  nothing tells.
  """
  folders = getattr(reader, "splits", {})
  named = [] if shares else [_named_split(row) for row in rows]
  if shares:
    divided = divide(reader, rows, shares)
    first = next(iter(divided))
    return {name: (part, skipped if name == first else []) for name, part in divided.items()}
  if any(named):
    return _by_column(reader, rows, skipped, split, named)
  if not folders:
    return {split or "train": (rows, skipped)}
  names = ", ".join(folders)
  beside = [path for row in rows if _first_folder(path := _path(row)) not in folders]
  if beside:
    reader.notes.append(
      f"the folders {names} are put into one split, {split or 'train'!r}, since {beside[0]} lies "
      "beside them; move it into one of them to make each a split"
    )
    return {split or "train": (rows, skipped)}
  if split:
    reader.notes.append(
      f"the folders {names} are put into one split, {split!r}; without --split each is one"
    )
    return {split: (rows, skipped)}
  reader.notes.append(
    f"the folders {names} become the splits {', '.join(dict.fromkeys(folders.values()))}; --split "
    "NAME puts all into one"
  )
  parts: dict[str, tuple[list[Row], list[Entry]]] = {name: ([], []) for name in folders.values()}
  first = next(iter(parts))
  for row in rows:
    parts[folders[_first_folder(_path(row))]][0].append(row)
  for entry in skipped:
    parts[folders.get(_first_folder(entry[0]), first)][1].append(entry)
  return {name: part for name, part in parts.items() if part[0]}


def _by_column(
  reader, rows: list[Row], skipped: list[Entry], split: str | None, named: Sequence[str]
) -> dict[str, tuple[list[Row], list[Entry]]]:
  """As `parts_of`, of rows that name their splits. Raises UserError: a name that none can have."""
  names = ", ".join(sorted(set(named) - {""}))
  if split or not all(named):
    why = "without --split each is one" if split else f"since {rows[named.index('')].name} has none"
    reader.notes.append(
      f"the splits {names} of the rows are put into one, {split or 'train'!r}, {why}"
    )
    return {split or "train": (rows, skipped)}
  parts: dict[str, tuple[list[Row], list[Entry]]] = {name: ([], []) for name in sorted(set(named))}
  for name in parts:
    try:
      check_name("a split", name)
    except UserError as error:
      raise UserError(
        f"rows name their splits, but {error}; or put all into --split NAME"
      ) from None
  if len(parts) > 1:
    reader.notes.append(f"the rows name their splits: {names}; --split NAME puts all into one")
  for row, name in zip(rows, named, strict=True):
    parts[name][0].append(row)
  next(iter(parts.values()))[1].extend(skipped)
  return parts


def _named_split(row: Row) -> str:
  """The split that a row says itself, by its usual name; "" = none."""
  said = row.where.said if isinstance(row.where, Where) else None
  name = said.split if said else ""
  return SPLITS.get(name.lower(), name)


def _path(row: Row) -> str:
  """Of the first file of a row of a folder."""
  return next(iter(row.where.media.values()))


def _first_folder(path: str) -> str:
  return os.path.normpath(path).split(os.sep)[0]
