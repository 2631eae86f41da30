"""report.html: one self-contained page of a run, for people who look.

Scores, curves, examples with pictures, confusion, the config and the environment. The page loads
nothing from anywhere.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from PIL import Image

from mmjax import __version__, files
from mmjax.evaluation import Result, read_eval_json, read_provenance
from mmjax.evaluation.report_charts import dots, evaluation_charts, lines, training_charts
from mmjax.evaluation.report_page import PAGE
from mmjax.evaluation.report_time import time_spent
from mmjax.printing import printable

NAME = "report.html"
HEADLINES = (
  "image_to_text/R@1",
  "text_to_image/R@1",
  "image_to_text/R@5",
  "text_to_image/R@5",
  "accuracy",
  "majority",
  "balanced_accuracy",
  "auc",
  "f1",
  "accuracy@5",
  "mean_class_accuracy",
  "r2",
  "mae",
  "rmse",
  "word_error_rate",
  "character_error_rate",
)
MAGNITUDES = ("mae", "rmse", "loss", "perplexity", "bits_per_byte", "median_rank", "cider_d")
COUNTS = ("images", "texts", "examples", "train_examples", "unreadable")
PICTURE = 128  # pixels of the longest side of a picture in the page


def write_report(
  workdir: str | Path,
  config: Any,
  results: Mapping[str, Result],
  metrics_file: str | Path | None = None,
) -> Path:
  """Writes `workdir`/report.html and returns its path.

  config: the resolved config. results: of the evaluators run now, with their figures; scores of
  others come from eval.json. metrics_file: a metrics.jsonl; without one the page has no curves.
  Raises UserError if the folder cannot be written.
  """
  workdir = Path(workdir)
  rows = read_metrics(metrics_file)
  scores = {**read_eval_json(workdir), **{name: result.metrics for name, result in results.items()}}
  page = (
    _environment()
    .from_string(PAGE)
    .render(
      title=workdir.resolve().name or "run",
      facts=[*_facts(config, rows), *_measured(workdir), *_cut(workdir)],
      tiles=[_tile(name, metrics) for name, metrics in scores.items()],
      tables=[
        (name, [(k, number(v)) for k, v in metrics.items()]) for name, metrics in scores.items()
      ],
      charts=training_charts(rows),
      time=time_spent(rows),
      evaluation_charts=evaluation_charts(rows, list(scores)),
      retrievals=[(name, figure) for name, figure in _figures(results, "retrieval")],
      texts=_figures(results, "texts"),
      dialogues=_figures(results, "dialogues"),
      pictures=_figures(results, "pictures"),
      confusions=[(name, _heat_map(figure)) for name, figure in _figures(results, "confusion")],
      classes=_figures(results, "classes"),
      dots=[*_reliabilities(results), *_scatters(results)],
      mistakes=[(name, _drawn(figure)) for name, figure in _figures(results, "mistakes")],
      words=_figures(results, "word_confusions"),
      provenance=[(name, about) for name, about in read_provenance(workdir).items()],
      config=config.to_dict() if hasattr(config, "to_dict") else dict(config),
      environment=environment(),
    )
  )
  path = workdir / NAME
  files.replace_file(path, page)
  return path


def read_metrics(path: str | Path | None) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; lines that are cut off or no objects with a step are passed
  over.
  """
  rows: list[dict[str, Any]] = []
  if path is None or not Path(path).is_file():
    return rows
  for line in files.read_file(path).decode(errors="replace").splitlines():
    try:
      row = files.parse_json(line)
    except ValueError:
      continue
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      rows.append(row)
  return rows


def environment() -> list[tuple[str, str]]:
  """Versions, devices and the time, as (name, value)."""
  devices = jax.devices()
  kinds = ", ".join(sorted({d.device_kind for d in devices}))
  versions = []
  for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
    try:
      versions.append(f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  return [
    ("mmjax", __version__),
    ("Devices", f"{len(devices)} x {kinds} ({devices[0].platform})"),
    ("Processes", str(jax.process_count())),
    ("Python", platform.python_version()),
    ("Libraries", ", ".join(versions)),
    ("System", platform.platform()),
    ("Written", time.strftime("%Y-%m-%d %H:%M:%S %Z")),
  ]


def number(value: Any) -> str:
  """A number for people: counts whole, the rest with four significant digits."""
  if not isinstance(value, (int, float)):
    return str(value)
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}" if abs(value) >= 10000 else str(int(value))
  return f"{value:.4g}"


def _facts(config: Any, rows: list[dict]) -> list[tuple[str, str]]:
  facts = []
  if rows:
    facts.append(
      ("Step", f"{max(row['step'] for row in rows):,} of {number(config['train']['steps'])}")
    )
  facts.append(("Batch", number(config["train"]["batch_size"])))
  losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float))]
  if losses:
    facts.append(("Loss", f"{losses[0]:.4g} → {losses[-1]:.4g}"))
  speeds = [
    row["examples_per_second"]
    for row in rows
    if isinstance(row.get("examples_per_second"), (int, float))
  ]
  if speeds:
    facts.append(("Examples a second", f"{float(np.median(speeds)):,.0f}"))
  times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
  if len(times) > 1:
    facts.append(("Time", _duration(max(times) - min(times))))
  facts.append(("Model", str(config["model"].get("name", ""))))
  facts.append(
    (
      "Encoders",
      ", ".join(f"{m}: {e.get('kind')}" for m, e in config["model"].get("encoders", {}).items()),
    )
  )
  return facts


def _measured(workdir: Path) -> list[tuple[str, str]]:
  """What the run's steps took beside what was planned, as its last line said."""
  try:
    return [
      (
        "Measured",
        str(files.read_json(workdir / "summary.json")["text"]).removeprefix("measured: "),
      )
    ]
  except (OSError, ValueError, KeyError, TypeError):
    return []


def _cut(workdir: Path) -> list[tuple[str, str]]:
  """What the config cuts of the training data, as the run said at its start."""
  try:
    lines = files.read_json(workdir / "cut.json")["cut"]
    return [("Cut", str(line)) for line in lines]
  except (OSError, ValueError, KeyError, TypeError):
    return []


def _duration(seconds: float) -> str:
  hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
  return (
    f"{hours} h {minutes} min"
    if hours
    else f"{minutes} min {int(seconds % 60)} s"
    if minutes
    else f"{seconds:.0f} s"
  )


def _tile(name: str, metrics: Mapping[str, float]) -> dict[str, Any]:
  """The first metrics of an evaluator, each with a bar if it is a share."""
  numbers = {m: float(v) for m, v in metrics.items() if isinstance(v, (int, float))}
  shown = [m for m in HEADLINES if m in numbers] or [m for m in numbers if m not in COUNTS]
  counts = ", ".join(
    f"{number(metrics[m])} {m.replace('_', ' ')}"
    for m in COUNTS
    if metrics.get(m) and not (m == "unreadable" and not metrics[m])
  )
  return dict(name=name, heads=[_head(m, numbers[m]) for m in shown[:4]], counts=counts)


def _head(metric: str, value: float) -> dict[str, Any]:
  label = metric.replace("image_to_text", "image → text").replace("text_to_image", "text → image")
  return dict(
    label=label.replace("/", " ").replace("_", " "),
    text=f"{value:.3f}" if abs(value) < 10 else number(value),
    bar=None
    if metric.rpartition("/")[2] in MAGNITUDES
    else f"{min(max(value, 0.0), 1.0) * 100:.1f}%",
  )


def _figures(results: Mapping[str, Result], kind: str) -> list[tuple[str, dict]]:
  return [
    (name, figure)
    for name, result in results.items()
    for figure in result.figures.values()
    if isinstance(figure, dict) and figure.get("kind") == kind
  ]


def _reliabilities(results: Mapping[str, Result]) -> list[dict[str, Any]]:
  """How often the model is right where it is so and so sure; large dots are many examples."""
  charts = []
  for name, figure in _figures(results, "reliability"):
    most = max(count for _, _, count in figure["points"])
    points = [(x, y, 2 + 6 * (count / most) ** 0.5) for x, y, count in figure["points"]]
    axes = ("how sure the model is", "how often it is right")
    charts.append(dots(f"{name}: calibration", points, axes, span=(0.0, 1.0)))
  return charts


def _scatters(results: Mapping[str, Result]) -> list[dict[str, Any]]:
  """Predicted values against true ones."""
  return [
    dots(
      f"{name}: {figure['name']}" if figure["name"] != "0" else name,
      [(x, y, 2.2) for x, y in figure["points"]],
      ("true value", "what the model says"),
    )
    for name, figure in _figures(results, "scatter")
  ]


def _drawn(figure: dict) -> dict[str, Any]:
  """The figure with the curves of its rows drawn."""
  rows = [
    {**row, "curve": lines(row["curve"])} if "curve" in row else row for row in figure["rows"]
  ]
  return {**figure, "rows": rows}


def _heat_map(figure: dict) -> dict[str, Any]:
  """Cells of a confusion matrix with the share of their row; at most the 40 most frequent
  classes.
  """
  matrix, names = np.asarray(figure["matrix"]), list(figure["names"])
  total, rows = int(matrix.sum()), matrix.sum(axis=1)
  kept = np.flatnonzero((rows + matrix.sum(axis=0)) > 0)
  if len(kept) > 40:
    kept = np.sort(kept[np.argsort(-rows[kept], kind="stable")[:40]])
  cells = [
    dict(
      name=names[i],
      count=int(rows[i]),
      cells=[
        dict(
          count=int(matrix[i, j]),
          share=float(matrix[i, j] / max(rows[i], 1)),
          correct=bool(i == j),
          title=f"{names[i]} taken for {names[j]}: {matrix[i, j]} of {rows[i]}",
        )
        for j in kept
      ],
    )
    for i in kept
  ]
  return dict(
    names=[names[i] for i in kept],
    rows=cells,
    total=total,
    correct=int(np.trace(matrix)),
    left_out=len(names) - len(kept),
  )


def picture_uri(pixels: np.ndarray) -> str:
  """A PNG (small pictures) or JPEG data URI of pixels uint8 [H, W, 3], at most PICTURE on the
  longest side.
  """
  picture = Image.fromarray(np.asarray(pixels, np.uint8))
  kind = "PNG" if max(picture.size) <= 64 else "JPEG"
  picture.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
  data = io.BytesIO()
  picture.save(data, kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
  return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _without_controls(value: Any) -> Any:
  """What the page shows of a value: names and texts of the data have their control characters
  escaped.
  """
  return printable(value, "\n\t") if type(value) is str else value


def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=_without_controls,
  )
  environment.filters.update(picture=picture_uri, number=number)
  environment.tests["tree"] = _is_tree
  return environment


def _is_tree(value: Any) -> bool:
  return isinstance(value, Mapping) and bool(value)
