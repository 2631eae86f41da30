"""WebDataset tars, as img2dataset writes them, read where they are: `KEY.jpg`, `KEY.txt`,
`KEY.json` in plain tars.

A key may have a sound (`KEY.flac`) and a video (`KEY.mp4`) beside a picture or instead of one, and
a class (`KEY.cls`) or questions (in the JSON) beside captions or instead of them.

A tar is read through once for the places of its members (`index_tar`); the index is kept in a cache
folder and made again when the size or time of the tar changes. After that every example is a few
reads at known offsets. Nothing is ever unpacked, so no name in a tar can reach the disk; names with
`..` or a leading `/`, links and devices are left out, and pickles are never read.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmjax import files
from mmjax.config import UserError
from mmjax.data import folders
from mmjax.data.media import ENDINGS
from mmjax.data.readers.cells import Skip, about_media, annotate, broken_text
from mmjax.data.readers.json_stream import Twice, as_object
from mmjax.data.readers.preferences import ROLES, given_in, is_judged
from mmjax.printing import printable

PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")
_VERSION = 5  # of the index files
_PARTS = ("image", "txt", "json", "cls", "audio", "video")  # columns of TarIndex.extents
# Members of a key are read at once where at most so many bytes lie between them.
_NEAR = 1 << 16
_MOST_NAMES = 1_000_000  # of one pattern
_BRACE = r"\{([^{}]*)\}"
_KINDS = {
  "txt": "txt",
  "json": "json",
  "cls": "cls",
  **{ending: name for name, endings in ENDINGS.items() for ending in endings},
}
_MEDIA = [_PARTS.index(name) for name in ("image", "audio", "video")]
_TEXTS = [_PARTS.index(name) for name in ("txt", "json", "cls")]
_log = logging.getLogger("mmjax")


class BadSample(UserError):
  """A key whose texts are of no use; `skip` says why."""

  def __init__(self, message: str, skip: Skip):
    super().__init__(message)
    self.skip = skip


@dataclasses.dataclass(frozen=True)
class TarIndex:
  """Where the pairs of media and texts of one tar are.

  `keys` [N] str, in the order of the tar; `extents` int64 [N, 6, 2]: offset and size of picture,
  .txt, .json, .cls, sound, video (size -1 = absent). `skipped`: [(name, reason)] of what is no
  pair.
  """

  path: str
  keys: np.ndarray
  extents: np.ndarray
  skipped: tuple[tuple[str, str], ...]

  def __len__(self) -> int:
    return len(self.keys)

  def read(
    self,
    row: int,
    language: str = "en",
    columns: Mapping[str, str] | None = None,
    separator: str = ",",
  ) -> dict[str, Any]:
    """Record `row`, its captions taken to be in `language` unless its JSON says otherwise. Raises
    UserError.

    columns {role: key, or several "a+b"} of the JSON; separator: of several labels in a text.
    """
    parts = self._parts(row)
    name = f"{Path(self.path).stem}/{self.keys[row]}"
    try:
      facts = json.loads(parts["json"], object_pairs_hook=as_object) if parts["json"] else {}
      if isinstance(facts, Twice):
        raise ValueError("a key stands twice")
      text = parts["txt"].decode("utf-8-sig") if parts["txt"] is not None else None
      label = parts["cls"].decode().strip() if parts["cls"] else ""
    except (ValueError, RecursionError) as error:
      raise self._bad(row, Skip("broken row", f".txt, .json or .cls: {error}")) from error
    facts = facts if isinstance(facts, dict) else {}
    cells = {
      role: facts.get(f"{role}s", facts.get(role))
      for role in ("question", "answer", "conversation")
    }
    cells |= {
      "conversation": cells["conversation"] or facts.get("messages"),
      "label": label or facts.get("label"),
      "language": facts.get("language"),
    }
    if is_judged(facts):
      cells |= {role: facts.get(role) for role in ROLES}
      cells["preference"] = given_in(cells)
    captions = facts.get("captions") or (text if text is not None else facts.get("caption"))
    if captions or text is not None:
      cells["caption"] = captions
    for role, name in (columns or {}).items():
      several = [facts.get(key) for key in name.split("+")]
      cells[role] = facts.get(name) if name in facts or len(several) == 1 else several
    said = annotate(cells, language, separator=separator)
    kinds = ("image", "audio", "video")
    media = {kind: parts[kind] for kind in kinds if parts[kind] is not None}
    said = said if isinstance(said, Skip) else about_media(said, media)
    if isinstance(said, Skip):
      raise self._bad(row, said)
    return said.record(name, media)

  def _bad(self, row: int, skip: Skip) -> BadSample:
    return BadSample(
      f"{self.path}: {self.keys[row]}: {skip.reason}{skip.detail and f' ({skip.detail})'}", skip
    )

  def has(self, part: str) -> bool:
    """Whether any key has this part ("image", "audio", "video", "txt", "json", "cls")."""
    return bool((self.extents[:, _PARTS.index(part), 1] >= 0).any())

  def _parts(self, row: int) -> dict[str, bytes | None]:
    """{part: its bytes, None = absent}. At a URL members that lie together are read at once: a
    request costs more than a few kilobytes.
    """
    extents = {
      name: extent
      for name, extent in zip(_PARTS, self.extents[row].tolist(), strict=True)
      if extent[1] >= 0
    }
    first, last = (
      min(offset for offset, _ in extents.values()),
      max(offset + size for offset, size in extents.values()),
    )
    together = (
      files.is_url(self.path) and last - first <= sum(size for _, size in extents.values()) + _NEAR
    )
    span = self._bytes(first, last - first) if together else b""
    parts: dict[str, bytes | None] = dict.fromkeys(_PARTS)
    for name, (offset, size) in extents.items():
      start = offset - first
      data = span[start : start + size] if together else self._bytes(offset, size)
      if len(data) != size:
        raise files.away(self.path, f"{self.keys[row]} is cut short")
      parts[name] = data
    return parts

  def _bytes(self, offset: int, size: int) -> bytes:
    if files.is_url(self.path):
      return files.read_range(self.path, offset, size)
    try:
      with files.open_file(self.path) as file:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:
      if error.errno == errno.EIO:  # a spot of the disk, not the file
        raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
      raise files.away(self.path, error.strerror or str(error)) from error


class TarSource:
  """All pairs of media and texts of the tars that a path names: a glob, a brace pattern
  `{00000..00010}.tar`, a folder, or one file.

  `source[i]` -> record with the captions in `languages` (() = all); captions that do not say their
  language count as the first of these, else as English. Tars without any pair are left out with a
  warning, unless all are.
  Raises UserError: nothing found, or no pair at all.
  """

  labels: tuple[str, ...] = ()
  answers: tuple[str, ...] = ()
  values: tuple[str, ...] = ()
  text = "caption"
  first_captions = 0

  def __init__(
    self,
    path: str | os.PathLike,
    languages: Sequence[str] = (),
    data_dir: str | os.PathLike | None = None,
  ):
    self.name, self.languages = "tars", tuple(languages) or ("en",)
    self._all_languages = not languages
    self._indices: list[TarIndex] = []
    self.skipped: Counter[str] = Counter()
    problems = []
    for found in index_tars(expand(path), data_dir):
      if isinstance(found, UserError):
        problems.append(str(found))
        self.skipped["tar without pairs"] += 1
        continue
      self.skipped.update(reason for _, reason in found.skipped)
      self._indices.append(found)
    if not self._indices:
      raise UserError(
        problems[0] + (f" (and {len(problems) - 1} more tars alike)" if len(problems) > 1 else "")
      )
    for problem in problems:
      _log.warning("left out: %s", printable(problem))
    if self.skipped:
      reasons = ", ".join(f"{count} ({reason})" for reason, count in self.skipped.most_common())
      _log.warning("%s: left out %s", printable(path), printable(reasons))
    self._ends = np.cumsum([len(index) for index in self._indices])
    content = hashlib.blake2b(digest_size=6)
    for index in self._indices:
      extents = index.extents if index.has("audio") or index.has("video") else index.extents[:, :4]
      content.update(
        os.path.basename(index.path).encode() + index.keys.astype("U").tobytes() + extents.tobytes()
      )
    self.fingerprint = (
      f"{len(self._indices)} tars: {len(self)} examples, content {content.hexdigest()}"
    )

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    which = int(np.searchsorted(self._ends, index, side="right"))
    tar = self._indices[which]
    record = tar.read(index - int(self._ends[which]) + len(tar), self.languages[0])
    if not self._all_languages:
      record["captions"] = {
        name: texts for name, texts in record["captions"].items() if name in self.languages
      }
    return record | {"label": ""}


def index_tars(
  paths: Sequence[str], data_dir: str | os.PathLike | None = None
) -> Iterator[TarIndex | UserError]:
  """The index of each tar in order, or the UserError about it. Raises StoreError."""

  def one(path: str) -> TarIndex | UserError:
    try:
      return index_tar(path, data_dir)
    except UserError as error:
      return error

  with ThreadPoolExecutor(8) as threads:
    yield from threads.map(one, paths)


def index_tar(path: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> TarIndex:
  """The index of one tar, from data_dir/tar_index if it is still right. Raises UserError: no tar,
  or no pair in it; StoreError.
  """
  path = os.fspath(path) if files.is_url(path) else os.path.abspath(path)
  try:
    size, changed = files.size_and_mark(path)
  except OSError as error:
    raise UserError(f"{path}: no such tar ({error.strerror or error})") from error
  stamp = np.array([_VERSION, size, changed], np.int64)
  name = hashlib.blake2b(path.encode(), digest_size=12).hexdigest()
  cache = folders.data_dir(data_dir or None) / "tar_index" / f"{name}.npz"
  try:
    with np.load(cache, allow_pickle=False) as saved:
      if np.array_equal(saved["stamp"], stamp):
        skipped = tuple(map(tuple, json.loads(str(saved["skipped"]))))
        return TarIndex(path, saved["keys"], saved["extents"], skipped)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass  # absent, or not one of ours: made again below
  index = _scan(path, size)
  out = io.BytesIO()
  np.savez(
    out,
    stamp=stamp,
    keys=index.keys,
    extents=index.extents,
    skipped=np.array(json.dumps(index.skipped)),
  )
  try:
    files.write_whole(cache, out.getvalue())
  except OSError as error:
    _log.warning("cannot keep the index of %s in %s (%s)", path, cache.parent, error.strerror)
  return index


def expand(path: str | os.PathLike | Sequence[str]) -> list[str]:
  """The files that a glob, brace pattern, folder, file or a list of these names. Raises UserError:
  there is none.
  """
  if not isinstance(path, (str, os.PathLike)):
    return [file for part in path for file in expand(part)]
  paths: list[str] = []
  for pattern in _braces(os.fspath(path)):
    if files.is_url(pattern):
      found = files.find(pattern if pattern.endswith(".tar") else f"{pattern.rstrip('/')}/*.tar")
    else:
      pattern = os.path.expanduser(pattern)
      if not glob.has_magic(pattern):
        files.local_path(pattern)
      found = sorted(
        glob.glob(
          os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern
        )
      )
    if not found:
      raise UserError(
        f"{pattern}: no such tar"
        + (f" (from the pattern {path})" if pattern != os.fspath(path) else "")
      )
    paths += found
  return paths


def _scan(path: str, size: int) -> TarIndex:
  """Reads the headers of a tar."""
  samples: dict[str, np.ndarray] = {}
  taken: dict[tuple[str, int], str] = {}  # (key, column) -> member
  several: set[str] = set()
  skipped: list[tuple[str, str]] = []
  try:
    opened = files.open_binary(path)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  try:
    # "r:": plain tars only, random access needs them
    with opened as file, tarfile.open(fileobj=file, mode="r:") as tar:
      for member in _members(tar, skipped):
        name = member.name
        if not member.isfile() or member.issparse():
          if not member.isdir():
            skipped.append((name, "link or device"))
          continue
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
          skipped.append((name, "unsafe name"))
          continue
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, _, kind = base.partition(".")
        kind = kind.lower()
        if not stem:
          continue  # hidden
        last = kind.rpartition(".")[2]
        if last in PICKLES or last not in _KINDS:
          skipped.append((name, "pickle" if last in PICKLES else "ending not read"))
          continue
        if member.offset_data + member.size > size:
          skipped.append((name, "truncated tar"))
          continue
        key, column = f"{folder}/{stem}".lstrip("/"), _PARTS.index(_KINDS[last])
        before = taken.setdefault((key, column), name)
        if key in samples and samples[key][column, 1] >= 0:
          if _dotted(name) and _dotted(before) and name != before:
            several.add(key)
            continue
          if _dotted(name) or not _dotted(before):
            reason = "ending not read" if _dotted(name) and name != before else "duplicate id"
            skipped.append((name, reason))
            continue
          skipped.append((before, "ending not read"))  # a.jpg is the picture of `a`, not a.mask.png
          taken[key, column] = name
        extent = samples.setdefault(key, np.full((len(_PARTS), 2), -1, np.int64))
        extent[column] = member.offset_data, member.size
  except (tarfile.TarError, OSError, ValueError, EOFError) as error:
    with files.open_binary(path) as file:
      zipped = file.read(2) == b"\x1f\x8b"
    hint = (
      "compressed: make it a plain .tar with gunzip"
      if zipped
      else "an empty file"
      if not size
      else str(error)
    )
    raise UserError(f"{path}: not a readable tar ({hint})") from error
  pairs = []
  for key, extent in samples.items():
    if broken_text(key):
      skipped.append((key, "broken text"))
    elif key in several:
      skipped.append((key, "several files of a kind"))
    elif (extent[_MEDIA, 1] < 0).all():
      skipped.append((key, "missing file"))
    elif (extent[_TEXTS, 1] < 0).all():
      skipped.append((key, "no caption"))
    else:
      pairs.append(key)
  if not pairs:
    what = ", ".join(
      f"{count} {reason}"
      for reason, count in Counter(reason for _, reason in skipped).most_common()
    )
    left_out = f"; left out: {what}" if what else ""
    raise UserError(
      f"{path}: no pair of a picture, sound or video and a caption (KEY.jpg with KEY.txt or "
      f"KEY.json){left_out}"
    )
  return TarIndex(path, np.array(pairs), np.stack([samples[key] for key in pairs]), tuple(skipped))


def _dotted(member: str) -> bool:
  """Whether more than an ending stands after the key: a.mask.png."""
  return member.rpartition("/")[2].count(".") > 1


def _members(tar: tarfile.TarFile, skipped: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
  """The members of a tar, or of several one after the other, up to where it breaks off."""
  count = 0
  while True:
    try:
      member = tar.next()
    except (tarfile.TarError, OSError, ValueError, EOFError):
      if not count:
        raise
      skipped.append(("", "truncated tar"))
      return
    if member is None:  # at its end, or at what is no header
      after = _after_zeros(tar)
      if after == tar.offset:
        skipped.append(("", "truncated tar"))
      if after in (None, tar.offset):
        return
      tar.offset = after  # type: ignore[assignment]
      continue
    count += 1
    # Else all headers of a large tar stay in memory.
    tar.members.clear()  # type: ignore[attr-defined]
    yield member


def _after_zeros(tar: tarfile.TarFile) -> int | None:
  """Where the first block that is not zero stands in what `tar` has not read, None = there is
  none.
  """
  file: Any = tar.fileobj
  place = tar.offset
  file.seek(place)
  while chunk := file.read(1 << 20):
    if rest := chunk.lstrip(b"\0"):
      return place + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    place += len(chunk)
  return None


def _braces(pattern: str) -> list[str]:
  """Expands {00000..00010} (keeping leading zeros) and {a,b}. Raises UserError: it cannot be read,
  or names too many files.
  """
  too_many = UserError(
    f"{pattern[:200]}: names more than {_MOST_NAMES:,} files. Name fewer, or the folder that they "
    "are in"
  )
  if (
    math.prod(len(_options(inner, pattern)) for inner in re.findall(_BRACE, pattern)) > _MOST_NAMES
  ):
    raise too_many
  names = [pattern]
  while re.search(_BRACE, names[0]):  # innermost first: all names have as many braces left
    expanded: list[str] = []
    characters = 0
    for name in names:
      before, inner, after = re.split(_BRACE, name, maxsplit=1)
      options = _options(inner, pattern)
      characters += len(options) * len(name)
      if len(expanded) + len(options) > _MOST_NAMES or characters > 256 * _MOST_NAMES:
        raise too_many
      width = len(inner.partition("..")[0]) if isinstance(options, range) else 0
      expanded += [before + str(option).zfill(width) + after for option in options]
    names = expanded
  return names


def _options(inner: str, pattern: str) -> range | list[str]:
  """What stands between two braces: 000..010 as numbers, or a,b."""
  if span := re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inner):
    first, last = int(span[1]), int(span[2])
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)
  if "," in inner:
    return inner.split(",")
  raise UserError(
    f"{pattern[:200]}: cannot read {{{inner[:80]}}}; write {{00000..00010}} or {{a,b}}"
  )
