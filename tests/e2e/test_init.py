"""From a folder as a user has it to a prediction, with the commands of the guide alone."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageDraw

import mmjax
from mmjax import cli
from mmjax.data.builders import write_dataset
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.guides import blocks, commands, read

SECTION = read("configs/README.md", "## A config that fits")
SHAPES = ("circle", "cross", "square")
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


def shape(kind: str, rng: np.random.Generator) -> Image.Image:
  """A dark shape of any place and size on a light ground, of a hue of its own."""
  image = Image.new("RGB", (40, 32), tuple(rng.integers(190, 256, 3).tolist()))
  shade = rng.integers(0, 90, 3) + 80 * (np.arange(3) == SHAPES.index(kind))
  draw, colour = ImageDraw.Draw(image), tuple(shade.tolist())
  r = int(rng.integers(7, 12))
  x, y = int(rng.integers(r, 40 - r)), int(rng.integers(r, 32 - r))
  if kind == "circle":
    draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
  elif kind == "square":
    draw.rectangle([x - r, y - r, x + r, y + r], fill=colour)
  else:
    draw.rectangle([x - r, y - 2, x + r, y + 2], fill=colour)
    draw.rectangle([x - 2, y - r, x + 2, y + r], fill=colour)
  return image


@pytest.fixture
def place(tmp_path, monkeypatch):
  """An empty folder to work in, with its own data sets."""
  monkeypatch.chdir(tmp_path)
  with mock.patch.dict(os.environ, MMJAX_DATA=str(tmp_path / "data")):
    yield tmp_path


def test_the_commands_of_the_guide_end_in_a_prediction(place, capsys):
  rng = np.random.default_rng(0)
  for kind in SHAPES:
    (place / "shapes" / kind).mkdir(parents=True)
    for i in range(80):
      shape(kind, rng).save(place / "shapes" / kind / f"{i}.png")
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


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression", "speech-recognition"])
def test_what_is_written_for_other_data_learns(task, place):
  rng = np.random.default_rng(0)

  def records(count: int):
    for i in range(count):
      level, noise = i % 3, rng.normal(size=(50, 2))
      if task == "speech-recognition":
        word = ("low", "middle", "high")[level]
        x = tone(0.6, hertz=(300, 800, 2000)[level] * rng.uniform(0.9, 1.1))
        yield dict(id=str(i), image_key=i, audio=sound(x), captions={"de": [word]})
        continue
      wave = np.sin(np.arange(50) * (0.2 + 0.3 * level) + rng.uniform(0, 6))
      series = np.float32(np.stack([1000 + 5 * wave, noise[:, 0]], 1) + 0.1 * noise)
      yield dict(
        id=str(i),
        image_key=i,
        captions={},
        series=series,
        label="abc"[level],
        value=np.float32([100 * level]),
      )

  fields = ("audio",) if task == "speech-recognition" else ("series", "value")
  splits = dict(train=records(240), validation=records(48))
  write_dataset("mine", place / "data", splits, fields=fields)
  assert cli.main(["init", task, "--source", "mine", "--out", "mine.py"]) == 0
  steps = "200" if task == "speech-recognition" else "100"
  quick = [f"--config.train.steps={steps}", "--config.log.tensorboard=False"]
  assert cli.main(["train", "--config", "mine.py", "--workdir", "run", *quick]) == 0
  scores = json.loads(pathlib.Path("run/eval.json").read_text())[f"{task}/validation"]
  if task == "classification":
    assert scores["accuracy"] > 0.9
  elif task == "regression":
    assert scores["r2"] > 0.5
  else:
    assert scores["word_error_rate"] < 0.3
    assert mmjax.load("run").write(audio=[tone(0.6, hertz=2000)]) == ["high"]
