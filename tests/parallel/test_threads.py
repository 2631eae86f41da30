"""A run on CPUs keeps the number of threads that it began with."""

import json
import os

import pytest

from mmjax.parallel import threads


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(recorded, cores, nproc, started) -> what `keep` says of a run folder; the process has not
  begun to compute unless `started`.
  """

  def make(recorded, *, cores=2, nproc="", started=False):
    monkeypatch.setenv("NPROC", nproc)
    monkeypatch.delenv("MMJAX_CPU_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(threads.xla_bridge, "backends_are_initialized", lambda: started)
    if recorded:
      (tmp_path / threads.FILE).write_text(json.dumps({"threads": recorded}))
    return threads.keep(tmp_path)

  return make


def test_a_run_goes_on_with_its_own_number_on_another_machine(run):
  assert "keeps the 1 CPU thread" in run(1, cores=16)
  assert os.environ["NPROC"] == "1" and threads.count() == 1


def test_nothing_is_said_where_nothing_differs(run):
  assert run(0, cores=3) == run(2) == run(4, nproc="4") == "" and threads.count() == 4


@pytest.mark.parametrize("how", [dict(nproc="4"), dict(started=True, cores=4)])
def test_what_cannot_be_kept_is_said(run, how):
  assert "this process has 4: from here on its numbers differ" in run(2, **how)
