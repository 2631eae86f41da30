"""Runs `mmjax` commands on hostile input, each in a fresh process, and says what no input may
cause.

A fork server imports the package once; every command then starts in some milliseconds, and one that
hangs or eats the memory harms nobody else.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
from typing import NamedTuple

SECONDS = 20  # of its own work; a machine with other work to do may take WAIT
WAIT = 6 * SECONDS
MEMORY = 500 * 2**20  # bytes above the input's size

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
  [
    "mmjax.cli",
    "mmjax.data.builders.convert",
    "mmjax.data.show",
    "mmjax.interop.export",
    "tensorflow_datasets.core.example_serializer",
    "av",
    "cv2",
    "soundfile",
    "pyarrow.parquet",
  ]
)


class Outcome(NamedTuple):
  code: int
  out: str
  err: str
  memory: int  # bytes that the process took beyond what it had at the start


def run(folder: pathlib.Path, *words: str) -> Outcome:
  """`mmjax WORDS` in FOLDER/work with data in FOLDER/data. Checks what must hold for every input:

  a known exit code, one line on a mistake, no unexpected exception, no hang, bounded memory,
  nothing written but in FOLDER/data and FOLDER/out, no code of the input run (it would leave a file
  "it_ran").
  """
  for name in ("data", "out", "work", "home"):
    (folder / name).mkdir(exist_ok=True)
  before = _state(folder)
  size = sum(path.stat().st_size for path in (folder / "work").rglob("*") if path.is_file())
  process = _server.Process(target=_child, args=(str(folder), list(words)))
  process.start()
  process.join(WAIT)
  if process.is_alive():
    process.kill()
    process.join()
    raise AssertionError(f"{' '.join(words)}: still running after {WAIT} s")
  assert process.exitcode != -signal.SIGXCPU, f"{' '.join(words)}: worked for over {SECONDS} s"
  text = {
    name: (folder / f"{name}.txt").read_text(errors="replace") for name in ("stdout", "stderr")
  }
  result = folder / "result.json"
  assert result.exists(), f"the process died with {process.exitcode}\n{text['stderr'][-2000:]}"
  code, memory = json.loads(result.read_text())
  for path in (result, folder / "stdout.txt", folder / "stderr.txt"):
    path.unlink()
  outcome = Outcome(code, text["stdout"], text["stderr"], memory)
  assert code in (0, 1, 2), outcome
  assert "Traceback" not in outcome.err and "(--debug shows where)" not in outcome.err, outcome.err[
    -3000:
  ]
  if code:
    lines = [line for line in outcome.err.splitlines() if line.startswith("mmjax: ")]
    assert len(lines) == 1, outcome.err[-3000:]
  for character in outcome.out + outcome.err:
    assert character in "\n\t\u200d" or character.isprintable(), (
      f"raw {character!r} on the terminal: {outcome}"
    )
  assert memory < MEMORY + size, f"{memory / 2**20:.0f} MiB for an input of {size} bytes"
  assert _state(folder) == before, "written outside of its folders"
  assert not list(folder.rglob("it_ran")), "code of the input ran"
  return outcome


def _state(folder: pathlib.Path) -> dict[str, str]:
  """{path: digest} of all that a command must leave alone."""
  mine = [folder / name for name in ("data", "out", "stdout.txt", "stderr.txt", "result.json")]
  found = {}
  for path in sorted(folder.rglob("*")):
    if not any(path == own or own in path.parents for own in mine):
      regular = path.is_file() and not path.is_symlink()
      found[os.fsdecode(os.fsencode(path))] = (
        hashlib.md5(path.read_bytes()).hexdigest() if regular else ""
      )
  return found


def _child(folder: str, words: list[str]) -> None:
  os.environ.update(
    MMJAX_DATA=f"{folder}/data",
    HOME=f"{folder}/home",
    JAX_PLATFORMS="cpu",
    PYTHONDONTWRITEBYTECODE="1",
  )
  os.chdir(f"{folder}/work")
  resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
  for number, name in ((1, "stdout"), (2, "stderr")):
    target = os.open(f"{folder}/{name}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(target, number)
  sys.stdout, sys.stderr = (
    os.fdopen(n, "w", encoding="utf-8", errors="surrogateescape") for n in (1, 2)
  )
  start = _resident()
  from mmjax import cli

  try:
    code = cli.main(words)
  except SystemExit as stop:
    code = stop.code if isinstance(stop.code, int) else 1
  sys.stdout.flush()
  sys.stderr.flush()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  pathlib.Path(folder, "result.json").write_text(json.dumps([code, max(0, peak - start)]))
  os._exit(0)


def _resident() -> int:
  """Bytes of memory that this process holds."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()
