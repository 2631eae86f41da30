"""The road of the guide for folders of every kind of data that users have: convert, show, init,
train, eval, predict, export, and the export or the run read again. No key is looked up.
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
from tests.e2e import own_folders

# folder: (task, files, more of convert, steps or "" for as many as init writes, metric, at least)
ROADS = {
  "pictures_with_labels": ("classification", 240, (), "", "accuracy", 0.8),
  "pictures_with_captions": ("captioning", 360, (), "", "exact", 0.6),
  "speech": ("speech-recognition", 320, (), "", "exact", 0.8),
  "clips": ("classification", 240, (), "", "accuracy", 0.8),
  "series_with_labels": ("classification", 240, (), "", "accuracy", 0.8),
  "series_with_values": ("regression", 240, ("--value", "cycles"), "", "r2", 0.5),
  "several_media": ("classification", 360, (), "", "accuracy", 0.8),
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


def test_a_table_of_values_is_predicted(place):
  """A road in short: what the others do in full."""
  scores, rows = travel("series_with_values", steps="30")
  assert scores["examples"] > 10 and all(0 < float(row["cycles"]) < 12 for row in rows)
  again = mmjax.load("run").predict(series=["mine/3.csv"])[0]
  (written,) = (row for row in rows if row["file"].endswith("mine/3.csv"))
  assert float(again["cycles"]) == pytest.approx(float(written["cycles"]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROADS)
def test_every_kind_of_folder_ends_in_a_prediction(kind, place):
  *_, metric, least = ROADS[kind]
  scores, rows = travel(kind)
  assert scores[metric] >= least > scores.get("majority", 0)
  name = {"regression": "cycles", "classification": "label"}.get(ROADS[kind][0], "text")
  assert len({row[name] for row in rows}) > 1


def test_files_of_one_name_are_one_row_of_a_model_that_reads_both(place):
  from mmjax.inference.predict import rows_of

  class Predictor:
    media = modalities = ("image", "audio")

  folder = place / "mine"
  folder.mkdir()
  for name in ("a.png", "a.wav", "b.png"):
    (folder / name).touch()
  rows, names = rows_of(Predictor(), [folder], {})
  assert rows == [
    {"image": folder / "a.png", "audio": folder / "a.wav"},
    {"image": folder / "b.png"},
  ]
  assert names == [str(folder / "a.png"), str(folder / "b.png")]
  (folder / "metadata.csv").write_text("image,audio\nb.png,a.wav\n")
  rows, names = rows_of(Predictor(), [folder], {})
  assert rows == [{"image": folder / "b.png", "audio": folder / "a.wav"}]
