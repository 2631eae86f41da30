"""Folders of this machine that stand for a URL of an object store.

`Mirror` copies what a run writes to its URL, `bring` copies a data set from its URL.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import fsspec
from etils import epath

from mmjax.config import UserError
from mmjax.files import as_path, is_url, listing, local_path, store_errors, write_whole

log = logging.getLogger("mmjax")

_SECONDS = 30.0  # between copies of what a run writes, besides those that a checkpoint asks for
_origins: dict[Path, epath.Path] = {}  # folders of this machine that stand for a URL


class Mirror:
  """`folder`: where to write the files of a place. The place itself, or for a URL a folder of this
  machine that is copied there.

  `upload` copies what has changed, and so does a thread from time to time; leaving `with`
  uploads for the last time. Each has a folder of its own, for several may write to one place (a
  run and `mmjax eval` of it); what a killed one left goes with the next.
  active: False = this process writes nothing. check: called before files are copied; what it
  raises, `upload` raises.
  """

  def __init__(
    self, place: str | os.PathLike, *, active: bool = True, check: Callable[[], None] | None = None
  ):
    self._check = check or (lambda: None)
    self.place = as_path(place) if is_url(place) else Path(place)
    self.folder, self._remote = Path(place), is_url(place) and active
    self._uploaded: dict[Path, tuple[int, int]] = {}
    self._lock, self._over = threading.Lock(), threading.Event()
    self._thread: threading.Thread | None = None
    self._alive: BinaryIO | None = None  # locked as long as the folder is in use

  def __enter__(self) -> Mirror:
    return self

  def __exit__(self, kind, *_) -> None:
    if self._thread is None:
      return
    self._over.set()
    self._thread.join(timeout=10)
    with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
      self.upload()
      shutil.rmtree(self.folder.parent, ignore_errors=True)
      if self._alive:
        self._alive.close()

  def fetch(self, *names: str) -> None:
    """Brings the files of these names that the place has: first of all, and again those that others
    write too.

    Raises UserError: the store cannot be read.
    """
    if not self._remote:
      return
    if self._thread is None:
      self._make_folder()
      self._thread = threading.Thread(target=self._upload_often, name="mirror", daemon=True)
      self._thread.start()
    with self._lock, store_errors(self.place, f"{self.place} cannot be read"):
      for name in names:
        if (self.place / name).exists():
          write_whole(self.folder / name, (self.place / name).read_bytes())
          self._uploaded[self.folder / name] = _stamp(self.folder / name)

  def _make_folder(self) -> None:
    root = cache_dir() / "runs" / _key(self.place)
    try:
      root.mkdir(parents=True, exist_ok=True)
      with open(root / ".lock", "w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        for left in root.glob("*/.alive"):
          with open(left) as other, contextlib.suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(dir=root)) / self.place.name
        self.folder.mkdir()
        self._alive = open(self.folder.parent / ".alive", "wb")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
    except OSError as error:
      raise UserError(
        f"{root}: cannot be written ({error.strerror}), where files for {self.place} are made. "
        "Set MMJAX_CACHE to another folder"
      ) from error

  def upload(self) -> None:
    """Copies what is new or has changed; returns when the store has it. Raises UserError."""
    if self._thread is None:
      return
    self._check()
    with self._lock, store_errors(self.place, f"{self.place} cannot be written"):
      fs = fsspec.core.url_to_fs(str(self.place))[0]
      for path in sorted(self.folder.rglob("*")):
        if path.name.startswith(".") or path.name.endswith(".tmp") or not path.is_file():
          continue
        stamp = _stamp(path)  # before the copy: what is added meanwhile goes with the next
        if self._uploaded.get(path) != stamp:
          fs.put_file(str(path), str(self.place / path.relative_to(self.folder).as_posix()))
          self._uploaded[path] = stamp

  def name(self, path: str | os.PathLike) -> str:
    """A path in the folder as the user knows it."""
    return (
      str(self.place / Path(path).relative_to(self.folder).as_posix())
      if self._remote
      else str(path)
    )

  def _upload_often(self) -> None:
    while not self._over.wait(_SECONDS):
      # A store that stays away ends the run at the next checkpoint.
      with contextlib.suppress(UserError, OSError):
        self.upload()


def _stamp(path: Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


def cached(url: str) -> Path:
  """The folder of this machine that stands for a URL with data; `bring` fills it."""
  place = as_path(url)
  root = cache_dir() / "remote" / f"{place.name}-{_key(place)}"
  _origins[root] = place
  return root


def origin(path: str | os.PathLike) -> epath.Path | None:
  """The URL that a path below a folder of `cached` stands for; None for any other path."""
  path = Path(path)
  return next(
    (
      url / path.relative_to(root).as_posix()
      for root, url in _origins.items()
      if path.is_relative_to(root)
    ),
    None,
  )


def bring(folder: Path) -> Path:
  """The folder of this machine with what the URL of a folder below one of `cached` holds; copied
  once a machine.

  It is named by content: what a process reads stays as it is when the URL gets other files. Returns
  `folder` where the URL has none.
  Raises UserError: the store cannot be read, or the disk not be written.
  """
  url = origin(folder)
  if url is None:
    return folder
  with store_errors(url, f"{url} cannot be read"):
    listed = listing(url)
  if not listed:
    return folder
  root = folder.parent / hashlib.blake2b(json.dumps(listed).encode(), digest_size=6).hexdigest()
  copy, partial = root / folder.name, root.with_name(f".{root.name}.partial")
  try:
    root.parent.mkdir(parents=True, exist_ok=True)
    # One of several processes of a machine copies, the others wait.
    with open(root.with_name(f".{root.name}.lock"), "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if copy.is_dir():
        return copy
      shutil.rmtree(partial, ignore_errors=True)
      log.info(
        "copying %s (%.1f MB) to %s", url, sum(size for size, _ in listed.values()) / 1e6, copy
      )
      targets = {name: partial / folder.name / name for name in listed}
      for place in targets.values():
        place.parent.mkdir(parents=True, exist_ok=True)
      with store_errors(url, f"{url} cannot be copied to {copy}"):
        fs, path = fsspec.core.url_to_fs(str(url))
        fs.get(
          [f"{path.rstrip('/')}/{name}" for name in listed],
          [str(place) for place in targets.values()],
        )
      for name, (size, _) in listed.items():
        if targets[name].stat().st_size != size:
          raise UserError(f"{url}/{name}: changed while it was copied. Start again")
      os.replace(partial, root)
  except OSError as error:
    raise UserError(
      f"{copy}: cannot be written ({error.strerror}). Free space or set MMJAX_CACHE to another "
      "folder"
    ) from error
  return copy


def _key(path: epath.Path) -> str:
  return hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()


def cache_dir() -> Path:
  """Where this machine keeps what belongs to URLs."""
  return local_path(os.environ.get("MMJAX_CACHE") or "~/.cache/mmjax")
