"""The watchdog: it ends what hangs, names what was waited for and who is silent, and leaves alone
what goes on.
"""

from __future__ import annotations

import threading
import time

import pytest

from mmjax.training.watchdog import Watchdog


def wait_for(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()


@pytest.fixture
def ended():
  """Exit codes that watchdogs asked for."""
  return []


def a_source_that_blocks(released):
  released.wait(20)


def test_a_data_source_that_blocks(tmp_path, ended, capfd):
  released = threading.Event()
  with Watchdog(0.4, end=lambda code: (ended.append(code), released.set())) as watchdog:
    watchdog.start(tmp_path)
    watchdog.at("the data of step 3")
    begin = time.monotonic()
    a_source_that_blocks(released)
    assert time.monotonic() - begin < 5
  assert ended == [1]
  line = capfd.readouterr().err
  assert line.count("\n") == 1 and line.startswith(
    "mmjax: process 0 of 1 hangs: the data of step 3 did not end within"
  )
  (stacks,) = (tmp_path / "stacks").glob("process-0-*.txt")
  assert (
    str(stacks) in line
    and "a_source_that_blocks" in stacks.read_text()
    and "the data of step 3" in stacks.read_text()
  )
  assert not (tmp_path / "heartbeats").exists()  # one process has nobody to tell


def test_progress_keeps_it_quiet(tmp_path, ended):
  with Watchdog(0.5, end=ended.append) as watchdog:
    watchdog.start(tmp_path)
    for i in range(12):
      watchdog.at(f"step {i}")
      time.sleep(0.1)
      watchdog.alive()
  assert not ended and not list(tmp_path.iterdir())


def test_the_compiler_may_take_longer(tmp_path, ended):
  with Watchdog(0.3, end=ended.append) as watchdog:
    watchdog.start(tmp_path)
    watchdog.at("the compiler")
    time.sleep(0.6)
    assert not ended
    assert wait_for(lambda: ended)


def test_off(tmp_path, ended):
  with Watchdog(0, end=ended.append) as watchdog:
    watchdog.start(tmp_path)
    time.sleep(0.3)
  assert not ended and not watchdog._threads


def test_the_silent_one_is_named_and_the_others_are_not(tmp_path, ended, capfd):
  """Three processes: 0 waits, 1 waits but lives, 2 wrote a heartbeat once and no more."""
  (tmp_path / "heartbeats").mkdir()
  (tmp_path / "heartbeats" / "2").write_text("77 1\n")
  others = []
  with (
    Watchdog(600, silence=1.0, process=0, processes=3, end=ended.append) as first,
    Watchdog(600, silence=600, process=1, processes=3, end=others.append) as second,
  ):
    second._beat = 0.1
    second.start(tmp_path)
    first.start(tmp_path)
    first.at("step 9 (its computation, or a collective)")
    assert wait_for(lambda: ended)
  line = capfd.readouterr().err
  assert "process 2 (for" in line and "process 1" not in line and "step 9" in line and not others


def test_all_alive_is_said(tmp_path, ended, capfd):
  with (
    Watchdog(1.0, process=0, processes=2, end=ended.append) as first,
    Watchdog(60, process=1, processes=2, end=print) as second,
  ):
    second._beat = 0.1
    second.start(tmp_path)
    first.start(tmp_path)
    first.at("the data of step 1")
    assert wait_for(lambda: ended)
  assert "every other process gives signs of life" in capfd.readouterr().err


def test_time_in_which_the_process_itself_was_stopped_does_not_count(tmp_path, ended, monkeypatch):
  with Watchdog(0.5, end=ended.append) as watchdog:
    watchdog.start(tmp_path)
    time.sleep(0.1)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 100)
    time.sleep(0.2)
    assert not ended
    assert wait_for(lambda: ended)


def test_a_folder_that_cannot_be_written_is_no_reason_to_stay(tmp_path, ended, capfd):
  with Watchdog(0.3, end=ended.append) as watchdog:
    watchdog.start(tmp_path)
    (tmp_path / "stacks").write_text("a file")
    watchdog.at("the report")
    assert wait_for(lambda: ended)
  printed = capfd.readouterr().err
  assert "Stacks: above" in printed and "test_watchdog.py" in printed
