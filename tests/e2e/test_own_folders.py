"""The road of the guide for folders of every kind of data that users have: convert, show, init,
train, eval, predict, export, and the run read again in Python. No key is looked up.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
from unittest import mock

import numpy as np
import pytest

import mmjax
from mmjax import cli
from mmjax.data.media import modality_of
from tests.e2e import own_folders

# folder: (task, records, more options of convert, metric of the test split, at least)
ROADS = {
  "pictures_with_labels": ("classification", 240, (), "accuracy", 0.8),
  "pictures_with_captions": ("captioning", 360, (), "exact", 0.6),
  "speech": ("speech-recognition", 320, (), "exact", 0.8),
  "clips": ("classification", 240, (), "accuracy", 0.8),
  "series_with_labels": ("classification", 240, (), "accuracy", 0.8),
  "series_with_values": ("regression", 240, ("--value", "cycles"), "r2", 0.5),
  "several_media": ("classification", 360, (), "accuracy", 0.8),
}


def travel(kind: str, steps: str = "") -> tuple[dict[str, float], list[dict[str, str]]]:
  """(scores of the test split, rows of predictions.csv) of a folder in the current one."""
  task, count, more, *_ = ROADS[kind]
  make = getattr(own_folders, kind)
  make(pathlib.Path("mine"), count, np.random.default_rng(0))
  settings = [f"--config.train.steps={steps}"] if steps else []
  for line in (
    ["data", "convert", "folder", "mine", "--name", "mine", *more]
    + ["--split", "train:80,validation:10,test:10"],
    ["data", "show", "mine", "--out", "mine.html"],
    ["init", task, "--source", "mine", "--out", "mine.py"],
    ["train", "--config", "mine.py", "--workdir", "run", *settings],
    ["eval", "--checkpoint", "run"],
    ["predict", "--checkpoint", "run", "mine", "--out", "predictions.csv"],
    ["export", "--checkpoint", "run", "--to", "safetensors", "--out", "exported"],
  ):
    assert cli.main(line) == 0, line
  with open("predictions.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == count and not any(row.get("error") for row in rows)
  assert pathlib.Path("run/report.html").stat().st_size and list(pathlib.Path("exported").iterdir())
  return json.loads(pathlib.Path("run/eval.json").read_text())[f"{task}/test"], rows


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with mock.patch.dict(os.environ, MMJAX_DATA=str(tmp_path / "data")):
    yield tmp_path


def read_again(rows: list[dict[str, str]]) -> None:
  """The first row of predictions.csv is what the run says in Python of the same files."""
  path = pathlib.Path(rows[0]["file"])
  path = path if path.exists() else "mine" / path
  files = {modality_of(p) or "series": [p] for p in path.parent.glob(f"{path.stem}.*")}
  files.pop("text", None)
  model = mmjax.load("run")
  (again,) = model.predict(**{m: file for m, file in files.items() if m in model.media})
  for name, value in again.items():
    if name != "file":
      number = isinstance(value, float)
      assert (
        float(rows[0][name]) == pytest.approx(value, rel=1e-3, abs=1e-6)
        if number
        else rows[0][name] == value
      )


def test_values_of_series_are_learned_and_predicted(place):
  """One road in the suite, and short; the others are run whole behind --all."""
  scores, rows = travel("series_with_values", steps="60")
  assert scores["examples"] > 10 and scores["r2"] > 0.2
  read_again(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROADS)
def test_every_kind_of_folder_ends_in_a_prediction(kind, place):
  *_, metric, least = ROADS[kind]
  scores, rows = travel(kind)
  assert scores[metric] >= least > scores.get("majority", 0)
  name = {"regression": "cycles", "classification": "label"}.get(ROADS[kind][0], "text")
  assert len({row[name] for row in rows}) > 1
  read_again(rows)
