"""`mmjax train --find-lr`: a learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3).

A few steps of the run with a rate that grows by a constant factor from step to step. Where the loss
falls fastest the rate is a good peak; where it rises it is too high. Nothing of it is kept but
find_lr.json and find_lr.html in the run folder.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax import files
from mmjax.config import UserError
from mmjax.data.rollouts import sampling
from mmjax.evaluation import report_charts
from mmjax.files import disk_errors
from mmjax.parallel import multihost
from mmjax.printing import in_html, log
from mmjax.training import reference
from mmjax.training.program import Program
from mmjax.training.start import new_state, open_data, own
from mmjax.training.stop import StopSignal

STEPS, LOWEST, HIGHEST = 120, 1e-6, 1.0
SMOOTHING = 0.85  # of the moving average of the loss
TOO_HIGH = 1.5  # times the lowest loss, or the first one: the test ends there
NAMES = ("find_lr.json", "find_lr.html")


class Found(NamedTuple):
  """rates, losses: of each step; smooth: their moving average; suggestion: for optimizer.lr; best:
  the rate with the lowest smooth loss, which is near the edge."""

  rates: list[float]
  losses: list[float]
  smooth: list[float]
  suggestion: float
  best: float


def find_lr(config: FrozenConfigDict, workdir: str | os.PathLike, *, steps: int = 0) -> Found:
  """Runs the test, prints its table and a suggestion for optimizer.lr, writes NAMES into `workdir`.

  steps: at most; 0 = STEPS. The first state is that of the run: new, or of init.from. Rates of
  other optimizers keep their ratio to it. Raises UserError: as `train`, or the loss is never
  finite.
  """
  if not os.fspath(workdir):
    raise UserError("--workdir is empty: name the run folder")
  if sampling(config):
    raise UserError(
      "--find-lr looks where the loss falls, but objective 'grpo' has none that tells: its reward "
      "does. Try rates a tenth of those that the model was trained with"
    )
  steps = steps or STEPS
  multihost.initialize(config, shared=str(workdir))
  with StopSignal() as stop:
    config, mesh, pipeline = multihost.together(functools.partial(open_data, config))
    with own(workdir, stop):
      ramp = growing(config, steps)
      with configs.mistakes():
        program = Program(ramp, mesh, steps=steps, examples=pipeline.examples)
        state = new_state(ramp, program, log=lambda line: None)
        log(f"compiling; then at most {steps} steps, rates from {LOWEST:g} to {HIGHEST:g}")
        program.compile()
      if pipeline.judged:
        pipeline.refer(reference.computed(pipeline, program, state), "")
      rates: list[float] = []
      losses: list[float] = []
      with jax.set_mesh(mesh):
        for at, batch in enumerate(pipeline.iterate(0, steps)):
          batch = multihost.to_device(batch, mesh)
          state, metrics = program.train(state, batch, pipeline.source_of(at))
          metrics = jax.device_get(metrics)
          if bool(metrics["skipped"]):
            break
          rates.append(float(metrics["lr"]))
          losses.append(float(metrics["loss"]))
          if multihost.any_process(stop.received):
            raise UserError(f"stopped by {stop.name} at step {at + 1} of {steps}")
          smooth = smoothed(losses)
          if smooth[-1] > TOO_HIGH * max(min(smooth), smooth[0]):
            break
      found = read(rates, losses)
      log(table(found))
      if multihost.is_main():
        _write(Path(workdir), found)
  return found


def growing(config: FrozenConfigDict, steps: int) -> FrozenConfigDict:
  """The config with a rate that grows from LOWEST to HIGHEST over `steps`."""
  tree = config.to_dict()
  factor = HIGHEST / (tree["optimizer"]["lr"] or 1.0)
  tree["optimizer"]["lr"] = HIGHEST
  for entry in tree["optimizers"].values():
    entry["lr"] *= factor
  tree["schedule"] = dict(name="exponential", warmup=0, first=LOWEST / HIGHEST)
  tree["train"]["steps"] = steps
  return FrozenConfigDict(tree)


def smoothed(losses: Sequence[float]) -> list[float]:
  """The exponential moving average, corrected for its start."""
  average, out = 0.0, []
  for number, loss in enumerate(losses, 1):
    average = SMOOTHING * average + (1 - SMOOTHING) * loss
    out.append(average / (1 - SMOOTHING**number))
  return out


def read(rates: Sequence[float], losses: Sequence[float]) -> Found:
  """The suggestion: the rate at which the smooth loss falls fastest (per factor of the rate), of
  those up to its lowest point. Raises UserError: there are fewer than 10 steps.
  """
  if len(losses) < 10:
    raise UserError(
      f"only {len(losses)} steps were finite, from a rate of {LOWEST:g} on: look at the data and "
      "at optimizer.clip first"
    )
  smooth = smoothed(losses)
  lowest = int(np.argmin(smooth))
  slopes = np.gradient(np.array(smooth), np.log(np.array(rates)))
  steepest = int(np.argmin(slopes[: max(2, lowest)]))
  suggestion = float(f"{rates[steepest]:.1e}")
  return Found(list(rates), list(losses), smooth, suggestion, rates[lowest])


def table(found: Found, lines: int = 12) -> str:
  """The losses at evenly spaced rates, and the suggestion."""
  chosen = np.unique(np.linspace(0, len(found.rates) - 1, lines).round().astype(int))
  rows = [f"  {found.rates[i]:.1e}  {found.smooth[i]:10.4f}" for i in chosen.tolist()]
  end = (
    "the loss was lowest there, and rises beyond"
    if found.best < found.rates[-1]
    else "the loss still falls at the highest rate"
  )
  return "\n".join(
    [
      "  rate        loss",
      *rows,
      f"optimizer.lr = {found.suggestion:g} is where the loss falls fastest; at {found.best:.1e} "
      f"{end}",
    ]
  )


def _write(folder: Path, found: Found) -> None:
  points = [(math.log10(rate), loss) for rate, loss in zip(found.rates, found.smooth, strict=True)]
  drawn = report_charts.chart("loss over log10 of the learning rate", [("loss", points)])
  page = (
    f"<!doctype html><meta charset='utf-8'><title>{in_html(drawn['title'])}</title><style>{_STYLE}"
    f"</style><h1>{in_html(drawn['title'])}</h1>{drawn['svg']}<pre>{in_html(table(found))}</pre>\n"
  )
  facts = dict(found._asdict())
  with disk_errors(folder, f"{folder} cannot be written"):
    files.make_folder(files.as_path(folder))
    for name, text in zip(NAMES, (json.dumps(facts, indent=2) + "\n", page), strict=True):
      files.as_path(folder / name).write_text(text)


_STYLE = """
body { font: 14px system-ui, sans-serif; max-width: 760px; margin: 2em auto; color: #1b2430 }
h1 { font-size: 18px } .grid { stroke: #e2e7ec } .tick { font-size: 11px; fill: #5d6b7c }
.line { fill: none; stroke: #0b7285; stroke-width: 1.8 } .area { fill: #0b7285; opacity: .09 }
"""
