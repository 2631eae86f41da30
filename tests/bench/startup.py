"""Seconds from the start of `mmjax train` to its first step, on the quickstart: imports, data,
initialisation and a warm compile cache.

python tests/bench/startup.py --runs 3      # the first run fills the cache and is not counted
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]


def start(config: str) -> float:
  """Wall seconds until the line of step 1; the run is then ended."""
  with tempfile.TemporaryDirectory() as folder:
    command = [
      sys.executable,
      "-m",
      "mmjax.cli",
      "train",
      "--config",
      config,
      "--workdir",
      f"{folder}/run",
    ]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    begin = time.monotonic()
    run = subprocess.Popen(
      command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []
    for line in run.stdout:
      lines.append(line)
      if line.startswith("step 1/"):
        break
    seconds = time.monotonic() - begin
    run.kill()
    run.wait()
  if not lines or not lines[-1].startswith("step 1/"):
    sys.exit("the run did not get to its first step:\n" + "".join(lines))
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
  parser.add_argument("--runs", type=int, default=3)
  options = parser.parse_args()
  start(options.config)
  for _ in range(options.runs):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = start(options.config)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
      f"{seconds:.1f} s to the first step, {processor:.1f} s of processor time; load "
      f"{os.getloadavg()[0]:.1f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
