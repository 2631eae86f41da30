"""What makes a checkpoint complete: manifest.json, the last file in it, with the size and CRC-32 of
every other file.

Orbax notices missing files and broken indices, but stores tensors without checksums; the manifest
notices every changed byte.
A folder without a manifest was never finished. The manifest guards itself by a checksum of its own
content. Object stores keep checksums of their own, and reading a checkpoint twice costs there: of a
large object the manifest has only the size.
"""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from mmjax import files as stores
from mmjax.config import UserError

NAME = "manifest.json"
_COMMITTED = "commit_success.txt"  # Orbax writes it after the manifest, for object stores
SMALL = 1 << 22  # bytes
_CHUNK = 1 << 20  # fits a core's cache
_THREADS = 4


class Corrupt(Exception):
  """A checkpoint that is half-written or damaged. The message says which file and what is wrong
  with it.
  """


def write(folder: epath.Path, **facts: Any) -> None:
  """Sums up every file under `folder`; `facts` (JSON values) are kept with it."""
  sizes = {
    name: size for name, size in stores.sizes(folder).items() if name not in (NAME, _COMMITTED)
  }
  names, stored = list(sizes), stores.is_url(folder)
  with ThreadPoolExecutor(_THREADS) as pool:
    sums = list(
      pool.map(
        lambda name: [sizes[name], None] if stored and sizes[name] > SMALL else _sum(folder / name),
        names,
      )
    )
  _put(folder, {**facts, "files": dict(zip(names, sums, strict=True))})


def update(folder: epath.Path, **facts: Any) -> None:
  """Changes facts of a finished checkpoint, atomically."""
  _put(folder, {**read(folder), **facts})


def read(folder: epath.Path) -> dict[str, Any]:
  """The facts and {"files": {name: [size, CRC-32]}}; of a large object [size, None]. Raises
  Corrupt, UserError.
  """
  try:
    with _opened(folder / NAME) as file:
      content = json.loads(file.read())
    body = content["content"]
    if content["crc32"] != zlib.crc32(_canonical(body)):
      raise Corrupt(f"{NAME} is damaged")
  except FileNotFoundError as error:
    raise Corrupt(f"it was never finished ({NAME} is missing)") from error
  except OSError as error:
    raise Corrupt(f"{NAME} cannot be read ({error.strerror or error})") from error
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise Corrupt(f"{NAME} is damaged") from error
  return body


def verify(folder: epath.Path, items: Sequence[str] | None = None) -> None:
  """Reads every file (of the named items, sub-folders of the checkpoint) and compares. Raises
  Corrupt, UserError.
  """
  check_content(folder, check_structure(folder, items))


def check_structure(folder: epath.Path, items: Sequence[str] | None = None) -> list[str]:
  """Compares names, sizes, and the content of small files: after it, the checkpoint can be read
  without surprises.

  Returns the names of the large files, whose content remains to be checked by `check_content`.
  Raises Corrupt, UserError.
  """
  files = read(folder)["files"]
  with stores.store_errors(folder, f"checkpoint {folder} cannot be read"):
    sizes = stores.sizes(folder)
  names = [name for name in files if items is None or name.split("/")[0] in items]
  large = [name for name in names if files[name][0] > SMALL]
  for name in names:
    if name not in sizes:
      raise Corrupt(f"{name} is missing")
    if sizes[name] != files[name][0]:
      raise Corrupt(f"{name} has {sizes[name]} bytes instead of {files[name][0]}")
  check_content(folder, [name for name in names if name not in large])
  return large


def check_content(folder: epath.Path, names: Sequence[str]) -> None:
  """Compares the checksums of the named files, but of large objects, which have none. Raises
  Corrupt, UserError.
  """
  files = read(folder)["files"]

  def check(name: str) -> None:
    try:
      if _sum(folder / name) != files[name]:
        raise Corrupt(f"{name} is damaged: its checksum differs")
    except FileNotFoundError as error:
      raise Corrupt(f"{name} is missing") from error
    except OSError as error:
      raise Corrupt(f"{name} cannot be read ({error.strerror or error})") from error

  with ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(check, [name for name in names if files[name][1] is not None]))


def _put(folder: epath.Path, content: dict[str, Any]) -> None:
  text = json.dumps({"crc32": zlib.crc32(_canonical(content)), "content": content})
  if stores.is_url(folder):  # an object store writes a whole object or none
    (folder / NAME).write_text(text)
    return
  stores.write_whole(Path(folder / NAME), text)


def _sum(path: epath.Path) -> list[int]:
  """[size, CRC-32] of a file."""
  size = crc = 0
  # One buffer for the whole file: new memory for each part costs more than the checksum of it.
  buffer = memoryview(bytearray(_CHUNK))
  with _opened(path) as file:
    while count := file.readinto(buffer):
      size, crc = size + count, zlib.crc32(buffer[:count], crc)
  return [size, crc]


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[io.BufferedReader | io.RawIOBase]:
  """A file of a checkpoint, to read. Raises OSError; UserError: the store does not answer, which
  says nothing of the checkpoint.
  """
  try:
    with stores.open_binary(path) as file:
      yield file
  except stores.StoreError as error:
    raise UserError(str(error)) from error


def _canonical(content: Any) -> bytes:
  return json.dumps(content, sort_keys=True).encode()
