"""Drawn pictures: their class by a classifier of real ones, their distance to the training
pictures, their place in the report.
"""

import numpy as np
import pytest

from mmjax.evaluation import generated as module
from mmjax.evaluation.report import write_report
from tests.evaluation import fakes

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
  monkeypatch.setattr(module, "SAMPLES", 1000)


def stripes(kind: int, count: int) -> np.ndarray:
  """Pictures uint8 [count, 12, 12, 3]: plain with noise, rows, columns."""
  wave = np.arange(12) // 2 % 2 * 160
  base = (np.zeros((12, 12)), np.tile(wave, (12, 1)), np.tile(wave[:, None], (1, 12)))[kind]
  return (base[None, :, :, None] + rng.integers(0, 90, (count, 12, 12, 3))).astype(np.uint8)


TRAIN, LABELS = np.concatenate([stripes(k, 40) for k in range(3)]), np.repeat(np.arange(3), 40)


def test_the_classifier_learns_and_repeats_itself():
  test, labels = np.concatenate([stripes(k, 10) for k in range(3)]), np.repeat(np.arange(3), 10)
  guesses = [module.fit(TRAIN, LABELS, np.arange(120, dtype=np.uint64), 3)(test) for _ in range(2)]
  assert (guesses[0] == labels).mean() > 0.95 and (guesses[0] == guesses[1]).all()


def test_the_nearest_picture_by_brute_force():
  x, others = TRAIN[::9], TRAIN[1::7]
  want = [min(np.sqrt(np.mean((a / 255.0 - b / 255.0) ** 2)) for b in others) for a in x]
  np.testing.assert_allclose(module.nearest(x, others), want, atol=1e-7)
  np.testing.assert_allclose(module.nearest(TRAIN[:3], TRAIN), 0, atol=1e-6)


class Data(fakes.Data):
  """Pictures with labels."""

  def __init__(self, pictures, labels, first):
    super().__init__(
      pictures.reshape(len(pictures), -1),
      labels=labels,
      label_names=("plain", "rows", "columns"),
      image_keys=first + np.arange(len(pictures), dtype=np.uint64),
    )
    self.pictures = pictures

  def picture(self, i):
    return self.pictures[i]

  def batches(self, modalities):
    return self._batches("text", self.vectors, self.valid)


def test_the_evaluator_counts_what_was_drawn(tmp_path):
  """A model that draws each real picture, half of them of the next class: accuracy is a half."""
  test, labels = np.concatenate([stripes(k, 8) for k in range(3)]), np.repeat(np.arange(3), 8)
  order = np.arange(24)
  order[::2] = (order[::2] + 8) % 24
  data = {"test": Data(test, labels, 1000), "train": Data(TRAIN, LABELS, 0)}
  run = fakes.evaluation({"drawn": dict(kind="generated", source="x", examples=5)}, data, devices=1)
  rows = iter(range(10**6))

  def apply(params, method, args, batch):
    assert method == "generate"
    at = [next(rows) % 24 for _ in batch["text"]["vectors"]]
    return np.stack([test[order[i]] for i in at])

  run.apply = apply
  result = run.run(1.0)["drawn"]
  m = result.metrics
  assert (
    abs(m["accuracy"] - 0.5) < 0.1
    and m["real/accuracy"] > 0.95
    and m["examples"] == 24
    and m["unreadable"] == 0
  )
  assert m["variety"] == 0 and m["copies"] == 0 and abs(m["majority"] - 1 / 3) < 1e-9
  np.testing.assert_allclose(m["nearest_train"], m["real/nearest_train"])
  page = write_report(tmp_path, run.config, {"drawn": result}).read_text()
  assert "what the model draws" in page and page.count('alt="drawn"') == 5
