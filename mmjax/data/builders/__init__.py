"""Makes data sets: the embedded ones by name (`build`), and one TFDS ArrayRecord form that every
builder writes.

`write_dataset` stores records, `parse_record` reads one back, and `features` is the TFDS schema
between the two (see schema.py), so that `tfds.builder_from_directory` opens the same files. Neither
needs TensorFlow.

A new data set is one file with a `build(data_dir, log)` function and one line in `BUILDERS`.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax import files, printing
from mmjax.config import UserError
from mmjax.data.builders.schema import (
  Record,
  canonical,
  check_fields,
  example_class,
  features,
  parse_record,
  to_example,
)
from mmjax.data.folders import find_version, is_complete, local_data_dir, split_sizes
from mmjax.kinds import load_function
from mmjax.ownership import Owner

__all__ = [
  "BUILDERS",
  "Record",
  "build",
  "canonical",
  "example_class",
  "features",
  "find_version",
  "is_complete",
  "parse_record",
  "split_sizes",
  "to_example",
  "write_dataset",
]

_PATIENCE = 3600.0  # seconds that a build waits for another one of the same data set

# Name -> "module:function"; the function takes (data_dir, log) and returns the folder of the
# version that it built.
BUILDERS = {
  "basket_prices": "mmjax.data.builders.basket_prices:build",
  "clip_questions": "mmjax.data.builders.clip_questions:build",
  "easy_vqa": "mmjax.data.builders.easy_vqa:build",
  "emoji_scenes": "mmjax.data.builders.emoji_scenes:build",
  "moving_emoji": "mmjax.data.builders.moving_emoji:build",
  "openmoji": "mmjax.data.builders.openmoji:build",
  "python_topics": "mmjax.data.builders.python_topics:build",
  "rare_animals": "mmjax.data.builders.rare_animals:build",
  "scene_dialogues": "mmjax.data.builders.scene_dialogues:build",
  "scene_preferences": "mmjax.data.builders.scene_preferences:build",
  "spoken_commands": "mmjax.data.builders.spoken_commands:build",
  "spoken_dialogues": "mmjax.data.builders.spoken_dialogues:build",
  "spoken_emoji": "mmjax.data.builders.spoken_emoji:build",
  "spoken_questions": "mmjax.data.builders.spoken_questions:build",
}


def build(
  name: str, data_dir: str | os.PathLike = "", log: Callable[[str], None] = printing.log
) -> Path:
  """Builds the embedded data set NAME under `data_dir` ("" = the usual folder); one that is there
  already is left alone.

  NAME may also be "module:function", a builder of one's own. Returns its folder,
  data_dir/NAME/VERSION. Raises UserError: no such data set or function, or the folder cannot be
  written.
  """
  target = BUILDERS.get(name, name)
  if ":" not in target:
    near = difflib.get_close_matches(name, BUILDERS, n=1)
    hint = (
      f"Did you mean {near[0]!r}?" if near else "`mmjax data convert` makes one from your own files"
    )
    raise UserError(f"no builder for data set {name!r}; there are: {', '.join(BUILDERS)}. {hint}")
  data_dir = local_data_dir(data_dir)
  start = time.perf_counter()
  make = load_function(target)
  built = find_version(data_dir, name) if name in BUILDERS else None
  folder = Path(make(data_dir, log))
  name = folder.parent.name
  splits = ", ".join(f"{split} {count:,}" for split, count in split_sizes(folder).items())
  if built == folder:
    log(f"{name} is already built: {folder} ({splits})")
  else:
    log(f"built {name} in {time.perf_counter() - start:.0f} s: {folder} ({splits})")
  return folder


def write_dataset(
  name: str,
  data_dir: str | os.PathLike,
  splits: Mapping[str, Iterable[Record]],
  *,
  fields: Sequence[str] = ("image",),
  version: str = "1.0.0",
  card: str = "",
  licence: str = "",
  homepage: str = "",
  metadata: Mapping[str, Any] | None = None,
) -> Path:
  """Writes records as data_dir/NAME/VERSION (TFDS ArrayRecord), in the given order; atomic: the
  folder appears complete.

  `fields`: the optional fields of records that are stored (schema.FIELDS). `card` becomes its
  README.md. metadata.json holds `labels`, `languages` and `answers` (of all splits, sorted),
  `values` (names of a record's numbers, "value[0]", ... unless `metadata` says), `fields`,
  `content` (a hash of all records, which makes the fingerprint of a source) and what `metadata`
  adds. Raises UserError: two records with the same id, no such field, or the folder cannot be
  written.
  """
  import tensorflow_datasets as tfds

  files.check_name("a data set", name)
  fields = check_fields(fields)
  seen_labels: set[str] = set()
  seen_languages: set[str] = set()
  seen_answers: set[str] = set()
  content = hashlib.blake2b(digest_size=16)
  facts = tfds.core.MetadataDict(metadata or {})

  class Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
      """TFDS would ask its own store about this data set, and leave a temporary folder behind."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    VERSION = tfds.core.Version(version)
    pkg_dir_path = Path(__file__).parent

    def _info(self):
      description = card.strip().split("\n\n")[0] or name
      return Info(
        builder=self,
        features=features(fields),
        description=description,
        homepage=homepage or None,
        license=licence or None,
        metadata=facts,
        disable_shuffling=True,
      )

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
        if "questions" in fields:
          seen_answers.update(answer for _, answer in record.get("questions") or ())
        if record.get("value") is not None and "values" not in facts:
          facts["values"] = [f"value[{k}]" for k in range(len(record["value"]))]
        content.update(canonical(split, record, fields))
        yield number, to_example(record, fields)
      facts.update(
        labels=sorted(seen_labels - {""}),
        languages=sorted(seen_languages),
        answers=sorted(seen_answers - {""}),
        fields=list(fields),
        content=content.hexdigest(),
      )

  ids: set[str] = set()
  Builder.name = name
  folder = Path(data_dir) / name / version
  what = f"{data_dir}: cannot write data set {name!r}"
  hint = ". Free space, or choose another folder with $MMJAX_DATA"
  try:
    with files.disk_errors(data_dir, what, hint):
      folder.parent.mkdir(parents=True, exist_ok=True)
      owner = Owner(folder.parent, f"data set {name!r} in {data_dir}", wait=_PATIENCE)
      with owner, _quiet_tfds(), tempfile.TemporaryDirectory() as nowhere:
        for left in folder.parent.glob(f"incomplete.*_{folder.name}"):  # of builds that were killed
          shutil.rmtree(left, ignore_errors=True)
        builder = Builder(data_dir=os.fspath(data_dir), file_format="array_record")
        builder.download_and_prepare(
          download_dir=nowhere, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
  except UserError:
    if not is_complete(folder):  # else another process has built the same meanwhile
      raise
  return folder


def _check_unique(known: set[str], key: str, name: str) -> None:
  if key in known:
    raise UserError(f"data set {name!r}: two records have the id {key!r}. Give each its own")
  known.add(key)


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
