"""Linear probe: how much a linear classifier reads from frozen embeddings, in closed form.

Ridge regression of one-against-all targets (-1, 1) on centred embeddings, with an intercept that is
not penalised:
W = (X'X + n s I)^-1 X'Y, n examples, s relative to the mean variance of a feature, so that the grid
means the same for any scale.
"""

from __future__ import annotations

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result
from mmjax.evaluation.zero_shot import confusion, mean_class_accuracy
from mmjax.ranges import Strengths

GRID = tuple(10.0**power for power in range(-6, 3))


def linear_probe(
  context: Context,
  *,
  source: str,
  split: str = "test",
  train_split: str = "train",
  grid: Strengths = (),
) -> Result:
  """Accuracy on `split` of a linear classifier fitted to the embeddings of `train_split`.

  source: a data set with labels. split: tested on. train_split: fitted on; a fifth of it (by
  picture, so that identical ones stay together) chooses the regularisation from `grid`, then all of
  it is fitted again. grid: strengths of the regularisation that are tried; () = some powers of 10.
  The tested split chooses nothing. Metrics: "accuracy", "mean_class_accuracy",
  "regularisation", "train_examples", "examples", "unreadable" (left out).
  """
  where = f"evaluation.evaluators.{context.name}"
  if split == train_split:
    raise UserError(
      f"{where}: split and train_split are both {split!r}; fit and test on different splits"
    )
  if any(not isinstance(s, (int, float)) or s <= 0 for s in grid):
    raise UserError(f"{where}.grid is {grid!r}: give positive numbers, such as {GRID}")
  test, train = context.data(source, split), context.data(source, train_split)
  names = sorted(set(test.label_names) | set(train.label_names))
  x_test, y_test, _, lost = _examples(context, test, names)
  x, y, keys, lost_train = _examples(context, train, names)
  if not len(x_test) or len(np.unique(y)) < 2:
    raise UserError(
      f"{where}: {source} needs readable pictures with labels in {split}, and of two classes in "
      f"{train_split}"
    )
  held_out = part_of(keys)
  best = choose(x[~held_out], y[~held_out], x[held_out], y[held_out], len(names), grid or GRID)
  weights, bias = ridge(x, y, len(names), (best,))[0]
  predicted = np.argmax(x_test @ weights + bias, axis=1)
  metrics = dict(
    accuracy=float(np.mean(predicted == y_test)),
    mean_class_accuracy=mean_class_accuracy(y_test, predicted == y_test),
    regularisation=float(best),
    train_examples=float(len(x)),
    examples=float(len(x_test)),
    unreadable=float(lost + lost_train),
  )
  return Result(metrics, {"confusion": confusion(y_test, predicted, names)})


def ridge(x: np.ndarray, y: np.ndarray, classes: int, grid) -> list[tuple[np.ndarray, np.ndarray]]:
  """[(weights float64 [D, C], bias [C]) for each regularisation]. x [N, D], y int [N]. One
  eigendecomposition serves all.
  """
  mean = x.mean(axis=0, dtype=np.float64)
  gram, cross = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1], classes))
  frequency = np.bincount(y, minlength=classes) / len(y)
  for start in range(0, len(x), 16384):
    part = x[start : start + 16384] - mean
    targets = 2.0 * (y[start : start + 16384, None] == np.arange(classes)) - 2.0 * frequency
    gram += part.T @ part
    cross += part.T @ targets
  values, vectors = np.linalg.eigh(gram)
  scale = max(float(np.trace(gram)) / len(gram), 1e-30)
  solutions = []
  for s in grid:
    weights = vectors @ ((vectors.T @ cross) / (np.maximum(values, 0) + s * scale)[:, None])
    solutions.append((weights, 2.0 * frequency - 1.0 - mean @ weights))
  return solutions


def choose(x, y, x_held, y_held, classes: int, grid) -> float:
  """The regularisation that does best on the held-out part; the strongest of equals."""
  grid = sorted(grid, reverse=True)
  if not len(x_held) or len(np.unique(y)) < 2:
    return grid[len(grid) // 2]
  scores = [
    np.mean(np.argmax(x_held @ weights + bias, axis=1) == y_held)
    for weights, bias in ridge(x, y, classes, grid)
  ]
  return grid[int(np.argmax(scores))]


def part_of(keys: np.ndarray) -> np.ndarray:
  """bool [N]: about a fifth, decided by each picture's key uint64 alone, so in any order and never
  splitting equal pictures.
  """
  mixed = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing; wraps
  return (mixed >> np.uint64(40)) % np.uint64(5) == 0


def _examples(
  context: Context, data, names: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  pictures = context.images(data)
  position = np.array([names.index(name) for name in data.label_names], np.int64)
  labels = np.asarray(data.labels)
  rows = np.flatnonzero(pictures.valid & (labels >= 0))
  return (
    pictures.vectors[rows],
    position[labels[rows]] if len(position) else labels[rows],
    np.asarray(data.media_keys["image"])[rows],
    int((~pictures.valid).sum()),
  )
