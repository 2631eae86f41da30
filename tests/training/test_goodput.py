"""The account of a run's time, on a clock of our own."""

from __future__ import annotations

import json
import random
import time

import pytest

from mmjax.evaluation.report_time import time_spent
from mmjax.training.goodput import LOSSES, Clock


class Time:
  """Stands for the module time: seconds pass when told."""

  def __init__(self, monkeypatch):
    self.wall, self.mono = 1e9, 50.0
    monkeypatch.setattr(time, "time", lambda: self.wall)
    monkeypatch.setattr(time, "monotonic", lambda: self.mono)

  def passes(self, seconds):
    self.wall += seconds
    self.mono += seconds


@pytest.fixture
def now(monkeypatch):
  return Time(monkeypatch)


def spend(clock, now, cause, seconds, **options):
  with clock.measure(cause, **options):
    now.passes(seconds)


def first_process(now, folder):
  begin = now.mono
  now.passes(5)
  clock = Clock(folder, begin, 0)
  spend(clock, now, "compilation", 10)
  for skipped in (False, True, False):
    spend(clock, now, "data", 1)
    spend(clock, now, "transfer", 0.5)
    spend(clock, now, "compute", 4)
    clock.finished(skipped)
  return clock


def test_every_second_has_a_cause(now, tmp_path):
  clock = first_process(now, tmp_path)
  spend(clock, now, "checkpoint", 2)
  spend(clock, now, "evaluation", 3)
  now.passes(1)
  row = clock.row(3, 16, 0.0)
  lost = {k.removeprefix("lost/"): v for k, v in row.items() if k.startswith("lost/")}
  want = dict.fromkeys(LOSSES, 0.0) | dict(
    start=5, compilation=10, data=3, transfer=1.5, skipped=4, checkpoint=2, evaluation=3, other=1
  )
  assert lost == pytest.approx(want)
  assert row["goodput"] == pytest.approx(8 / 37.5) and clock.wall == pytest.approx(37.5)
  assert {k: v for k, v in row.items() if k.startswith("time/")} == pytest.approx(
    {
      "time/data": 1,
      "time/transfer": 0.5,
      "time/compute": 4,
      "time/checkpoint": 2 / 3,
      "time/evaluation": 1,
    }
  )
  spend(clock, now, "compute", 4)
  clock.finished(False)
  spend(clock, now, "evaluation", 6)
  again = clock.row(4, 16, 0.0)
  # Evaluation left out.
  assert again["examples_per_second"] == pytest.approx(16 / 4) and again["time/compute"] == 4


def test_steps_that_no_checkpoint_has_are_lost(now, tmp_path):
  clock = first_process(now, tmp_path)
  noted = clock.productive  # a checkpoint
  spend(clock, now, "compute", 7)
  clock.finished(False)
  clock.write()
  now.passes(100)  # killed, and started 100 s later
  begin = now.mono
  now.passes(6)
  clock = Clock(tmp_path, begin, 3, productive=noted)
  row = clock.row(4, 16, 0.0)
  assert row["lost/steps"] == 7 and row["lost/stopped"] == 100 and row["lost/start"] == 11
  assert row["goodput"] == pytest.approx(8 / (5 + 10 + 3 * 5.5 + 7 + 100 + 6))


def test_waiting_while_the_devices_are_busy_loses_nothing(now, tmp_path):
  clock = Clock(None, now.mono, 0)
  spend(clock, now, "data", 3, busy=lambda: True)
  clock.finished(False)
  assert clock.productive == 3 and clock.row(1, 1, 0.0)["lost/data"] == 0


def test_clocks_that_jump_do_no_harm(now, tmp_path):
  jumps = random.Random(0)
  step = 0
  for _ in range(5):
    begin = now.mono
    clock = Clock(tmp_path, begin, step)
    for _ in range(10):
      now.wall += jumps.uniform(-1e6, 1e6)
      step += 1
      spend(clock, now, "compute", 1)
      clock.finished(False)
      row = clock.row(step, 8, 0.0)
      assert 0 <= row["goodput"] <= 1 and all(
        v >= 0 for k, v in row.items() if k.startswith(("lost/", "time/"))
      )
    clock.write()
    now.mono = jumps.uniform(0, 1e4)  # another process, another machine
  assert json.loads((tmp_path / "goodput.json").read_text())["wall"] >= 50


@pytest.mark.parametrize(
  "text", ["", "{", "[]", "{}", '{"seconds": {}}', '{"seconds": {}, "wall": null, "seen": 1}']
)
def test_a_damaged_file_starts_anew(now, tmp_path, text):
  (tmp_path / "goodput.json").write_text(text)
  assert Clock(tmp_path, now.mono, 0).wall == 0


def test_what_is_waited_for_is_told(now):
  told = []
  clock = Clock(None, now.mono, 0, notify=told.append)
  spend(clock, now, "data", 1, step=3)
  spend(clock, now, "checkpoint", 1, step=3)
  assert told[0] == "the data of step 3" and told[2].startswith("the checkpoint of step 3")


def test_the_report_shows_where_the_time_went(now, tmp_path):
  clock = first_process(now, tmp_path)
  rows = [dict(step=3, **clock.row(3, 16, 0.0))]
  now.passes(2)
  rows.append(dict(step=4, **clock.row(4, 16, 0.0)))
  section = time_spent(rows)
  assert section["goodput"] == pytest.approx(8 / 33.5) and section["wall"] == "33.5 s"
  assert section["rows"][0]["text"] == "8.0 s" and sum(
    row["share"] for row in section["rows"]
  ) == pytest.approx(100)
  assert section["rows"][1] == dict(
    label="Compiling", text="10.0 s", share=pytest.approx(1000 / 33.5)
  )
  assert [c["title"] for c in section["charts"]] == ["Seconds a step", "Goodput"]
  assert time_spent([]) is None and time_spent([dict(step=1, loss=2.0)]) is None
