"""Notices a run that hangs: writes every thread's stack, says in one line what was waited for, and
ends with exit code 1.

The main thread says what it begins (`at`); if nothing else begins within the bound, the process
hangs: a disk that does not answer, a data source, a device, or a collective that another process
never joins. In runs of several processes each one also writes RUN/heartbeats/I, from a thread that
goes on while the main one waits. A process that waits long looks at the others' files:
whose does not change any more is stopped (SIGSTOP), dead, or on a machine that is gone, and is
named. JAX's coordination service also knows heartbeats, but not while the process that hosts it (0)
is the one that is stopped; and it ends a process before anything is written.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping

from mmjax import files

# What may well take longer than others: how many times train.hang_seconds.
PATIENCE = {"the compiler": 4, "start-up (opening data, restoring)": 4}
_BEAT = 10.0  # seconds between heartbeats, at most


class Watchdog:
  """Ends this process when it makes no progress. Use it in `with`; it sleeps until `start`.

  seconds: the bound on one wait; 0 = off. silence: the bound where another process gives no sign of
  life any more, if lower.
  end: called with the exit code; `os._exit`, since a main thread that hangs cannot be asked to
  leave.
  """

  def __init__(
    self,
    seconds: float,
    *,
    silence: float = math.inf,
    process: int = 0,
    processes: int = 1,
    end: Callable[[int], None] = os._exit,
  ):
    self._seconds, self._quiet = seconds, min(seconds, silence)
    self._process, self._processes, self._end = process, processes, end
    self._beat = min(_BEAT, self._quiet / 10)
    self._now = ("start-up (opening data, restoring)", time.monotonic())
    self._peers: dict[
      int, tuple[str, float]
    ] = {}  # process: (its heartbeat, when that was first seen)
    self._waiting = 0.0
    self._over = threading.Event()
    self._threads: list[threading.Thread] = []

  def start(self, workdir: str | os.PathLike) -> None:
    """From now on, with stacks and heartbeats under `workdir` (a folder or URL that exists)."""
    self._folder = files.as_path(workdir)
    self.at(self._now[0])
    if self._seconds:
      loops = [self._watch, self._exchange] if self._processes > 1 else [self._watch]
      self._threads = [
        threading.Thread(target=loop, name="watchdog", daemon=True) for loop in loops
      ]
      for thread in self._threads:
        thread.start()

  def __enter__(self) -> Watchdog:
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    for thread in self._threads:
      thread.join(timeout=2)  # it may be writing to a disk that does not answer

  def at(self, what: str) -> None:
    """What the main thread waits for from now on."""
    self._now = (what, time.monotonic())

  def alive(self) -> None:
    """A part of it is done (a batch of an evaluation)."""
    self.at(self._now[0])

  # -- Threads -------------------------------------------------------------------------------------

  def _watch(self) -> None:
    tick = min(1.0, self._quiet / 10)
    before, watched, excused = time.monotonic(), self._now, 0.0
    while not self._over.wait(tick):
      now, current = time.monotonic(), self._now
      if current is not watched:
        watched, excused = current, 0.0
      # This whole process was stopped, or its machine asleep: nobody waited.
      if now - before > 3 * tick:
        excused += now - before
      before = now
      what, since = watched
      self._waiting = max(0.0, now - since - excused)
      # A process that starts late has an old heartbeat in the folder until then.
      patience = PATIENCE.get(what, 1)
      silent = self.silent(now) if self._waiting >= self._quiet * patience else {}
      if silent or self._waiting >= self._seconds * patience:
        self._over.set()
        self._end_with(what, silent)

  def _exchange(self) -> None:
    """Writes this process's heartbeat; reads the others' while this process waits suspiciously
    long, and only then.
    """
    folder, count = self._folder / "heartbeats", 0
    while True:
      count += 1
      with contextlib.suppress(Exception):  # a disk that fails shows elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(self._process)).write_text(f"{os.getpid()} {count}\n")
      if self._waiting < self._quiet / 3:
        self._peers = {}
      else:
        for peer in range(self._processes):
          with contextlib.suppress(Exception):
            beat = (folder / str(peer)).read_text()
            if peer != self._process and self._peers.get(peer, ("", 0.0))[0] != beat:
              self._peers[peer] = (beat, time.monotonic())
      if self._over.wait(self._beat):
        return

  def silent(self, now: float) -> dict[int, float]:
    """{process: seconds} of those that were looked at and have given no sign of life for several
    heartbeats.
    """
    quiet = {peer: now - last for peer, (_, last) in sorted(dict(self._peers).items())}
    return {
      peer: seconds
      for peer, seconds in quiet.items()
      if seconds >= max(4 * self._beat, self._quiet / 3)
    }

  # -- The end -------------------------------------------------------------------------------------

  def _end_with(self, what: str, silent: Mapping[int, float]) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = self._folder / "stacks" / f"process-{self._process}-{stamp}.txt"
    written: list[str] = []
    writer = threading.Thread(
      target=lambda: written.append(self._write_stacks(path, what)), daemon=True
    )
    writer.start()
    writer.join(timeout=10)  # the disk may be what hangs
    who = ""
    if silent:
      names = ", ".join(f"process {peer} (for {seconds:.0f} s)" for peer, seconds in silent.items())
      who = f"; no sign of life from {names}: stopped, dead or cut off"
    elif self._processes > 1:
      who = "; every other process gives signs of life"
    line = (
      f"mmjax: process {self._process} of {self._processes} hangs: {what} did not end within "
      f"{self._waiting:.0f} s (train.hang_seconds){who}. Stacks: "
      f"{written[0] if written else 'could not be written'}. Ending with exit code 1; the same "
      "command goes on from the last checkpoint\n"
    )
    os.write(2, line.encode())
    self._end(1)

  def _write_stacks(self, path, what: str) -> str:
    """Every thread's Python stack, to the run folder; to stderr where that fails."""
    with tempfile.TemporaryFile("w+") as file:
      faulthandler.dump_traceback(file, all_threads=True)
      file.seek(0)
      text = f"process {self._process} waited {self._waiting:.0f} s for {what}\n\n{file.read()}"
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
      return str(path)
    except Exception:
      os.write(2, text.encode())
      return "above"
