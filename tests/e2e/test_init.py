"""From a folder as a user has it to a prediction, with the commands of the guide alone."""

from __future__ import annotations

import json
import os
import shlex
from unittest import mock

import numpy as np
import pytest

from mmjax import cli
from tests.e2e.own_folders import SHAPES, pictures_with_labels
from tests.guides import blocks, commands, read

SECTION = read("configs/README.md", "## A config that fits")
QUICK = [
  f"--config.{setting}"
  for setting in (
    "train.steps=50",
    "train.batch_size=32",
    "log.tensorboard=False",
    "evaluation.every='100%'",
    "model.width=64",
  )
]


@pytest.fixture
def place(tmp_path, monkeypatch):
  """An empty folder to work in, with its own data sets."""
  monkeypatch.chdir(tmp_path)
  with mock.patch.dict(os.environ, MMJAX_DATA=str(tmp_path / "data")):
    yield tmp_path


def test_the_commands_of_the_guide_end_in_a_prediction(place, capsys):
  pictures_with_labels(place / "shapes", 240, np.random.default_rng(0), hint=80)
  lines = commands(SECTION)
  assert len(lines) <= 8
  for line in lines:
    words = shlex.split(line)[1:]
    assert cli.main([*words, *(QUICK if words[0] == "train" else [])]) == 0, line
  found = json.loads((place / "runs/shapes/eval.json").read_text())
  scores = found["classification/test"]
  assert scores["accuracy"] > 0.7 > scores["majority"] + 0.2
  predicted = (place / "predictions.csv").read_text().splitlines()[1:]
  assert len(predicted) == 80 and sum("circle" in line for line in predicted) > 40
  capsys.readouterr()
  exec(blocks(SECTION, "python")[0], {})
  assert capsys.readouterr().out.strip() in SHAPES
