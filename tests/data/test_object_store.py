"""Data sets, tokenizers and tars at a URL: the same records as from the local folder."""

from __future__ import annotations

import json
import os

import pytest
import requests
from s3fs import S3File, S3FileSystem

from mmjax import files
from mmjax.config import UserError
from mmjax.data import builders
from mmjax.data.builders import convert
from mmjax.data.folders import data_dir, local_data_dir
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import list_datasets, open_source
from mmjax.data.tokenizers import load_tokenizer
from tests.data.test_convert import picture
from tests.data.test_tars import pairs, write_tar


def records(source):
  return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def remote(object_store, tiny):
  """The URL of a copy of `tiny`."""
  url = files.as_path("s3://bucket/datasets")
  for path in tiny.rglob("*"):
    if path.is_file():
      (url / path.relative_to(tiny).as_posix()).write_bytes(path.read_bytes())
  return str(url)


def test_records_and_tokenizer_equal_the_local_ones(remote, tiny, config, monkeypatch):
  there = open_source(dict(name="tiny", split="train+test"), remote)
  here = open_source(dict(name="tiny", split="train+test"), tiny)
  assert there.fingerprint == here.fingerprint and records(there) == records(here)
  assert list_datasets(data_dir(remote)) == ["broken", "tiny"]
  local, distant = config(), config(**{"data.dir": remote})
  assert load_tokenizer(distant.data).to_assets() == load_tokenizer(local.data).to_assets()
  assert Pipeline(distant).fingerprint() == Pipeline(local).fingerprint()
  monkeypatch.setenv("MMJAX_DATA", remote)
  assert (
    open_source(dict(name="tiny", split="test"))[0]
    == open_source(dict(name="tiny", split="test"), tiny)[0]
  )


def test_the_newest_whole_version_is_taken_and_a_change_is_seen(remote, tiny):
  url = files.as_path(remote)
  for path in (tiny / "tiny" / "1.0.0").iterdir():
    (url / "changing" / "1.0.0" / path.name).write_bytes(path.read_bytes())
  # Not finished: no features.json.
  (url / "changing" / "1.1.0" / "dataset_info.json").write_text("{}")
  folder = builders.find_version(data_dir(remote), "changing")
  assert folder.name == "1.0.0"
  assert {p.name for p in folder.iterdir() if p.name[0] != "."} == set(
    os.listdir(tiny / "tiny" / "1.0.0")
  )
  (url / "changing" / "1.0.0" / "README.md").write_text("# another\n")
  assert (
    builders.find_version(data_dir(remote), "changing") / "README.md"
  ).read_text() == "# another\n"
  assert builders.find_version(data_dir(remote), "nothing") is None


def test_what_is_missing_names_the_url_and_nothing_is_made_there(remote, tmp_path):
  with pytest.raises(
    UserError, match=r"no data set 'tinny' under s3://bucket/datasets .*Did you mean 'tiny'"
  ):
    open_source(dict(name="tinny"), remote)
  with pytest.raises(
    UserError,
    match="s3://nobody/data/tiny cannot be read|no data set 'tiny' under s3://nobody/data",
  ):
    open_source(dict(name="tiny"), "s3://nobody/data")
  for make in (
    lambda: builders.build("openmoji", remote),
    lambda: convert.convert("folder", str(tmp_path), "mine", remote),
    lambda: local_data_dir(remote),
  ):
    with pytest.raises(UserError, match="s3://bucket/datasets: data sets are made on this machine"):
      make()


def test_tars_equal_the_local_ones(object_store, tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  url = files.as_path("s3://bucket/shards")
  for shard in range(2):
    path = write_tar(tmp_path / f"{shard:05d}.tar", pairs(shard * 10, 5))
    (url / f"{shard:05d}.tar").write_bytes((tmp_path / f"{shard:05d}.tar").read_bytes())
  here = open_source(dict(name="tars", path=str(tmp_path / "*.tar")))
  for pattern in (f"{url}/{{00000..00001}}.tar", f"{url}/*.tar", str(url)):
    there = open_source(dict(name="tars", path=pattern))
    assert there.fingerprint == here.fingerprint and records(there) == records(here)
  with pytest.raises(UserError, match="s3://bucket/shards/7.tar: no such tar"):
    open_source(dict(name="tars", path=f"{url}/7.tar"))
  (url / "00001.tar").write_bytes(open(path, "rb").read()[:4096])  # shorter now, and indexed anew
  assert len(open_source(dict(name="tars", path=str(url)))) == 6
  with pytest.raises(FileNotFoundError, match="s3://bucket/shards/gone.tar cannot be read"):
    files.read_range(f"{url}/gone.tar", 0, 10)


@pytest.mark.parametrize("reads", [0, 1, 2, 20])  # the size, the first header, a header, one far in
def test_a_store_that_does_not_answer_costs_no_record(object_store, tmp_path, monkeypatch, reads):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  url = files.as_path(f"s3://bucket/hiccup{reads}")
  for shard in range(2):
    (url / "a" / f"{shard}.tar").write_bytes(
      open(write_tar(tmp_path / "x.tar", pairs(shard * 10, 5)), "rb").read()
    )
  real, left = S3File.read, [reads]

  def read(self, length=-1):
    left[0] -= 1
    if left[0] < 0:
      raise PermissionError("Forbidden")
    return real(self, length)

  def refuse(*_, **__):
    raise PermissionError("Forbidden")

  entry = dict(name="tars", path=f"{url}/*/*.tar")
  with (
    monkeypatch.context() as patch,
    pytest.raises(
      files.StoreError, match=r"s3://bucket/hiccup.*/[01].tar cannot be read: Forbidden"
    ),
  ):
    patch.setattr(*((S3File, "read", read) if reads else (files, "_facts", refuse)))
    open_source(entry)
  with (
    monkeypatch.context() as patch,
    pytest.raises(UserError, match=r"\*.tar cannot be read: Forbidden"),
  ):
    listing = S3FileSystem._lsdir
    patch.setattr(
      S3FileSystem,
      "_lsdir",
      lambda self, path, *words, **named: (
        refuse() if path.endswith("/a") else listing(self, path, *words, **named)
      ),
    )
    open_source(entry)
  assert len(open_source(entry)) == 10


def test_media_of_conversations_are_read_from_the_store(object_store, tmp_path):
  """Those that fail are named and counted; a store that does not answer ends the conversion."""
  url = "s3://bucket/pictures"
  for number in (1, 2):
    (files.as_path(url) / f"{number}.png").write_bytes(picture(number))
  (files.as_path(url) / "broken.png").write_bytes(b"no picture")
  (tmp_path / "4.png").write_bytes(picture(4))

  def openai(*urls):
    parts = [{"type": "image_url", "image_url": {"url": one}} for one in urls]
    said = [dict(role="user", content=[*parts, {"type": "text", "text": "what?"}])]
    return dict(messages=[*said, dict(role="assistant", content="a picture")])

  turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a picture"}]
  rows = [
    openai(f"{url}/1.png", f"{url}/2.png"),
    dict(image=f"{url}/1.png", conversations=turns),
    dict(image=f"file://{tmp_path}/4.png", conversations=turns),
    openai(f"{url}/none.png"),
    openai(f"{url}/broken.png"),
    openai("https://example.com/3.png"),
  ]
  table = tmp_path / "talks.jsonl"
  table.write_text("\n".join(map(json.dumps, rows)))
  for workers in (1, 2):
    place = tmp_path / f"data{workers}"
    made = convert.convert("conversations", table, "talks", place, workers=workers, log=print)
    assert made.first_skipped == {
      "missing file": [f"{url}/none.png"],
      "unreadable": [f"{url}/broken.png"],
      "an address of no store": ["https://example.com/3.png"],
    }
    several, one, file = records(open_source(dict(name="talks", split="train"), place))
    assert several["image"] == one["image"] == picture(1) and file["image"] == picture(4)
    assert several["media"] == [("image", picture(2))]
  requests.post(f"{object_store}/moto-api/reset-auth", data="0", timeout=10)
  try:
    with pytest.raises(UserError, match=f"{url}/1.png cannot be read: .*credentials"):
      convert.convert("conversations", table, "talks", tmp_path / "none", log=print)
  finally:
    requests.post(f"{object_store}/moto-api/reset-auth", data="inf", timeout=10)
  assert not list((tmp_path / "none").glob("talks/*/dataset_info.json"))
