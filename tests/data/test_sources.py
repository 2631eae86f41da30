"""Data sets on disk: what is written is what is read, splits, languages, errors that help,
half-written and damaged ones.
"""

import os
import shutil
import subprocess
import sys

import pytest

from mmjax.config import UserError
from mmjax.data import builders, sources
from mmjax.data.builders import find_version, split_sizes, write_dataset
from mmjax.data.folders import data_dir
from mmjax.data.sources import list_datasets, list_tokenizers, open_source
from mmjax.errors import StoreError
from tests.data.conftest import record
from tests.e2e import squares


def entry(**changes):
  return {
    "name": "tiny",
    "split": "train",
    "languages": (),
    "path": "",
    "weight": 1.0,
    "cache": False,
    **changes,
  }


def test_records_are_read_as_they_were_written(tiny):
  source = open_source(entry(), tiny)
  assert len(source) == 37
  for i in (36, 0, 17):
    assert source[i] == record(i)
  assert source.labels == ("black", "blue", "green", "grey", "pink", "red", "white")
  assert source.languages == ("de", "en")


def test_several_splits_are_one_after_the_other(tiny):
  source = open_source(entry(split="test+validation"), tiny)
  assert [source[i]["id"] for i in range(len(source))] == [
    f"r{i:03d}" for i in [*range(50, 60), *range(37, 50)]
  ]


def test_only_the_wanted_languages_are_read(tiny):
  source = open_source(entry(languages=("de",)), tiny)
  assert source[3]["captions"] == {"de": ["ein Ding 3"]} and source.languages == ("de",)


def test_a_cached_source_reads_every_record_once(tiny):
  source = open_source(entry(cache=True), tiny)
  assert source[5] is source[5] and source[5] == open_source(entry(), tiny)[5]


def test_tfds_opens_the_same_files(tiny):
  import tensorflow_datasets as tfds

  example = tfds.builder_from_directory(str(find_version(tiny, "tiny"))).as_data_source("test")[0]
  assert (
    example["id"] == b"r050"
    and example["image"].shape == (20, 20, 3)
    and example["captions"]["text"][2] == b"ein Ding 50"
  )
  assert "tensorflow" not in sys.modules


def test_the_fingerprint_follows_the_content(tiny, tmp_path):
  here = open_source(entry(), tiny).fingerprint
  records = [record(i) for i in range(37)]
  write_dataset(
    "tiny",
    tmp_path / "same",
    {
      "train": records,
      "validation": map(record, range(37, 50)),
      "test": map(record, range(50, 60)),
    },
  )
  assert open_source(entry(), tmp_path / "same").fingerprint == here
  records[4] = record(4, captions={"en": ["another"]})
  write_dataset("tiny", tmp_path / "other", {"train": records})
  assert open_source(entry(), tmp_path / "other").fingerprint != here
  assert open_source(entry(split="test"), tiny).fingerprint != here


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(name="tinny"), ["no data set 'tinny'", "Did you mean 'tiny'"]),
    (dict(name="openmoj"), ["Did you mean 'openmoji'", "mmjax data build openmoji"]),
    (dict(name="openmoji"), ["mmjax data build openmoji", "there: broken, tiny"]),
    (dict(name="qqq"), ["mmjax data convert", "MMJAX_DATA"]),
    (dict(split="trian"), ["no split 'trian'", "train, validation, test", "Did you mean 'train'"]),
    (dict(split="train+tets"), ["no split 'tets'", "Did you mean 'test'"]),
    (dict(languages=("en", "fr")), ["no captions in 'fr'", "de, en"]),
    (dict(name="tars"), ["no path"]),
  ],
)
def test_mistakes_name_the_way_out(tiny, changes, words):
  with pytest.raises(UserError) as error:
    open_source(entry(**changes), tiny)
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["gone", "emptied", "no file"])
def test_a_file_that_goes_away_is_no_unreadable_record(tiny, tmp_path, how):
  """Its rows would count as bad records, up to a limit, and the run go on without them."""
  shutil.copytree(tiny / "tiny", tmp_path / "tiny")
  path = next((tmp_path / "tiny").rglob("tiny-train*"))
  source, content = open_source(entry(), tmp_path), path.read_bytes()
  if how == "emptied":
    assert source[0]["id"]
    os.truncate(path, 0)
  else:
    path.unlink()
    if how == "no file":
      path.mkdir()
  with pytest.raises(StoreError, match=f"{path.name} went away .*Bring it back and start the same"):
    for number in range(len(source)):
      source[number]
  if how == "no file":
    path.rmdir()
  path.write_bytes(content)
  assert open_source(entry(), tmp_path).fingerprint == source.fingerprint


def test_a_missing_or_truncated_file_is_named(tiny, tmp_path):
  shutil.copytree(tiny / "tiny", tmp_path / "tiny")
  path = next((tmp_path / "tiny").rglob("tiny-train*"))
  path.write_bytes(path.read_bytes()[:-3000])
  with pytest.raises(UserError, match="cannot be read"):
    open_source(entry(), tmp_path)[36]
  path.unlink()
  with pytest.raises(UserError, match="tiny-train.*is missing.*make the data set again"):
    open_source(entry(), tmp_path)


INFO = {
  "no JSON": "{",
  "deep": "[" * 100_000,
  "a list": "[]",
  "no splits": '{"name": "tiny"}',
  "another place": '{"name": "../tiny", "splits": []}',
  "lengths that are none": '{"name": "tiny", "splits": [{"name": "train", "shardLengths": ["x"]}]}',
  "below zero": '{"name": "tiny", "splits": [{"name": "train", "shardLengths": ["-1"]}]}',
  "no numbers": '{"name": "tiny", "splits": [{"name": "train", "shardLengths": 7}]}',
  "splits without names": '{"name": "tiny", "splits": [{"shardLengths": ["37"]}]}',
}
FACTS = {
  "no JSON": "{",
  "null": "null",
  "labels that are none": '{"labels": 7, "languages": [], "content": ""}',
  "labels of labels": '{"labels": [["a"]], "languages": [], "content": ""}',
  "no content": '{"labels": [], "languages": []}',
  "values": '{"labels": [], "languages": [], "content": "", "values": {"a": 1}}',
}
TOLD = [("dataset_info.json", text) for text in INFO.values()]
TOLD += [("metadata.json", text) for text in FACTS.values()]


@pytest.mark.parametrize(("name", "text"), TOLD, ids=[*INFO, *FACTS])
def test_what_says_how_a_data_set_is_may_be_damaged_or_forged(tiny, tmp_path, name, text):
  shutil.copytree(tiny / "tiny", tmp_path / "tiny")
  (tmp_path / "tiny" / "1.0.0" / name).write_text(text)
  with pytest.raises(UserError, match=f"{name} is damaged") as error:
    open_source(entry(), tmp_path)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["dataset_info.json", "metadata.json"])
def test_what_says_so_may_be_a_pipe(tiny, tmp_path, name, in_time):
  shutil.copytree(tiny / "tiny", tmp_path / "tiny")
  (tmp_path / "tiny" / "1.0.0" / name).unlink()
  os.mkfifo(tmp_path / "tiny" / "1.0.0" / name)
  with pytest.raises(UserError, match="not a regular file"):
    open_source(entry(), tmp_path)


def test_a_folder_of_another_program_is_refused(tiny, tmp_path):
  shutil.copytree(tiny / "tiny", tmp_path / "tiny")
  (tmp_path / "tiny" / "1.0.0" / "metadata.json").unlink()
  with pytest.raises(UserError, match="not one of mmjax"):
    open_source(entry(), tmp_path)


def test_a_build_that_fails_leaves_no_data_set(tmp_path):
  def records():
    yield record(0)
    raise RuntimeError("power cut")

  with pytest.raises(RuntimeError):
    write_dataset("half", tmp_path, {"train": records()})
  assert find_version(tmp_path, "half") is None and list_datasets(tmp_path) == []
  assert split_sizes(write_dataset("half", tmp_path, {"train": [record(0)]})) == {"train": 1}
  assert list_datasets(tmp_path) == ["half"]


def test_a_build_that_is_killed_leaves_no_data_set(tmp_path):
  code = (
    "import os, sys\nfrom mmjax.data.builders import write_dataset\nfrom tests.data.conftest "
    "import record\ndef records():\n  yield record(0)\n  os.kill(os.getpid(), 9)\n  yield "
    f"record(1)\nwrite_dataset('half', {str(tmp_path)!r}, {{'train': records()}})"
  )
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
  assert find_version(tmp_path, "half") is None
  left = next((tmp_path / "half").glob("incomplete.*_1.0.0"))
  os.utime(left, (0, 0))
  write_dataset("half", tmp_path, {"train": [record(0)]})
  assert len(open_source(entry(name="half"), tmp_path)) == 1
  assert not left.exists() and [path.name for path in tmp_path.iterdir()] == ["half"]


def test_equal_ids_are_refused(tmp_path):
  with pytest.raises(UserError, match="two records have the id 'train/r001'"):
    write_dataset("twice", tmp_path, {"train": [record(1), record(1)]})
  assert list_datasets(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("no folder")
  with pytest.raises(UserError, match="cannot write data set 'x'"):
    write_dataset("x", tmp_path / "file", {"train": [record(1)]})


def test_unknown_builders_name_the_nearest(tmp_path):
  with pytest.raises(UserError, match="Did you mean 'openmoji'"):
    builders.build("openmojis", tmp_path)


def test_a_tokenizer_may_be_a_folder(tmp_path):
  (tmp_path / "hf").mkdir()
  (tmp_path / "own.model").touch()
  assert list_tokenizers(tmp_path) == ["hf", "own"]


def test_the_folder_of_the_data(monkeypatch, tiny, config):
  monkeypatch.setenv("MMJAX_DATA", "/somewhere")
  assert str(data_dir()) == "/somewhere" and str(data_dir("")) == "/somewhere"
  assert data_dir(config()) == tiny and data_dir(config().data) == tiny
  monkeypatch.delenv("MMJAX_DATA")
  assert str(data_dir(None)).endswith(".cache/mmjax")
  assert list_datasets(tiny) == ["broken", "tiny"] and list_tokenizers(tiny / "tokenizers") == [
    "tiny"
  ]
  assert sources.list_datasets(tiny / "nowhere") == []


def test_a_data_set_that_is_written_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
  (tmp_path / "temporary").mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
  squares.build(tmp_path / "data", count=3)
  assert len(open_source(dict(name="squares", split="train"), str(tmp_path / "data"))) == 3
  assert list((tmp_path / "temporary").iterdir()) == []
