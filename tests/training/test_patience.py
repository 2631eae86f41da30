"""The loss of held-out data, early stopping and the best checkpoint: by whole runs on coloured
squares.
"""

from __future__ import annotations

import io
import json
import re

import jax
import numpy as np
import pytest

import mmjax
from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.evaluation import Result
from mmjax.parallel import compiler
from mmjax.state import checkpoint
from mmjax.training import evaluate, loop
from mmjax.training.hooks import Hooks, score_lines
from mmjax.training.metrics import Progress
from tests.e2e import squares


def constant(context) -> Result:
  """An evaluator that never finds anything better than at first."""
  return Result({"score": 1.0}, {})


def make_config(folder, *overrides):
  c = configs.base()
  c.train.steps, c.train.batch_size = 12, 16
  c.data.dir, c.data.image.size = str(folder), 32
  c.data.sources.squares = dict(name="squares")
  c.data.label, c.data.classes = "label", 3
  c.model = dict(
    name="encoder",
    width=16,
    classes=3,
    encoders=dict(image=dict(kind="vit", patch=16, depth=1, heads=2)),
  )
  c.precision.compute, c.log.tensorboard, c.log.every = "float32", False, 1
  c.objectives.colour = dict(kind="classification", class_weights="balanced", weight=0.5)
  c.evaluation.every, c.evaluation.patience, c.evaluation.batch_size = 2, 2, 32
  c.evaluation.evaluators.same = dict(kind=f"{__name__}:constant")
  c.evaluation.evaluators.val = dict(kind="loss", source="squares", split="test")
  c.checkpoint.best, c.checkpoint.every, c.checkpoint.keep = "same/score", 0, 1
  return configs.resolve(c, overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("patience") / "data"
  squares.build(folder, count=96)
  return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  assert loop.train(make_config(data), folder) == loop.DONE
  return folder


def rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if "loss" in row or "val/loss" in row]


def test_a_run_ends_when_it_has_not_got_better_for_a_while(run):
  assert rows(run)[-1]["step"] == 6, "the best at 2, none better at 4 and 6"
  assert checkpoint.find_checkpoint(run).name == "6"
  assert checkpoint.find_checkpoint(f"{run}/best").name == "2"
  assert checkpoint.find_checkpoint(f"{run}/checkpoints/best").name == "2"
  kept = (run / "checkpoints").iterdir()
  assert sorted(path.name for path in kept if path.name.isdigit()) == ["2", "6"]
  stored = checkpoint.load_config(str(run), (__name__,)).objectives.colour.class_weights
  assert stored == (1.0, 1.0, 1.0), "the numbers are in the checkpoint"


def test_ended_early_it_is_complete(run, data, capfd):
  assert loop.train(make_config(data), run) == loop.DONE
  assert "is complete" in "".join(capfd.readouterr())
  assert rows(run)[-1]["step"] == 6


def test_stopped_and_started_again_it_ends_at_the_same_step(run, data, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(Hooks, "stopping", lambda self, at: at == 5)
    assert loop.train(make_config(data), tmp_path) == loop.STOPPED
  assert loop.train(make_config(data), tmp_path) == loop.DONE
  losses = [
    [(r["step"], r["loss"]) for r in rows(folder) if "loss" in r] for folder in (run, tmp_path)
  ]
  assert losses[0] == losses[1]


def test_the_loss_of_held_out_data_is_that_of_the_predictor(run, data):
  """Against -log of the probabilities that the loaded checkpoint gives the true classes."""
  predictor = mmjax.load(f"{run}/best", allow_code=(__name__,))
  records = list(squares.records(1, 48))
  shares = predictor.classes(image=[record["image"] for record in records])
  names = list(predictor.class_names)
  want = -np.log([p[names.index(r["label"])] for p, r in zip(shares, records, strict=True)]).mean()
  found = next(row for row in rows(run) if row["step"] == 2 and "val/loss" in row)
  assert found["val/colour/loss"] == pytest.approx(want, rel=1e-5)
  assert found["val/loss"] == pytest.approx(0.5 * want, rel=1e-5)
  again = evaluate.evaluate(f"{run}/best", suite="val", allow_code=(__name__,))
  assert again["val"]["colour/loss"] == pytest.approx(want, rel=1e-5)


def test_the_best_is_the_smallest_of_losses_and_errors(data, tmp_path):
  def mode(best, given="auto"):
    return checkpoint.best_mode(dict(best=best, best_mode=given))

  assert {mode(f"val/{name}") for name in ("loss", "x/loss", "word_error_rate", "mae", "rmse")} == {
    "min"
  }
  assert {mode(f"val/{name}") for name in ("accuracy", "R@1", "auc", "r2", "loss/accuracy")} == {
    "max"
  }
  assert mode("val/loss", "max") == "max"
  with pytest.raises(ConfigError, match="evaluation.patience waits for a better checkpoint.best"):
    make_config(data, "checkpoint.best=")
  with pytest.raises(UserError, match="no checkpoint here"):
    checkpoint.find_checkpoint(str(tmp_path / "best"))


def test_the_time_left_is_right_from_the_second_logged_step_on(monkeypatch):
  """The first step takes 100 s, each of the others 2: a line at step 11 of 51 tells 80 s."""
  out, clock = io.StringIO(), iter((100.0, 120.0, 200.0))
  monkeypatch.setattr("time.monotonic", lambda: next(clock))
  progress = Progress(0, 51, out)
  for step in (1, 11, 51):
    progress.log(dict(step=step, loss=1.0, lr=0.1))
  lines = out.getvalue().splitlines()
  assert "left" not in lines[0]
  assert [re.search(r"left (\S+)", line)[1] for line in lines[1:]] == ["1:20", "0:00"]


def test_the_time_left_counts_evaluations_but_not_what_they_compile(monkeypatch):
  """Steps of 2 s; after every 20 an evaluation of 10 s, the first of which compiles for 90 more."""
  out, now = io.StringIO(), [100.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  progress = Progress(0, 50, out, evaluate_every=20)
  for step in range(1, 51):
    now[0] += 2
    if step in (1, 10, 20, 30, 40, 50):
      progress.log(dict(step=step, loss=1.0, lr=0.1))
    if step in (20, 40):
      seconds = 100.0 if step == 20 else 10.0
      now[0] += seconds
      progress.evaluated(seconds, seconds - 10)
  lines = out.getvalue().splitlines()
  # After step 20 are 20 s of evaluations left, at 40 that of this step as well, and one at the end.
  assert [re.search(r"left (\S+)", line)[1] for line in lines[3:]] == ["1:00", "0:40", "0:10"]


def test_compiling_is_measured():
  before = compiler.seconds()
  jax.jit(lambda x: x * 3 + before)(2.0).block_until_ready()
  assert compiler.seconds() > before


def test_the_metric_that_checkpoints_are_kept_by_is_said_first():
  metrics = dict(bleu=0.1, rouge=0.2, cider=0.3, exact=0.4, word_error_rate=0.5)
  results = {name: Result(metrics, {}) for name in ("words/validation", "words/test")}
  results["other"] = Result(dict(loss=2.0), {})
  assert list(score_lines(results, "words/validation/word_error_rate")) == [
    "words/validation: word_error_rate 0.5  bleu 0.1  rouge 0.2  cider 0.3",
    "words/test: word_error_rate 0.5  bleu 0.1  rouge 0.2  cider 0.3",
    "other: loss 2",
  ]
  assert next(score_lines(results, "")).endswith("bleu 0.1  rouge 0.2  cider 0.3  exact 0.4")
