"""One owner at a time: who may write into a folder, on one machine, on a shared file system and in
an object store.

`Owner` claims a folder for a process. Claims are numbered files FOLDER/owner/N.json that say host,
process and start; a claim is made only where no file of that number is (a hard link, O_EXCL, or a
conditional put), so of two processes that want the same number one gets it. The highest number owns
the folder. Beside it, N.beat changes every few seconds, and says "ended" when the owner has ended
well.

Whether an owner lives is told on its own machine by its process (number and start time, so a number
that is used again deceives nobody), elsewhere by its beat: it is dead when the beat did not change
for `_LEASE` seconds of the clock of the process that looks. Nobody's clock is compared with
another's. A process that was stopped (SIGSTOP, a machine asleep) for longer than that has lost its
folder to the next number; it finds out by `check`, which must be called before anything is written
that the next owner would write too.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from mmjax import files
from mmjax.config import UserError

log = logging.getLogger("mmjax")

FOLDER = "owner"
# Seconds between signs of life; without one for so long an owner elsewhere is dead.
_BEAT, _LEASE = 10.0, 60.0
_ENDED = "ended"
_MOST = 2**16  # bytes of a claim or a beat
_SETTLE = 2.0  # seconds until a store without conditional puts shows whose write came last


class Owner:
  """This process as the owner of `folder` (a path or URL, which is made). Use it in `with`; it is
  free again after that.

  what: names the folder in messages, such as "--workdir runs/a". wait: seconds to wait for an owner
  that lives, 0 = refuse at once. stopped: asked while waiting; True ends it. Raises UserError: the
  folder has another owner (host, process and start are named), or cannot be written.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    what: str,
    *,
    wait: float = 0.0,
    stopped: Callable[[], bool] = bool,
  ):
    self._folder = files.as_path(folder) / FOLDER
    self._what, self._claim = what, dict(_myself(), token=uuid.uuid4().hex)
    self._over, self._lost = threading.Event(), ""
    self._made = not files.is_url(folder) and not self._folder.parent.exists()
    with _write_errors(self._folder, what):
      self._number = self._acquire(wait, stopped)
    self._beats = threading.Thread(target=self._go_on_beating, name="owner", daemon=True)
    self._beats.start()

  def __enter__(self) -> Owner:
    return self

  def __exit__(self, *_) -> None:
    """Gives the folder free; what cannot be written then is found dead by the next owner. A folder
    that was made here and in which nothing was written vanishes again.
    """
    self._over.set()
    self._beats.join(timeout=10)  # it may be writing to a disk that does not answer
    with contextlib.suppress(Exception):
      self._beat(_ENDED)
      if self._made and [path.name for path in self._folder.parent.iterdir()] == [FOLDER]:
        self._remove([self._number])
        os.rmdir(self._folder)  # unless somebody claims it in this moment
        os.rmdir(self._folder.parent)

  def check(self) -> None:
    """Raises UserError: another process has taken over, because this one gave no sign of life for
    too long."""
    self._look()
    self.check_known()

  def check_known(self) -> None:
    """`check` by what the last look at the disk found, at most some seconds ago."""
    if self._lost:
      raise UserError(
        f"{self._what} was taken over by {self._lost}: this process was stopped, or "
        f"cut off from the disk, for more than {_LEASE:.0f} s. It ends here and writes nothing more"
      )

  # -- Claiming ------------------------------------------------------------------------------------

  def _acquire(self, wait: float, stopped: Callable[[], bool]) -> int:
    files.make_folder(self._folder)
    begin, other = time.monotonic(), None
    while True:
      numbers = _numbers(self._folder)
      newest = max(numbers, default=0)
      if newest and (other is None or other.number != newest):
        other = _Other(self._folder, newest, self._claim["machine"])
      if not newest or other is None or other.is_gone():
        if self._claims(newest + 1):
          self._remove(numbers)
          return newest + 1
        time.sleep(0.05)
        continue
      waited = time.monotonic() - begin
      if stopped() or other.lives and waited >= wait:
        after = f", still after {waited:.0f} s" if wait else ""
        raise UserError(
          f"{self._what} is in use by {other.name}{after}. "
          "Wait for that process or end it, or choose another folder"
        )
      if not other.told:
        other.told = True
        log.warning(
          "%s is in use by %s; waiting at most %.0f s for %s",
          self._what,
          other.name,
          *((wait, "it to end") if other.lives else (_LEASE, "a sign of life from it")),
        )
      time.sleep(min(1.0, _BEAT / 10))

  def _claims(self, number: int) -> bool:
    """Makes the claim of this number, unless another process has it, or a higher one."""
    text = json.dumps(self._claim)
    files.make_folder(self._folder)  # another owner may have left nothing
    if not _create(self._folder / f"{number}.json", text):
      return False
    self._number = number
    if not self._is_mine():
      (self._folder / f"{number}.json").unlink(missing_ok=True)
      return False
    self._beat("0")
    return True

  def _remove(self, numbers: list[int]) -> None:
    for number in numbers:
      for ending in ("json", "beat"):
        with contextlib.suppress(Exception):
          (self._folder / f"{number}.{ending}").unlink()

  # -- Keeping -------------------------------------------------------------------------------------

  def _newest(self) -> int:
    """The number that owns the folder. Where somebody has deleted this process's claim, and nobody
    made another, it is made again."""
    newest = max(_numbers(self._folder), default=0)
    if newest < self._number:
      files.make_folder(self._folder)
      _create(self._folder / f"{self._number}.json", json.dumps(self._claim))
    return max(newest, self._number)

  def _is_mine(self) -> bool:
    newest = self._newest()
    return (
      newest == self._number
      and _read_claim(self._folder, newest).get("token") == self._claim["token"]
    )

  def _look(self) -> None:
    # A disk or store that fails shows where something is written.
    with contextlib.suppress(Exception):
      if not self._lost and not self._is_mine():
        self._lost = _name(_read_claim(self._folder, self._newest()))

  def _go_on_beating(self) -> None:
    count = 0
    while not self._over.wait(_BEAT) and not self._lost:
      count += 1
      self._look()
      with contextlib.suppress(Exception):
        self._beat(str(count))

  def _beat(self, text: str) -> None:
    """In place: on NFS, a file that is renamed may look the old one for longer."""
    (self._folder / f"{self._number}.beat").write_text(text)


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
  """A folder beside `out` to write into, which becomes `out` when the block ends well, and vanishes
  when it does not. What processes of this machine left there that were killed vanishes too.

  Raises UserError: `out` exists and is not empty (now, or when another process was faster), or
  cannot be written.
  """
  check_free(out)
  out = Path(out).absolute()
  me = _myself()
  machine = f".{out.name}.{zlib.crc32(me['machine'].encode()):08x}"
  temporary = out.with_name(f"{machine}-{me['pid']}-{me['process_start'].replace(' ', '_')}.tmp")
  for left in out.parent.glob(f"{glob.escape(machine)}-*-*.tmp*"):
    pid, start = left.name.removeprefix(f"{machine}-").split(".tmp")[0].split("-", 1)
    if not re.fullmatch("[0-9]{1,9}", pid) or _started(int(pid)).replace(" ", "_") != start:
      shutil.rmtree(left, ignore_errors=True)
  try:
    with files.disk_errors(out, f"{out} cannot be written"):
      temporary.mkdir(parents=True)
      yield temporary
      temporary.rename(out)  # over an empty folder too; one with files that came meanwhile stays
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: str | os.PathLike) -> None:
  """Raises UserError unless `out` can become a new folder of this machine: absent or empty, in a
  folder that can be written."""
  files.check_local(out)
  out = Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out}: exists and is not empty. Choose another folder, or delete it")
  parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise UserError(f"{out}: {parent} cannot be written. Choose another folder")


class _Other:
  """The owner of a claim as another process sees it. lives: whether that is known; told: whether
  the user knows of it."""

  def __init__(self, folder: Any, number: int, machine: str):
    self.number, self.lives, self.told = number, False, False
    self._folder, self._claim = folder, _read_claim(folder, number)
    self._here = self._claim.get("machine") == machine
    self._beat, self._since = _read_beat(folder, number), time.monotonic()
    self.name = _name(self._claim)

  def is_gone(self) -> bool:
    """Whether it has ended or is dead; asked again and again, for only time tells of a process
    elsewhere."""
    beat = _read_beat(self._folder, self.number)
    if beat == _ENDED:
      return True
    if self._here:
      pid = self._claim.get("pid")
      start = _started(pid) if type(pid) is int else ""
      self.lives = bool(start) and start == self._claim.get("process_start")
      return not self.lives
    if beat != self._beat:
      self._beat, self._since, self.lives = beat, time.monotonic(), True
    return time.monotonic() - self._since >= _LEASE


def _create(path: Any, text: str) -> bool:
  """Writes a file or object that is not there yet, whole; False: another one is there, or was
  first. Raises OSError."""
  if files.is_url(path):
    return _create_object(str(path), text.encode())
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  temporary.write_text(text)
  try:
    with contextlib.suppress(OSError):  # also one that says "exists" of its own success, over NFS
      os.link(temporary, path)
    if os.stat(temporary).st_nlink == 2:
      return True
  finally:
    temporary.unlink(missing_ok=True)
  try:
    with open(path, "x") as file:  # no hard links here, or somebody was first
      file.write(text)
    return True
  except FileExistsError:
    return False


def _create_object(url: str, content: bytes) -> bool:
  """The same in a store. Where it knows no conditional puts the last of two writers gets the
  object, and the other must look again."""
  fs, name = fsspec.core.url_to_fs(url)
  if fs.exists(name):
    return False
  try:
    fs.pipe_file(name, content, mode="create")
  except Exception:
    if fs.exists(name):
      return False
    fs.pipe_file(name, content)
  time.sleep(_SETTLE)
  return fs.cat_file(name) == content


def _numbers(folder: Any) -> list[int]:
  """The numbers of the claims that a folder has."""
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return [
    int(number)
    for number, _, ending in (name.partition(".") for name in names)
    if number.isascii() and number.isdigit() and ending == "json"
  ]


def _read_claim(folder: Any, number: int) -> dict[str, Any]:
  """A claim; {} where it is gone or half-written."""
  try:
    claim = json.loads(_read(folder / f"{number}.json"))
    return claim if isinstance(claim, dict) else {}
  except (ValueError, RecursionError):
    return {}


def _read_beat(folder: Any, number: int) -> str:
  return _read(folder / f"{number}.beat")


def _read(path: Any) -> str:
  """The text of a file or object, which somebody may be writing anew: in a store, in one
  request. "" where there is none, or what no owner has written. Raises OSError.
  """
  try:
    if not files.is_url(path):
      return files.read_file(path, _MOST).decode("utf-8", "replace")
    fs, name = fsspec.core.url_to_fs(str(path))
    return fs.cat_file(name).decode("utf-8", "replace")
  except FileNotFoundError:
    return ""
  except OSError as error:
    if error.errno in (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EFBIG):  # a pipe, a folder
      return ""
    raise


def _name(claim: dict[str, Any]) -> str:
  if not claim:
    return "another process"
  return f"process {claim.get('pid')} on host {claim.get('host')}, started {claim.get('started')}"


# -- Processes -------------------------------------------------------------------------------------


def _myself() -> dict[str, Any]:
  """Who this process is. machine: equal for processes that see each other's numbers (containers
  have numbers of their own)."""
  host, pid = socket.gethostname(), os.getpid()
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    machine = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
  except OSError:
    machine = host
  started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
  return dict(host=host, machine=machine, pid=pid, process_start=_started(pid), started=started)


def _started(pid: int) -> str:
  """When a process of this machine was started, as the system says it; "" where there is none (or
  its end is not yet collected)."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
  except FileNotFoundError:
    if Path("/proc/self/stat").exists():
      return ""
  except (ProcessLookupError, IndexError):
    return ""
  return subprocess.run(
    ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True
  ).stdout.strip()


@contextlib.contextmanager
def _write_errors(folder: Any, what: str) -> Iterator[None]:
  hint = ". Free space, or choose another folder"
  try:
    with files.store_errors(folder, f"{what} cannot be written", hint):
      yield
  except (NotADirectoryError, FileExistsError) as error:
    above = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    raise UserError(
      f"{what} cannot be written: {above} is no folder. Choose another folder"
    ) from error
  except OSError as error:
    raise UserError(f"{what} cannot be written: {error.strerror or error}{hint}") from error
