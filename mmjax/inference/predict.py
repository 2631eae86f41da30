"""What a checkpoint of any kind says about files, a folder or the rows of a table: labels with
probabilities, values, texts. `mmjax predict`, and `Predictor.predict` in Python.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax import files, printing
from mmjax.config import UserError
from mmjax.data.media import SERIES, modality_of
from mmjax.data.readers import json_lines, table
from mmjax.data.readers.cells import Skip
from mmjax.data.readers.columns import COLUMNS
from mmjax.data.readers.folder import TABLES as FOLDER_TABLES
from mmjax.inference.inputs import Item
from mmjax.inference.transcribe import windows_of

if TYPE_CHECKING:  # which calls this module
  from mmjax.inference.predictor import Predictor

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MEDIA = ("image", "audio", "video", "series")
SHOWN = 50  # classes that a row has the probability of each of; of more only the likeliest
CHUNK = 256  # rows that are read, predicted and forgotten at once
Row = dict[str, Any]


def predict(
  predictor: Predictor,
  rows: Sequence[Mapping[str, Item] | UserError],
  names: Sequence[str] = (),
  *,
  timestamps: bool = False,
  beams: int = 1,
  log: Callable[[str], None] = lambda line: printing.log(line, sys.stderr),
) -> list[Row]:
  """A dict for each row {modality: item}, in order: what the model's heads and decoder say.

  Of a classifier "label" and "probability" ("a|b" and none where a row may have several labels) and
  "probability/CLASS"; of a regression each value by its name, in the units of the training data; of
  a decoder or a CTC head "text", and with `timestamps` "segments" [{start, end, text}] in seconds.
  Sounds longer than the model reads go through it in windows: probabilities and values are means
  over the windows, texts are joined.
  A row that cannot be read has only "error", and `log` names it. names: of the rows, for messages
  and "file". Raises UserError: the model has nothing to say, or no row can be read or has the
  modalities that the model needs.
  """
  names = [*names] or [str(number + 1) for number in range(len(rows))]
  tasks = _tasks(predictor)
  if not tasks:
    raise UserError(
      "this checkpoint has no classifier, no values and no decoder: use `mmjax classify` with "
      "labels of yours, `mmjax search` or `mmjax embed`"
    )
  found: list[Row] = []
  for start in range(0, len(rows), CHUNK):
    part = slice(start, start + CHUNK)
    said, items = _read(predictor, rows[part], names[part], log)
    for number, item in [*items.items()]:
      try:
        for _, modalities in tasks:
          _given(predictor, item, modalities)
      except UserError as error:
        said[number]["error"] = f"{said[number]['file']}: {error}"
        log(f"skipped {said[number]['error']}")
        del items[number]
    numbers = list(items)
    for task, modalities in tasks:
      for given, group in _groups(predictor, list(items.values()), modalities):
        chosen = [numbers[k] for k in group]
        more = task(predictor, given, [items[k] for k in chosen], timestamps, beams)
        for k, answer in zip(chosen, more, strict=True):
          said[k].update(answer)
    found += said
    if len(rows) > CHUNK:
      log(f"{len(found)} of {len(rows)} done")
  _count(found, log)
  return found


def command(
  predictor: Predictor,
  inputs: Sequence[str | os.PathLike],
  *,
  columns: Mapping[str, str] | None = None,
  root: str | os.PathLike = "",
  out: str | os.PathLike = "",
  **settings: Any,
) -> list[Row]:
  """`mmjax predict`: rows of files, folders or tables; writes `out` (.csv, .json or .jsonl).
  Answers have their "question" beside them: several may be about one file.
  """
  if out:
    files.check_output(out)
  rows, names = rows_of(predictor, inputs, columns or {}, root)
  found = predict(predictor, rows, names, **settings)
  if predictor.config.data.label == "answer":
    for i, row in enumerate(rows):
      if isinstance(row, dict) and "text" in row:
        found[i] = {"file": found[i]["file"], "question": row["text"], **found[i]}
  if out:
    write(found, out)
  return found


def zero_shot(
  predictor: Predictor,
  inputs: Sequence[str | os.PathLike],
  labels: Sequence[str],
  *,
  templates: Sequence[str] = ("{}",),
  out: str | os.PathLike = "",
  log: Callable[[str], None] = lambda line: printing.log(line, sys.stderr),
) -> list[Row]:
  """`mmjax classify`: "label", "probability" and "probability/LABEL" of files, by labels that the
  model was not trained on (`Predictor.classify`). Rows and errors as of `predict`.
  """
  if out:
    files.check_output(out)
  if "text" not in predictor.modalities or not predictor.joint:
    raise UserError(
      "this checkpoint has no shared space of media and texts to compare labels in: use `mmjax "
      "predict`, for what it was trained to say"
    )
  found, items = _read(predictor, *rows_of(predictor, inputs, {}), log)
  _count(found, log)
  groups: dict[str, list[int]] = {}
  for i, read in items.items():
    groups.setdefault(next(iter(read)), []).append(i)
  for modality, indices in groups.items():
    given = [items[i][modality] for i in indices]
    shares = predictor.classify(given, labels, templates, modality)
    for i, share in zip(indices, shares, strict=True):
      best = int(share.argmax())
      found[i].update(label=labels[best], probability=float(share[best]))
      found[i].update((f"probability/{n}", float(p)) for n, p in zip(labels, share, strict=True))
  if out:
    write(found, out)
  return found


def rows_of(
  predictor: Predictor,
  inputs: Sequence[str | os.PathLike],
  columns: Mapping[str, str],
  root: str | os.PathLike = "",
) -> tuple[list[dict[str, Item] | UserError], list[str]]:
  """({modality: item} of each row or why there is none, names). An input is a file, a folder of
  files, or a table, a row of which has its modalities in columns; paths in it are relative to
  `root`, "" = its own folder. Of a folder a row is a file, or, where the model reads several
  modalities at once, what the converter reads as one: a row of the table in it, or without a table
  the files that differ only in their endings. columns: {modality, or "id": column}; others are
  found by their names. Raises UserError.
  """
  rows: list[dict[str, Item] | UserError] = []
  names: list[str] = []
  for given in inputs:
    path = Path(given)
    if path.is_dir():
      more_rows, more_names = _of_folder(predictor, path, columns, root)
      rows, names = rows + more_rows, names + more_names
    elif path.suffix.lower() in TABLES and not _is_series(predictor, path, columns):
      lines = _table(path)
      whole = [line for _, line in lines if not isinstance(line, Skip)]
      chosen = _columns(predictor, whole, columns, path)
      for number, (at, line) in enumerate(lines, 1):
        if isinstance(line, Skip):
          rows.append(UserError(f"{at}: {line.detail or line.reason}"))
          names.append(at)
          continue
        rows.append(_cells(line, chosen, Path(root) if root else path.parent))
        media = (str(line[column]) for name, column in chosen.items() if name in MEDIA)
        usual = next(filter(None, media), f"{path.name}:{number}")
        names.append(str(line[columns["id"]]) if "id" in columns else usual)
    else:
      modality = _modality(predictor, path)
      if modality is None:
        raise UserError(
          f"{given} is no file of {', '.join(sorted(predictor.media)) or 'media'}, no folder and "
          f"no table ({', '.join(TABLES)})"
        )
      rows.append({modality: path})
      names.append(os.fspath(given))
  return rows, names


def _of_folder(
  predictor: Predictor, folder: Path, columns: Mapping[str, str], root: str | os.PathLike
) -> tuple[list[dict[str, Item] | UserError], list[str]]:
  """The rows of a folder and of those below it, and their names, as of `rows_of`."""
  everything, closed = files.files_below(folder)
  everything = [p for p in everything if p.is_file() or p.suffix.lower() not in TABLES]
  unread: list[Any] = [UserError(f"{place} cannot be read ({why})") for place, why in closed]
  unread_names = [os.fspath(place) for place, _ in closed]
  if _fuses(predictor):
    tables: dict[Path, Path] = {}  # of two in a folder the one that the converter reads
    for name in FOLDER_TABLES:
      for path in everything:
        if path.name == name:
          tables.setdefault(path.parent, path)
    if tables:
      of_tables, table_names = rows_of(predictor, sorted(tables.values()), columns, root)
      return of_tables + unread, table_names + unread_names
  rows: dict[tuple[Path, int], dict[str, Item]] = {}
  for path in everything:
    modality = _modality(predictor, path)
    if modality is None:
      continue
    if path.suffix.lower() in TABLES and not _is_series(predictor, path, columns):
      continue
    number = 0  # of a.jpg and a.png each is a row
    stem = path.with_suffix("") if _fuses(predictor) else path
    while modality in rows.get((stem, number), ()):
      number += 1
    rows.setdefault((stem, number), {})[modality] = path
  if not rows:
    raise UserError(f"{folder} has no files of {', '.join(sorted(predictor.media))} in it")
  names = [str(next(iter(row.values()))) for row in rows.values()]
  return [*rows.values(), *unread], [*names, *unread_names]


def write(found: Sequence[Row], out: str | os.PathLike) -> None:
  """Writes rows as a table (.csv), a list (.json) or lines (.jsonl) of objects."""
  ending = Path(out).suffix.lower()
  if ending == ".json":
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
  elif ending == ".jsonl":
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
  else:
    columns = list(dict.fromkeys(name for row in found for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()
    for row in found:
      writer.writerow({name: _cell(value) for name, value in row.items()})
    text = file.getvalue()
  target = Path(out)
  with files.disk_errors(target, f"{out} cannot be written"):
    files.write_output(target, text)


def _cell(value: Any) -> Any:
  if isinstance(value, float):
    return f"{value:.6g}"
  return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


# -- What a model says -----------------------------------------------------------------------------


def _tasks(predictor: Predictor) -> list[tuple[Callable, tuple[str, ...]]]:
  """(function, the modalities that it reads) of each thing that the model can say."""
  tasks: list[tuple[Callable, tuple[str, ...]]] = []
  if predictor.classes_count:
    tasks.append((_labels, predictor.modalities_of("classification", "ordinal")))
  if predictor.values_count:
    tasks.append((_values, predictor.modalities_of("regression")))
  if predictor.writes:
    sources = [
      tuple(entry["source"])
      for entry in predictor.config.objectives.values()
      if entry.get("kind") == "captioning"
    ]
    tasks.append((_texts, sources[0] if sources else tuple(predictor.media)))
  return tasks


def _groups(
  predictor: Predictor, items: Sequence[Mapping[str, Item]], modalities: tuple[str, ...]
) -> Iterable[tuple[tuple[str, ...], list[int]]]:
  """(modalities, rows) of rows that have the same ones of those that a task reads."""
  groups: dict[tuple[str, ...], list[int]] = {}
  for k, item in enumerate(items):
    groups.setdefault(_given(predictor, item, modalities), []).append(k)
  return groups.items()


def _given(
  predictor: Predictor, item: Mapping[str, Item], modalities: tuple[str, ...]
) -> tuple[str, ...]:
  """Those of a task's modalities that a row is read by. Raises UserError: it lacks one that the
  model always saw.
  """
  given = tuple(m for m in modalities if m in item)
  alone = not _fuses(predictor)
  if not given or (len(given) < len(modalities) and not alone and not _may_lack(predictor)):
    raise UserError(
      f"the model reads {' and '.join(modalities)}, but a row has only "
      f"{', '.join(item) or 'none of them'}. Give a table and name its columns: "
      f"--columns {','.join(f'{m}=COLUMN' for m in modalities)}"
    )
  return given[:1] if alone else given


def _fuses(predictor: Predictor) -> bool:
  """Whether the model reads several modalities of a row at once; else each has its own head."""
  return predictor.config.model.get("fusion") is not None


def _may_lack(predictor: Predictor) -> bool:
  return predictor.config.data.missing == "mask"


def _labels(
  predictor: Predictor,
  given: tuple[str, ...],
  items: Sequence[Mapping[str, Item]],
  timestamps: bool,
  beams: int,
) -> list[Row]:
  shares = _means(predictor, given, items, predictor.classes)
  names = [*predictor.class_names]
  names += map(str, range(len(names), shares.shape[1]))
  several = predictor.config.data.label == "labels"
  rows: list[Row] = []
  for share in shares:
    best = int(share.argmax())
    row: Row = dict(label=names[best], probability=float(share[best]))
    if several:
      row = dict(label="|".join(names[c] for c in np.flatnonzero(share > 0.5)))
    if len(names) <= SHOWN:
      row.update((f"probability/{n}", float(p)) for n, p in zip(names, share, strict=True))
    rows.append(row)
  return rows


def _values(
  predictor: Predictor,
  given: tuple[str, ...],
  items: Sequence[Mapping[str, Item]],
  timestamps: bool,
  beams: int,
) -> list[Row]:
  values = _means(predictor, given, items, predictor.values)
  return [dict(zip(predictor.value_names, row.tolist(), strict=True)) for row in values]


def _texts(
  predictor: Predictor,
  given: tuple[str, ...],
  items: Sequence[Mapping[str, Item]],
  timestamps: bool,
  beams: int,
) -> list[Row]:
  inputs: dict[str, Any] = {m: [item[m] for item in items] for m in given}
  if given != ("audio",) or predictor.knows_times:
    if not timestamps:
      return [dict(text=text) for text in predictor.generate(beams=beams, **inputs)]
    written: list[Any] = predictor.generate(beams=beams, timestamps=True, **inputs)
    return [_timed([(s.start, s.end, s.text) for s in segments]) for segments in written]
  windows = [_windows(predictor, item["audio"], quiet=True) for item in items]
  texts: Any = iter(predictor.generate(beams=beams, audio=[x for of in windows for _, _, x in of]))
  spoken = [_timed([(start, end, next(texts)) for start, end, _ in of]) for of in windows]
  return spoken if timestamps else [dict(text=row["text"]) for row in spoken]


def _windows(
  predictor: Predictor, sound: Item, quiet: bool = False
) -> list[tuple[float, float, Any]]:
  waveform = predictor.media["audio"].sound(sound)
  return windows_of(waveform, predictor.config.data.audio, quiet=quiet)


def _timed(segments: Sequence[tuple[float, float, str]]) -> Row:
  text = " ".join(part.strip() for _, _, part in segments if part.strip())
  rows = [dict(start=round(a, 3), end=round(b, 3), text=part.strip()) for a, b, part in segments]
  return dict(text=text, segments=rows)


def _means(
  predictor: Predictor,
  given: tuple[str, ...],
  items: Sequence[Mapping[str, Item]],
  head: Callable[..., np.ndarray],
) -> np.ndarray:
  """[N, *] of a head; of a sound in several windows the mean over them."""
  if "audio" not in given:
    return head(**{m: [item[m] for item in items] for m in given})
  windows = [_windows(predictor, item["audio"]) for item in items]
  owner = np.repeat(np.arange(len(items)), [len(of) for of in windows])
  inputs = {m: [items[i][m] for i in owner.tolist()] for m in given if m != "audio"}
  rows = head(**inputs, audio=[sound for of in windows for _, _, sound in of])
  starts = np.flatnonzero(np.diff(owner, prepend=-1))
  counts = np.bincount(owner)[:, None]
  return np.add.reduceat(rows.astype(np.float64), starts, axis=0) / counts


# -- What users give -------------------------------------------------------------------------------


def _read(
  predictor: Predictor,
  rows: Sequence[Mapping[str, Item] | UserError],
  names: Sequence[str],
  log: Callable[[str], None],
) -> tuple[list[Row], dict[int, dict[str, Any]]]:
  """({"file"} of each row, and "error" of one that cannot be read, which `log` names; {number: its
  items} of the others).
  """
  found: list[Row] = [dict(file=name) for name in names]
  items: dict[int, dict[str, Any]] = {}
  for number, (row, name) in enumerate(zip(rows, names, strict=True)):
    try:
      if isinstance(row, UserError):
        raise row
      items[number] = _items(predictor, row, name)
    except UserError as error:
      log(f"skipped {error}")
      found[number]["error"] = str(error)
  return found, items


def _items(predictor: Predictor, row: Mapping[str, Item], name: str) -> dict[str, Any]:
  """{modality: what was read of it} of a row. Raises UserError."""
  read: dict[str, Any] = {}
  for modality, item in row.items():
    if modality == "text":
      read[modality] = item
    elif modality in predictor.media:
      media = predictor.media[modality]
      read[modality] = (media.sound if modality == "audio" else media)(item, name)
  return read


def _count(found: Sequence[Row], log: Callable[[str], None]) -> None:
  """Counts the rows that could not be read. Raises UserError: none could."""
  failed = [row["error"] for row in found if "error" in row]
  if failed and len(failed) == len(found):
    raise UserError(f"none of the {len(found)} rows could be read; the first: {failed[0]}")
  if failed:
    log(f"{len(found) - len(failed)} of {len(found)} rows read, {len(failed)} skipped")


def _modality(predictor: Predictor, path: Path) -> str | None:
  """What the model takes a file for; None: it takes no such file."""
  found = modality_of(path)
  if found == "video" and "video" not in predictor.media and "audio" in predictor.media:
    return "audio"  # its sound track
  if found is None and path.suffix.lower() in SERIES:
    found = "series"
  return found if found in predictor.media else None


def _is_series(predictor: Predictor, path: Path, columns: Mapping[str, str]) -> bool:
  """Whether a table of numbers is a series rather than a table of rows."""
  from mmjax.data.image import Unreadable
  from mmjax.data.series import read_series

  if "series" not in predictor.media or columns or path.suffix.lower() not in SERIES:
    return False
  try:
    read_series(files.read_file(path))
  except (Unreadable, OSError):
    return False
  return True


def _table(path: Path) -> list[tuple[str, dict[str, Any] | Skip]]:
  """(where it stands, the row or why it cannot be read) of each row of a table. Raises UserError:
  it cannot be opened, or is empty.
  """
  ending, name = path.suffix.lower(), os.fspath(path)
  rows: list[tuple[str, Any]]
  if ending == ".parquet":
    rows = [(f"{path.name}:{n}", row) for n, row in enumerate(_parquet(path), 1)]
  elif ending in table.ENDINGS:
    rows = list(table.table_rows(name))
  else:
    objects = json_lines.read_json(name)
    rows = [] if isinstance(objects, dict) else list(objects)
  if not any(isinstance(row, dict) for _, row in rows):
    raise UserError(f"{path} has no rows, each with named columns")
  return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
  try:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()
  except ImportError as error:
    raise UserError(f"{path}: Parquet needs pyarrow: pip install 'mmjax[parquet]'") from error
  except (ValueError, OSError) as error:
    raise UserError(f"{path} is no table that can be read ({error!s:.200})") from error


def _columns(
  predictor: Predictor, rows: Sequence[Mapping], named: Mapping[str, str], path: Path
) -> dict[str, str]:
  """{modality: column} of a table. Raises UserError: no such column, or none that is read."""
  present = list(dict.fromkeys(name for row in rows for name in row))
  lower = {str(name).strip().lower(): name for name in reversed(present)}
  usual = {m: COLUMNS[m] for m in MEDIA}
  usual["text"] = (*COLUMNS["question"], *COLUMNS["caption"])
  chosen = {}
  for modality in predictor.modalities:
    if modality in named:
      if named[modality] not in present:
        raise UserError(f"{path} has no column {named[modality]!r}; it has: {', '.join(present)}")
      chosen[modality] = named[modality]
    elif column := next((lower[option] for option in usual[modality] if option in lower), None):
      chosen[modality] = column
  for role in named:
    if role not in (*predictor.modalities, "id"):
      raise UserError(
        f"--columns names {role!r}, but this checkpoint reads {', '.join(predictor.modalities)}"
      )
  if not chosen:
    raise UserError(
      f"{path} has no column for {', '.join(predictor.modalities)}; it has: {', '.join(present)}. "
      f"Name it: --columns {predictor.modalities[0]}=COLUMN"
    )
  return chosen


def _cells(line: Mapping[str, Any], chosen: Mapping[str, str], folder: Path) -> dict[str, Item]:
  """{modality: item} of a row; media are files, but for numbers of a series that stand in it."""
  found: dict[str, Item] = {}
  for modality, column in chosen.items():
    value = line.get(column)
    if value is None or value == "":
      continue
    if modality == "text":
      found[modality] = str(value)
    elif isinstance(value, dict):  # as the datasets library stores media
      found[modality] = value.get("bytes") or folder / str(value.get("path"))
    elif modality == "series" and (isinstance(value, list) or str(value).startswith("[")):
      found[modality] = np.asarray(value if isinstance(value, list) else json.loads(value))
    else:
      found[modality] = value if isinstance(value, bytes) else folder / str(value)
  return found
