"""Shards of a data set that is being converted: written in parallel, and kept after a kill.

A shard is a fixed number of rows of the source, so that neither the order nor the bytes depend on
the number of workers. All media are decoded once to see that they can be, and stored as the bytes
they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mmjax.config import UserError
from mmjax.data import media
from mmjax.data.builders import Record, canonical, features, to_example
from mmjax.data.builders.summary import entry_of
from mmjax.data.image import Unreadable
from mmjax.data.readers.cells import Skip, broken_text
from mmjax.data.workers import at_most
from mmjax.files import write_whole


def write_shards(
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
        skipped.append(entry_of(name, fault, joined))
        continue
      data = serializer.serialize_example(schema.encode_example(to_example(record, fields)))
      # Without it, fields come in the order of a map, which varies.
      data = Example.FromString(data).SerializeToString(deterministic=True)
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
  # Written last: a shard with facts is whole.
  write_whole(staging / f"shard-{number:05d}.json", json.dumps(facts).encode())
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
  if classes and record["label"] and not is_known(record["label"], classes):
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


def is_known(label: str, classes: Sequence[str]) -> bool:
  return label in classes or all(name in classes for name in label.split("|"))
