"""How many processes read and convert data: never many more than the machine has cores."""

from __future__ import annotations

import json
import multiprocessing
import os

import pytest

from mmjax.data import workers
from mmjax.data.builders import convert, shards
from mmjax.data.pipeline import Pipeline


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
  workers._say.cache_clear()


@pytest.mark.parametrize("asked, started", [(0, 0), (3, 3), (8, 8), (9, 8), (256, 8)])
def test_no_more_than_the_machine_has_room_for_are_started(capsys, asked, started):
  for _ in range(2):
    assert workers.at_most(asked, "data.workers") == started
  said = capsys.readouterr().err
  line = f"data.workers is {asked}: 8 processes are started, 4 for each of 2 cores\n"
  assert said == (line if asked > started else "")


def test_a_large_machine_starts_as_many_as_are_asked_for(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)))
  assert workers.at_most(256, "data.workers") == 256


def test_a_pipeline_that_asks_for_too_many_gives_the_same_batches(config, monkeypatch):
  monkeypatch.setattr(workers, "FEWEST", 1)
  monkeypatch.setattr(workers, "OF_A_CORE", 1)
  one, many = (Pipeline(config(**{"data.workers": count})) for count in (0, 200))
  expected = [batch["id"] for batch in one.iterate(0, 6)]
  before, seen, alive = set(multiprocessing.active_children()), [], 0
  for batch in many.iterate(0, 6):
    seen.append(batch["id"])
    alive = max(alive, len(set(multiprocessing.active_children()) - before))
  assert seen == expected and 0 < alive <= 2


def test_a_conversion_that_asks_for_too_many_starts_few(tmp_path, monkeypatch):
  asked = []

  class Pool:
    def __init__(self, count, **_):
      asked.append(count)
      raise KeyboardInterrupt  # no process is started here

  monkeypatch.setattr(shards, "ProcessPoolExecutor", Pool)
  rows = [json.dumps(dict(text=f"text {i}", label="a")) for i in range(40)]
  (tmp_path / "rows.jsonl").write_text("\n".join(rows))
  with pytest.raises(KeyboardInterrupt):
    convert.convert(
      "jsonl", tmp_path / "rows.jsonl", "many", tmp_path, workers=200, shard_rows=2, log=print
    )
  assert asked == [8]
