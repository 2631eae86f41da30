"""Makes data sets: the embedded ones by name (`build`), and one TFDS ArrayRecord form that every builder writes.

A *record* is a dict: `id` str, `image` encoded bytes or None, `captions` {language: [caption, ...]}, `label` str ("" = none),
`image_key` int in [0, 2^64) (equal = the same picture). `write_dataset` stores records, `parse_record` reads one back, and
`features` is the TFDS schema between the two, so that `tfds.builder_from_directory` opens the same files.
Neither needs TensorFlow.

A new data set is one file with a `build(data_dir, log)` function and one line in `BUILDERS`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from mmjax.config import UserError

Record = dict[str, Any]

# Name -> "module:function"; the function takes (data_dir, log) and returns the folder of the version that it built.
BUILDERS = {
  "openmoji": "mmjax.data.builders.openmoji:build",
}


def build(name: str, data_dir: str | os.PathLike = "", log: Callable[[str], None] = print) -> Path:
  """Builds the embedded data set NAME under `data_dir` ("" = the usual folder); one that is there already is left alone.

  Returns its folder, data_dir/NAME/VERSION. Raises UserError: no such data set, or the folder cannot be written.
  """
  if name not in BUILDERS:
    near = difflib.get_close_matches(name, BUILDERS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "`mmjax data convert` makes one from your own files"
    raise UserError(f"no builder for data set {name!r}; there are: {', '.join(BUILDERS)}. {hint}")
  module, _, function = BUILDERS[name].partition(":")
  from mmjax.data.sources import data_dir as usual_dir

  data_dir = usual_dir(data_dir)
  start = time.perf_counter()
  make = getattr(importlib.import_module(module), function)
  there = find_version(data_dir, name)
  folder = make(data_dir, log)
  splits = ", ".join(f"{split} {count:,}" for split, count in split_sizes(folder).items())
  if there == folder:
    log(f"{name} is already built: {folder} ({splits})")
  else:
    log(f"built {name} in {time.perf_counter() - start:.0f} s: {folder} ({splits})")
  return folder


def features():
  """The TFDS schema of a record. `captions` is two parallel sequences; `image_key` holds the bits of a uint64 as int64."""
  import numpy as np
  import tensorflow_datasets as tfds

  return tfds.features.FeaturesDict({
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(None, None, None)),
    "captions": tfds.features.Sequence({"language": tfds.features.Text(), "text": tfds.features.Text()}),
    "label": tfds.features.Text(),
    "image_key": tfds.features.Scalar(np.int64),
  })


def to_example(record: Record) -> dict[str, Any]:
  """A record as the example that `features` encodes (the picture stays the encoded bytes that it is)."""
  pairs = [(language, text) for language, texts in record["captions"].items() for text in texts]
  key = record["image_key"]
  return {
    "id": record["id"],
    "image": io.BytesIO(record["image"] or b""),
    "captions": {"language": [language for language, _ in pairs], "text": [text for _, text in pairs]},
    "label": record.get("label", ""),
    "image_key": key - (1 << 64) if key >= 1 << 63 else key,
  }


def parse_record(data: bytes, languages: Sequence[str] = ()) -> Record:
  """The record in a serialised tf.train.Example, with the captions in `languages` only (() = all). Raises UserError."""
  try:
    feature = example_class().FromString(data).features.feature
    captions: dict[str, list[str]] = {}
    wanted = {language.encode() for language in languages}
    texts = feature["captions/text"].bytes_list.value if "captions/text" in feature else ()
    for language, text in zip(feature["captions/language"].bytes_list.value if texts else (), texts, strict=True):
      if not wanted or language in wanted:
        captions.setdefault(language.decode(), []).append(text.decode())
    return {
      "id": feature["id"].bytes_list.value[0].decode(),
      "image": feature["image"].bytes_list.value[0] or None,
      "captions": captions,
      "label": feature["label"].bytes_list.value[0].decode(),
      "image_key": feature["image_key"].int64_list.value[0] % (1 << 64),
    }
  except (IndexError, UnicodeDecodeError, ValueError, DecodeError) as error:
    raise UserError(f"a record has not the fields of an mmjax data set ({error}); make one with `mmjax data convert`") from error


@functools.cache
def example_class():
  """tf.train.Example. Call it once before threads read: the lazy imports of TFDS deadlock when two threads start them."""
  from tensorflow_datasets.proto import tf_example_generated_pb2

  return tf_example_generated_pb2.Example


def write_dataset(
    name: str,
    data_dir: str | os.PathLike,
    splits: Mapping[str, Iterable[Record]],
    *,
    version: str = "1.0.0",
    card: str = "",
    licence: str = "",
    homepage: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
  """Writes records as data_dir/NAME/VERSION (TFDS ArrayRecord), in the given order; atomic: the folder appears complete.

  `card` becomes its README.md. metadata.json holds `labels` and `languages` (sorted), `content` (a hash of all
  records, which makes the fingerprint of a source) and what `metadata` adds.
  Raises UserError: two records with the same id, or the folder cannot be written.
  """
  import tensorflow_datasets as tfds

  seen_labels, seen_languages, content = set(), set(), hashlib.blake2b(digest_size=16)
  facts = tfds.core.MetadataDict(metadata or {})

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    pkg_dir_path = Path(__file__).parent

    def _info(self):
      description = card.strip().split("\n\n")[0] or name
      return tfds.core.DatasetInfo(builder=self, features=features(), description=description, homepage=homepage or None,
                                   license=licence or None, metadata=facts, disable_shuffling=True)

    def _log_download_bytes(self):  # these two would print about downloads that there are none of
      pass

    def _log_download_done(self):
      pass

    def _split_generators(self, dl_manager):
      (Path(self.data_dir) / "README.md").write_text(card or f"# {name}\n", encoding="utf-8")
      return {split: self._generate_examples(split, records) for split, records in splits.items()}

    def _generate_examples(self, split, records):
      for number, record in zip(itertools.count(), records):
        _check_unique(ids, f"{split}/{record['id']}", name)
        seen_labels.add(record.get("label", ""))
        seen_languages.update(record["captions"])
        content.update(_canonical(split, record))
        yield number, to_example(record)
      facts.update(labels=sorted(seen_labels - {""}), languages=sorted(seen_languages), content=content.hexdigest())

  ids: set[str] = set()
  Builder.name = name
  folder = Path(data_dir) / name / version
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with _quiet_tfds(), tempfile.TemporaryDirectory() as nowhere:
      builder = Builder(data_dir=os.fspath(data_dir), file_format="array_record")
      builder.download_and_prepare(download_dir=nowhere, download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except OSError as error:
    if not is_complete(folder):  # else another process has built the same meanwhile
      raise UserError(f"{data_dir}: cannot write data set {name!r} ({error}). Choose another folder with $MMJAX_DATA") from error
  return folder


def is_complete(folder: Path) -> bool:
  """Whether `folder` (data_dir/NAME/VERSION) holds a finished data set; a build that was cut short never does."""
  return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def find_version(data_dir: str | os.PathLike, name: str) -> Path | None:
  """The newest finished version of data set NAME under `data_dir`, or None."""
  root = Path(data_dir) / name
  found = []
  for folder in root.iterdir() if name and root.is_dir() else ():
    if folder.name.replace(".", "").isdigit() and is_complete(folder):
      found.append((tuple(int(part) for part in folder.name.split(".")), folder))
  return max(found)[1] if found else None


def split_sizes(folder: Path) -> dict[str, int]:
  """{split: number of examples} of the data set in `folder`."""
  info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
  return {split["name"]: sum(int(length) for length in split["shardLengths"]) for split in info["splits"]}


def _check_unique(seen: set[str], key: str, name: str) -> None:
  if key in seen:
    raise UserError(f"data set {name!r}: two records have the id {key!r}. Give each its own")
  seen.add(key)


def _canonical(split: str, record: Record) -> bytes:
  """What counts as the content of a record, as bytes. The picture counts by its key: encoders of the same pixels may differ."""
  fields = [split, record["id"], record["captions"], record.get("label", ""), record["image_key"]]
  return json.dumps(fields, sort_keys=True).encode()


def _remove_leftovers(folder: Path, older_than: float = 3600.0) -> None:
  """Deletes what builds left that were killed: folders that TFDS names incomplete.*_VERSION, untouched for an hour."""
  for path in folder.parent.glob(f"incomplete.*_{folder.name}"):
    if time.time() - path.stat().st_mtime > older_than:
      shutil.rmtree(path, ignore_errors=True)


class _quiet_tfds:
  """Silences the progress bars and log lines of TFDS for a while."""

  def __enter__(self):
    import tensorflow_datasets as tfds
    from absl import logging

    self.verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()

  def __exit__(self, *unused):
    import tensorflow_datasets as tfds
    from absl import logging

    logging.set_verbosity(self.verbosity)
    tfds.enable_progress_bar()
