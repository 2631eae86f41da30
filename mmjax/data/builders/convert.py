"""`mmjax data convert`: pictures, sounds and videos with texts from elsewhere into a data set, in
parallel and resumable.

  convert("folder", "photos/", "mine")     the formats are those of mmjax/data/readers

Rows are divided among splits (splits.py), and those of a split written in shards (shards.py). A
finished shard is kept with its facts in DIR/NAME/converting-SPLIT/; after a kill, the same command
goes on with what is missing. Only when all shards are there does the data set appear, at once, as
DIR/NAME/VERSION (version.py). What is left out is counted by reason and listed in
skipped-SPLIT.jsonl (summary.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import find_version, splits
from mmjax.data.builders.schema import check_fields
from mmjax.data.builders.shards import write_shards
from mmjax.data.builders.summary import Entry, Summary, entry_of, reasons, summary_of
from mmjax.data.builders.version import assemble
from mmjax.data.folders import local_data_dir, read_facts, split_sizes
from mmjax.data.readers import open_reader
from mmjax.data.readers.cells import Skip, printable
from mmjax.data.readers.rows import Row
from mmjax.files import check_name
from mmjax.ownership import Owner

SHARD_ROWS = 2000
_FORM = 4  # of the shards: another number starts a conversion anew


def convert(
  format: str,
  source: str | os.PathLike,
  name: str,
  data_dir: str | os.PathLike | None = None,
  *,
  workers: int = 1,
  split: str | None = None,
  language: str = "en",
  columns: Mapping[str, str] | None = None,
  media: str | os.PathLike = "",
  encoding: str = "",
  separator: str = ",",
  classes: Sequence[str] = (),
  root: str | os.PathLike = "",
  shard_rows: int = SHARD_ROWS,
  log: Callable[[str], None] = printing.log,
) -> Summary:
  """Converts `source` into data set NAME under `data_dir` ('' or None: the default folder).

  `split`: a name, None = "train", or where the folders of a folder are called as splits are (train,
  val, test) or a column names them, these; or shares, "train:80,test:20" (splits.py). Of several
  splits the Summary is of the first, with the others in `others`.

  `language`: of captions that do not say. `columns`: {role: column}, the roles being those of
  readers.columns.COLUMNS.
  `separator`: of several labels in a text. `classes`: what labels may be, in their order; () = any,
  sorted.
  `media`: the folder of the files that annotations name ("" = that of the annotations). `root`: a
  folder below which these may lie anywhere ("" = `media`). `encoding`: of texts that are not UTF-8.
  `workers`: processes; 0 or 1 = this one. A further split of a data set makes its next version,
  which holds all.
  Raises UserError: bad arguments, nothing to convert, or everything was left out.
  """
  start = time.perf_counter()
  check_name("a data set", name)
  shares = splits.shares_of(split or "")
  if not shares and split is not None:
    check_name("a split", split)
  if (columns or {}).get("group") and not shares:
    raise UserError("--group keeps rows together in splits by shares: --split train:80,test:20")
  if workers < 0 or shard_rows < 1:
    raise UserError(f"workers is {workers} and shard_rows {shard_rows}: give at least 0 and 1")
  place = local_data_dir(data_dir or None) / name
  if bad := [one for one in classes if not one.strip() or "|" in one]:
    raise UserError(f"classes names {bad[0]!r}: give names without '|'")
  if len(set(classes)) < len(classes):
    raise UserError(f"classes names one twice: {', '.join(classes)}")
  reader = open_reader(
    format,
    source,
    columns,
    language,
    media=media,
    encoding=encoding,
    cache=place.parent,
    separator=separator,
    classes=classes or _ordered_classes(place),
    root=root,
  )
  rows, left = reader.rows()
  rows, duplicates = _unique(rows)
  skipped = [entry_of(name, skip) for name, skip in left] + duplicates
  if not rows:
    raise UserError(f"{source}: nothing to convert{reasons(skipped)}")
  parts = splits.parts_of(reader, rows, skipped, split, shares)
  settings = [_FORM, format, shares, language, columns, os.fspath(media), encoding, shard_rows]
  settings += [separator, reader.options.classes, os.fspath(root)]
  summaries = []
  for part, (rows_of, skipped_of) in parts.items():
    plan = _plan_hash([*settings, part], reader, rows_of)
    summaries.append(
      _convert_split(
        reader,
        rows_of,
        skipped_of,
        place,
        name,
        part,
        plan,
        format,
        source,
        shard_rows,
        workers,
        log,
      )
    )
  first = dataclasses.replace(summaries[0], others=tuple(summaries[1:]))
  return dataclasses.replace(first, seconds=time.perf_counter() - start)


def _convert_split(
  reader,
  rows: list[Row],
  skipped: list[Entry],
  root: Path,
  name: str,
  split: str,
  plan: str,
  format: str,
  source: str | os.PathLike,
  shard_rows: int,
  workers: int,
  log: Callable[[str], None],
) -> Summary:
  """Converts the rows of one split, into the next version of the data set in `root`."""
  start = time.perf_counter()
  done = _already(root.parent, name, split, plan, source)
  if done:
    log(f"{done.folder} holds split {split!r} of this source already")
    return done
  staging = root / f"converting-{split}"
  try:
    root.mkdir(parents=True, exist_ok=True)
    with Owner(root, f"data set {name!r} in {root.parent}"):
      # Another process may have converted it in the meantime.
      if done := _already(root.parent, name, split, plan, source):
        return done
      staging.mkdir(exist_ok=True)
      fields = check_fields(reader.fields(rows))
      facts = write_shards(reader, rows, fields, split, staging, plan, shard_rows, workers, log)
      for fact in facts:
        skipped += map(tuple, fact["skipped"])
      if not sum(fact["count"] for fact in facts):
        shutil.rmtree(staging)
        count = sum(row.count for row in rows)
        left = f"all {count:,} rows of split {split!r} were left out"
        raise UserError(f"{source}: {left}{reasons(skipped)}")
      columns = reader.options.columns
      for role in {"labels", "value"} & set(columns):
        if not any(fact["labels" if role == "labels" else "widths"] for fact in facts):
          shutil.rmtree(staging)
          raise UserError(f"{source}: no row has anything in {columns[role]!r}, its {role}")
      origin = dict(
        plan=plan,
        format=format,
        source=printable(os.fspath(source)),
        rows=sum(fact["rows"] for fact in facts),
        notes=list(reader.notes),
      )
      folder = assemble(root, name, split, staging, facts, fields, skipped, origin, reader.options)
      shutil.rmtree(staging)
  except OSError as error:
    raise UserError(
      f"{root}: cannot be written ({error.strerror or error}). "
      f"Start the same command again to go on, or set $MMJAX_DATA"
    ) from error
  origin["examples"] = sum(fact["count"] for fact in facts)
  summary = summary_of(name, split, folder, origin, skipped, time.perf_counter() - start)
  log(str(summary))
  return summary


# -- the data set ----------------------------------------------------------------------------------


def _ordered_classes(root: Path) -> tuple[str, ...]:
  """The classes that were given, in their order, when the data set in `root` was converted."""
  folder = find_version(root.parent, root.name)
  try:
    meta = read_facts(folder) if folder else {}
  except UserError:
    return ()
  return tuple(meta["labels"]) if meta.get("ordered") else ()


def _already(data_dir: Path, name: str, split: str, plan: str, source) -> Summary | None:
  """The summary of this very conversion if it is done. Raises UserError: the split is there from
  elsewhere.
  """
  folder = find_version(data_dir, name)
  if folder is None:
    return None
  meta = read_facts(folder)
  if split not in split_sizes(folder):
    return None
  facts = meta.get("converted", {}).get(split, {})
  if facts.get("plan") != plan:
    raise UserError(
      f"{folder} has a split {split!r} already, not from {source} as it is now. "
      f"Choose another name or split, or delete {folder.parent}"
    )
  with open(folder / f"skipped-{split}.jsonl", encoding="utf-8") as file:
    skipped = [
      (row["id"], row["reason"], row["detail"], row.get("rows", 1)) for row in map(json.loads, file)
    ]
  return summary_of(name, split, folder, facts, skipped, 0.0)


def _unique(rows: list[Row]) -> tuple[list[Row], list[Entry]]:
  known: set[str] = set()
  kept, duplicates = [], []
  for row in rows:
    if row.name in known:
      duplicates.append(entry_of(row.name, Skip("duplicate id"), row.count))
    else:
      known.add(row.name)
      kept.append(row)
  return kept, duplicates


def _plan_hash(settings: list, reader, rows: list) -> str:
  """Changes when the settings, the rows or a file of the source do."""
  digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
  for row in rows:
    digest.update(repr(row).encode())
  for path in reader.files(rows):
    with contextlib.suppress(OSError, ValueError):
      stat = os.stat(path)
      digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
  return digest.hexdigest()
