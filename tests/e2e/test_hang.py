"""Real processes, one of them stopped: the other notices, names it, leaves its stacks, and the same
command goes on.
"""

from __future__ import annotations

import re
import signal
import socket
import time

import pytest

from mmjax.config import UserError
from mmjax.state.checkpoint import find_checkpoint
from tests.e2e.commands import QUICKSTART, SMALL, metrics, read_until, run_processes, start

HANG_SECONDS = 15  # at least
STEPS = 20_000  # more than are done before the process is stopped


def wait_for_checkpoint(folder, seconds=120.0):
  """A checkpoint is written while steps go on: until it is whole."""
  until = time.monotonic() + seconds
  while True:
    try:
      return find_checkpoint(folder)
    except UserError:
      assert time.monotonic() < until, "no checkpoint was written"
    time.sleep(0.1)


@pytest.fixture(scope="module")
def hang_seconds(embedded_data, tmp_path_factory):
  """train.hang_seconds for this machine, which may be busy: as long as a whole short run takes, so
  that a start, which may take four times as long, is no hang.
  """
  folder, begin = tmp_path_factory.mktemp("short"), time.monotonic()
  words = ["train", "--config", QUICKSTART, "--workdir", str(folder), *SMALL]
  run_processes(2, *words, "--config.train.steps=2", "--config.evaluation.every=0", devices=1)
  return max(HANG_SECONDS, round(time.monotonic() - begin))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])  # 0 hosts JAX's coordination service
def test_a_stopped_process_is_noticed_and_named(hang_seconds, tmp_path, stopped):
  words = [
    "train",
    "--config",
    QUICKSTART,
    "--workdir",
    str(tmp_path),
    *SMALL,
    f"--config.train.steps={STEPS}",
    "--config.evaluation.every=0",
    "--config.checkpoint.every=100",
    "--allow-change",
  ]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  jobs = [
    start(
      *words,
      f"--config.train.hang_seconds={hang_seconds}",
      MMJAX_HEARTBEAT_SECONDS=str(4 * hang_seconds),  # JAX's own patience stays the longer one
      MMJAX_COORDINATOR=f"localhost:{port}",
      MMJAX_PROCESSES="2",
      MMJAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]
  try:
    assert f"step 120/{STEPS}" in read_until(jobs[0], f"step 120/{STEPS}")[-1]
    wait_for_checkpoint(tmp_path)
    jobs[stopped].send_signal(signal.SIGSTOP)
    printed = jobs[1 - stopped].communicate(timeout=10 * hang_seconds)[0]
  finally:
    for job in jobs:
      job.kill()
      job.wait()
  (line,) = [line for line in printed.splitlines() if line.startswith("mmjax: ")]
  assert jobs[1 - stopped].returncode == 1, printed[-2000:]
  waited = int(re.search(r"did not end within (\d+) s", line)[1])  # what the machine took apart
  assert hang_seconds - 1 <= waited < 2 * hang_seconds
  assert (
    f"mmjax: process {1 - stopped} of 2 hangs" in line
    and f"no sign of life from process {stopped} (for" in line
  )
  assert "a collective" in line
  (stacks,) = (tmp_path / "stacks").glob(f"process-{1 - stopped}-*.txt")
  assert str(stacks) in line and "loop.py" in stacks.read_text()
  saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  run_processes(2, *[w.replace(f"steps={STEPS}", f"steps={saved + 2}") for w in words], devices=1)
  assert [row["step"] for row in metrics(tmp_path)] == list(range(1, saved + 3))
