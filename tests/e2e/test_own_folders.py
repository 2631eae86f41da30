"""The road of the guide for folders of every kind of data that users have: convert, show, init,
train, eval, predict, export, and what was exported read again: by transformers where it has a class
for it, else by mmjax. No key is looked up.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import transformers
from PIL import Image

import mmjax
from mmjax import cli
from mmjax.data.media import modality_of
from tests.e2e import own_folders

Rows = list[dict[str, str]]  # of predictions.csv


class Road(NamedTuple):
  """folder: a function of own_folders; count: its records; least: of `metric` on the test split.
  hf: the family of transformers that the model shall be like. convert: more options.
  """

  folder: str
  task: str
  count: int
  metric: str
  least: float
  convert: tuple[str, ...] = ()
  hf: str = ""


ROADS = {
  "pictures with labels": Road("pictures_with_labels", "classification", 240, "accuracy", 0.8),
  "pictures with captions": Road("pictures_with_captions", "captioning", 360, "exact", 0.6),
  "speech": Road("speech", "speech-recognition", 320, "exact", 0.8),
  "clips": Road("clips", "classification", 240, "accuracy", 0.8),
  "series with labels": Road("series_with_labels", "classification", 240, "accuracy", 0.8),
  "series with values": Road(
    "series_with_values", "regression", 240, "r2", 0.5, ("--value", "cycles")
  ),
  "several media": Road("several_media", "classification", 360, "accuracy", 0.8),
  "questions": Road("pictures_with_questions", "question-answering", 360, "accuracy", 0.7),
  "a ViT": Road("pictures_with_labels", "classification", 240, "accuracy", 0.6, hf="vit"),
  "a ResNet": Road("pictures_with_labels", "classification", 240, "accuracy", 0.6, hf="resnet"),
  "a CLIP": Road("pictures_with_captions", "retrieval", 360, "image_to_text/R@1", 0.5, hf="clip"),
  "a SigLIP": Road(
    "pictures_with_captions", "retrieval", 360, "image_to_text/R@1", 0.5, hf="siglip"
  ),
  "a BERT": Road("texts_with_labels", "classification", 300, "accuracy", 0.8, hf="bert"),
  "a Whisper": Road("speech", "speech-recognition", 320, "exact", 0.5, hf="whisper"),
}


def travel(road: Road, steps: str = "") -> dict[str, float]:
  """The scores of the test split; leaves run/, exported/ and predictions.csv in the current folder,
  or found.npz of a model that only finds.
  """
  make = getattr(own_folders, road.folder)
  make(pathlib.Path("mine"), road.count, np.random.default_rng(0))
  settings = [f"--config.train.steps={steps}"] if steps else []
  shares = ("--split", "train:80,validation:10,test:10")
  shown = "mine/metadata.csv" if road.folder == "texts_with_labels" else "mine"
  used = ["predict", "--checkpoint", "run", shown, "--out", "predictions.csv"]
  if road.task == "retrieval":
    used = ["embed", "--checkpoint", "run", "--images", "mine", "--out", "found.npz"]
  to, chosen = ("hf", ["--hf", road.hf]) if road.hf else ("safetensors", [])
  lines: tuple[Sequence[str], ...] = (
    ["data", "convert", "folder", "mine", "--name", "mine", *road.convert, *shares],
    ["data", "show", "mine", "--out", "mine.html"],
    ["init", road.task, "--source", "mine", "--out", "mine.py", *chosen],
    ["train", "--config", "mine.py", "--workdir", "run", *settings],
    ["eval", "--checkpoint", "run"],
    used,
    ["export", "--checkpoint", "run", "--to", to, "--out", "exported"],
  )
  assert len(lines) <= 8
  for line in lines:
    assert cli.main([*line]) == 0, line
  assert pathlib.Path("run/report.html").stat().st_size
  return json.loads(pathlib.Path("run/eval.json").read_text())[f"{road.task}/test"]


def predictions(count: int) -> Rows:
  with open("predictions.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == count and not any(row.get("error") for row in rows)
  return rows


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with mock.patch.dict(os.environ, MMJAX_DATA=str(tmp_path / "data")):
    yield tmp_path


def path_of(row: dict[str, str]) -> pathlib.Path:
  path = pathlib.Path(row["file"])
  return path if path.exists() else "mine" / path


def read_again(rows: Rows) -> None:
  """What was exported says in Python of the same files what stands in predictions.csv."""
  model = mmjax.load("exported")
  for row in rows[::40]:
    files: dict[str, list] = {"text": [row["question"]]} if "question" in row else {}
    for path in path_of(row).parent.glob(f"{path_of(row).stem}.*"):
      files[modality_of(path) or "series"] = [path]
    read = (*model.media, "text")
    (again,) = model.predict(**{name: file for name, file in files.items() if name in read})
    assert set(again) <= set(row)
    for name, value in again.items():
      if isinstance(value, float):
        assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-5)
      elif name != "file":
        assert row[name] == value


def read_by_classifier(rows: Rows) -> None:
  """Labels of pictures by their names, as surely."""
  processor = transformers.AutoProcessor.from_pretrained("exported")
  model = transformers.AutoModelForImageClassification.from_pretrained("exported").eval()
  pictures = [Image.open(path_of(row)).convert("RGB") for row in rows]
  with torch.no_grad():
    odds = torch.softmax(model(**processor(pictures, return_tensors="pt")).logits, -1).numpy()
  for row, some in zip(rows, odds, strict=True):
    for number, name in model.config.id2label.items():
      assert float(row[f"probability/{name}"]) == pytest.approx(some[number], abs=0.02)
    assert row["label"] == model.config.id2label[int(some.argmax())] or some.max() < 0.52


def read_by_bert(rows: Rows) -> None:
  """Labels by their names, as surely, of the texts of the table."""
  tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
  model = transformers.AutoModelForSequenceClassification.from_pretrained("exported").eval()
  with open("mine/metadata.csv", newline="") as file:
    texts = [row["text"] for row in csv.DictReader(file)]
  inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
  with torch.no_grad():
    odds = torch.softmax(model(**inputs).logits, -1).numpy()
  for row, some in zip(rows, odds, strict=True):
    for number, name in model.config.id2label.items():
      assert float(row[f"probability/{name}"]) == pytest.approx(some[number], abs=1e-4)


def read_by_whisper(rows: Rows) -> None:
  """The same transcripts, but for a few: sounds are resampled in another way."""
  processor = transformers.AutoProcessor.from_pretrained("exported")
  model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained("exported").eval()
  rate, sounds = 16_000, []
  for row in rows:
    sound, own = soundfile.read(path_of(row), dtype="float32")
    divisor = math.gcd(rate, own)
    sounds.append(scipy.signal.resample_poly(sound, rate // divisor, own // divisor))
  inputs = processor(sounds, sampling_rate=rate, return_tensors="pt")
  with torch.no_grad():
    tokens = model.generate(inputs["input_features"], do_sample=False)
  texts = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
  assert np.mean([row["text"] == text for row, text in zip(rows, texts, strict=True)]) > 0.95


def read_by_finder() -> None:
  """Pictures and captions are as near to each other."""
  processor = transformers.AutoProcessor.from_pretrained("exported")
  model = transformers.AutoModel.from_pretrained("exported").eval()
  found = np.load("found.npz")
  texts = [f"a {colour} {shape}" for colour in own_folders.COLOURS for shape in own_folders.SHAPES]
  pictures = [Image.open(f"mine/{name}").convert("RGB") for name in found["image_ids"]]
  inputs = processor(text=texts, images=pictures, padding="max_length", return_tensors="pt")
  with torch.no_grad():
    there = model(**inputs)
  here = mmjax.load("run").encode_text(texts)
  np.testing.assert_allclose(there.text_embeds, here, atol=1e-4)
  likeness = (there.image_embeds.numpy() * found["image_embeddings"]).sum(1)
  assert likeness.min() > 0.99


def test_values_of_series_are_learned_and_predicted(place):
  """One road in the suite, and short; the others are run whole behind --all."""
  road = ROADS["series with values"]
  scores = travel(road, steps="60")
  assert scores["examples"] > 10 and scores["r2"] > 0.2
  read_again(predictions(road.count))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROADS)
def test_every_kind_of_folder_ends_in_a_prediction(name, place):
  road = ROADS[name]
  scores = travel(road)
  print(name, road.metric, scores[road.metric])
  assert scores[road.metric] >= road.least > scores.get("majority", 0)
  if road.task == "retrieval":
    return read_by_finder()
  rows = predictions(road.count * (3 if name == "questions" else 1))
  columns = {"regression": "cycles", "classification": "label", "question-answering": "label"}
  said = columns.get(road.task, "text")
  assert len({row[said] for row in rows}) > 1
  readers = {"a BERT": read_by_bert, "a Whisper": read_by_whisper}
  readers.update(dict.fromkeys(("a ViT", "a ResNet"), read_by_classifier))
  readers.get(name, read_again)(rows)
