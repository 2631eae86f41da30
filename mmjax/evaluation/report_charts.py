"""The curves of report.html: light inline SVG, with the points beside it for the read-out under the
pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import markupsafe

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 26
POINTS = 400  # a longer curve is drawn as means of neighbours

FIRST = (
  ("loss", "Loss"),
  ("lr", "Learning rate"),
  ("examples_per_second", "Examples a second"),
  ("grad_norm", "Gradient norm"),
)
HIDDEN = ("step", "time", "ids_crc32", "skipped", "goodput")
TIME = ("time/", "lost/")  # report_time.py shows them
NAMES = dict(
  update_norm="Update norm",
  param_norm="Parameter norm",
  scale="Temperature scale",
  mfu="Model FLOPs utilisation",
  data_wait_fraction="Share of time that waited for data",
  memory="Memory (bytes)",
  skipped_total="Skipped steps",
)


def training_charts(rows: Sequence[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
  """(charts to show at once, charts to fold away) of the rows of a metrics.jsonl: dicts with a
  title and an svg.
  """
  rows = [row for row in rows if "loss" in row]
  names = list(dict.fromkeys(name for row in rows for name in row))
  charts = {}
  for name in [first for first, _ in FIRST] + names:
    if name in names and name not in HIDDEN and not name.startswith(TIME) and name not in charts:
      points = _points(rows, name)
      if len(points) > 1 and not (name in ("skipped_total", "rollbacks") and not points[-1][1]):
        title = dict(FIRST).get(name) or NAMES.get(name) or name.replace("_", " ")
        charts[name] = chart(title, [(name, points)], zero=name in ("lr", "examples_per_second"))
  objective = sorted(
    (n for n in charts if "/" in n and not n.endswith(("/loss", "/scale", "/bias"))),
    key=lambda n: "accuracy" not in n,
  )
  shown = [name for name in ("loss", *objective[:2], "lr", "examples_per_second") if name in charts]
  if len(shown) % 2 and "grad_norm" in charts:
    shown.append("grad_norm")
  return [charts[name] for name in shown], [charts[name] for name in charts if name not in shown]


def evaluation_charts(rows: Sequence[dict[str, Any]], evaluators: Sequence[str]) -> list[dict]:
  """One chart an evaluator that ran at least twice: its recalls or accuracies over the steps."""
  charts = []
  for evaluator in evaluators:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(evaluator + "/"))
    series = []
    for name in names:
      metric = name[len(evaluator) + 1 :]
      if ("R@" in metric or "accuracy" in metric) and len(points := _points(rows, name)) > 1:
        series.append(
          (
            metric.replace("image_to_text", "i→t")
            .replace("text_to_image", "t→i")
            .replace("/", " "),
            points,
          )
        )
    if series:
      charts.append(chart(evaluator, series[:6], zero=True))
  return charts


def chart(
  title: str, series: Sequence[tuple[str, list[tuple[float, float]]]], zero: bool = False
) -> dict[str, Any]:
  """A line chart. series: (name, [(x, y)]); `zero` keeps zero on the y axis. Returns dict(title,
  svg, last).
  """
  series = [(name, _thin(points)) for name, points in series]
  xs = [x for _, points in series for x, _ in points]
  ys = [y for _, points in series for _, y in points]
  low, high = _range(ys, zero)
  left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

  def x_of(x):
    return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

  def y_of(y):
    return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

  parts = []
  for tick in _ticks(low, high, 5):
    y = f"{y_of(tick):.1f}"
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
      f'<text class="tick" x="{LEFT - 7}" y="{y}" dy="3.5" text-anchor="end">{_short(tick)}</text>'
    )
  for tick in _ticks(left, right, 6):
    parts.append(
      f'<text class="tick" x="{x_of(tick):.1f}" y="{HEIGHT - 8}" '
      f'text-anchor="middle">{_short(tick)}</text>'
    )
  for i, (_, points) in enumerate(series):
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    if len(series) == 1:
      base = HEIGHT - BOTTOM
      parts.append(
        f'<polygon class="area s{i}" points="{x_of(points[0][0]):.1f},{base} {path} '
        f'{x_of(points[-1][0]):.1f},{base}"/>'
      )
    parts.append(f'<polyline class="line s{i}" points="{path}"/>')
    if len(points) <= 12:
      parts += [
        f'<circle class="dot s{i}" r="2.6" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}"/>'
        for x, y in points
      ]
  data = dict(
    box=[LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
    x=[left, right],
    y=[low, high],
    series=[
      dict(name=name, points=[[x, float(f"{y:.6g}")] for x, y in points]) for name, points in series
    ],
  )
  svg = (
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markupsafe.escape(title)}" '
    f'data-chart="{markupsafe.escape(json.dumps(data, separators=(",", ":")))}">{"".join(parts)}<g '
    'class="hover"></g></svg>'
  )
  legend = [
    dict(name=name, index=i, last=_short(points[-1][1], 4))
    for i, (name, points) in enumerate(series)
  ]
  return dict(title=title, svg=markupsafe.Markup(svg), legend=legend)


def dots(
  title: str,
  points: Sequence[tuple[float, float, float]],
  axes: tuple[str, str],
  span: tuple[float, float] | None = None,
) -> dict[str, Any]:
  """Dots (x, y, radius) in a square, with the diagonal on which x = y; both axes have the same
  range, `span` or that of the points. axes: what x and y are. Returns dict(title, svg, legend).
  """
  values = [value for x, y, _ in points for value in (x, y)]
  low, high = span or _range(values, False)
  side = HEIGHT - TOP - BOTTOM

  def place(x, y):
    share = high - low
    return LEFT + (x - low) / share * side, HEIGHT - BOTTOM - (y - low) / share * side

  parts = []
  for tick in _ticks(low, high, 5):
    (x, base), (_, y) = place(tick, low), place(low, tick)
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{LEFT + side}" y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text class="tick" x="{LEFT - 7}" y="{y:.1f}" dy="3.5" text-anchor="end">{_short(tick)}'
      f'</text><text class="tick" x="{x:.1f}" y="{base + 18:.1f}" text-anchor="middle">'
      f"{_short(tick)}</text>"
    )
  (x0, y0), (x1, y1) = place(low, low), place(high, high)
  parts.append(f'<line class="grid" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
  for x, y, radius in points:
    (at, height) = place(x, y)
    parts.append(
      f'<circle class="dot s0" fill-opacity=".6" r="{radius:.1f}" cx="{at:.1f}" cy="{height:.1f}">'
      f"<title>{_short(x)}, {_short(y)}</title></circle>"
    )
  words = [f"across: {axes[0]}", f"up: {axes[1]}"]
  parts += [
    f'<text class="tick" x="{LEFT + side + 18}" y="{TOP + 14 + 16 * i}">{markupsafe.escape(word)}'
    "</text>"
    for i, word in enumerate(words)
  ]
  svg = (
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markupsafe.escape(title)}">'
    f"{''.join(parts)}</svg>"
  )
  return dict(title=title, svg=markupsafe.Markup(svg), legend=[])


def lines(values: Any) -> markupsafe.Markup:
  """A small drawing of a series [T, C], at most six channels of it."""
  width, height = 180, 90
  columns = [[float(v) for v in column] for column in list(zip(*values, strict=True))[:6]]
  every = [v for column in columns for v in column] or [0.0]
  low, high = min(every), max(every)
  scale = (high - low) or 1.0
  paths = []
  for i, column in enumerate(columns):
    points = " ".join(
      f"{k / max(len(column) - 1, 1) * width:.1f},{height - (v - low) / scale * height:.1f}"
      for k, v in enumerate(column)
    )
    paths.append(f'<polyline class="line s{i}" points="{points}"/>')
  return markupsafe.Markup(
    f'<svg class="curve" viewBox="0 0 {width} {height}">{"".join(paths)}</svg>'
  )


def _points(rows: Sequence[dict], name: str) -> list[tuple[float, float]]:
  return [
    (row["step"], float(row[name]))
    for row in rows
    if isinstance(row.get(name), (int, float))
    and not isinstance(row[name], bool)
    and math.isfinite(row[name])
  ]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """At most POINTS points: means of equal runs of neighbours, each at its run's last x."""
  if len(points) <= POINTS:
    return points
  edges = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
  return [
    (points[b - 1][0], sum(y for _, y in points[a:b]) / (b - a))
    for a, b in zip(edges, edges[1:], strict=False)
  ]


def _range(ys: list[float], zero: bool) -> tuple[float, float]:
  low, high = min(ys), max(ys)
  if zero and low >= 0:
    low = 0.0
  if high - low < 1e-12 * max(abs(high), 1.0):
    low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
  margin = (high - low) * 0.06
  return (low if zero and low == 0 else low - margin), high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers within [low, high]."""
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
  first = math.ceil(low / step - 1e-9)
  return [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _short(value: float, digits: int = 3) -> str:
  if value == 0:
    return "0"
  size = abs(value)
  for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size >= limit:
      scale = 1e3 if unit == "k" else limit
      return f"{value / scale:.{digits}g}{unit}"
  if size < 1e-3:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
  return f"{value:.{max(digits, len(str(int(size))))}g}"
