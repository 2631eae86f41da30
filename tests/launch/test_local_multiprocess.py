"""launch/local_multiprocess.sh with real processes: equal to one process, stopped, killed,
restarted.
"""

import os
import signal
import socket

import pytest

from tests.e2e.commands import QUICKSTART, SMALL, example_ids, metrics, read_until, run, start
from tests.launch.jobs import Launcher, newest_step, training_processes

SHORT = (
  *SMALL,
  "--config.train.steps=12",
  "--config.checkpoint.every=4",
  "--config.evaluation.every=12",
)
TRAIN = ("--config", QUICKSTART, *SHORT)


pytestmark = pytest.mark.slow  # minutes of real processes


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, embedded_data):
  return Launcher(tmp_path_factory.mktemp("launcher"), SHORT)


@pytest.fixture(scope="module")
def unbroken(launcher, tmp_path_factory):
  """(run folder, output) of two processes that nothing interrupted."""
  folder = tmp_path_factory.mktemp("unbroken")
  return folder, launcher.run(folder)


@pytest.fixture(autouse=True)
def nothing_left(launcher):
  """Ends what a failed test has left."""
  yield
  launcher.end()


def test_two_processes_train_as_one_process_with_two_devices_does(unbroken, tmp_path):
  folder, printed = unbroken
  assert {line[:4] for line in printed.splitlines() if line} == {
    "[0] ",
    "[1] ",
  } and "[0] done: 12 steps" in printed
  run("train", *TRAIN, "--workdir", tmp_path, devices=2)
  ours, theirs = metrics(folder), metrics(tmp_path)
  assert example_ids(ours) == example_ids(theirs)
  for mine, other in zip(ours, theirs, strict=True):
    if "loss" in mine:
      assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("whom", ["launcher", "process 1"])
def test_a_stopped_job_saves_one_step_in_all_processes_and_goes_on(
  launcher, unbroken, tmp_path, whom
):
  process = launcher.start(tmp_path)
  read_until(process, "step 6/12")
  os.kill(process.pid if whom == "launcher" else training_processes(tmp_path)[1], signal.SIGTERM)
  printed = process.communicate(timeout=200)[0]
  assert (
    process.returncode == 75
    and f"at step {newest_step(tmp_path)} of 12; checkpoint saved" in printed
  ), printed
  assert 6 <= newest_step(tmp_path) < 12 and not training_processes(tmp_path)
  assert f"at step {newest_step(tmp_path)} of 12" in launcher.run(tmp_path)
  assert metrics(tmp_path) == metrics(unbroken[0])


def test_a_signal_that_comes_before_the_first_step_is_not_lost(launcher, tmp_path):
  process = launcher.start(tmp_path)
  read_until(process, "examples an epoch")
  process.send_signal(signal.SIGTERM)
  printed = process.communicate(timeout=200)[0]
  assert process.returncode == 75 and "before step 1 of 12" in printed, printed


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_job_runs_again_to_the_same_end(
  launcher, unbroken, tmp_path, victim
):
  process = launcher.start(tmp_path)
  read_until(process, "step 6/12")
  os.kill(training_processes(tmp_path)[victim], signal.SIGKILL)
  printed = process.communicate(timeout=300)[0]
  assert process.returncode == 0, printed
  assert (
    "ending the other 1" in printed
    and "restart 1 of 10" in printed
    and "[0] done: 12 steps" in printed
  )
  assert metrics(tmp_path) == metrics(unbroken[0]) and not training_processes(tmp_path)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_whose_peer_died_ends_by_itself(embedded_data, tmp_path, victim):
  """As on a cluster, where no launcher of ours ends it: it fails with 1, or JAX's heartbeat ends it
  with SIGABRT.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  jobs = [
    start(
      "train",
      *TRAIN,
      "--workdir",
      tmp_path,
      "--config.train.steps=4000",
      "--config.evaluation.every=4000",
      MMJAX_PROCESSES="2",
      MMJAX_COORDINATOR=f"localhost:{port}",
      MMJAX_PROCESS_ID=str(i),
      MMJAX_HEARTBEAT_SECONDS="10",
    )
    for i in range(2)
  ]
  read_until(jobs[0], "step 6/4000")
  jobs[victim].kill()
  printed = jobs[1 - victim].communicate(timeout=60)[0]
  assert jobs[1 - victim].returncode in (1, -signal.SIGABRT), printed


def test_bad_usage_is_not_run_again(launcher, tmp_path):
  printed = launcher.run(tmp_path, extra=("--config.train.stepz=3",), code=2)
  assert "unknown key train.stepz. Did you mean 'steps'" in printed and "restart:" not in printed
