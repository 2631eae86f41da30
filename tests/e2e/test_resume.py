"""A run that is killed, stopped or moved goes on exactly where it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import pytest

from tests.e2e.commands import (
  QUICKSTART,
  SMALL,
  example_ids,
  metrics,
  parameters,
  read_until,
  run,
  run_processes,
  start,
)


def train(workdir, *extra):
  return ("train", "--config", QUICKSTART, "--workdir", str(workdir), *SMALL, *extra)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, embedded_data):
  """A run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("unbroken")
  run(*train(folder))
  return folder


def assert_same(folder, unbroken):
  assert metrics(folder) == metrics(unbroken)
  assert parameters(folder) == parameters(unbroken)


def test_killed_while_compiling_stepping_and_evaluating_equals_the_unbroken_run(unbroken, tmp_path):
  for words in ("examples an epoch", "step 7/24", "step 12/24"):
    process = start(*train(tmp_path))
    read_until(process, words)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  run(*train(tmp_path))
  assert_same(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
def test_killed_on_all_cores_and_gone_on_on_one_equals_the_unbroken_run(embedded_data, tmp_path):
  """The threads of XLA, by which sums are cut, stay those that the run began with."""
  larger = (
    "--config.train.batch_size=64",
    "--config.evaluation.every=0",
    "--config.model.width=64",
    *(f"--config.model.encoders.{m}.width=64" for m in ("image", "text")),
  )
  a, b = tmp_path / "a", tmp_path / "b"
  run(*train(a, *larger), NPROC="")
  process = start(*train(b, *larger), NPROC="")
  read_until(process, "step 10/24")
  process.send_signal(signal.SIGKILL)
  process.communicate()
  cores = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(cores)})  # the command inherits it
  try:
    printed = run(*train(b, *larger), NPROC="").stdout
  finally:
    os.sched_setaffinity(0, cores)
  assert f"keeps the {len(cores)} CPU thread(s)" in printed
  assert_same(b, a)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_equals_the_unbroken_run(unbroken, tmp_path):
  begin = time.monotonic()
  run(*train(tmp_path / "timed"))
  seconds = time.monotonic() - begin  # of a whole run on this machine
  moments, kills, folder = random.Random(0), 0, tmp_path / "killed"
  for _ in range(20):
    process = start(*train(folder))
    try:
      process.communicate(timeout=moments.uniform(0.05, 0.9) * seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      kills += 1
  run(*train(folder))
  assert kills >= 5
  assert_same(folder, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_75(unbroken, tmp_path, number):
  process = start(*train(tmp_path))
  read_until(process, "step 6/24")
  process.send_signal(number)
  printed = process.communicate()[0]
  assert process.returncode == 75 and "checkpoint saved" in printed, printed
  run(*train(tmp_path))
  assert_same(tmp_path, unbroken)


def test_a_finished_run_says_so(unbroken):
  assert "is complete" in run(*train(unbroken)).stdout


@pytest.fixture(scope="module")
def eight(tmp_path_factory, embedded_data):
  """The whole run on eight devices, and a copy of it stopped at step 12."""
  whole, half = tmp_path_factory.mktemp("eight"), tmp_path_factory.mktemp("half")
  run(*train(whole), devices=8)
  process = start(*train(half), devices=8)
  read_until(process, "step 12/24")
  process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == 75
  return whole, half


@pytest.mark.parametrize(
  ("processes", "devices", "workers"),
  [(1, 1, 3), (1, 4, 2), pytest.param(2, 1, 0, marks=pytest.mark.slow), (4, 1, 0)],
)
def test_resumed_elsewhere_sees_the_same_ids_in_the_same_order(
  eight, tmp_path, processes, devices, workers
):
  whole, half = eight
  folder = tmp_path / "run"
  subprocess.run(["cp", "-r", str(half), str(folder)], check=True)
  words = train(folder, f"--config.data.workers={workers}")
  if processes > 1:
    run_processes(processes, *words, devices=devices)
  else:
    run(*words, devices=devices)
  assert example_ids(metrics(folder)) == example_ids(metrics(whole))
  for mine, theirs in zip(metrics(folder), metrics(whole), strict=True):
    if "loss" in mine:
      assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
