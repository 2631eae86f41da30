"""Where the time of a run goes: of each step, and of all wall time since the run's first start.

Every second of the main process belongs to one cause. Goodput is the share of the wall time since
the first start that computed steps which count: neither skipped nor lost, because the run ended
before a checkpoint had them. The seconds live in RUN/goodput.json, and a checkpoint notes how many
were productive when it was saved: what goes beyond that is lost when a run goes on from it. Clocks
that jump do no harm: within a process time is monotonic, and between two processes it never counts
less than nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.training.metrics import utilisation

NAME = "goodput.json"
# What the main thread waits for, by cause; the watchdog says it so.
WAITS = {
  "compilation": "the compiler",
  "data": "the data of step {step}",
  "transfer": "the transfer of the batch of step {step} to the devices",
  "rollouts": "the answers of step {step} and their rewards",
  "compute": "step {step} (its computation, or a collective)",
  "checkpoint": "the checkpoint of step {step} (the disk, or a collective)",
  "evaluation": "the evaluation at step {step}",
  "agreement": "the other processes' word on stopping after step {step} (a collective)",
  "report": "the report",
}
PARTS = ("data", "transfer", "compute", "checkpoint", "evaluation")  # of a step
LOSSES = (
  "start",
  "compilation",
  "data",
  "transfer",
  "checkpoint",
  "evaluation",
  "skipped",
  "steps",
  "stopped",
)


class Clock:
  """Measures a run from its first start on; `folder`: where goodput.json is, None = do not keep it.

  begin: time.monotonic() at the start of this process. productive: what the checkpoint that this
  process goes on from noted. notify: called with what the main thread waits for, whenever that
  changes.
  """

  def __init__(
    self,
    folder: Path | None,
    begin: float,
    step: int,
    *,
    productive: float = 0.0,
    notify: Callable[[str], None] = lambda what: None,
  ):
    self._path, self._begin, self._notify = folder and folder / NAME, begin, notify
    before = _read(self._path)
    self.seconds = {
      cause: float(before.get("seconds", {}).get(cause, 0.0)) for cause in ("productive", *LOSSES)
    }
    self._wall = float(before.get("wall", 0.0))
    if before:
      lost = max(0.0, self.seconds["productive"] - productive)
      self.seconds["productive"] -= lost
      self.seconds["steps"] += lost
      # From the last sign of the process before to the start of this one.
      idle = max(
        0.0, time.time() - (time.monotonic() - begin) - float(before.get("seen", math.inf))
      )
      self.seconds["stopped"] += idle
      self._wall += idle
    self.seconds["start"] += time.monotonic() - begin
    self._computing = 0.0  # seconds of compute that belong to steps whose outcome is not known yet
    self._parts = dict.fromkeys(PARTS, 0.0)
    self._row_at, self._row_step, self._laps, self._written = time.monotonic(), step, 0, -math.inf
    self._step_seconds: list[float] = []

  @contextlib.contextmanager
  def measure(
    self, cause: str, step: int = 0, *, busy: Callable[[], bool] = lambda: False
  ) -> Iterator[None]:
    """The block's seconds belong to `cause`; to compute instead, if the devices were `busy` all the
    while.
    """
    begin = time.monotonic()
    self._notify(WAITS[cause].format(step=step))
    yield
    seconds = time.monotonic() - begin
    cause = "compute" if busy() else cause
    if cause in ("compute", "rollouts"):
      self._computing += seconds
    elif cause in self.seconds:
      self.seconds[cause] += seconds
    if cause in self._parts:
      self._parts[cause] += seconds
    self._notify("what comes after " + WAITS[cause].format(step=step))

  def finished(self, skipped: bool) -> None:
    """The outcome of one more step is known."""
    self.seconds["skipped" if skipped else "productive"] += self._computing
    self._computing = 0.0

  @property
  def productive(self) -> float:
    """Seconds so far, for the checkpoint."""
    return self.seconds["productive"]

  @property
  def step_seconds(self) -> float | None:
    """Seconds a step of this process, evaluation left out: the median over the rows; None before
    there are two.
    """
    return statistics.median(self._step_seconds) if self._step_seconds else None

  @property
  def wall(self) -> float:
    """Seconds since the first start of the run."""
    return self._wall + time.monotonic() - self._begin

  def row(self, step: int, batch_size: int, flops: float) -> dict[str, float | None]:
    """What metrics.jsonl says of the steps since the last row: speed, seconds a step by part; and
    of the run: goodput, seconds lost by cause. Speed leaves out evaluation, and the first row has
    none: its steps contain the warming up."""
    now, steps, parts = time.monotonic(), max(1, step - self._row_step), self._parts
    seconds = max(now - self._row_at - parts["evaluation"], 1e-9)
    known = self._laps > 0
    if known:
      self._step_seconds.append(seconds / steps)
    row: dict[str, Any] = dict(
      examples_per_second=steps * batch_size / seconds if known else None,
      mfu=utilisation(flops, seconds / steps) if known else None,
      data_wait_fraction=min(1.0, parts["data"] / seconds) if known else None,
    )
    row.update({f"time/{part}": parts[part] / steps for part in PARTS})
    wall = max(self.wall, 1e-9)
    row["goodput"] = min(1.0, (self.seconds["productive"] + self._computing) / wall)
    row.update({f"lost/{cause}": self.seconds[cause] for cause in LOSSES})
    row["lost/other"] = max(0.0, wall - sum(self.seconds.values()) - self._computing)
    self._row_at, self._row_step, self._laps, self._parts = (
      now,
      step,
      self._laps + 1,
      dict.fromkeys(PARTS, 0.0),
    )
    if now - self._written > 1:
      self.write()
    return row

  def write(self) -> None:
    """Keeps the seconds for the next start. A disk that is full does not end a run here."""
    if self._path is None:
      return
    self._written = time.monotonic()
    text = json.dumps(dict(wall=self.wall, seen=time.time(), seconds=self.seconds), indent=2) + "\n"
    with contextlib.suppress(OSError):
      files.write_whole(self._path, text)


def _read(path: Path | None) -> dict[str, Any]:
  """What the process before wrote; {} where there is nothing usable."""
  try:
    table = files.read_json(path) if path else {}
    return (
      table
      if isinstance(table.get("seconds"), dict) and math.isfinite(table["wall"] + table["seen"])
      else {}
    )
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return {}
