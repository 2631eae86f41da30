"""Pictures that the model draws from held-out captions: what a classifier of real pictures takes
them for, and how near they are to the training pictures.

The classifier never sees a drawn picture, nor anything of the model: it is fitted here, in closed
form, to real pictures. Its features are those of Coates and Ng (2011, "The importance of encoding
versus training with sparse coding and vector quantization"): patches of training pictures,
normalised and whitened, serve as filters; what passes a threshold is summed over a 3x3 grid of the
picture.
"""

from __future__ import annotations

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result, sample_evenly
from mmjax.evaluation.linear_probe import GRID, choose, part_of, ridge
from mmjax.evaluation.zero_shot import confusion, mean_class_accuracy
from mmjax.ranges import Count, Seed

PATCH, FILTERS, THRESHOLD, GRID_SIDE = 6, 192, 0.5, 3
SAMPLES = 20_000  # patches that the whitening is estimated from


def generated(
  context: Context,
  *,
  source: str,
  split: str = "test",
  train_split: str = "train",
  languages: tuple[str, ...] = (),
  seed: Seed = 0,
  examples: Count = 60,
) -> Result:
  """Draws a picture for each example's caption in `split`, and a second one with other noise.

  source: a data set with labels. split: whose captions are drawn. train_split: real pictures that
  the classifier is fitted to, and that drawn ones are compared with.
  languages: of the captions (() = those that data.sources reads of it, else all).
  seed: of the noise. examples: how many the report shows.
  Metrics of drawn pictures, and of the real ones of `split` as "real/...":
    "accuracy", "mean_class_accuracy": share that the classifier gives the class of their caption's
    real picture. "nearest_train": root mean square difference (of pixels in 0 to 1) to the nearest
    training picture, averaged.
  Of drawn pictures alone: "copies" (share nearer to a training picture than 0.02), "variety" (the
  difference between the two pictures of a caption).
  Besides: "majority" (what guessing gets), "examples", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if split == train_split:
    raise UserError(f"{where}: split and train_split are both {split!r}; captions must be held out")
  test, train = context.data(source, split, languages), context.data(source, train_split, languages)
  names = sorted(set(test.label_names) | set(train.label_names))
  (real, readable), (x, readable_train) = pictures_of(test), pictures_of(train)
  (made, drawn), (again, _) = (
    context.apply("generate", (number,), test.batches(("text",))) for number in (seed, seed + 1)
  )
  labels, train_labels = (
    np.array([names.index(d.label_names[i]) if i >= 0 else -1 for i in d.labels])
    for d in (test, train)
  )
  rows = np.flatnonzero(readable & drawn[: len(test)] & (labels >= 0))
  kept = np.flatnonzero(readable_train & (train_labels >= 0))
  if not len(rows) or len(np.unique(train_labels[kept])) < 2:
    raise UserError(
      f"{where}: {source} needs readable pictures with captions and labels in {split}, and of two "
      f"classes in {train_split}"
    )
  y, real, made, again = labels[rows], real[rows], made[rows], again[rows]
  x, x_labels = x[kept], train_labels[kept]
  classify = fit(x, x_labels, np.asarray(train.media_keys["image"])[kept], len(names))
  guess, guess_real = classify(made), classify(real)
  near = nearest(made, x)
  metrics = dict(
    accuracy=float(np.mean(guess == y)),
    mean_class_accuracy=mean_class_accuracy(y, guess == y),
    nearest_train=float(near.mean()),
    variety=float(
      np.mean(np.sqrt(np.mean(np.square((made.astype(np.float32) - again) / 255), axis=(1, 2, 3))))
    ),
    copies=float(np.mean(near < 0.02)),
    majority=float(np.bincount(y).max() / len(y)),
    examples=float(len(rows)),
    unreadable=float(len(test) - len(rows)),
  )
  metrics["real/accuracy"] = float(np.mean(guess_real == y))
  metrics["real/mean_class_accuracy"] = mean_class_accuracy(y, guess_real == y)
  metrics["real/nearest_train"] = float(nearest(real, x).mean())
  captions: dict[int, str] = {}
  for caption in test.captions:
    captions.setdefault(caption.example, caption.text)
  shown = [
    dict(
      text=captions.get(int(rows[i]), ""),
      picture=made[i],
      expected=real[i],
      correct=bool(guess[i] == y[i]),
    )
    for i in sample_evenly(len(rows), examples)
  ]
  return Result(
    metrics,
    {"pictures": dict(kind="pictures", rows=shown), "confusion": confusion(y, guess, names)},
  )


def pictures_of(data) -> tuple[np.ndarray, np.ndarray]:
  """(pixels uint8 [N, H, W, 3] of an `EvaluationData` in its order, which show something, bool [N]:
  an unreadable one is white).
  """
  pixels = np.stack([data.picture(i) for i in range(len(data))])
  return pixels, (pixels != 255).any((1, 2, 3))


def nearest(x: np.ndarray, others: np.ndarray) -> np.ndarray:
  """float64 [N]: root mean square difference of each picture of x, uint8 [N, H, W, 3], to the
  nearest of others, in 0 to 1.
  """

  def flat(pictures):
    return pictures.reshape(len(pictures), -1).astype(np.float64) / 255

  others = flat(others)
  out = []
  for start in range(0, len(x), 256):
    part = flat(x[start : start + 256])
    squares = np.square(part).sum(1)[:, None] + np.square(others).sum(1)[None] - 2 * part @ others.T
    out.append(np.sqrt(np.maximum(squares.min(1), 0) / others.shape[1]))
  return np.concatenate(out)


def fit(x: np.ndarray, labels: np.ndarray, keys: np.ndarray, classes: int):
  """A classifier of pictures uint8 [N, H, W, 3], as a function to class numbers int [N].
  Deterministic: the same for the same pictures.

  keys uint64 [N] of the pictures: a fifth by them chooses the regularisation.
  """
  rng = np.random.default_rng(0)
  side = x.shape[1] - PATCH + 1
  at = zip(rng.integers(len(x), size=SAMPLES), *rng.integers(side, size=(2, SAMPLES)), strict=True)
  patches = normalised(
    np.stack([x[i, r : r + PATCH, c : c + PATCH].reshape(-1) for i, r, c in at]).astype(np.float32)
  )
  mean = patches.mean(0)
  values, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
  whiten = (vectors / np.sqrt(values + 0.1)) @ vectors.T
  filters = (patches - mean) @ whiten
  filters = filters[np.linalg.norm(filters, axis=1) > 1e-3][:FILTERS]  # plain patches say nothing
  filters /= np.linalg.norm(filters, axis=1, keepdims=True)
  kernel, bias = (
    (whiten @ filters.T).astype(np.float32),
    (mean @ whiten @ filters.T).astype(np.float32),
  )
  edges = np.linspace(0, side, GRID_SIDE + 1).round().astype(int)

  def features(pictures: np.ndarray) -> np.ndarray:
    out = []
    for start in range(0, len(pictures), 64):
      part = pictures[start : start + 64].astype(np.float32)
      views = np.lib.stride_tricks.sliding_window_view(part, (PATCH, PATCH), axis=(1, 2)).transpose(
        0, 1, 2, 4, 5, 3
      )
      pixels = np.maximum(
        normalised(views.reshape(-1, PATCH * PATCH * 3)) @ kernel - bias - THRESHOLD, 0
      )
      pixels = pixels.reshape(len(part), side, side, -1)
      sums = np.add.reduceat(np.add.reduceat(pixels, edges[:-1], axis=1), edges[:-1], axis=2)
      out.append(np.sqrt(sums.reshape(len(part), -1)))
    return np.concatenate(out)

  inputs, held = features(x), part_of(keys)
  spread = inputs.std(0) + 1e-2
  best = choose(
    inputs[~held] / spread, labels[~held], inputs[held] / spread, labels[held], classes, GRID
  )
  weights, intercept = ridge(inputs / spread, labels, classes, (best,))[0]
  return lambda pictures: np.argmax(features(pictures) / spread @ weights + intercept, axis=1)


def normalised(patches: np.ndarray) -> np.ndarray:
  """Patches float32 [N, P] in 0..255 with mean 0 and variance 1; 10 is added to the variance, so
  that plain ones stay plain.
  """
  patches = patches - patches.mean(1, keepdims=True)
  return patches / np.sqrt(patches.var(1, keepdims=True) + 10)
