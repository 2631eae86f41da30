"""A small data set and a tokenizer for it, made once a session: `tiny` is the data folder, `config`
a resolved config on it.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mmjax import config as configs
from mmjax.data.builders import write_dataset
from mmjax.data.tokenizer_training import train_tokenizer

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink")


def picture(seed: int, size: int = 20) -> bytes:
  out = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
  Image.fromarray(pixels).save(out, "PNG")
  return out.getvalue()


def record(i: int, **changes) -> dict:
  colour = COLOURS[i % len(COLOURS)]
  captions = {
    "en": [f"a {colour} thing number {i}", f"thing {i} in {colour}"],
    "de": [f"ein Ding {i}"],
  }
  return {
    "id": f"r{i:03d}",
    "image": picture(i),
    "captions": captions,
    "label": colour,
    "image_key": 2**64 - 1 - i,
    **changes,
  }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  records = [record(i) for i in range(60)]
  write_dataset(
    "tiny",
    root,
    {"train": records[:37], "validation": records[37:50], "test": records[50:]},
    card="# tiny\n",
  )
  broken = [record(i) for i in range(8)]
  broken[2]["image"] = broken[2]["image"][:40]
  broken[5]["captions"] = {}
  write_dataset("broken", root, {"train": broken})
  captions = [text for r in records for texts in r["captions"].values() for text in texts]
  train_tokenizer(captions, root / "tokenizers" / "tiny.model", vocab_size=400)
  return root


@pytest.fixture
def config(tiny):
  """config(**{"train.batch_size": 8, ...}) -> a resolved config with pictures and captions of
  `tiny`.
  """

  def make(**changes):
    c = configs.base()
    c.data.dir, c.data.text.tokenizer, c.data.text.vocab_size = str(tiny), "tiny", 512
    c.data.sources.tiny = dict(name="tiny", split="train", languages=("en", "de"))
    c.data.image.size, c.data.text.length, c.train.batch_size = 16, 12, 8
    c.data.text.drop_words, c.data.image.augment.rotate = 0.2, 10.0
    c.model = dict(
      name="dual_encoder",
      encoders=dict(image=dict(kind="vit", patch=8), text=dict(kind="transformer")),
    )
    return configs.resolve(c, [f"{path}={value!r}" for path, value in changes.items()])

  return make
