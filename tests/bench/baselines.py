"""What recipes have to beat: usual features with a simple model of scikit-learn, on the same
splits.

  python tests/bench/baselines.py spoken_commands

Models are fitted on `train`. The one that is best on `validation` is scored on `test`.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from skimage.feature import hog
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import get_scorer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mmjax.data.sources import open_source

SOUND = 22_400  # samples of a sound that are looked at: 1.4 s
MELS, PARTS = 40, 14  # bands of a spectrogram, and parts of its time that are averaged


def measure(
  candidates: Iterable[tuple[str, Any]],
  features: Callable[[dict], np.ndarray],
  target: Callable[[dict], Any],
  scores: Sequence[str],
  source: str,
) -> dict[str, Any]:
  """{"chosen": name, split: {score: value}}. scores: names of scikit-learn, of which the first
  chooses."""
  data = {}
  for split in ("train", "validation", "test"):
    rows = open_source(dict(name=source, split=split, languages=()))
    records = [rows[i] for i in range(len(rows))]
    data[split] = np.stack([features(r) for r in records]), np.array([target(r) for r in records])
  fitted = {name: model.fit(*data["train"]) for name, model in candidates}
  first = get_scorer(scores[0])
  chosen = max(fitted, key=lambda name: first(fitted[name], *data["validation"]))
  reached = {
    split: {name: float(get_scorer(name)(fitted[chosen], *data[split])) for name in scores}
    for split in ("validation", "test")
  }
  return dict(chosen=chosen, **reached)


def spoken_commands() -> dict[str, Any]:
  """Accuracy of logistic regression and of support vectors on a spectrogram."""
  models: dict[str, Any] = {}
  for c in (1e-4, 1e-3, 1e-2, 1e-1):
    models[f"logistic regression, C = {c:g}"] = LogisticRegression(C=c, max_iter=1000)
  for c in (1.0, 10.0):
    for gamma in (0.3, 1.0, 3.0):
      name = f"support vectors, C = {c:g}, gamma = {gamma:g} / features"
      models[name] = SVC(C=c, gamma=gamma / (MELS * PARTS))
  scaled = [(name, make_pipeline(StandardScaler(), model)) for name, model in models.items()]
  return measure(scaled, spectrogram, lambda r: r["label"], ["accuracy"], "spoken_commands")


def spectrogram(record: dict) -> np.ndarray:
  """float64 [MELS * PARTS]: log energies of mel bands, of windows of 25 ms every 10 ms."""
  sound, rate = soundfile.read(io.BytesIO(record["audio"]))
  sound = np.pad(sound, (0, max(0, SOUND - len(sound))))[:SOUND]
  windows = np.lib.stride_tricks.sliding_window_view(sound, rate // 40)[:: rate // 100]
  power = np.square(np.abs(np.fft.rfft(windows * np.hanning(rate // 40), 512)))
  top = 2595 * np.log10(1 + rate / 2 / 700)
  edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
  bins = np.fft.rfftfreq(512, 1 / rate)
  rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
  falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
  energy = np.log(power @ np.maximum(0, np.minimum(rising, falling)).T + 1e-8)
  energy -= energy.mean()
  return np.concatenate([part.mean(0) for part in np.array_split(energy, PARTS)])


def rare_animals() -> dict[str, Any]:
  """Average precision, AUC and balanced accuracy of two usual ways, whose classes weigh alike."""
  linear = []
  for c in (1e-4, 1e-3, 1e-2, 1e-1):
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=300)
    linear.append((f"C = {c:g}", make_pipeline(StandardScaler(), model)))
  settings: dict[str, Any] = dict(max_iter=300, class_weight="balanced", random_state=0)
  trees = [
    (
      f"{leaves} leaves, rate {rate:g}",
      HistGradientBoostingClassifier(max_leaf_nodes=leaves, learning_rate=rate, **settings),
    )
    for leaves in (7, 31)
    for rate in (0.03, 0.1)
  ]
  scores = ("average_precision", "roc_auc", "balanced_accuracy")
  args = (lambda r: r["label"] == "animal", scores, "rare_animals")
  return {
    "gradients, logistic regression": measure(linear, gradients, *args),
    "colours, boosted trees": measure(trees, colours, *args),
  }


def basket_prices() -> dict[str, Any]:
  """R2 and mean error of boosted trees on the table beside what is told of the picture, and of a
  linear model of that, times the share of the price that the table says is paid."""
  trees = [
    (
      f"{leaves} leaves, rate {rate:g}",
      make_pipeline(
        ColumnTransformer(
          [("gradients", PCA(32, random_state=0), slice(259, None))], remainder="passthrough"
        ),
        HistGradientBoostingRegressor(
          max_leaf_nodes=leaves, learning_rate=rate, max_iter=500, random_state=0
        ),
      ),
    )
    for leaves in (15, 63)
    for rate in (0.03, 0.1)
  ]
  linear = [
    (f"alpha = {alpha:g}", Ridge(alpha, fit_intercept=False))
    for alpha in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
  ]

  def seen(record: dict) -> np.ndarray:
    return np.concatenate([colours(record), gradients(record)])

  def paid(record: dict) -> float:
    quantity, discount = record["series"][0]
    return quantity * (1 - discount)

  def beside(record: dict) -> np.ndarray:
    return np.concatenate([record["series"][0], [paid(record)], seen(record)])

  def times(record: dict) -> np.ndarray:
    return paid(record) * np.concatenate([[1.0], seen(record)])

  args = (lambda r: r["value"][0], ("r2", "neg_mean_absolute_error"), "basket_prices")
  return {
    "boosted trees": measure(trees, beside, *args),
    "ridge regression": measure(linear, times, *args),
  }


def gradients(record: dict) -> np.ndarray:
  """float64 [F]: histograms of oriented gradients."""
  return hog(np.asarray(picture(record).convert("L")), pixels_per_cell=(8, 8))


def colours(record: dict) -> np.ndarray:
  """float64 [256]: how often each of 16 hues occurs with each of 4 saturations and values."""
  pixels = np.asarray(picture(record).convert("HSV")).reshape(-1, 3) // (16, 64, 64)
  return np.bincount(pixels @ (16, 4, 1), minlength=256) / len(pixels)


def picture(record: dict) -> Image.Image:
  return Image.open(io.BytesIO(record["image"])).convert("RGB")


BASELINES = dict(
  basket_prices=basket_prices, rare_animals=rare_animals, spoken_commands=spoken_commands
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("source", choices=sorted(BASELINES))
  print(json.dumps(BASELINES[parser.parse_args().source](), indent=2))


if __name__ == "__main__":
  main()
