"""The learning-rate range test: what it suggests, what it leaves behind."""

from __future__ import annotations

import json
import os
from unittest import mock

import numpy as np
import pytest

from mmjax import cli
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.training import find_lr
from tests.e2e import squares


def test_the_suggestion_is_where_the_loss_falls_fastest():
  rates = np.geomspace(1e-6, 1, 121)
  losses = 2 - 1 / (1 + (1e-3 / rates) ** 2) + np.maximum(0, np.log(rates / 0.05)) ** 2
  found = find_lr.read(rates.tolist(), losses.tolist())
  assert 5e-4 < found.suggestion < 4e-3  # the smoothing lags behind a little
  assert found.suggestion < found.best < 0.2
  assert f"optimizer.lr = {found.suggestion:g}" in find_lr.table(found)


def test_a_loss_that_is_never_finite_is_said():
  with pytest.raises(UserError, match="only 3 steps were finite"):
    find_lr.read([1e-6] * 3, [1.0] * 3)


def test_rates_grow_by_a_constant_factor_and_groups_keep_their_ratio():
  c = configs.base()
  c.optimizer.lr = 0.01
  c.optimizers.other = dict(name="adamw", lr=0.001, params="x/.*")
  c.model = dict(name="multitask", encoders=dict(image=dict(kind="vit")))
  ramp = find_lr.growing(configs.resolve(c), 11)
  assert ramp.optimizer.lr == 1.0 and ramp.optimizers.other.lr == pytest.approx(0.1)
  from mmjax.state.schedule import make_schedule

  factors = np.asarray(make_schedule(ramp, steps=11)(np.arange(11)))
  np.testing.assert_allclose(factors[1:] / factors[:-1], 1e6**0.1, rtol=1e-4)
  assert factors[-1] == 1.0 and factors[0] == pytest.approx(1e-6)


def test_the_command_finds_a_rate_that_learns_and_leaves_no_checkpoint(tmp_path, capsys):
  config = squares.make(tmp_path)
  run, data = tmp_path / "run", str(tmp_path / "data")
  words = ["train", "--config", str(config), "--workdir", str(run), "--find-lr"]
  with mock.patch.dict(os.environ, MMJAX_DATA=data), mock.patch.object(find_lr, "STEPS", 60):
    assert cli.main(words) == 0
  assert "optimizer.lr = " in capsys.readouterr().out
  found = json.loads((run / "find_lr.json").read_text())
  assert 1e-5 < found["suggestion"] < 0.3 and "<svg" in (run / "find_lr.html").read_text()
  left = {path.name for path in run.iterdir()} - set(find_lr.NAMES)
  assert not left & {"checkpoints", "config.json", "metrics.jsonl"}, left
