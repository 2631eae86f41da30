"""`mmjax data show`: a sample sheet of a data set, one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax import printing
from mmjax.config import UserError
from mmjax.data import fitting, image, show_media
from mmjax.data.cuts import fits, measure_for
from mmjax.data.folders import data_dir as default_data_dir
from mmjax.data.histograms import as_html, histograms, in_text
from mmjax.data.measure import measure
from mmjax.data.preferences import SIDES, talks_of
from mmjax.data.resample import resize_exact
from mmjax.data.sequences import Sequences
from mmjax.data.sources import Source, list_datasets, open_source
from mmjax.files import check_output, write_output

# pixels of the longer side; larger pictures are shrunk, so that a sheet stays a few megabytes
THUMBNAIL = 320
MOST_MEASURED = 200_000  # rows of a split; of a larger one so many, evenly spaced
_RIGHT_TO_LEFT = {"ar", "fa", "he", "ur"}


def show_data_set(
  name: str,
  out: str | os.PathLike = "sample.html",
  *,
  split: str = "train",
  count: int = 48,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  config=None,
  log: Callable[[str], None] = printing.log,
) -> Path:
  """Draws a sample sheet of data set NAME, or of tars if NAME is a path to some, with histograms of
  labels and lengths over the whole split, which are printed too. Returns the file.

  config: then also what it would cut. Raises UserError.
  """
  check_output(out)
  tars = name.endswith(".tar") and name not in list_datasets(default_data_dir(data_dir or None))
  entry: dict[str, Any] = dict(name="tars", path=name) if tars else dict(name=name, split=split)
  root = os.fspath(data_dir) if data_dir else None
  source = open_source(entry | dict(languages=()), root if config is None else config)
  if config is None:
    measured, cut = measure(source, split, data_dir=root, most=MOST_MEASURED), []
  else:
    entries = [one for one in config.data.sources.values() if one["name"] == entry["name"]]
    entry = {**(entries[0] if entries else {"languages": source.languages}), **entry}
    measured = measure_for(config, entry, MOST_MEASURED)
    cut = [str(fit) for fit in fits(config, entry, measured) if fit.cut]
  found = histograms(measured)
  if not measured.whole:
    cut.insert(0, f"measured: {len(measured.row):,} of {measured.rows:,} rows, evenly spaced")
  for line in (line for histogram in found for line in in_text(histogram)):
    log(line)
  for line in cut:
    log(line)
  if config is not None and not any("exceed" in line for line in cut):
    log("the config cuts nothing")
  sequences = None
  if config is not None and entry.get("text") in ("conversation", "preference"):
    from mmjax.data.examples import Examples

    sequences = Examples(config, train=False).sequences
    source.text = entry["text"]
    fitting.examples(sequences, source)  # which says what is learned of it, and what cannot be
  path = show(
    source,
    out,
    count=count,
    seed=seed,
    title=name if tars else f"{name} / {split}",
    sequences=sequences,
    charts="".join(f"<p>{printing.in_html(line)}</p>" for line in cut) + as_html(found),
  )
  log(f"wrote {path}: {min(count, len(source))} of {len(source):,} examples")
  return path


def show(
  source: Source | Sequence[Mapping[str, Any]],
  out_html: str | os.PathLike,
  count: int = 48,
  seed: int = 0,
  title: str = "",
  charts: str = "",
  sequences: Sequences | None = None,
) -> Path:
  """Draws `count` random examples (all in order, if there are no more) of a source or a list of
  records.

  charts: HTML above them. sequences: then conversations are shown as a language model gets them,
  with what it learns coloured; else by their turns. The same seed draws the same ones. A record
  that cannot be read gets a tile that says why.
  Raises UserError: nothing to show, or `out_html` cannot be written.
  """
  total = len(source)
  if count < 1 or total < 1:
    raise UserError(f"nothing to show: {total} examples, count {count}")
  chosen = np.arange(total)
  if count < total:
    chosen = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
  tiles: list[str] = []
  sizes: list[tuple[int, int]] = []
  captions: list[str] = []
  languages: Counter[str] = Counter()
  labels: Counter[str] = Counter()
  unreadable = 0
  seconds: dict[str, list[float]] = {"sounds": [], "videos": []}
  for index in chosen.tolist():
    try:
      record = source[index]
    except UserError as error:
      tiles.append(_tile(dict(id=f"record {index}"), [_framed(_fault(error))], ""))
      unreadable += 1
      continue
    parts, size, faults = [], "", 0
    for what in _shown(record):
      try:
        if what == "image":
          picture, (height, width) = _picture(record)
          size = f"{width} × {height}"
          sizes.append((height, width))
          parts.append(_framed(picture))
        elif what == "series":
          parts.append(show_media.chart(record["series"]))
        else:
          part, length = (show_media.sound if what == "audio" else show_media.strip)(record[what])
          seconds["sounds" if what == "audio" else "videos"].append(length)
          parts.append(part)
      except UserError as error:
        parts.append(_framed(_fault(error)))
        faults += 1
    unreadable += faults > 0
    languages.update(list(record["captions"]))
    labels.update([record["label"]] if record.get("label") else [])
    captions += [text for texts in record["captions"].values() for text in texts]
    parts += [_talk(record, *talk, sequences) for talk in _talks(record)]
    tiles.append(_tile(record, parts, size))
  drawn = f", seed {seed}" if len(tiles) < total else ""
  facts = [f"<b>{total:,}</b> examples", f"<b>{len(tiles)}</b> shown{drawn}"]
  if sizes:
    low, high = np.min(sizes, axis=0), np.max(sizes, axis=0)
    same = f"<b>{low[1]} × {low[0]}</b> pixels"
    facts.append(
      f"<b>{low[1]}–{high[1]}</b> × <b>{low[0]}–{high[0]}</b> pixels"
      if (low != high).any()
      else same
    )
  for what, lengths in seconds.items():
    if lengths:
      facts.append(
        f"{what} of <b>{np.median(lengths):.1f}</b> s (median), at most <b>{max(lengths):.1f}</b>"
      )
  if captions:
    lengths = [len(text) for text in captions]
    facts.append(
      f"captions of <b>{np.median(lengths):.0f}</b> characters (median), at most "
      f"<b>{max(lengths)}</b>"
    )
  if unreadable:
    facts.append(f'<b class="bad">{unreadable} unreadable</b>')
  title = title or getattr(source, "name", "") or "sample"
  page = _PAGE.format(
    title=printing.in_html(title),
    style=_STYLE,
    facts="".join(f"<li>{fact}</li>" for fact in facts),
    languages=_chips("Languages", languages),
    labels=_chips("Labels", labels),
    charts=charts,
    tiles="\n".join(tiles),
  )
  try:
    write_output(Path(out_html).absolute(), page.encode("utf-8"))
  except OSError as error:
    raise UserError(f"{out_html}: cannot be written ({error.strerror})") from error
  return Path(out_html)


def _talks(record: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Any]]]:
  """("" or what was judged of its answer, turns) of each conversation of a record."""
  for turns in record.get("conversations") or ():
    yield "", turns
  for part in range(len(record.get("preferences") or ())):
    for side, turns in talks_of(dict(record), part):
      yield SIDES[side], turns


def _talk(
  record: Mapping[str, Any], judged: str, turns: Sequence[Any], sequences: Sequences | None
) -> str:
  """The HTML of a conversation, with what is learned of it coloured."""
  try:
    if sequences is None:
      pieces = [
        (f"{turn['role']}: {_said(turn['content'])}\n", turn["role"] == "assistant")
        for turn in turns
      ]
    else:
      each = "every" if sequences.text.loss == "each" else ""  # all are learned, one by one
      parts = sequences.turns(record, turns, loss="last" if judged else each)
      pieces = sequences.readable(parts)
  except UserError as error:
    return _framed(_fault(error))
  shown = "".join(
    f"<b>{printing.in_html(text)}</b>" if learned else printing.in_html(text)
    for text, learned in pieces
  )
  title = f"<i>{judged}</i>\n" if judged else ""
  return f'<pre class="talk">{title}{shown}</pre>'


def _said(content: str | Sequence[Mapping[str, str]]) -> str:
  if isinstance(content, str):
    return content
  return "".join(part.get("text") or f"<{part['type']}>" for part in content)


def _shown(record: Mapping[str, Any]) -> list[str]:
  """The media of a record; a picture, which is said to be missing, if it has none and no texts."""
  available = [name for name in ("image", "video", "audio") if record.get(name)]
  return available + (["series"] if record.get("series") is not None else []) or (
    [] if record.get("conversations") or record.get("preferences") else ["image"]
  )


def _picture(record: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
  """(HTML of the picture, (height, width) upright). Raises UserError."""
  if not record.get("image"):
    raise UserError("no picture, sound, video or series")
  pixels = image.decode(record["image"])
  height, width = pixels.shape[:2]
  scale = THUMBNAIL / max(height, width)
  if scale < 1:
    pixels = resize_exact(
      pixels, (max(1, round(height * scale)), max(1, round(width * scale))), "bicubic"
    )
  out = io.BytesIO()
  small = max(height, width) <= 128  # drawn pictures and icons stay exact, photographs become JPEG
  Image.fromarray(pixels).save(
    out, "PNG" if small else "JPEG", **({} if small else dict(quality=88))
  )
  data = base64.b64encode(out.getvalue()).decode()
  kind = "png" if small else "jpeg"
  return f'<img class="{"small" if small else ""}" alt="" src="data:image/{kind};base64,{data}">', (
    height,
    width,
  )


def _fault(error: Exception) -> str:
  return f'<div class="fault">{printing.in_html(str(error))}</div>'


def _framed(picture: str) -> str:
  return f'<div class="frame">{picture}</div>'


def _tile(record: Mapping[str, Any], parts: Sequence[str], size: str) -> str:
  """The HTML of a record; `parts`: of its media."""
  lines = []
  for language, texts in sorted(
    record.get("captions", {}).items(), key=lambda item: (item[0] != "en", item[0])
  ):
    direction = ' dir="rtl"' if language in _RIGHT_TO_LEFT else ""
    for number, text in enumerate(texts):
      mark = f"<dt>{printing.in_html(language)}</dt>" if number == 0 else "<dt></dt>"
      shown = text if len(text) <= 300 else text[:300] + "…"
      lines.append(
        f'{mark}<dd lang="{printing.in_html(language)}"{direction}>{printing.in_html(shown)}</dd>'
      )
  tag = (
    f'<span class="label">{printing.in_html(record["label"])}</span>' if record.get("label") else ""
  )
  head = f'<div class="head">{tag}<span class="size">{size}</span></div>' if tag or size else ""
  wide = ' class="wide"' if any('class="strip"' in part for part in parts) else ""
  name, questions = (
    printing.in_html(record["id"]),
    show_media.answers(record.get("questions") or ()),
  )
  captions = f"<dl>{''.join(lines)}</dl>" if lines else ""
  return (
    f'<article{wide}>{"".join(parts)}{head}{captions}{questions}<div class="id" '
    f'title="{name}">{name}</div></article>'
  )


def _chips(title: str, counts: Counter[str]) -> str:
  if not counts:
    return ""
  chips = "".join(
    f"<span>{printing.in_html(name)} <b>{count}</b></span>"
    for name, count in counts.most_common(40)
  )
  return f'<div class="chips"><em>{title}</em>{chips}</div>'


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · mmjax</title><style>{style}</style></head>
<body><header><h1>{title}</h1><ul>{facts}</ul>{languages}{labels}{charts}</header>
<main>
{tiles}
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --ink: #1d2330; --soft: #697386; --line: #e3e6ec; --accent: #3758d6; --frame: #fafbfc }
@media (prefers-color-scheme: dark) { :root { --back: #14161b; --card: #1d2027; --ink: #e8eaf0; --soft: #98a1b3; --line: #2d323d; --accent: #8fa5ff; --frame: #262a33 } }
* { box-sizing: border-box } body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif }
header { padding: 28px 32px 12px; max-width: 1600px; margin: auto } h1 { margin: 0 0 8px; font-size: 24px; letter-spacing: -.01em }
ul { list-style: none; margin: 0 0 12px; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 22px; color: var(--soft) } ul b { color: var(--ink); font-weight: 600 }
.bad { color: #d33 !important } .chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 6px 0; align-items: baseline } .chips em { font-style: normal; color: var(--soft); width: 84px }
.chips span { background: var(--card); border: 1px solid var(--line); border-radius: 999px; padding: 1px 10px; font-size: 12.5px } .chips b { color: var(--soft); font-weight: 500 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; padding: 12px 32px 40px; max-width: 1600px; margin: auto }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; break-inside: avoid; display: flex; flex-direction: column }
.frame { height: 200px; display: flex; align-items: center; justify-content: center; background: var(--frame); border-bottom: 1px solid var(--line) }
.bars { display: flex; flex-wrap: wrap; gap: 12px 32px } figure { margin: 0; min-width: 260px; flex: 1 } figure em { font-style: normal; color: var(--soft) } figure dl { max-height: 240px; padding: 0 }
figure dd i { display: inline-block; height: 10px; background: var(--accent); border-radius: 2px; min-width: 1px } header p { margin: 4px 0; color: #c60 }
img { max-width: 100%; max-height: 100%; display: block } img.small { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; background: #fff; border-radius: 6px }
.wide { grid-column: 1 / -1 } @media (min-width: 580px) { .wide { grid-column: span 2 } }
.strip, .series, .sound { padding: 10px 12px; background: var(--frame); border-bottom: 1px solid var(--line) } .strip .size, .series .size, .sound .size { display: block; margin: 4px 0 0; white-space: normal }
img.film { width: 100%; max-height: 160px; object-fit: contain; image-rendering: pixelated; border-radius: 4px } svg { width: 100%; height: 110px; display: block } path { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke }
.sound path { stroke: var(--accent) } .sound svg { height: 44px; margin-bottom: 6px } audio { width: 100%; height: 36px; display: block }
dl.questions { grid-template-columns: 1fr auto; border-top: 1px dashed var(--line); padding-top: 6px } .questions dt { font-size: 13px; color: var(--ink); line-height: inherit } .questions dd { color: var(--accent); font-weight: 600 }
.talk { margin: 0; padding: 8px 12px; max-height: 240px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.5 inherit; color: var(--soft) } .talk b { color: var(--accent); font-weight: 600 }
.fault { color: #d33; padding: 16px; text-align: center; font-size: 13px; overflow-wrap: anywhere }
.head { display: flex; gap: 8px; align-items: baseline; padding: 10px 12px 0 } .label { color: var(--accent); font-weight: 600; font-size: 12.5px } .size { color: var(--soft); font-size: 12px; margin-left: auto; white-space: nowrap }
dl { margin: 6px 0 8px; padding: 0 12px; display: grid; grid-template-columns: auto 1fr; gap: 2px 8px; max-height: 190px; overflow: auto; scrollbar-width: thin; scrollbar-color: var(--line) transparent } dt { color: var(--soft); font-size: 11px; line-height: 20px }
dd { margin: 0; overflow-wrap: anywhere } .id { margin-top: auto; border-top: 1px solid var(--line); padding: 6px 12px; color: var(--soft); font: 11.5px/1.4 ui-monospace, Menlo, Consolas, monospace; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
"""
