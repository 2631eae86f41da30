"""Whole runs in this process in which something goes wrong: steps that are not finite, a data
source that hangs, clocks that jump.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import shutil
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config as configs
from mmjax import evaluation, remote
from mmjax.config import ConfigError, UserError
from mmjax.data.pipeline import Pipeline
from mmjax.evaluation import report
from mmjax.ownership import Owner
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.remote import Mirror
from mmjax.state import checkpoint
from mmjax.state.checkpointer import Checkpointer
from mmjax.training import loop, start
from mmjax.training.outputs import Outputs
from mmjax.training.profile import parse
from mmjax.training.program import Program
from mmjax.training.watchdog import Watchdog
from tests.e2e import squares
from tests.e2e.commands import QUICKSTART, SMALL, metrics

OVERRIDES = [word.removeprefix("--") for word in SMALL] + [
  f"config.{word}"
  for word in (
    "train.steps=12",
    "train.rollback=4",
    "checkpoint.every=4",
    "checkpoint.keep=1",
    "evaluation.every=0",
  )
]
BAD = {6, 7, 8, 9}  # the checkpoint of step 8 is in the middle of them


class Killed(BaseException):
  """Stands for the end of a process."""


@pytest.fixture(scope="module", autouse=True)
def programs():
  """Runs of one config share a program: it is traced and compiled once."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(start, "Program", functools.cache(Program))
    yield


@pytest.fixture(scope="module")
def config(embedded_data):
  return configs.load(QUICKSTART, OVERRIDES)


@pytest.fixture
def bad_steps(monkeypatch):
  """Steps BAD are not finite; at step `killed_at[0]` the run ends."""
  real, killed_at = Program.train, [0]

  def train(self, state, batch, source=""):
    at = int(state.step) + 1
    if at == killed_at[0]:
      raise Killed
    if at not in BAD:
      return real(self, state, batch, source)
    old = jax.tree.map(jnp.copy, state)
    result = real(self, state, batch, source)[1]
    with jax.transfer_guard("allow"):
      bad = dict(skipped=jnp.float32(1), loss=jnp.float32(np.nan))
      return old.replace(step=old.step + 1), {**result, **bad}

  monkeypatch.setattr(Program, "train", train)
  return killed_at


def test_a_rollback_takes_the_parameters_of_the_last_good_checkpoint_and_goes_on(
  config, bad_steps, tmp_path, monkeypatch, capsys
):
  assert loop.train(config, tmp_path / "whole", profile="2:3") == loop.DONE
  printed = capsys.readouterr().out
  assert (
    "step 9: 4 steps in a row were not finite (train.rollback); back to the parameters of "
    "checkpoint 4, on with step 10" in printed
  )
  assert (
    list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))
    and "step 3: trace written to" in printed
  )
  for words in (
    "memory of a device: parameters ",
    "a step: ",
    "FLOP of the model",
    "measured: ",
    " ms a step, ",
    "of the whole process (planned ",
  ):
    assert words in printed
  rows = metrics(tmp_path / "whole")
  assert [row["step"] for row in rows] == list(range(1, 13))  # nothing is taken back
  assert [row["rollbacks"] for row in rows] == [0] * 9 + [1] * 3 and rows[-1]["skipped_total"] == 4
  times = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
  assert (
    0 < times["goodput"] < 1
    and times["lost/skipped"] > 0
    and times["lost/compilation"] > 0
    and times["time/compute"] >= 0
  )

  # By hand: batches 1 to 4, then 10 to 12, each at its own step.
  mesh = make_mesh(config)
  pipeline = Pipeline(config, rows=multihost.local_rows(mesh, config.train.batch_size))
  step = start.Program(config, mesh, steps=12, examples=pipeline.examples)
  state = step.init(config.seed)
  with jax.set_mesh(mesh):
    for at in (1, 2, 3, 4, 10, 11, 12):
      state = state.replace(step=jax.device_put(np.int32(at - 1), state.step.sharding))
      state = step.train(state, multihost.to_device(pipeline.batch(at - 1), mesh))[0]
  same(state.params, checkpoint.load_params(str(tmp_path / "whole"), average=False))

  # Killed after the rollback, before a checkpoint knew of it; and the clock goes back meanwhile.
  bad_steps[0] = 11
  with pytest.raises(Killed):
    loop.train(config, tmp_path / "broken")
  bad_steps[0] = 0
  with pytest.raises(
    ConfigError, match="--profile 2:3: this start of the run makes the steps 9 to 12"
  ):
    loop.train(config, tmp_path / "broken", profile="2:3")
  real = time.time
  monkeypatch.setattr(time, "time", lambda began=real(): began - 100 * (real() - began) - 1e5)
  assert loop.train(config, tmp_path / "broken") == loop.DONE
  assert metrics(tmp_path / "broken") == rows
  same(
    checkpoint.load_params(str(tmp_path / "broken"), average=False),
    checkpoint.load_params(str(tmp_path / "whole"), average=False),
  )
  kept = json.loads((tmp_path / "broken" / "goodput.json").read_text())
  assert kept["seconds"]["steps"] > 0 and min(kept["seconds"].values()) >= 0 and kept["wall"] < 600
  page = (tmp_path / "broken" / "report.html").read_text()
  assert "Where the time went" in page and "Measured" in page
  told = json.loads((tmp_path / "broken" / "summary.json").read_text())
  assert (
    told["planned"]["flops"] == step.flops_per_step()
    and told["text"].removeprefix("measured: ") in page
  )
  assert (
    told["planned"]["memory"]["parameters"]
    == sum(x.nbytes for x in jax.tree.leaves(state.params))
    < told["measured"]["memory"]
  )


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_data_source_that_hangs_ends_the_run(config, tmp_path, monkeypatch, capfd):
  codes, released = [], threading.Event()

  def end(code):
    codes.append(code)
    released.set()

  def watchdog(_, **settings):  # a short limit in the place of train.hang_seconds
    return Watchdog(4.0, end=end, **settings)

  monkeypatch.setattr(loop, "Watchdog", watchdog)
  real = Pipeline.iterate

  def iterate(self, start, stop):
    yield from real(self, start, start + 2)
    assert released.wait(30)
    raise UserError("released")

  monkeypatch.setattr(Pipeline, "iterate", iterate)
  with pytest.raises(UserError, match="released"):
    loop.train(config, tmp_path)
  assert codes == [1] and "hangs: the data of step 3 did not end within" in capfd.readouterr().err
  (stacks,) = (tmp_path / "stacks").iterdir()
  assert "in iterate" in stacks.read_text()


def test_clocks_that_jump_and_checkpoints_that_somebody_deletes(
  embedded_data, tmp_path, monkeypatch, caplog
):
  config = configs.load(
    QUICKSTART,
    [
      *OVERRIDES,
      "config.checkpoint.minutes=60",
      "config.checkpoint.keep=5",
      "config.train.hang_seconds=60.0",
    ],
  )
  codes, ahead, clock, real = [], [0.0], time.time, Program.train
  monkeypatch.setattr(loop, "Watchdog", functools.partial(Watchdog, end=codes.append))
  monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])

  def train(self, state, batch, source=""):
    # Two days forth when a checkpoint has begun to be written, then back.
    ahead[0] = -1e5 if int(state.step) % 4 else 1e5
    if int(state.step) == 7:  # the checkpoint of step 4 is written, the one of step 8 is not begun
      for thread in threading.enumerate():
        if thread.name == "checkpoint":
          thread.join()
      shutil.rmtree(tmp_path / "checkpoints" / "4")
    return real(self, state, batch, source)

  monkeypatch.setattr(Program, "train", train)
  assert loop.train(config, tmp_path) == loop.DONE and not codes
  assert (
    "checkpoint 4 is no longer there, though this run did not delete it; the next save is whole "
    "again" in caplog.text
  )
  # And none by the clock.
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [8, 12]
  assert [row["step"] for row in metrics(tmp_path)] == list(
    range(1, 13)
  ) and checkpoint.load_params(str(tmp_path))
  account = json.loads((tmp_path / "goodput.json").read_text())
  assert min(account["seconds"].values()) >= 0 and account["wall"] < 600


def test_a_disk_that_fills_up_under_the_metrics_is_named(embedded_data, tmp_path):
  outputs = Outputs(
    Mirror(tmp_path), 0, configs.load(QUICKSTART, [*OVERRIDES, "config.log.tensorboard=True"])
  )
  row = dict(loss=1.0, **{f"metric/{i}": float(i) for i in range(50)})
  outputs.write(dict(step=1, time=0.0, **row))
  outputs.sync()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # Every longer file fails to be written.
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
  try:
    with pytest.raises(
      UserError,
      match=f"{tmp_path}: metrics cannot be written: .*What was saved is intact: free space",
    ):
      for step in range(2, 60):
        outputs.write(dict(step=step, time=0.0, **row))
    with contextlib.suppress(UserError):
      outputs.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  # The unfinished line goes.
  outputs = Outputs(
    Mirror(tmp_path), 1, configs.load(QUICKSTART, [*OVERRIDES, "config.log.tensorboard=True"])
  )
  outputs.write(dict(step=2, time=0.0, **row))
  outputs.close()
  assert metrics(tmp_path) == [dict(step=1, **row), dict(step=2, **row)]


def test_weights_and_biases(tmp_path, monkeypatch, config):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="package wandb is not installed. `pip install wandb`"):
    start.open_workdir(
      tmp_path, configs.load(QUICKSTART, [*OVERRIDES, "config.log.wandb=mine"]), False
    )
  monkeypatch.delitem(sys.modules, "wandb")
  (tmp_path / "modules").mkdir()
  (tmp_path / "modules" / "wandb.py").write_text(
    "calls = []\n"
    "class Run:\n"
    "  def log(self, row, step): calls.append((step, row))\n"
    "  def finish(self): calls.append('finished')\n"
    "def init(**settings):\n"
    "  calls.append(settings)\n"
    "  return Run()\n"
  )
  monkeypatch.syspath_prepend(tmp_path / "modules")
  for _ in range(2):  # a run that is started again goes on with the same one
    outputs = Outputs(
      remote.Mirror(tmp_path), 0, configs.load(QUICKSTART, [*OVERRIDES, "config.log.wandb=mine"])
    )
    outputs.write(dict(step=3, time=1.0, loss=2.5, mfu=None))
    outputs.close()
  calls = sys.modules["wandb"].calls
  assert (
    calls[0]["project"] == "mine"
    and calls[0]["resume"] == "allow"
    and calls[0]["config"]["train"]["steps"] == 12
  )
  assert calls[1:3] == [(3, {"loss": 2.5}), "finished"] and calls[3]["id"] == calls[0]["id"]
  del sys.modules["wandb"]


@pytest.mark.parametrize("text", ["5", "7:5", "0:3", "a:b", "-1:3", "1:2:3"])
def test_bad_ranges_of_steps(text):
  with pytest.raises(ConfigError, match="write START:STOP"):
    parse(text)


def test_a_rollback_after_the_end_is_refused(embedded_data):
  with pytest.raises(
    ConfigError, match="train.rollback is 20, but must be 0 or less than train.max_skipped"
  ):
    configs.load(QUICKSTART, ["config.train.rollback=20"])


# -- On a data set of squares ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """tiny(*overrides): the config of the squares, of 8 steps."""
  folder = tmp_path_factory.mktemp("squares")
  file = squares.make(folder)
  settings = [
    f"config.data.dir={folder / 'data'}",
    "config.train.steps=8",
    "config.evaluation.every=4",
  ]
  return lambda *overrides: configs.load(str(file), [*settings, *overrides])


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
  """A run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("whole")
  assert loop.train(tiny(), folder) == loop.DONE
  return folder


@pytest.mark.parametrize(
  "end", [pytest.param("write_eval_json", marks=pytest.mark.slow), "write_report"]
)
def test_a_run_that_is_killed_after_its_last_checkpoint_is_finished_by_the_next_start(
  tiny, whole, tmp_path, monkeypatch, capsys, end
):
  def kill(*_, **__):
    raise Killed

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(evaluation if end == "write_eval_json" else report, end, kill)
    loop.train(tiny(), tmp_path)
  assert (tmp_path / "checkpoints" / "8" / "manifest.json").exists()
  assert not (tmp_path / "report.html").exists()
  with monkeypatch.context() as patch:
    patch.setattr(Program, "train", kill)  # no step is made again
    assert loop.train(tiny(), tmp_path) == loop.DONE
  assert metrics(tmp_path) == metrics(whole)
  assert (tmp_path / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
  assert "Measured" in (tmp_path / "report.html").read_text()
  told = json.loads((tmp_path / "summary.json").read_text())
  assert told["finished"] == 8 and told["planned"]["flops"] > 0 and told["measured"]["seconds"] > 0
  capsys.readouterr()
  with monkeypatch.context() as patch:
    patch.setattr(Checkpointer, "restore", kill)  # nothing is read or computed again
    patch.setattr(Program, "compile", kill)
    assert loop.train(tiny(), tmp_path) == loop.DONE
  assert "is complete: 8 of 8 steps" in capsys.readouterr().out
  (tmp_path / "report.html").unlink()
  assert loop.train(tiny(), tmp_path) == loop.DONE and (tmp_path / "report.html").exists()
  assert metrics(tmp_path) == metrics(whole)


def test_a_finished_run_whose_checkpoint_is_damaged_is_not_complete(tiny, whole, tmp_path, caplog):
  shutil.copytree(whole, tmp_path / "run")
  (tmp_path / "run" / "checkpoints" / "8" / "manifest.json").write_text("{}")
  assert loop.train(tiny(), tmp_path / "run") == loop.DONE
  assert "checkpoints/8 is corrupt" in caplog.text
  assert metrics(tmp_path / "run") == metrics(whole)


def test_a_step_that_moves_data_without_a_word_ends_the_run(tiny, tmp_path, monkeypatch):
  real = Program.train

  def train(self, state, batch, source=""):
    state, metrics = real(self, state, batch, source)
    return state, {**metrics, "loss": metrics["loss"] + np.zeros((), np.float32)}

  monkeypatch.setattr(Program, "train", train)
  with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
    loop.train(tiny(), tmp_path)


def test_a_folder_in_which_another_run_trains_is_left_alone(tiny, whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")}
  with Owner(tmp_path / "run", "the other run"):
    with pytest.raises(UserError, match=r"--workdir .*run is in use by process \d+ on host"):
      loop.train(tiny("config.train.steps=12"), tmp_path / "run")
    assert all(
      path.read_bytes() == text for path, text in before.items() if "owner" not in str(path)
    )


def test_a_run_that_was_stopped_and_taken_over_ends_and_writes_nothing(
  tiny, whole, tmp_path, monkeypatch
):
  real, seen = Program.train, {}

  def train(self, state, batch, source=""):
    if int(state.step) == 5:  # 4 is saved: SIGSTOP, and another run goes on from there
      for thread in threading.enumerate():
        if thread.name == "checkpoint":
          thread.join()
      (newest,) = (tmp_path / "owner").glob("*.json")
      theirs = dict(json.loads(newest.read_text()), token="theirs", pid=7, host="far")
      (tmp_path / "owner" / f"{int(newest.stem) + 1}.json").write_text(json.dumps(theirs))
      shutil.copytree(tmp_path / "checkpoints", tmp_path / "before")
      seen["metrics"] = (tmp_path / "metrics.jsonl").read_text()
    return real(self, state, batch, source)

  with monkeypatch.context() as patch:
    patch.setattr(Program, "train", train)
    with pytest.raises(UserError, match="was taken over by process 7 on host far.*writes nothing"):
      loop.train(tiny("config.checkpoint.every=2"), tmp_path)
  assert seen and not (tmp_path / "report.html").exists()
  saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert saved == {path.name for path in (tmp_path / "before").iterdir()} == {"2", "4"}
