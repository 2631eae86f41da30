"""Real processes that talk over gloo: one of them is killed again and again, or their number
changes, and the run is the same.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from tests.e2e.commands import SMALL, example_ids, metrics, parameters, read_until
from tests.launch.jobs import Launcher, training_processes

KILLS, STEPS, GRACE = 20, 160, 5
LONG = (
  *SMALL,
  f"--config.train.steps={STEPS}",
  "--config.checkpoint.every=5",
  "--config.evaluation.every=20",
)

pytestmark = pytest.mark.slow  # minutes of real processes


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, embedded_data):
  return Launcher(tmp_path_factory.mktemp("launcher"), LONG)


@pytest.fixture(scope="module")
def unbroken(launcher, tmp_path_factory):
  """A run of two processes with four devices each that nothing interrupted."""
  folder = tmp_path_factory.mktemp("unbroken")
  launcher.run(folder, "--devices", "4")
  return folder


@pytest.fixture(autouse=True)
def nothing_left(launcher):
  """Ends what a failed test has left."""
  yield
  launcher.end()


def step_of(workdir) -> int:
  """The last step that metrics.jsonl has; 0 = none."""
  try:
    return max(
      (json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()),
      default=0,
    )
  except (OSError, ValueError):
    return 0


def wait_until(condition, seconds: float, what: str) -> None:
  begin = time.monotonic()
  while not condition():
    assert time.monotonic() - begin < seconds, what
    time.sleep(0.02)


def test_one_of_two_processes_killed_twenty_times_equals_the_unbroken_run(
  launcher, unbroken, tmp_path
):
  """Lives end at random moments: some a few seconds after their start (joining, restoring,
  compiling), most after a few steps and part of a second (stepping, saving, evaluating)."""
  run, moments, lives, stepped = tmp_path / "run", random.Random(0), [set()], 0
  with open(tmp_path / "printed", "w") as printed:
    job = launcher.start(
      run,
      "--devices",
      "4",
      "--grace",
      str(GRACE),
      extra=(f"--config.train.on_restart={KILLS}",),
      output=printed,
    )
    for kill in range(KILLS):
      wait_until(
        lambda: len(set(training_processes(run).values()) - lives[-1]) == 2,
        2 * GRACE + 20,
        f"no new start after kill {kill}",
      )
      life, start = training_processes(run), step_of(run)
      until = time.monotonic() + (moments.uniform(0.2, 12) if moments.random() < 0.4 else 300)
      steps, rest = moments.randint(1, 6), moments.uniform(0, 0.5)
      while time.monotonic() < until and step_of(run) < start + steps:
        time.sleep(0.02)
      time.sleep(rest)
      assert job.poll() is None, "the job ended before the kills did"
      stepped += step_of(run) > start
      os.kill(life[moments.randrange(2)], signal.SIGKILL)
      lives.append(set(life.values()))
      wait_until(
        lambda: not set(training_processes(run).values()) & lives[-1],
        GRACE + 10,
        "the other process did not end",
      )
    assert job.wait(timeout=500) == 0, (tmp_path / "printed").read_text()[-4000:]
  text = (tmp_path / "printed").read_text()
  assert f"restart {KILLS} of {KILLS} in" in text and f"[0] done: {STEPS} steps" in text
  assert 5 <= stepped < KILLS  # some while stepping, some before
  assert metrics(run) == metrics(unbroken)
  assert parameters(run) == parameters(unbroken)


def test_two_processes_then_four_then_one_see_the_same_examples_in_the_same_order(
  launcher, unbroken, tmp_path
):
  for processes, devices, last in ((2, 4, 10), (4, 2, 20)):
    job = launcher.start(tmp_path, "--devices", str(devices), processes=processes)
    read_until(job, f"step {last}/{STEPS}")
    os.kill(training_processes(tmp_path)[1], signal.SIGTERM)
    printed = job.communicate(timeout=200)[0]
    assert job.returncode == 75 and "checkpoint saved" in printed, printed
  launcher.run(tmp_path, "--devices", "1", processes=1)
  ours, theirs = metrics(tmp_path), metrics(unbroken)
  assert example_ids(ours) == example_ids(theirs)
  for mine, other in list(zip(ours, theirs, strict=True))[:30]:  # rounding grows with the steps
    if "loss" in mine:
      assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
