"""Pictures of any aspect ratio through the front door: a run that trains, is killed, goes on,
evaluates, and embeds.
"""

from __future__ import annotations

import numpy as np
import pytest

import mmjax
from mmjax import config as configs
from mmjax.data.builders import write_dataset
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.parallel.mesh import single_device_mesh
from mmjax.training import loop, start
from mmjax.training.program import Program
from tests.data.conftest import COLOURS, record
from tests.e2e.commands import metrics, parameters
from tests.inference.tiny import png

SHAPES = ((20, 20), (12, 40), (33, 9), (8, 24))


class Killed(BaseException):
  """Stands for the end of a process."""


def picture(i: int) -> np.ndarray:
  return np.random.default_rng(i).integers(0, 256, (*SHAPES[i % len(SHAPES)], 3), dtype=np.uint8)


def make(root):
  c = configs.base()
  c.data.dir, c.data.sources.wide, c.train.steps, c.train.batch_size = (
    str(root),
    dict(name="wide"),
    4,
    8,
  )
  c.data.image.resize, c.data.image.patch, c.data.image.tokens, c.data.image.augment.crop = (
    "naflex",
    4,
    12,
    (0.5, 1.0),
  )
  c.data.text.tokenizer, c.data.text.vocab_size, c.data.text.length = "t", 512, 12
  c.model = dict(
    name="dual_encoder",
    width=16,
    encoders=dict(
      image=dict(kind="naflex", patch=4, grid=3, depth=1, heads=2),
      text=dict(kind="transformer", depth=1, heads=2),
    ),
  )
  c.objectives.align = dict(kind="contrastive", between=("image", "text"))
  c.evaluation.evaluators["retrieval"] = dict(kind="retrieval", source="wide", split="test")
  c.precision.compute, c.checkpoint.every, c.log.every, c.log.tensorboard = "float32", 2, 1, False
  return configs.resolve(c)


@pytest.mark.slow
def test_a_run_on_pictures_of_any_aspect_ratio_trains_resumes_evaluates_and_embeds(
  tmp_path, monkeypatch
):
  records = [record(i, image=png(picture(i))) for i in range(24)]
  write_dataset("wide", tmp_path, {"train": records[:16], "test": records[16:]}, card="# wide\n")
  train_tokenizer(
    [f"a {c} thing number" for c in COLOURS] * 20,
    tmp_path / "tokenizers" / "t.model",
    vocab_size=400,
  )
  config, step = make(tmp_path), Program.train
  monkeypatch.setattr(start, "make_mesh", lambda config: single_device_mesh())
  assert loop.train(config, tmp_path / "whole") == loop.DONE

  def train(self, state, batch, source=""):
    if int(state.step) == 3:
      raise Killed
    return step(self, state, batch, source)

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(Program, "train", train)
    loop.train(config, tmp_path / "killed")
  assert loop.train(config, tmp_path / "killed") == loop.DONE
  assert (
    metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    and len(metrics(tmp_path / "whole")) >= 4
  )
  assert parameters(tmp_path / "killed") == parameters(tmp_path / "whole")
  assert "retrieval/image_to_text/R@1" in metrics(tmp_path / "whole")[-1]

  model = mmjax.load(tmp_path / "whole", mesh=single_device_mesh())
  pictures = [picture(i) for i in range(4)]
  rows = model.encode_image(pictures)
  alone = np.concatenate([model.encode_image(one) for one in pictures])
  np.testing.assert_allclose(rows, alone, atol=2e-6)
  assert np.abs(rows[1:] - rows[:-1]).max() > 1e-3
  inputs = [model.media["image"](one) for one in pictures]
  junk = [
    {**x, "patches": np.where(x["mask"][:, None], x["patches"], 200).astype(np.uint8)}
    for x in inputs
  ]
  assert any((a["patches"] != b["patches"]).any() for a, b in zip(inputs, junk, strict=True))
  np.testing.assert_allclose(model.encode_image(junk), rows, atol=2e-6)
  assert model.pixels(pictures[1]).shape == (8, 24, 3)
