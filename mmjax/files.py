"""Paths of this machine and URLs of object stores (gs://, s3://), behind one door.

An object store knows whole objects: no folders, no appending, no renaming. What needs those is done
in a folder of this machine, see remote.py. Everything else goes to the URL directly, through etils
and fsspec (extras `s3` and `gcs`), which find endpoint and credentials as the stores' own tools do
(AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from etils import epath

from mmjax.config import UserError
from mmjax.errors import StoreError
from mmjax.printing import shorten

log = logging.getLogger("mmjax")

# Bytes of a file that is read whole: a record of a data set cannot hold more.
LARGEST = 2**31 - 2**20
_GROWTH = 2**24  # bytes that a file may have beyond its size, as those of /proc do
_TEXT = 2**28  # bytes of a text that a run has written
_LONGEST = 255  # bytes of a name
SMALL = 2**20  # bytes of an array that is worth no file
_STORES = ("s3", "gs")
# Errors of a program, which no store is to blame for.
_BUGS = (
  TypeError,
  AttributeError,
  NameError,
  LookupError,
  ArithmeticError,
  AssertionError,
  MemoryError,
)
_DISK_ERROR = re.compile(
  r"No space left|Disk quota|File too large|Permission denied|Read-only file|Not a directory|OS "
  r"error"
)


def away(path: str | os.PathLike, why: str) -> StoreError:
  """What to raise for a file of data that was there and is not any more, or has changed."""
  return StoreError(
    f"{path} went away while it was read ({why}). Bring it back and start the same command again: "
    "a run goes on from its last checkpoint",
    why,
  )


def is_url(path: str | os.PathLike) -> bool:
  return "://" in os.fspath(path)


def no_folder(path: str | os.PathLike) -> str:
  """What is said of a path that is not a folder."""
  return f"{os.fspath(path)}: no such folder" + (" (it is a file)" if os.path.exists(path) else "")


def is_object(path: str) -> bool:
  """Whether a path is the URL of an object of a known kind of store."""
  return path.partition("://")[0] in _STORES and is_url(path)


def as_path(path: str | os.PathLike) -> epath.Path:
  """An absolute path of this machine, or a URL as it is. Raises UserError: no path, or a store that
  is not known.
  """
  if not is_url(path):
    return epath.Path(local_path(path)).absolute()
  protocol = os.fspath(path).split("://")[0]
  if protocol not in _STORES:
    raise UserError(
      f"{path}: no such kind of store. Write s3://bucket/folder, gs://bucket/folder or a path of "
      "this machine"
    )
  for name in ("s3", "gs", "gcs"):
    # other processes, and TensorStore in this one, write too: a listing that is remembered is wrong
    fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
  return epath.Path(path)


def local_path(path: str | os.PathLike) -> Path:
  """A path of this machine, with ~ as the home folder. Raises UserError: no file could have it, or
  there is no such home.
  """
  text = os.path.expanduser(os.fspath(path))
  if text.startswith("~"):
    home = text.split(os.sep)[0]
    raise UserError(
      f"{shorten(path)}: no home folder is known for {home}. Write the path in full, or ./{home} "
      "for a file of that name"
    )
  _check_path(text)
  return Path(text)


def _check_path(path: str | os.PathLike) -> None:
  """Raises UserError: no file could have this path."""
  text = os.fspath(path)
  try:
    os.lstat(text)
  except ValueError as error:  # a NUL, or what no name of a file is made of
    raise UserError(f"{path!r:.200} cannot be a path: it holds {_stray(text)!r}") from error
  except OSError as error:
    # The system says so only where the folders above are there.
    if error.errno == errno.ENAMETOOLONG or any(
      len(os.fsencode(part)) > _LONGEST for part in text.split(os.sep)
    ):
      raise UserError(f"{shorten(path)} cannot be a path: it is too long") from error


def check_local(path: str | os.PathLike) -> None:
  """Raises UserError: `path` is no path, or a URL, where only runs and evaluations are written."""
  if is_url(path):
    raise UserError(
      f"{shorten(path)}: this is written on this machine: name a place here, and copy it to a "
      "store then"
    )
  _check_path(path)


def _stray(text: str) -> str:
  """The first character that no path can have."""
  for character in text:
    try:
      if b"\0" not in os.fsencode(character):
        continue
    except UnicodeEncodeError:
      pass
    return character
  return text


def make_folder(path: Path | epath.Path) -> None:
  """Makes a folder and those above it; in a store there are none, and an attempt to make one could
  make a bucket.
  """
  if not is_url(path):
    path.mkdir(parents=True, exist_ok=True)


def check_name(what: str, name: str) -> None:
  """Refuses what could not be a part of a path everywhere, or would leave its folder. Raises
  UserError. what: "a data set", ...
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f"{what} cannot be called {name!r:.200}: use small letters, digits and _, a letter first"
    )


def check_output(path: str | os.PathLike, *, folder: bool = False) -> None:
  """Raises UserError: no file (or `folder` to write files in) can be made at `path`, or replaced.
  To be asked before the work whose results go there; folders that are missing count as made.
  Of URLs only `folder` may be one, which a `Mirror` writes.
  """
  if is_url(path) and folder:
    return
  check_local(path)
  path = Path(path).absolute()
  if not folder and _is_special(path) and os.access(path, os.W_OK):
    return
  if os.path.isdir(path) and not folder:
    raise UserError(f"{path} is a folder. Give a file name, such as {path / 'out'}{path.suffix}")
  home = path if folder else path.parent
  home = next(place for place in (home, *home.parents) if os.path.lexists(place))
  if not os.path.isdir(home):
    raise UserError(f"{path} cannot be written: {home} is no folder. Choose another place")
  if not os.access(home, os.W_OK | os.X_OK):
    raise UserError(
      f"{path} cannot be written: you may not write in {home}. Choose another place, or change "
      "its permissions"
    )
  if not folder and os.path.lexists(path) and not _may_replace(path, home):
    raise UserError(
      f"{path} cannot be written: it belongs to somebody else, and in {home} only they may "
      "replace it. Choose another name"
    )


def _may_replace(path: Path, home: Path) -> bool:
  """Whether a file may be replaced in a folder that can be written: in one like /tmp only by the
  owner of either.
  """
  above = os.stat(home)
  mine = os.geteuid() in (0, os.lstat(path).st_uid, above.st_uid)
  return mine or not above.st_mode & stat.S_ISVTX


def _is_special(path: Path) -> bool:
  """Whether a pipe or a device is there, such as /dev/stdout or /dev/null."""
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return False
  return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def write_whole(path: Path, content: str | bytes) -> None:
  """Writes a file of this machine so that it is there whole or not at all: readers see the old one
  or the new one. Raises OSError.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
  try:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_output(path: str | os.PathLike, content: str | bytes) -> None:
  """`write_whole` at a place that a user has named: a pipe or a device, such as /dev/stdout, is
  written to as it is, never replaced. Raises OSError.
  """
  if _is_special(Path(path)):
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
  else:
    write_whole(Path(path), content)


def replace_file(path: Path, text: str) -> None:
  """`write_whole`. Raises UserError."""
  try:
    write_whole(path, text)
  except OSError as error:
    raise UserError(
      f"{path}: cannot be written ({error.strerror or error}). Free space or give another folder"
    ) from error


@contextlib.contextmanager
def _turned(place: str | os.PathLike, turn: Callable[[Exception], Exception]) -> Iterator[None]:
  """Raises `turn(error)` for what the store of `place`, or the way there, says. Errors at paths of
  this machine, and those of a program, stay what they are."""
  try:
    yield
  except (UserError, *_BUGS):
    raise
  except Exception as error:
    told = turn(error) if is_url(place) else error
    if told is error:
      raise
    raise told from error


def store_errors(
  place: str | os.PathLike, what: str, hint: str = ""
) -> contextlib.AbstractContextManager:
  """Turns what the store of `place`, or the way there, says into one line, UserError "WHAT: REASON
  HINT".
  """
  return _turned(place, lambda error: UserError(f"{what}: {reason(error)}{hint}"))


@contextlib.contextmanager
def disk_errors(place: str | os.PathLike, what: str, hint: str = "") -> Iterator[None]:
  """Turns what the disk or the object store of `place` says, which libraries wrap in many types,
  into one line.
  """
  try:
    with store_errors(place, what, hint):
      yield
  except UserError:
    raise
  except Exception as error:
    match = _DISK_ERROR.search(str(error))
    if not isinstance(error, OSError) and not match:
      raise
    reason = getattr(error, "strerror", None) or (match[0] if match else str(error).split("\n")[0])
    raise UserError(
      f"{what}: {reason}{hint or '. Free space, or choose another folder'}"
    ) from error


def _asking(path: str | os.PathLike) -> contextlib.AbstractContextManager:
  """Turns what the store of a URL, or the way there, says into FileNotFoundError, which is an
  answer, or StoreError.
  """

  def turn(error: Exception) -> Exception:
    if isinstance(error, StoreError):
      return error
    why = reason(error)
    text = f"{path} cannot be read: {why}"
    return (
      FileNotFoundError(text) if isinstance(error, FileNotFoundError) else StoreError(text, why)
    )

  return _turned(path, turn)


def reason(error: Exception) -> str:
  """Why a store did not do what it was asked, and how to mend it."""
  if isinstance(error, StoreError):
    return error.why
  if isinstance(error, ImportError):
    return f"{str(error).splitlines()[0]}; pip install 'mmjax[s3]' or 'mmjax[gcs]'"
  text = (
    getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0] or type(error).__name__
  )
  if isinstance(error, FileNotFoundError) and "exist" not in text:
    text = f"nothing there ({text})"
  return (
    f"{text.rstrip('.')}. Check the bucket's name and permissions, and this machine's credentials "
    "and endpoint"
  )


def sizes(folder: str | os.PathLike) -> dict[str, int]:
  """{name relative to `folder`: bytes} of every file below it, sorted; {} where there is none."""
  return {name: size for name, (size, _) in listing(folder).items()}


def listing(folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
  """{name: (bytes, mark)}, see `size_and_mark`."""
  with _asking(folder):
    fs, root = fsspec.core.url_to_fs(str(as_path(folder)))
    root = root.rstrip("/") + "/"
    found = {
      path[len(root) :]: _facts(info)
      for path, info in fs.find(root, detail=True).items()
      if path.startswith(root) and not path.endswith("/")
    }
  return dict(sorted(found.items()))


def _facts(info: dict) -> tuple[int, int]:
  mark = next(
    (str(info[name]) for name in ("ETag", "etag", "md5Hash", "mtime") if info.get(name)), ""
  )
  return int(info["size"]), int(hashlib.blake2b(mark.encode(), digest_size=6).hexdigest(), 16)


def read_range(path: str, offset: int, size: int) -> bytes:
  """`size` bytes of an object from `offset` on; fewer where it ends before. Raises
  FileNotFoundError, StoreError.
  """
  with _asking(path):
    fs, name = fsspec.core.url_to_fs(str(as_path(path)))
    return fs.cat_file(name, start=offset, end=offset + size)


def read_object(url: str, most: int = LARGEST) -> bytes:
  """The bytes of an object. Raises FileNotFoundError, OSError (EFBIG) for more than `most` bytes,
  StoreError.
  """
  size, _ = size_and_mark(url)
  if size > most:
    raise OSError(errno.EFBIG, f"{size / 2**20:.0f} MiB, more than {most / 2**20:.0f} MiB", url)
  return read_range(url, 0, size)


def open_binary(path: str | os.PathLike) -> io.BufferedReader | _Object:
  """A file or object to read from, with seeking. It and its methods raise OSError; of an object
  FileNotFoundError, StoreError.
  """
  return _Object(path) if is_url(path) else open_file(path)


def open_file(path: str | os.PathLike) -> io.BufferedReader:
  """A regular file of this machine, links followed. Raises OSError: also for a pipe, socket or
  device, which could block for good, and for what no file can be called.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except ValueError as error:  # a NUL, or half a character
    raise OSError(errno.EINVAL, "no file can be called so", repr(path)) from error
  try:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
      raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
  except OSError:
    os.close(descriptor)
    raise
  return open(descriptor, "rb")


def read_file(path: str | os.PathLike, most: int = LARGEST) -> bytes:
  """The bytes of a regular file. Raises OSError: as `open_file`, and (EFBIG) for more than `most`
  bytes.
  """
  with open_file(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > most:
      raise OSError(
        errno.EFBIG, f"{size / 2**20:.0f} MiB, more than {most / 2**20:.0f} MiB", os.fspath(path)
      )
    room = min(most, size + _GROWTH)
    data = file.read(room + 1)
  if data is None:  # one of /proc that would make its reader wait
    raise OSError(errno.EAGAIN, "nothing to read", os.fspath(path))
  if len(data) > room:  # it grew, or is one of those that do not know their size
    raise OSError(errno.EFBIG, f"more than {room / 2**20:.0f} MiB", os.fspath(path))
  return data


def read_text(path: str | os.PathLike) -> str:
  """The text of a regular file, or of an object, that a run has written. Raises OSError: as
  `read_file`; ValueError: it is no UTF-8.
  """
  if is_url(path):
    return as_path(path).read_text()
  return read_file(path, _TEXT).decode()


def read_json(path: str | os.PathLike) -> Any:
  """The JSON of `read_text`. Raises OSError; ValueError: it is none."""
  return parse_json(read_text(path))


def parse_json(text: str) -> Any:
  """What a JSON text says. Raises ValueError: it is none, or nested too deep."""
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError("JSON that is nested too deep") from error


def files_below(folder: str | os.PathLike) -> tuple[list[Path], list[tuple[Path, str]]]:
  """(the files of a folder and of those below it, sorted; (folder, why) of each that cannot be
  listed). Links to folders are not followed. Raises UserError: it cannot be listed itself.
  """
  found: list[Path] = []
  closed: list[tuple[Path, str]] = []

  def note(error: OSError) -> None:
    place, why = Path(os.fspath(error.filename)), error.strerror or str(error)
    if place == Path(folder):
      raise UserError(f"{folder} cannot be read ({why}). Change its permissions, or name another")
    closed.append((place, why))

  for place, _, names in os.walk(os.fspath(folder), onerror=note):
    found += [Path(place, name) for name in names]
  return sorted(found), sorted(closed)


class _Object(io.RawIOBase):
  def __init__(self, path: str | os.PathLike):
    with _asking(path):
      fs, name = fsspec.core.url_to_fs(str(as_path(path)))
      self._path, self._file = path, fs.open(name, "rb")

  def readinto(self, buffer) -> int:
    with _asking(self._path):
      return self._file.readinto(buffer)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True


def size_and_mark(path: str | os.PathLike) -> tuple[int, int]:
  """(bytes, a number that changes when the content does: the time in ns, or what the store says).

  Raises OSError; of an object FileNotFoundError or StoreError.
  """
  if not is_url(path):
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
  with _asking(path):
    fs, name = fsspec.core.url_to_fs(str(as_path(path)))
    return _facts(fs.info(name))


def find(pattern: str) -> list[str]:
  """The URLs that a pattern with *, ? and [] names, sorted. Raises UserError: the store cannot be
  read.

  Not by fsspec's glob, which takes a folder that cannot be listed for an empty one.
  """
  with store_errors(pattern, f"{pattern} cannot be read"):
    fs, name = fsspec.core.url_to_fs(str(as_path(pattern)))
    bucket, *parts = name.split("/")
    found = [bucket]
    for part in parts:
      if glob.has_magic(part):
        found = [
          path
          for folder in found
          for path in _ls(fs, folder)
          if fnmatch.fnmatchcase(path, f"{glob.escape(folder)}/{part}")
        ]
      else:
        found = [f"{folder}/{part}" for folder in found]
    return sorted(
      fs.unstrip_protocol(path) for path in found if glob.has_magic(parts[-1]) or fs.exists(path)
    )


def _ls(fs, folder: str) -> list[str]:
  try:
    return [path.rstrip("/") for path in fs.ls(folder, detail=False)]
  except FileNotFoundError:
    return []


def array_on_disk(beside: str | os.PathLike, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An array of zeros whose memory the system may write to the disk of `beside` and take back, for
  what is larger than memory. Its file has no name and vanishes with it. Small arrays are plain.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  if size < SMALL:
    return np.zeros(shape, dtype)
  folder: Path | None = None
  if not is_url(beside):
    path = Path(beside).absolute()
    folder = next(p for p in (path, *path.parents) if p.is_dir())
  with tempfile.TemporaryFile(dir=folder) as file:
    os.posix_fallocate(file.fileno(), 0, size)  # a full disk would end the process later
    return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


# -- Data ------------------------------------------------------------------------------------------
