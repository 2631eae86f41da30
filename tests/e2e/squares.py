"""Coloured squares: a data set, a tokenizer and a config so small that a command takes little more
than its start."""

from __future__ import annotations

import io
import os
import pathlib
from unittest import mock

import numpy as np
from PIL import Image

COLOURS = dict(red=(220, 40, 40), green=(40, 160, 60), blue=(40, 70, 220))
CONFIG = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.train.steps, c.train.batch_size = 24, 32
  c.data.sources.squares = dict(name="squares")
  c.data.image.size = 32
  c.data.text.tokenizer, c.data.text.vocab_size, c.data.text.length = "squares", 512, 8
  c.data.label, c.data.classes = "label", 3
  c.model = dict(name="dual_encoder", width=32, encoders=dict(
      image=dict(kind="vit", patch=8, depth=1, heads=2),
      text=dict(kind="transformer", depth=1, heads=2)))
  c.precision.compute = "float32"
  c.objectives.align = dict(kind="contrastive", between=("image", "text"))
  c.log.every, c.checkpoint.every, c.evaluation.every = 1, 4, 8
  c.log.tensorboard = False
  c.evaluation.evaluators["retrieval/test"] = dict(
      kind="retrieval", source="squares", split="test")
  return c
"""


def picture(colour: str, top: int = 8, left: int = 8, shade: int = 0) -> bytes:
  """A PNG of 32 x 32 pixels with a square."""
  pixels, file = np.full((32, 32, 3), 255 - shade, np.uint8), io.BytesIO()
  pixels[top : top + 12, left : left + 12] = COLOURS[colour]
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def records(seed: int, count: int, shade: int = 0):
  places = np.random.default_rng(seed)
  for number in range(count):
    colour, (top, left) = list(COLOURS)[number % 3], places.integers(0, 20, 2)
    yield dict(
      id=f"{seed}-{number}",
      image=picture(colour, top, left, shade),
      image_key=1000 * seed + number,
      captions={"en": [f"a {colour} square"]},
      label=colour,
    )


def build(data_dir, log=print, *, count: int = 192, shade: int = 0) -> pathlib.Path:
  """The data set "squares"; also as `mmjax data build tests.e2e.squares:build`."""
  from mmjax.data.builders import find_version, write_dataset

  splits = dict(train=records(0, count, shade), test=records(1, 48, shade))
  return find_version(data_dir, "squares") or write_dataset(
    "squares", data_dir, splits, card="# squares", licence="CC0-1.0"
  )


def make(folder: pathlib.Path) -> pathlib.Path:
  """`folder`/data with the data set and its tokenizer, `folder`/tiny.py; the config's path."""
  from mmjax import cli

  build(folder / "data")
  with mock.patch.dict(os.environ, MMJAX_DATA=str(folder / "data")):
    words = "data tokenizer --source squares --name squares --vocab-size 400".split()
    assert cli.main(words) == 0
  config = folder / "tiny.py"
  config.write_text(CONFIG)
  return config
