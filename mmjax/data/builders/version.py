"""A version of a converted data set, made at once of new shards and of the version before it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.config import UserError
from mmjax.data.builders import _quiet_tfds, features, find_version
from mmjax.data.builders.schema import check_fields
from mmjax.data.builders.shards import is_known
from mmjax.data.builders.summary import Entry, counts_of
from mmjax.data.folders import read_facts, read_info
from mmjax.data.readers.rows import Options

Split = tuple[list[int], int]  # records of each shard, and bytes


def assemble(
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
  splits = _take_over(before, new) if before else {}
  whole = [(number, fact) for number, fact in enumerate(facts) if fact["count"]]
  for at, (number, _) in enumerate(whole):
    _link(
      staging / f"shard-{number:05d}",
      new / f"{name}-{split}.array_record-{at:05d}-of-{len(whole):05d}",
    )
  splits[split] = ([fact["count"] for _, fact in whole], sum(fact["bytes"] for _, fact in whole))
  contents = "".join([meta["content"], *(fact["content"] for fact in facts)])
  counts = counts_of(skipped)
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
  _write_info(new, name, version, meta, splits)
  os.rename(new, folder)
  return folder


def _take_over(before: Path, new: Path) -> dict[str, Split]:
  """Puts the shards of the version before into the folder `new`; its splits."""
  splits: dict[str, Split] = {}
  for old in read_info(before)["splits"]:
    lengths = [int(length) for length in old["shardLengths"]]
    splits[old["name"]] = lengths, int(old.get("numBytes", 0))
  for path in before.iterdir():
    if ".array_record-" in path.name or path.name.startswith("skipped-"):
      _link(path, new / path.name)
  return splits


def _write_info(
  folder: Path, name: str, version: str, meta: dict[str, Any], splits: Mapping[str, Split]
) -> None:
  """Writes what TFDS reads besides the shards."""
  import tensorflow_datasets as tfds

  with _quiet_tfds():
    identity = tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version(version),
      data_dir=os.fspath(folder),
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
        dataset_name=name, data_dir=folder, split=part, filetype_suffix="array_record"
      )
      parts.append(
        tfds.core.SplitInfo(
          name=part, shard_lengths=lengths, num_bytes=size, filename_template=template
        )
      )
    info.set_splits(tfds.core.splits.SplitDict(parts))
    info.write_to_directory(folder)


def _targets(name: str, meta: dict, facts: list[dict], options: Options) -> dict[str, Any]:
  """What metadata.json says of labels and values, with those of the new shards. Raises UserError:
  they are others than those of the splits that are there, or rows differ in how many they have.
  """
  labels = sorted({*meta["labels"], *(label for fact in facts for label in fact["labels"])})
  if options.classes:
    if unknown := [label for label in meta["labels"] if not is_known(label, options.classes)]:
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


def _link(source: Path, target: Path) -> None:
  try:
    os.link(source, target)
  except OSError:  # a file system without hard links
    shutil.copyfile(source, target)
