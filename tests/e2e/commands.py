"""Running whole commands in processes of their own, on the embedded data, with a model small enough
to start in seconds.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
SMALL = [
  f"--config.{setting}"
  for setting in (
    "train.steps=24",
    "train.batch_size=16",
    "model.width=16",
    "data.image.size=32",
    "model.encoders.image.width=16",
    "model.encoders.image.depth=1",
    "model.encoders.image.heads=2",
    "model.encoders.image.patch=8",
    "model.encoders.text.width=16",
    "model.encoders.text.depth=1",
    "model.encoders.text.heads=2",
    "checkpoint.every=4",
    "evaluation.every=12",
    "log.every=1",
    "log.tensorboard=False",
  )
]
# And all time/..., lost/...
TIMING = {"time", "examples_per_second", "mfu", "data_wait_fraction", "memory", "goodput"}


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
  env = {k: v for k, v in os.environ.items() if not k.startswith("MMJAX_")}
  env.update(
    JAX_PLATFORMS="cpu",
    MMJAX_DATA=os.environ["MMJAX_DATA"],
    MMJAX_CPU_DEVICES=str(devices),
    PYTHONPATH=str(ROOT),
    **extra,
  )
  return env


def command(*words: str) -> list[str]:
  return [sys.executable, "-m", "mmjax.cli", *map(str, words)]


def run(
  *words: str, devices: int = 1, code: int | None = 0, seconds: float = 600, **extra: str
) -> subprocess.CompletedProcess:
  """Runs `mmjax WORDS` for at most `seconds`, checks its exit code, returns what it printed."""
  done = subprocess.run(
    command(*words),
    env=environment(devices, **extra),
    capture_output=True,
    text=True,
    timeout=seconds,
  )
  assert code is None or done.returncode == code, (
    f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
  )
  return done


def start(*words: str, devices: int = 1, **extra: str) -> subprocess.Popen:
  """Starts `mmjax WORDS`; its lines, errors included, come from .stdout."""
  return subprocess.Popen(
    command(*words),
    env=environment(devices, PYTHONUNBUFFERED="1", **extra),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def read_until(process: subprocess.Popen, words: str) -> list[str]:
  """Lines of a started process up to the first one with `words` in it (or its end)."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if words in line:
      break
  return lines


def run_processes(count: int, *words: str, devices: int, **extra: str) -> list[str]:
  """Runs one job in `count` real processes (gloo), each with `devices` simulated devices; returns
  what each printed.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  jobs = [
    start(
      *words,
      devices=devices,
      MMJAX_COORDINATOR=f"localhost:{port}",
      MMJAX_PROCESSES=str(count),
      MMJAX_PROCESS_ID=str(i),
      **extra,
    )
    for i in range(count)
  ]
  printed = [job.communicate(timeout=600)[0] for job in jobs]
  assert all(job.returncode == 0 for job in jobs), "\n".join(printed)[-4000:]
  return printed


def metrics(folder: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl without the keys that measure time and memory."""
  rows = [
    json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
  ]
  return [
    {k: v for k, v in row.items() if k not in TIMING and not k.startswith(("time/", "lost/"))}
    for row in rows
  ]


def example_ids(rows: list[dict]) -> list[tuple[int, int]]:
  """(step, checksum of the ids of its batch) of the lines of steps."""
  return [(row["step"], row["ids_crc32"]) for row in rows if "loss" in row]


def parameters(folder: pathlib.Path) -> dict[str, bytes]:
  """The bytes of every parameter of the newest checkpoint."""
  import jax
  import numpy as np

  from mmjax.state import checkpoint

  params = checkpoint.load_params(checkpoint.find_checkpoint(folder))
  return {
    jax.tree_util.keystr(path): np.asarray(x).tobytes()
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }


def used(pid: int) -> dict[str, int]:
  """Resident MiB, open files and threads of a process."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  fields = dict(line.split(":", 1) for line in status.splitlines())
  return dict(
    memory=int(fields["VmRSS"].split()[0]) // 1024,
    files=len(os.listdir(f"/proc/{pid}/fd")),
    threads=int(fields["Threads"]),
  )
