"""Where the time of a run went, for report.html: shares of all wall time since the first start, and
the parts of a step over the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.evaluation.report_charts import _points, chart

LOST = dict(
  start="Starting: imports, data, restoring",
  compilation="Compiling",
  data="Waiting for data",
  transfer="Host to device",
  checkpoint="Saving and restoring",
  evaluation="Evaluating",
  skipped="Steps that were skipped",
  steps="Steps lost before a checkpoint had them",
  stopped="Not running: between an end and the next start",
  other="Other",
)
PARTS = dict(
  data="data",
  transfer="host to device",
  compute="compute",
  checkpoint="checkpoint",
  evaluation="evaluation",
)


def time_spent(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """dict(goodput, wall, rows of dict(label, text, share in percent), charts) of the rows of a
  metrics.jsonl; None if they do not tell."""
  last = next((row for row in reversed(rows) if isinstance(row.get("goodput"), (int, float))), None)
  if last is None:
    return None
  lost = {label: float(last.get(f"lost/{cause}") or 0.0) for cause, label in LOST.items()}
  goodput = min(1.0, max(0.0, float(last["goodput"])))
  wall = sum(lost.values()) / (1 - goodput) if goodput < 1 else sum(lost.values())
  parts = {
    "Computing steps that count": goodput * wall,
    **dict(sorted(lost.items(), key=lambda item: -item[1])),
  }
  table = [
    dict(label=label, text=_seconds(seconds), share=100 * seconds / max(wall, 1e-9))
    for label, seconds in parts.items()
    if seconds > 0
  ]
  series = [
    (label, points)
    for part, label in PARTS.items()
    if len(points := _points(rows, f"time/{part}")) > 1
  ]
  charts = [chart("Seconds a step", series, zero=True)] if series else []
  points = _points(rows, "goodput")
  charts += [chart("Goodput", [("goodput", points)], zero=True)] if len(points) > 1 else []
  return dict(goodput=goodput, wall=_seconds(wall), rows=table, charts=charts)


def _seconds(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, hours = int(seconds // 60), int(seconds // 3600)
  return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"
