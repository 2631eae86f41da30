"""Jobs of several real processes, started by launch/local_multiprocess.sh."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from tests.e2e.commands import QUICKSTART, environment
from tests.launch.fakes import LAUNCH, ROOT


class Launcher:
  """Starts launch/local_multiprocess.sh with an `mmjax` on PATH that is this interpreter's; `words`
  go to each job.
  """

  def __init__(self, folder: pathlib.Path, words: tuple[str, ...]):
    self.bin, self.words, self.jobs = folder / "bin", words, {}
    self.bin.mkdir()
    program = self.bin / "mmjax"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mmjax.cli "$@"\n')
    program.chmod(0o755)

  def start(
    self,
    workdir,
    *options: str,
    extra: tuple[str, ...] = (),
    processes: int = 2,
    output: Any = subprocess.PIPE,
  ) -> subprocess.Popen:
    env = environment(PYTHONUNBUFFERED="1", PATH=f"{self.bin}:{os.environ['PATH']}")
    words = (
      str(processes),
      "--backoff",
      "0",
      *options,
      "--config",
      QUICKSTART,
      *self.words,
      "--workdir",
      str(workdir),
      *extra,
    )
    job = subprocess.Popen(
      ["bash", str(LAUNCH / "local_multiprocess.sh"), *words],
      env=env,
      cwd=ROOT,
      text=True,
      stdout=output,
      stderr=subprocess.STDOUT,
    )
    self.jobs[job] = workdir
    return job

  def run(self, workdir, *options: str, code: int = 0, **settings) -> str:
    process = self.start(workdir, *options, **settings)
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == code, f"exit code {process.returncode}\n{printed[-4000:]}"
    return printed

  def end(self) -> None:
    """Kills what is left of the jobs: the launchers first, which would start others."""
    for job in self.jobs:
      job.kill()
      job.wait()
    for workdir in self.jobs.values():
      for pid in training_processes(workdir).values():
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
    self.jobs.clear()


def training_processes(workdir) -> dict[int, int]:
  """{process number: id} of the processes that train in this folder."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      words = (path / "cmdline").read_bytes().split(b"\0")
      variables = (path / "environ").read_bytes().split(b"\0")
    except OSError:
      continue
    if b"mmjax.cli" in words and os.fsencode(str(workdir)) in words:
      found.update(
        {
          int(v.split(b"=")[1]): int(path.name)
          for v in variables
          if v.startswith(b"MMJAX_PROCESS_ID=")
        }
      )
  return found


def newest_step(workdir) -> int:
  return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
