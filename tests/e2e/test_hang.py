"""Real processes, one of them stopped: the other notices, names it, leaves its stacks, and the same
command goes on.
"""

from __future__ import annotations

import signal
import socket
import time

import pytest

from tests.e2e.commands import QUICKSTART, SMALL, metrics, read_until, run_processes, start

HANG_SECONDS = 15  # compiling takes less than four times as long


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])  # 0 hosts JAX's coordination service
def test_a_stopped_process_is_noticed_and_named(embedded_data, tmp_path, stopped):
  words = [
    "train",
    "--config",
    QUICKSTART,
    "--workdir",
    str(tmp_path),
    *SMALL,
    "--config.train.steps=3000",
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
      f"--config.train.hang_seconds={HANG_SECONDS}",
      MMJAX_COORDINATOR=f"localhost:{port}",
      MMJAX_PROCESSES="2",
      MMJAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]
  try:
    assert "step 120/3000" in read_until(jobs[0], "step 120/3000")[-1]
    jobs[stopped].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    printed = jobs[1 - stopped].communicate(timeout=60)[0]
    seconds = time.monotonic() - begin
  finally:
    for job in jobs:
      job.kill()
      job.wait()
  (line,) = [line for line in printed.splitlines() if line.startswith("mmjax: ")]
  assert jobs[1 - stopped].returncode == 1 and seconds < 2 * HANG_SECONDS, printed[-2000:]
  assert (
    f"mmjax: process {1 - stopped} of 2 hangs" in line
    and f"no sign of life from process {stopped} (for" in line
  )
  assert "a collective" in line
  (stacks,) = (tmp_path / "stacks").glob(f"process-{1 - stopped}-*.txt")
  assert str(stacks) in line and "loop.py" in stacks.read_text()
  saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  run_processes(2, *[w.replace("steps=3000", f"steps={saved + 2}") for w in words], devices=1)
  assert [row["step"] for row in metrics(tmp_path)] == list(range(1, saved + 3))
