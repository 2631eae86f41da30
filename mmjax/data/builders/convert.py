"""`mmjax data convert`: pictures, sounds and videos with texts from elsewhere into a data set, in
parallel and resumable.

  convert("folder", "photos/", "mine")     the formats are those of mmjax/data/readers

The rows of the source are cut into shards of a fixed number of rows, so that neither the order nor
the bytes depend on the number of workers. A finished shard is kept with its facts in
DIR/NAME/converting-SPLIT/; after a kill, the same command goes on with what is missing. Only when
all shards are there does the data set appear, at once, as DIR/NAME/VERSION. All media are decoded
once to see that they can be (and stored as the bytes they are); what is left out is counted by
reason and listed in skipped-SPLIT.jsonl.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mmjax import printing
from mmjax.config import UserError
from mmjax.data import media
from mmjax.data.builders import (
  Record,
  _quiet_tfds,
  canonical,
  features,
  find_version,
  splits,
  to_example,
)
from mmjax.data.builders.schema import check_fields
from mmjax.data.folders import local_data_dir, read_facts, read_info, split_sizes
from mmjax.data.image import Unreadable
from mmjax.data.readers import open_reader
from mmjax.data.readers.cells import Skip, broken_text, printable
from mmjax.data.readers.folder import SPLITS
from mmjax.data.readers.rows import OUTSIDE, Options, Row, Where
from mmjax.data.workers import at_most
from mmjax.files import check_name, write_whole
from mmjax.ownership import Owner

SHARD_ROWS = 2000
_ENDING = "ending not read"
Entry = tuple[
  str, str, str, int
]  # of what is left out: id, reason, detail, how many rows of the source
_FORM = 4  # of the shards: another number starts a conversion anew


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a conversion made: examples of the split, from how many rows of the source, {reason:
  count} of the rows that were left out and the first names of each (of files whose ending is not
  read: the endings), and how the source was understood.

  Rows about one medium are one example: `rows` and the counts in `skipped` add up to all rows and
  files of the source; `endings` has the same counts by {reason: {file ending: count}}, "none" of
  what is no file.
  """

  name: str
  split: str
  folder: str
  examples: int
  skipped: dict[str, int]
  first_skipped: dict[str, list[str]]
  seconds: float
  rows: int = 0
  notes: tuple[str, ...] = ()
  endings: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  others: tuple[Summary, ...] = ()

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    joined = f" from {self.rows:,} rows" if self.rows > self.examples else ""
    lines = [
      f"{self.folder}: {self.examples:,} examples{joined} in split {self.split!r}, "
      f"{self.seconds:.0f} s"
    ]
    lines += [f"  {note}" for note in self.notes]
    for reason, count in self.skipped.items():
      first = self.first_skipped[reason]
      names = ", ".join(map(printing.printable, first))
      more = ", ..." if count > len(first) and reason != _ENDING else ""
      more += "; --root names a folder that holds them all" if reason == OUTSIDE else ""
      lines.append(f"  left out {count:,}: {reason} ({names}{more})")
    return "\n".join([*lines, *map(str, self.others)])


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
  skipped = [_entry(name, skip) for name, skip in left] + duplicates
  if not rows:
    raise UserError(f"{source}: nothing to convert{_reasons(skipped)}")
  parts = _parts(reader, rows, skipped, split, shares)
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


def _parts(
  reader, rows: list[Row], skipped: list[Entry], split: str | None, shares: Mapping[str, float]
) -> dict[str, tuple[list[Row], list[Entry]]]:
  """{split: (its rows, what is left out of it already)}; that belongs to the first split where
  nothing tells.
  """
  folders = getattr(reader, "splits", {})
  named = [] if shares else [_named_split(row) for row in rows]
  if shares:
    divided = splits.divide(reader, rows, shares)
    first = next(iter(divided))
    return {name: (part, skipped if name == first else []) for name, part in divided.items()}
  if any(named):
    return _by_column(reader, rows, skipped, split, named)
  if not folders:
    return {split or "train": (rows, skipped)}
  there = ", ".join(folders)
  beside = [path for row in rows if _first_folder(path := _path(row)) not in folders]
  if beside:
    reader.notes.append(
      f"the folders {there} are put into one split, {split or 'train'!r}, since {beside[0]} lies "
      "beside them; move it into one of them to make each a split"
    )
    return {split or "train": (rows, skipped)}
  if split:
    reader.notes.append(
      f"the folders {there} are put into one split, {split!r}; without --split each is one"
    )
    return {split: (rows, skipped)}
  reader.notes.append(
    f"the folders {there} become the splits {', '.join(dict.fromkeys(folders.values()))}; --split "
    "NAME puts all into one"
  )
  parts: dict[str, tuple[list[Row], list[Entry]]] = {name: ([], []) for name in folders.values()}
  first = next(iter(parts))
  for row in rows:
    parts[folders[_first_folder(_path(row))]][0].append(row)
  for entry in skipped:
    parts[folders.get(_first_folder(entry[0]), first)][1].append(entry)
  return {name: part for name, part in parts.items() if part[0]}


def _by_column(
  reader, rows: list[Row], skipped: list[Entry], split: str | None, named: Sequence[str]
) -> dict[str, tuple[list[Row], list[Entry]]]:
  """As `_parts`, of rows that name their splits. Raises UserError: a name that none can have."""
  there = ", ".join(sorted(set(named) - {""}))
  if split or not all(named):
    why = "without --split each is one" if split else f"since {rows[named.index('')].name} has none"
    reader.notes.append(
      f"the splits {there} of the rows are put into one, {split or 'train'!r}, {why}"
    )
    return {split or "train": (rows, skipped)}
  parts: dict[str, tuple[list[Row], list[Entry]]] = {name: ([], []) for name in sorted(set(named))}
  for name in parts:
    try:
      check_name("a split", name)
    except UserError as error:
      raise UserError(
        f"rows name their splits, but {error}; or put all into --split NAME"
      ) from None
  if len(parts) > 1:
    reader.notes.append(f"the rows name their splits: {there}; --split NAME puts all into one")
  for row, name in zip(rows, named, strict=True):
    parts[name][0].append(row)
  next(iter(parts.values()))[1].extend(skipped)
  return parts


def _named_split(row: Row) -> str:
  """The split that a row says itself, by its usual name; "" = none."""
  said = row.where.said if isinstance(row.where, Where) else None
  name = said.split if said else ""
  return SPLITS.get(name.lower(), name)


def _path(row: Row) -> str:
  """Of the first file of a row of a folder."""
  return next(iter(row.where.media.values()))


def _first_folder(path: str) -> str:
  return os.path.normpath(path).split(os.sep)[0]


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
      if done := _already(
        root.parent, name, split, plan, source
      ):  # by a process that has just ended
        return done
      staging.mkdir(exist_ok=True)
      fields = check_fields(reader.fields(rows))
      facts = _write_shards(reader, rows, fields, split, staging, plan, shard_rows, workers, log)
      for fact in facts:
        skipped += map(tuple, fact["skipped"])
      if not sum(fact["count"] for fact in facts):
        shutil.rmtree(staging)
        count = sum(row.count for row in rows)
        left = f"all {count:,} rows of split {split!r} were left out"
        raise UserError(f"{source}: {left}{_reasons(skipped)}")
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
      folder = _assemble(root, name, split, staging, facts, fields, skipped, origin, reader.options)
      shutil.rmtree(staging)
  except OSError as error:
    raise UserError(
      f"{root}: cannot be written ({error.strerror or error}). "
      f"Start the same command again to go on, or set $MMJAX_DATA"
    ) from error
  origin["examples"] = sum(fact["count"] for fact in facts)
  summary = _summary(name, split, folder, origin, skipped, time.perf_counter() - start)
  log(str(summary))
  return summary


# -- shards ----------------------------------------------------------------------------------------


def _write_shards(
  reader,
  rows: list,
  fields: tuple,
  split: str,
  staging: Path,
  plan: str,
  shard_rows: int,
  workers: int,
  log: Callable[[str], None],
) -> list[dict[str, Any]]:
  """The facts of all shards, in order; writes those that are not there yet."""
  plan_file = staging / "plan"
  if not plan_file.is_file() or plan_file.read_text() != plan:
    for path in staging.glob("shard-*"):
      path.unlink()
    write_whole(plan_file, plan.encode())
  for path in (*staging.glob("*.tmp"), *staging.glob(".shard-*")):
    path.unlink()
  parts = [rows[at : at + shard_rows] for at in range(0, len(rows), shard_rows)]
  facts: dict[int, dict] = {}
  for number in range(len(parts)):
    fact = _finished(staging, number)
    if fact is not None:
      facts[number] = fact
  if facts:
    log(f"going on: {len(facts)} of {len(parts)} shards are there already")
  missing = [number for number in range(len(parts)) if number not in facts]
  processes = at_most(min(workers, len(missing)), "--workers")
  start, wrote, said = time.perf_counter(), 0, time.perf_counter()
  for number, fact in _run(reader, parts, missing, fields, split, staging, processes):
    facts[number] = fact
    wrote += len(parts[number])
    if time.perf_counter() - said > 5 or len(facts) == len(parts) > 1:
      said = time.perf_counter()
      rate = wrote / (said - start)
      left = sum(len(parts[n]) for n in missing if n not in facts)
      log(f"shard {len(facts)} of {len(parts)}, {rate:.0f} rows/s, {left / rate:.0f} s left")
  return [facts[number] for number in range(len(parts))]


def _run(
  reader, parts: list, missing: list[int], fields: tuple, split: str, staging: Path, workers: int
) -> Iterator[tuple[int, dict]]:
  if workers <= 1:
    for number in missing:
      yield number, _write_shard(reader, parts[number], fields, split, staging, number)
    return
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # workers inherit it; they never touch a device
  pool = ProcessPoolExecutor(
    workers, mp_context=multiprocessing.get_context("spawn"), initializer=_die_with_parent
  )
  try:
    futures = {
      pool.submit(_write_shard, reader, parts[number], fields, split, staging, number): number
      for number in missing
    }
    for future in as_completed(futures):
      yield futures[future], future.result()
  except BrokenProcessPool as error:
    raise UserError(
      "a worker process died (out of memory?). Start the same command again, with fewer workers, "
      "to go on"
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
  """A worker of a parent that was killed would wait for work forever."""

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _write_shard(
  reader, rows: list, fields: tuple, split: str, staging: Path, number: int
) -> dict[str, Any]:
  """Writes shard-NUMBER and then its facts: {count, rows, bytes, size, content, labels, languages,
  answers, widths (how many values records have), skipped}.
  """
  from tensorflow_datasets.core import example_serializer
  from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

  schema = features(fields)
  serializer = example_serializer.ExampleSerializer(schema.get_serialized_info())
  content, skipped, count, size, read = hashlib.blake2b(digest_size=16), [], 0, 0, 0
  labels: set[str] = set()
  languages: set[str] = set()
  answers: set[str] = set()
  widths: set[int] = set()
  temporary = staging / f"shard-{number:05d}.tmp"
  with _record_writer(temporary) as writer:
    for name, record, joined in reader.read(rows):
      fault = record if isinstance(record, Skip) else _fault(record, reader.options.classes)
      if fault:
        skipped.append(_entry(name, fault, joined))
        continue
      data = serializer.serialize_example(schema.encode_example(to_example(record, fields)))
      data = Example.FromString(data).SerializeToString(
        deterministic=True
      )  # else fields come in the order of a map
      writer.write(data)
      content.update(canonical(split, record, fields))
      labels.add(record["label"])
      languages.update(record["captions"])
      if record.get("value") is not None:
        widths.add(len(record["value"]))
      if not record.get("conversations"):  # whose answers are no classes
        answers.update(answer for _, answer in record.get("questions", ()))
      count, size, read = count + 1, size + len(data), read + joined
  with open(temporary, "rb") as file:
    os.fsync(file.fileno())
    length = os.fstat(file.fileno()).st_size
  os.replace(temporary, staging / f"shard-{number:05d}")
  facts = dict(
    count=count,
    rows=read,
    bytes=size,
    size=length,
    content=content.hexdigest(),
    labels=sorted(labels - {""}),
    languages=sorted(languages),
    answers=sorted(answers - {""}),
    widths=sorted(widths),
    skipped=skipped,
  )
  write_whole(
    staging / f"shard-{number:05d}.json", json.dumps(facts).encode()
  )  # last: now the shard counts
  return facts


@contextlib.contextmanager
def _record_writer(path: Path):
  """An ArrayRecordWriter, whose RuntimeErrors (a full disk) become OSErrors."""
  from array_record.python.array_record_module import ArrayRecordWriter

  try:
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
      yield writer
    finally:
      writer.close()
  except RuntimeError as error:
    raise OSError(str(error).splitlines()[0].partition("; ")[0]) from error


def _finished(staging: Path, number: int) -> dict[str, Any] | None:
  """The facts of a shard if it is whole."""
  shard = staging / f"shard-{number:05d}"
  try:
    facts = json.loads(shard.with_suffix(".json").read_bytes())
    return facts if shard.stat().st_size == facts["size"] else None
  except (OSError, ValueError, KeyError):
    return None


def _fault(record: Record, classes: Sequence[str] = ()) -> Skip | None:
  """Why a record is no use: by its texts, by its labels, which `classes` must name if it names any,
  and by decoding all of its media.
  """
  if classes and record["label"] and not _known(record["label"], classes):
    return Skip("another label", f"{record['label']} is not in --classes")
  if bad := broken_text(
    [
      record["id"],
      record["captions"],
      record["label"],
      record.get("questions"),
      record.get("facts"),
      record.get("conversations"),
      record.get("preferences"),
    ]
  ):
    return Skip("broken text", bad)
  try:
    media.check(record)
  except Unreadable as error:
    return Skip("too large" if media.too_large(error) else "unreadable", str(error))
  return None


# -- the data set ----------------------------------------------------------------------------------


def _assemble(
  root: Path,
  name: str,
  split: str,
  staging: Path,
  facts: list[dict],
  fields: tuple,
  skipped: list[Entry],
  origin: dict,
  options: Options,
) -> Path:
  """Makes root/VERSION from the shards and from the splits that the version before it has; it
  appears at once.
  """
  import tensorflow_datasets as tfds

  before = find_version(root.parent, name)
  version = "1.0.0"
  meta: dict[str, Any] = dict(
    labels=[], values=[], languages=[], answers=[], fields=[], content="", converted={}
  )
  if before:
    major, minor, _ = before.name.split(".")
    version = f"{major}.{int(minor) + 1}.0"
    meta |= dict(fields=["image"]) | read_facts(before)
  meta |= _targets(name, meta, facts, options)
  folder, new = root / version, root / f"{version}.incomplete-converting"
  shutil.rmtree(new, ignore_errors=True)
  new.mkdir()
  whole = [(number, fact) for number, fact in enumerate(facts) if fact["count"]]
  for at, (number, _) in enumerate(whole):
    _link(
      staging / f"shard-{number:05d}",
      new / f"{name}-{split}.array_record-{at:05d}-of-{len(whole):05d}",
    )
  splits = {}
  if before:
    for old in read_info(before)["splits"]:
      splits[old["name"]] = (
        [int(length) for length in old["shardLengths"]],
        int(old.get("numBytes", 0)),
      )
    for path in before.iterdir():
      if ".array_record-" in path.name or path.name.startswith("skipped-"):
        _link(path, new / path.name)
  splits[split] = ([fact["count"] for _, fact in whole], sum(fact["bytes"] for _, fact in whole))
  contents = "".join([meta["content"], *(fact["content"] for fact in facts)])
  counts = _counts(skipped)
  converted = meta.get("converted", {}) | {
    split: origin | {"examples": sum(splits[split][0]), "skipped": counts}
  }
  meta |= {
    what: sorted({*meta[what], *(name for fact in facts for name in fact[what])})
    for what in ("languages", "answers")
  }
  meta["fields"] = list(check_fields({*meta["fields"], *fields}))
  meta |= dict(
    content=hashlib.blake2b(contents.encode(), digest_size=16).hexdigest(), converted=converted
  )
  with open(new / f"skipped-{split}.jsonl", "w", encoding="utf-8") as file:
    for row, reason, detail, count in skipped:
      line = dict(id=row, reason=reason, detail=detail) | ({"rows": count} if count > 1 else {})
      file.write(json.dumps(line, ensure_ascii=False) + "\n")
  (new / "README.md").write_text(_card(name, meta), encoding="utf-8")
  with _quiet_tfds():
    identity = tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version(version),
      data_dir=os.fspath(new),
      module_name="mmjax.data.builders.convert",
    )
    info = tfds.core.DatasetInfo(
      builder=identity,
      description=f"{name}, converted by mmjax",
      features=features(meta["fields"]),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(meta),
    )
    info.set_file_format("array_record")
    parts = []
    for part, (lengths, size) in splits.items():
      template = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=new, split=part, filetype_suffix="array_record"
      )
      parts.append(
        tfds.core.SplitInfo(
          name=part, shard_lengths=lengths, num_bytes=size, filename_template=template
        )
      )
    info.set_splits(tfds.core.splits.SplitDict(parts))
    info.write_to_directory(new)
  os.rename(new, folder)
  return folder


def _targets(name: str, meta: dict, facts: list[dict], options: Options) -> dict[str, Any]:
  """What metadata.json says of labels and values, with those of the new shards. Raises UserError:
  they are others than those of the splits that are there, or rows differ in how many they have.
  """
  labels = sorted({*meta["labels"], *(label for fact in facts for label in fact["labels"])})
  if options.classes:
    if unknown := [label for label in meta["labels"] if not _known(label, options.classes)]:
      raise UserError(
        f"{name} has the label {unknown[0]!r} in another split, which --classes does not name"
      )
    labels = list(options.classes)
  widths = sorted({width for fact in facts for width in fact["widths"]})
  values = list(meta["values"])
  if len(widths) > 1:
    raise UserError(
      f"rows have {' or '.join(map(str, widths))} values in {options.columns['value']!r}: give "
      "each as many"
    )
  if widths:
    column = options.columns["value"]
    named = [column] if widths == [1] else column.split("+")
    if len(named) < widths[0]:
      named = [f"{column}[{number}]" for number in range(widths[0])]
    if values and values != named:
      raise UserError(
        f"{name} has the values {', '.join(values)} in another split, not {', '.join(named)}"
      )
    values = named
  return dict(labels=labels, ordered=bool(options.classes), values=values)


def _ordered_classes(root: Path) -> tuple[str, ...]:
  """The classes that were given, in their order, when the data set in `root` was converted."""
  folder = find_version(root.parent, root.name)
  try:
    meta = read_facts(folder) if folder else {}
  except UserError:
    return ()
  return tuple(meta["labels"]) if meta.get("ordered") else ()


def _known(label: str, classes: Sequence[str]) -> bool:
  return label in classes or all(name in classes for name in label.split("|"))


def _card(name: str, meta: dict) -> str:
  lines = [
    f"# {name}",
    "",
    "Made by `mmjax data convert`.",
    f"Fields: `id`, {', '.join(f'`{name}`' for name in meta['fields'])} (media encoded), "
    "`captions` (language, text), `label`, `image_key`.",
    f"Languages: {', '.join(meta['languages'])}. Classes: {len(meta['labels'])}. Values: "
    f"{', '.join(meta['values']) or 'none'}.",
    "",
  ]
  for split, facts in meta["converted"].items():
    lines.append(
      f"- `{split}`: {facts['examples']:,} examples, from {facts['format']} `{facts['source']}`"
    )
    lines += [f"  - {note}" for note in facts.get("notes", ())]
    lines += [f"  - left out {count:,}: {reason}" for reason, count in facts["skipped"].items()]
  return "\n".join(lines) + "\n"


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
  return _summary(name, split, folder, facts, skipped, 0.0)


def _summary(
  name: str,
  split: str,
  folder: Path,
  origin: Mapping[str, Any],
  skipped: list[Entry],
  seconds: float,
) -> Summary:
  counts, first, endings = _counts(skipped), {}, _endings(skipped)
  for reason in counts:
    names = [row for row, why, *_ in skipped if why == reason]
    if reason == _ENDING:
      names = [f"{ending} {count:,}" for ending, count in endings[reason].items()]
    first[reason] = names if reason == _ENDING else names[:3]
  return Summary(
    name,
    split,
    os.fspath(folder),
    origin["examples"],
    counts,
    first,
    seconds,
    origin.get("rows", origin["examples"]),
    tuple(origin.get("notes", ())),
    endings,
  )


# -- helpers ---------------------------------------------------------------------------------------


def _entry(name: str, skip: Skip, count: int = 1) -> Entry:
  return printable(name), skip.reason, printable(skip.detail), count


def _counts(skipped: list[Entry]) -> dict[str, int]:
  """{reason: how many rows}, the most first."""
  counts: Counter[str] = Counter()
  for _, reason, _, count in skipped:
    counts[reason] += count
  return dict(counts.most_common())


def _endings(skipped: list[Entry]) -> dict[str, dict[str, int]]:
  """{reason: {file ending: rows}}, the most first."""
  found: dict[str, Counter[str]] = {}
  for row, reason, _, count in skipped:
    ending = os.path.splitext(row)[1].lower()
    ending = ending if re.fullmatch(r"\.\w{1,16}", ending) else "none"
    found.setdefault(reason, Counter())[ending] += count
  return {reason: dict(counts.most_common()) for reason, counts in found.items()}


def _unique(rows: list[Row]) -> tuple[list[Row], list[Entry]]:
  known: set[str] = set()
  kept, duplicates = [], []
  for row in rows:
    if row.name in known:
      duplicates.append(_entry(row.name, Skip("duplicate id"), row.count))
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


def _link(source: Path, target: Path) -> None:
  try:
    os.link(source, target)
  except OSError:  # a file system without hard links
    shutil.copyfile(source, target)


def _reasons(skipped: list[Entry]) -> str:
  """' (3 missing file, such as a.jpg; ...)', or ''."""
  parts = []
  for reason, count in list(_counts(skipped).items())[:4]:
    row, _, detail, _ = next(entry for entry in skipped if entry[1] == reason)
    parts.append(
      f"{count} {reason}, such as {row}" + (f": {detail}" if detail and detail != row else "")
    )
  return f" ({'; '.join(parts)})" if parts else ""
