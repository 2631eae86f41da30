"""Values that the model predicts, against those of the records."""

from __future__ import annotations

import math

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result
from mmjax.evaluation.examples import shown
from mmjax.evaluation.metrics.regression import errors
from mmjax.ranges import Count

POINTS = 500  # of a scatter plot


def regression(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple[str, ...] = (),
  modalities: tuple[str, ...] = ("image",),
  text: str = "caption",
  objective: str = "",
  mistakes: Count = 12,
) -> Result:
  """How far the model's values are off, in the units of the data.

  source: a data set with values. split: which of its splits. languages: of the texts. modalities:
  what the values are read off, as in the objective. text: what the text of a row is, "caption" or
  "question". objective: whose scale the values have; "" = the only regression. mistakes: how many
  of the worst the report shows.
  Metrics: "mae", "rmse", "r2", and "mean_guess/rmse" of always saying the mean of the training
  data, which "r2" of 0 is about; of several values the same as "NAME/mae", ..., and the mean of
  their "r2"; "examples", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  mean, std = scale(context.config, objective, where)
  data = context.data(source, split, languages, text)
  batches = data.batches(modalities)
  found, valid, true = context.apply("regress", (tuple(modalities),), batches, ("value",))
  predicted = found.astype(np.float64) * std + mean
  true = np.where(valid[:, None], true, np.nan).astype(np.float64)
  if not np.isfinite(true).any():
    raise UserError(f"{where}: {source} split {split} has no readable example with a value")
  names = value_names(data.source, len(mean))
  result: dict[str, float] = {}
  figures: dict = {}
  r2 = []
  for k, name in enumerate(names):
    if not np.isfinite(true[:, k]).any():
      continue
    prefix = f"{name}/" if len(names) > 1 else ""
    off = errors(predicted[:, k], true[:, k])
    guess = errors(np.full(len(true), mean[k]), true[:, k])
    result |= {f"{prefix}mae": off.mae, f"{prefix}rmse": off.rmse}
    if math.isfinite(off.r2):
      result[f"{prefix}r2"] = off.r2
      r2.append(off.r2)
    result[f"{prefix}mean_guess/rmse"] = guess.rmse
    rows = np.flatnonzero(np.isfinite(true[:, k]))
    rows = rows[np.linspace(0, len(rows) - 1, min(POINTS, len(rows))).round().astype(int)]
    points = np.stack([true[rows, k], predicted[rows, k]], axis=1).tolist()
    figures[f"scatter/{name}"] = dict(kind="scatter", name=name, points=points)
  if len(names) > 1 and r2:
    result = {"r2": float(np.mean(r2)), **result}
  off = np.nan_to_num(np.abs(predicted - true) / std).max(1)
  worst = np.argsort(-off, kind="stable")[: min(mistakes, int((off > 0).sum()))]
  figures["mistakes"] = dict(
    kind="mistakes",
    rows=[
      dict(
        said=", ".join(f"{x:.4g}" for x in predicted[i]),
        true=", ".join(f"{x:.4g}" for x in true[i]),
        note=f"off by {off[i]:.2f} standard deviations",
        **shown(data, data.items[i], modalities),
      )
      for i in worst.tolist()
    ],
  )
  measured = int(np.isfinite(true).any(1).sum())
  unreadable = float((~valid[: len(data.items)]).sum())
  return Result({**result, "examples": float(measured), "unreadable": unreadable}, figures)


def scale(config, objective: str = "", where: str = "") -> tuple[np.ndarray, np.ndarray]:
  """(mean, standard deviation) float64 [K] by which the model's values are standardised. Raises
  UserError: no regression, or several of different scales.
  """
  entries = {n: e for n, e in config.objectives.items() if e.get("kind") == "regression"}
  if objective:
    entries = {name: entry for name, entry in entries.items() if name == objective}
  scales = {(tuple(entry["mean"]), tuple(entry["std"])) for entry in entries.values()}
  prefix = f"{where}: " if where else ""
  if not scales:
    raise UserError(f"{prefix}this config has no objective of the kind 'regression'")
  if len(scales) > 1:
    raise UserError(f"{prefix}the scales of {', '.join(entries)} differ: name one by `objective`")
  mean, std = scales.pop()
  if not mean or not std:
    raise UserError(f"{prefix}mean and std of the values are not known: no run has filled them in")
  return np.asarray(mean, np.float64), np.asarray(std, np.float64)


def value_names(source, count: int) -> list[str]:
  """The names of the values of a source; numbers where it has none."""
  names = list(getattr(source, "values", ()))
  return names if len(names) == count else [str(k) for k in range(count)]
