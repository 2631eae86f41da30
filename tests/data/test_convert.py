"""Conversion of each format, what is left out and why, and resumption after kills."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmjax.config import UserError
from mmjax.data.builders import convert as module
from mmjax.data.builders import shards
from mmjax.data.builders.convert import convert
from mmjax.data.media import bytes_key
from mmjax.data.sources import open_source
from tests.data.test_tars import pairs, write_tar


def picture(number: int, kind: str = "PNG") -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(
    out, kind
  )
  return out.getvalue()


def folder_of(root, count, prefix="p"):
  root.mkdir(parents=True, exist_ok=True)
  for n in range(count):
    (root / f"{prefix}{n:03d}.png").write_bytes(picture(n))
    (root / f"{prefix}{n:03d}.txt").write_text(f"picture number {n}\n")
  return root


def source(tmp_path, name="mine", split="train", languages=()):
  return open_source(dict(name=name, split=split, languages=languages), str(tmp_path / "data"))


def run(tmp_path, format, path, name="mine", **options):
  return convert(format, path, name, tmp_path / "data", log=lambda line: None, **options)


def test_a_folder_with_text_files_in_two_languages(tmp_path):
  root = folder_of(tmp_path / "in", 3)
  (root / "p001.de.txt").write_text("Bild eins\nnoch eins\n\n")
  folder_of(root / "sub", 1, "q")
  summary = run(tmp_path, "folder", root)
  assert summary.examples == 4 and summary.skipped == {} and summary.to_dict()["split"] == "train"
  records = [source(tmp_path)[n] for n in range(4)]
  assert [r["id"] for r in records] == ["p000.png", "p001.png", "p002.png", "sub/q000.png"]
  assert records[1]["captions"] == {"en": ["picture number 1"], "de": ["Bild eins", "noch eins"]}
  assert records[2]["image"] == picture(2) and records[2]["image_key"] == bytes_key(picture(2))
  assert source(tmp_path).languages == ("de", "en")


@pytest.mark.parametrize("table", ["captions.csv", "captions.tsv", "metadata.jsonl"])
def test_a_folder_with_a_table(tmp_path, table):
  root = folder_of(tmp_path / "in", 4)
  rows = [
    dict(file_name="p000.png", text="one", label="x"),
    dict(file_name="p002.png", text='tw"o, or so', label="y"),
    dict(file_name="p000.png", text="one again", label="x"),
  ]
  with open(root / table, "w", newline="") as file:
    if table.endswith("jsonl"):
      file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
      writer = csv.DictWriter(file, rows[0], delimiter="," if table.endswith("csv") else "\t")
      writer.writeheader()
      writer.writerows(rows)
  summary = run(tmp_path, "folder", root)
  assert summary.examples == 2 and summary.rows == 3
  assert summary.skipped == {"no caption": 2, "ending not read": 4}, (
    "the table speaks for the folder, the .txt do not"
  )
  assert source(tmp_path)[0]["captions"] == {"en": ["one", "one again"]} and source(tmp_path)[1][
    "captions"
  ] == {"en": ['tw"o, or so']}
  assert source(tmp_path).labels == ("x", "y")


def test_everything_that_can_be_wrong_is_counted_by_reason(tmp_path):
  root = folder_of(tmp_path / "in", 3)
  (tmp_path / "secret.png").write_bytes(picture(9))
  (root / "link.png").symlink_to(tmp_path / "secret.png")
  (root / "cut.png").write_bytes(picture(4)[:200])
  (root / "text.png").write_text("no picture")
  huge = bytearray(picture(5))
  huge[16:24] = (30000).to_bytes(4, "big") * 2
  (root / "huge.png").write_bytes(huge)
  lines = [dict(id=f"{n}", image=f"p{n:03d}.png", caption=f"c{n}") for n in range(3)]
  lines += [
    dict(id="1", image="p002.png", caption="same id"),
    dict(id="a", image="gone.png", caption="x"),
    dict(id="b", image="../secret.png", caption="x"),
    dict(id="c", image=str(tmp_path / "secret.png"), caption="x"),
    dict(id="d", image="link.png", caption="x"),
    dict(id="e", image="cut.png", caption="x"),
    dict(id="f", image="text.png", caption="x"),
    dict(id="g", image="huge.png", caption="x"),
    dict(id="h", image="p000.png", caption="  "),
    dict(id="i", image="p000.png", caption=None),
    dict(id="j", image=3, caption="x"),
    dict(id="k", image="p000.png\0", caption="x"),
    dict(id="l", image="p001.png", caption=["ok", 3]),
  ]
  (root / "all.jsonl").write_text(
    "\n".join(map(json.dumps, lines)) + '\n{"broken\n[1]\n{"other": 1}\n'
  )
  summary = run(tmp_path, "jsonl", root / "all.jsonl")
  assert summary.examples == 4 and [source(tmp_path)[n]["id"] for n in range(4)] == [
    "0",
    "1",
    "2",
    "l",
  ]
  assert summary.skipped == {
    "outside the source folder": 3,
    "broken row": 3,
    "missing file": 3,
    "unreadable": 2,
    "no caption": 2,
    "too large": 1,
    "duplicate id": 1,
  }
  assert summary.first_skipped["too large"] == ["g"]
  listed = [json.loads(line) for line in open(os.path.join(summary.folder, "skipped-train.jsonl"))]
  assert len(listed) == 15 and {
    row["id"] for row in listed if row["reason"] == "outside the source folder"
  } == {"b", "c", "d"}
  assert "left out 3: missing file" in str(summary)


def test_tars(tmp_path):
  for n in range(2):
    write_tar(
      tmp_path / f"{n:05d}.tar",
      pairs(n * 10, 5) + ([("000000003.jpg", b"again"), ("x.txt", b"alone")] if n == 0 else []),
    )
  (tmp_path / "00002.tar").write_bytes(b"")
  summary = run(tmp_path, "webdataset", tmp_path / "{00000..00002}.tar")
  assert summary.examples == 10 and summary.skipped == {
    "tar without pairs": 1,
    "duplicate id": 1,
    "missing file": 1,
  }
  records = source(tmp_path)
  assert records[0]["id"] == "00000/000000000" and records[9]["captions"] == {"en": ["caption 14"]}


@pytest.mark.parametrize("kind", ["bytes", "struct", "path", "struct-path"])
def test_parquet(tmp_path, kind):
  import pyarrow
  import pyarrow.parquet

  (tmp_path / "in").mkdir()
  for n in range(6):
    (tmp_path / "in" / f"{n}.png").write_bytes(picture(n))
  images = {
    "bytes": [picture(n) for n in range(6)],
    "struct": [dict(bytes=picture(n), path=None) for n in range(6)],
    "path": [f"{n}.png" for n in range(6)],
    "struct-path": [dict(bytes=None, path=f"{n}.png") for n in range(6)],
  }[kind]
  images[4] = None
  table = pyarrow.table(
    {
      "image": images,
      "captions": [["a", "b"], ["c"], [], ["d"], ["e"], ["f"]],
      "label": [0, 1, 0, 1, 0, None],
      "other": range(6),
    }
  )
  features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
  table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
  pyarrow.parquet.write_table(table, tmp_path / "in" / "train-00000.parquet", row_group_size=4)
  summary = run(tmp_path, "parquet", tmp_path / "in", shard_rows=3)
  assert summary.examples == 4 and summary.skipped == {"no caption": 1, "missing file": 1}
  records = [source(tmp_path)[n] for n in range(4)]
  assert [r["image"] for r in records] == [picture(n) for n in (0, 1, 3, 5)]
  assert [r["label"] for r in records] == ["cat", "dog", "dog", ""]
  assert records[0]["captions"] == {"en": ["a", "b"]} and records[3]["id"] == "train-00000/000005"


def test_columns_and_languages_can_be_named(tmp_path):
  root = folder_of(tmp_path / "in", 2)
  (root / "x.jsonl").write_text(
    "".join(json.dumps(dict(bild=f"p{n:03d}.png", satz=f"Satz {n}")) + "\n" for n in range(2))
  )
  with pytest.raises(
    UserError,
    match="no column that looks like a picture, sound, video or series; it has: bild, satz",
  ):
    run(tmp_path, "jsonl", root / "x.jsonl")
  run(
    tmp_path, "jsonl", root / "x.jsonl", columns=dict(image="bild", caption="satz"), language="de"
  )
  assert source(tmp_path)[1]["captions"] == {"de": ["Satz 1"]}


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
  root = folder_of(tmp_path / "in", 20)
  (root / "p007.png").write_bytes(b"broken")
  one = run(tmp_path, "folder", root, "one", shard_rows=4)
  two = run(tmp_path, "folder", root, "two", shard_rows=4, workers=2)
  assert one.skipped == two.skipped == {"unreadable": 1}
  a, b = source(tmp_path, "one"), source(tmp_path, "two")
  assert [a[n] for n in range(len(a))] == [b[n] for n in range(len(b))] and len(a) == 19
  assert (
    a.fingerprint.replace("one/", "").split("content")[0]
    == b.fingerprint.replace("two/", "").split("content")[0]
  )

  def read(summary):
    return [
      open(os.path.join(summary.folder, name), "rb").read()
      for name in sorted(os.listdir(summary.folder))
      if "array_record" in name
    ]

  assert read(one) == read(two) and len(read(one)) == 5


def test_tfds_opens_what_was_converted(tmp_path):
  import tensorflow_datasets as tfds

  summary = run(tmp_path, "folder", folder_of(tmp_path / "in", 5), shard_rows=2)
  records = tfds.builder_from_directory(summary.folder).as_data_source(
    "train", decoders={"image": tfds.decode.SkipDecoding()}
  )
  assert len(records) == 5 and records[4]["id"] == b"p004.png" and records[4]["image"] == picture(4)


def test_a_second_split_makes_the_next_version_with_both(tmp_path):
  run(tmp_path, "folder", folder_of(tmp_path / "a", 4))
  summary = run(tmp_path, "folder", folder_of(tmp_path / "b", 2), split="validation", language="de")
  assert (
    summary.folder.endswith("mine/1.1.0")
    and not (tmp_path / "data" / "mine" / "converting-validation").exists()
  )
  assert len(source(tmp_path)) == 4 and len(source(tmp_path, split="validation")) == 2
  assert source(tmp_path).languages == ("de", "en")
  assert len(source(tmp_path, split="train+validation")) == 6


def test_the_same_command_again_does_nothing_and_another_source_is_refused(tmp_path):
  first = run(tmp_path, "folder", folder_of(tmp_path / "a", 3))
  stamp = os.stat(first.folder).st_mtime_ns
  again = run(tmp_path, "folder", tmp_path / "a", workers=2)
  assert (again.examples, again.folder) == (3, first.folder) and os.stat(
    first.folder
  ).st_mtime_ns == stamp
  with pytest.raises(UserError, match="has a split 'train' already"):
    run(tmp_path, "folder", folder_of(tmp_path / "b", 2))


def test_finished_shards_are_kept_and_half_written_ones_are_not(tmp_path, monkeypatch):
  root = folder_of(tmp_path / "in", 12)
  written, original = [], shards._write_shard

  def three_then_stop(reader, rows, fields, split, staging, number):
    if len(written) == 3:
      raise KeyboardInterrupt
    written.append(number)
    return original(reader, rows, fields, split, staging, number)

  monkeypatch.setattr(shards, "_write_shard", three_then_stop)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, "folder", root, shard_rows=2)
  staging = tmp_path / "data" / "mine" / "converting-train"
  with pytest.raises(UserError, match="no data set 'mine'"):
    source(tmp_path)
  (staging / "shard-00001").write_bytes(b"half")  # 0 stays, 1 is damaged, 2 has no facts
  (staging / "shard-00002.json").unlink()
  (staging / "shard-00003.tmp").write_bytes(b"half")
  written.clear()
  monkeypatch.setattr(shards, "_write_shard", lambda *a: written.append(a[-1]) or original(*a))
  assert run(tmp_path, "folder", root, shard_rows=2).examples == 12
  assert written == [1, 2, 3, 4, 5]
  whole = run(tmp_path, "folder", root, "whole", shard_rows=2)
  assert [source(tmp_path)[n] for n in range(12)] == [
    source(tmp_path, "whole")[n] for n in range(12)
  ] and whole.examples == 12
  assert not staging.exists()


def test_a_changed_source_starts_anew(tmp_path, monkeypatch):
  root = folder_of(tmp_path / "in", 4)
  original = module.assemble
  monkeypatch.setattr(module, "assemble", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, "folder", root, shard_rows=2)
  (root / "p000.txt").write_text("changed\n")
  monkeypatch.setattr(module, "assemble", original)
  run(tmp_path, "folder", root, shard_rows=2)
  assert source(tmp_path)[0]["captions"] == {"en": ["changed"]}


def test_kill_9_in_the_middle_then_again(tmp_path):
  root = folder_of(tmp_path / "in", 300)
  code = (
    "import sys; from mmjax.data.builders.convert import convert\nif __name__ == '__main__': "
    "convert('folder', sys.argv[1], 'mine', sys.argv[2], shard_rows=5, workers=int(sys.argv[3]))"
  )
  (tmp_path / "go.py").write_text(code)
  command = [sys.executable, str(tmp_path / "go.py"), str(root), str(tmp_path / "data")]
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
  }
  staging = tmp_path / "data" / "mine" / "converting-train"
  process = subprocess.Popen([*command, "1"], env=environment, stdout=subprocess.DEVNULL)
  end = time.monotonic() + 60
  while len(list(staging.glob("*.json"))) < 5 and process.poll() is None and time.monotonic() < end:
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  kept = len(list(staging.glob("*.json")))
  assert 5 <= kept < 60
  out = subprocess.run(
    [*command, "2"], env=environment, capture_output=True, text=True, timeout=120
  )
  assert out.returncode == 0 and f"going on: {kept} of 60" in out.stdout, out.stdout + out.stderr
  assert [source(tmp_path)[n]["id"] for n in range(300)] == [f"p{n:03d}.png" for n in range(300)]


@pytest.mark.parametrize(
  "format,make,what",
  [
    ("folder", lambda p: p / "nothing", "no such folder"),
    ("folder", lambda p: p, "nothing to convert"),
    ("jsonl", lambda p: p / "x.jsonl", "x.jsonl"),
    ("webdataset", lambda p: p / "{00..01}.tar", "00.tar"),
    ("parquet", lambda p: p, "no .parquet"),
    ("zip", lambda p: p, "no format 'zip'"),
  ],
)
def test_nothing_to_convert_is_one_clear_line(tmp_path, format, make, what):
  (tmp_path / "in").mkdir()
  with pytest.raises(UserError, match=what) as error:
    run(tmp_path, format, make(tmp_path / "in"))
  assert "\n" not in str(error.value)


def test_everything_left_out_is_an_error_that_says_why(tmp_path):
  (tmp_path / "in").mkdir()
  for n in range(3):
    (tmp_path / "in" / f"{n}.png").write_bytes(picture(n))
  with pytest.raises(
    UserError, match="all 3 rows of split .train. were left out .3 no caption, such as 0.png"
  ):
    run(tmp_path, "folder", tmp_path / "in")
  assert [path.name for path in (tmp_path / "data" / "mine").iterdir()] == ["owner"]


def test_bad_arguments_and_places(tmp_path):
  root = folder_of(tmp_path / "in", 1)
  for options in (
    dict(name="Bad Name"),
    dict(name="../x"),
    dict(split="a/b"),
    dict(workers=-1),
    dict(columns=dict(picture="x")),
  ):
    with pytest.raises(UserError):
      run(tmp_path, "folder", root, **options)
  (tmp_path / "data").write_text("a file")
  with pytest.raises(UserError, match="data sets lie in a folder"):
    run(tmp_path, "folder", root)
  (tmp_path / "data").unlink()
  (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
  with pytest.raises(UserError, match="not a readable parquet"):
    run(tmp_path, "parquet", tmp_path / "bad.parquet")


def test_a_full_disk_is_one_clear_line_and_the_next_start_goes_on(tmp_path, monkeypatch):
  from array_record.python import array_record_module

  root, original = folder_of(tmp_path / "in", 6), array_record_module.ArrayRecordWriter

  class Full:
    def __init__(self, path, options):
      self.writer = original(path, options)

    def write(self, data):
      self.writer.write(data)

    def close(self):
      self.writer.close()
      if Full.left == 0:
        raise RuntimeError("write() failed: No space left on device; writing /x; at byte 9")
      Full.left -= 1

  Full.left = 1
  with monkeypatch.context() as patch:
    patch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match="cannot be written .*No space left on device") as error:
      run(tmp_path, "folder", root, shard_rows=2)
  assert "\n" not in str(error.value)
  assert len(list((tmp_path / "data" / "mine" / "converting-train").glob("*.json"))) == 1
  assert run(tmp_path, "folder", root, shard_rows=2).examples == 6
