"""Splits by shares, by folders and by slices."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.builders.convert import convert
from mmjax.data.builders.splits import shares_of
from mmjax.data.sources import open_source
from tests.data.conftest import record
from tests.data.test_convert import folder_of, picture

SHARES = "train:60,validation:20,test:20"


def ids(root, split="train", name="mine"):
  source = open_source(dict(name=name, split=split), str(root / "data"))
  return [source[i]["id"] for i in range(len(source))]


def run(tmp_path, path, format="folder", name="mine", **options):
  return convert(format, path, name, tmp_path / "data", log=lambda line: None, **options)


def photograph(seed, size=(96, 64), quality=None):
  small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
  out = io.BytesIO()
  drawn = Image.fromarray(small).resize((96, 64), Image.BICUBIC).resize(size, Image.BICUBIC)
  drawn.save(out, "JPEG" if quality else "PNG", **({"quality": quality} if quality else {}))
  return out.getvalue()


def test_shares_hold_and_do_not_depend_on_names(tmp_path):
  root = folder_of(tmp_path / "in", 200)
  summary = run(tmp_path, root, split=SHARES)
  parts = {name: ids(tmp_path, name) for name in ("train", "validation", "test")}
  assert sorted(sum(parts.values(), [])) == [f"p{n:03d}.png" for n in range(200)]
  for name, share in shares_of(SHARES).items():
    assert abs(len(parts[name]) / 200 - share) < 4 * (share * (1 - share) / 200) ** 0.5
  assert [one.split for one in (summary, *summary.others)] == list(parts)
  again = run(tmp_path, root, split=SHARES)
  assert again.examples == summary.examples  # done already: nothing is made anew
  for path in root.iterdir():
    path.rename(path.with_name(f"renamed-{path.name}"))
  run(tmp_path, root, name="other", split=SHARES)
  assert ids(tmp_path, "test", "other") == [f"renamed-{name}" for name in parts["test"]]


def test_near_duplicates_and_groups_never_straddle(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  rows = []
  for n in range(60):
    files = {
      f"a{n}.png": photograph(n),
      f"b{n}.jpg": photograph(n, quality=85),
      f"c{n}.png": photograph(n, size=(48, 32)),
      f"d{n}.png": photograph(1000 + n),
    }
    for name, data in files.items():
      (root / name).write_bytes(data)
      rows.append(dict(image=name, label="x", who=f"w{n}" if name[0] in "ad" else ""))
  (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
  run(tmp_path, root / "t.jsonl", "jsonl", split="train:1,test:1", columns={"group": "who"})
  train, test = ids(tmp_path, "train"), ids(tmp_path, "test")
  assert len(train) + len(test) == 240 and min(len(train), len(test)) > 60
  for n in range(60):
    there = {name in train for name in (f"a{n}.png", f"b{n}.jpg", f"c{n}.png", f"d{n}.png")}
    assert len(there) == 1, n
  # alone, pictures that differ are free of each other
  run(tmp_path, root / "t.jsonl", "jsonl", name="free", split="train:1,test:1")
  free = set(ids(tmp_path, "train", "free"))
  assert any((f"a{n}.png" in free) != (f"d{n}.png" in free) for n in range(60))


def test_what_cannot_be_read_is_counted_in_one_split(tmp_path):
  root = folder_of(tmp_path / "in", 40)
  (root / "p003.png").write_bytes(b"no picture")
  (root / "p004.txt").unlink()
  (root / "notes.docx").write_bytes(b"")
  summary = run(tmp_path, root, split="train:1,test:1")
  every = (summary, *summary.others)
  assert sum(one.rows for one in every) + sum(sum(one.skipped.values()) for one in every) == 41


@pytest.mark.parametrize("split", ("train:", "train:80,train:20", "train:-1,test:2", "train:x"))
def test_shares_that_are_none_are_refused(tmp_path, split):
  with pytest.raises(UserError, match="Write each split once, with a positive number"):
    run(tmp_path, folder_of(tmp_path / "in", 3), split=split)


def test_an_empty_split_and_a_group_without_shares_are_refused(tmp_path):
  root = folder_of(tmp_path / "in", 3)
  with pytest.raises(UserError, match="none of the 3 records falls into split 'test'"):
    run(tmp_path, root, split="train:1000000,test:1")
  with pytest.raises(UserError, match="--group keeps rows together in splits by shares"):
    run(tmp_path, root, columns={"group": "who"})


def roots(tmp_path, *folders):
  for number, folder in enumerate(folders):
    path = tmp_path / "in" / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "a.png").write_bytes(picture(number))
  return tmp_path / "in"


def test_folders_called_as_splits_become_splits(tmp_path):
  root = roots(tmp_path, "train/cat", "train/dog", "val/cat", "test/dog")
  (root / "val" / "notes.docx").write_bytes(b"")
  lines = []
  summary = convert("folder", root, "mine", tmp_path / "data", log=lines.append)
  assert [(one.split, one.examples) for one in (summary, *summary.others)] == [
    ("test", 1), ("train", 2), ("validation", 1)
  ]  # fmt: skip
  assert "become the splits test, train, validation; --split NAME puts all into one" in lines[0]
  assert ids(tmp_path) == ["train/cat/a.png", "train/dog/a.png"]
  source = open_source(dict(name="mine", split="validation"), str(tmp_path / "data"))
  assert source.labels == ("cat", "dog") and source[0]["label"] == "cat"
  assert {one.split: one.skipped for one in (summary, *summary.others)}["validation"] == {
    "ending not read": 1
  }


def test_a_folder_beside_those_of_splits_puts_all_into_one_and_is_named(tmp_path):
  root = roots(tmp_path, "train/cat", "val/dog", "more/cat")
  summary = run(tmp_path, root)
  assert (summary.split, summary.examples, summary.others) == ("train", 3, ())
  assert any(
    "the folders train, val are put into one split, 'train', since more/cat/a.png lies beside" in x
    for x in summary.notes
  )
  (root / "more/cat/a.png").rename(root / "more/cat/a.docx")  # nothing that is read
  again = run(tmp_path, root, name="again")
  assert {one.split for one in (again, *again.others)} == {"train", "validation"}


def test_classes_that_are_called_as_splits_stay_classes(tmp_path):
  run(tmp_path, roots(tmp_path, "train", "plane", "test"))
  source = open_source(dict(name="mine", split="train"), str(tmp_path / "data"))
  assert source.labels == ("plane", "test", "train")


def test_two_folders_of_one_split_and_a_lone_one(tmp_path):
  summary = run(tmp_path, roots(tmp_path, "train/cat", "training/dog", "test/cat"))
  sizes = {one.split: one.examples for one in (summary, *summary.others)}
  assert sizes == {"test": 1, "train": 2}
  (tmp_path / "lone" / "val" / "cat").mkdir(parents=True)
  (tmp_path / "lone" / "val" / "cat" / "a.png").write_bytes(picture(0))
  assert run(tmp_path, tmp_path / "lone", name="lone").split == "validation"


def table_of(tmp_path, splits):
  root = roots(tmp_path, "pics")
  lines = ["image,label,split"]
  for number, split in enumerate(splits):
    (root / f"{number}.png").write_bytes(picture(number))
    lines.append(f"{number}.png,{number % 2},{split}")
  (root / "t.csv").write_text("\n".join(lines))
  return root / "t.csv"


def test_a_column_of_splits_is_kept(tmp_path):
  table = table_of(tmp_path, ("train", "Val", "train", "test"))
  summary = run(tmp_path, table, "csv")
  sizes = {one.split: one.examples for one in (summary, *summary.others)}
  assert sizes == {"test": 1, "train": 2, "validation": 1}
  assert "the rows name their splits: test, train, validation" in " ".join(summary.notes)
  assert ids(tmp_path, "test") == ["3.png"]
  whole = run(tmp_path, table, "csv", name="whole", split="all")
  assert whole.examples == 4 and "put into one, 'all'" in " ".join(whole.notes)
  shared = run(tmp_path, table, "csv", name="shared", split="train:1,test:1")
  assert sum(one.examples for one in (shared, *shared.others)) == 4
  moved = run(
    tmp_path, table, "csv", name="moved", columns={"split": "label", "label": "split"}, split="a"
  )
  assert moved.examples == 4


def test_a_column_of_splits_with_gaps_or_odd_names(tmp_path):
  summary = run(tmp_path, table_of(tmp_path, ("train", "", "test")), "csv")
  assert summary.examples == 3 and "since 1.png has none" in " ".join(summary.notes)
  with pytest.raises(UserError, match="cannot be called 'Fold 1'.*--split NAME"):
    run(tmp_path, table_of(tmp_path, ("Fold 1", "b")), "csv", name="odd")


def test_rows_of_one_medium_in_two_splits_are_left_out(tmp_path):
  root = roots(tmp_path, "pics")
  (root / "a.png").write_bytes(picture(0))
  (root / "b.png").write_bytes(picture(1))
  rows = [("a", "x", "train"), ("a", "y", "test"), ("b", "x", "test")]
  lines = [json.dumps(dict(image=f"{p}.png", caption=c, split=s)) for p, c, s in rows]
  (root / "t.jsonl").write_text("\n".join(lines))
  summary = run(tmp_path, root / "t.jsonl", "jsonl")
  assert {one.split: one.examples for one in (summary, *summary.others)} == {"test": 1, "train": 1}
  assert summary.skipped == {"another split": 1}


def test_a_named_split_takes_all_folders_and_says_so(tmp_path):
  root = roots(tmp_path, "train/cat", "val/cat")
  summary = run(tmp_path, root, split="all")
  assert summary.examples == 2 and summary.others == ()
  assert "put into one split, 'all'; without --split each is one" in " ".join(summary.notes)


def test_tables_in_folders_of_splits(tmp_path):
  root = roots(tmp_path, "train", "test")
  for split in ("train", "test"):
    (root / split / "metadata.csv").write_text(f"file_name,label,id\na.png,x,of {split}\n")
  run(tmp_path, root)
  assert ids(tmp_path) == ["of train"] and ids(tmp_path, "test") == ["of test"]


def test_a_file_beside_the_folders_of_splits_makes_one_split(tmp_path):
  root = roots(tmp_path, "train", "test", ".")
  (root / "metadata.csv").write_text("file_name,label\na.png,x\ntrain/a.png,y\ntest/a.png,z\n")
  summary = run(tmp_path, root)
  assert summary.examples == 3 and "since a.png lies beside them" in " ".join(summary.notes)
  (root / "metadata.csv").write_text("file_name,label\ntrain/a.png,y\ntest/a.png,z\n")
  summary = run(tmp_path, root, name="other")
  every = (summary, *summary.others)
  assert [one.examples for one in every] == [1, 1]
  assert [one.skipped for one in every if one.skipped] == [{"no caption": 1}]


@pytest.mark.parametrize("folders", (("train", "plane"), ("cat", "dog"), ("train",)))
def test_other_folders_are_classes(tmp_path, folders):
  summary = run(tmp_path, roots(tmp_path, *folders))
  assert summary.split == "train" and summary.others == () and summary.examples == len(folders)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
  root = tmp_path_factory.mktemp("hundred")
  rows = [record(i, label=str(i // 10), image=None) for i in range(101)]
  write_dataset("mine", root / "data", {"train": rows, "test": rows[:7]}, fields=())
  return root


@given(first=st.integers(0, 100), second=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_slices_divide_a_split(hundred, first, second):
  low, high = sorted((first, second))
  found = []
  for begin, end in ((0, low), (low, high), (high, 100)):
    if round(begin * 1.01) < round(end * 1.01):
      found += ids(hundred, f"train[{begin}%:{end}%]")
  assert sorted(found) == sorted(ids(hundred)) and len(set(found)) == 101


def test_a_slice_is_spread_over_the_split_and_the_same_each_time(hundred):
  part = ids(hundred, "train[:20]")
  assert part == ids(hundred, "train[:20]") == sorted(part) and len(part) == 20
  assert len({int(name[1:]) // 10 for name in part}) > 5
  assert ids(hundred, "test+train[:1]")[:7] == ids(hundred, "test")
  source = open_source(dict(name="mine", split="train[:20]"), str(hundred / "data"))
  assert source.fingerprint.endswith("train[:20]") and source.labels[:2] == ("0", "1")


@pytest.mark.parametrize(
  "split, what",
  (
    ("train[:102]", "102 is not within it, which has 101 rows"),
    ("train[:101%]", "101% is not within it"),
    ("train[5:5]", "is empty: train has 101 rows"),
    ("train[0.5:]", "0.5 is not within it"),
    ("train[:10%", "is no split: write its name"),
    ("train[-5:]", "is no split: write its name"),
    ("train[%:]", "is no split: write its name"),
    ("nowhere[:10%]", "no split 'nowhere'"),
  ),
)
def test_bounds_of_slices_are_checked(hundred, split, what):
  with pytest.raises(UserError, match=what.replace("[", r"\[")):
    ids(hundred, split)
