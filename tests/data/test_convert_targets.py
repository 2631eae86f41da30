"""Labels, values and sensor series of one's own files, from the table to the batch."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from mmjax import cli
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders.convert import convert
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.image import Unreadable
from mmjax.data.measure import measure
from mmjax.data.pipeline import Pipeline, batch_spec
from mmjax.data.series import read_series
from mmjax.data.sources import open_source
from tests.data.test_convert import folder_of


def read(root, name="mine", split="train"):
  source = open_source(dict(name=name, split=split), str(root))
  return source, [source[i] for i in range(len(source))]


def run(tmp_path, path, format="csv", name="mine", **options):
  return convert(format, path, name, tmp_path / "data", log=lambda line: None, **options)


def table(tmp_path, header, *lines):
  root = folder_of(tmp_path / "in", len(lines))
  rows = [header, *(f"p{n:03d}.png,{line}" for n, line in enumerate(lines))]
  (root / "t.csv").write_text("\n".join(rows) + "\n")
  return root / "t.csv"


def batches_of(tmp_path, **changes):
  c = configs.base()
  c.data.dir, c.train.batch_size, c.data.image.size = str(tmp_path / "data"), 4, 8
  c.data.sources.mine = dict(name="mine")
  c.model = dict(name="multitask", encoders=dict(image=dict(kind="vit", patch=4)))
  return configs.resolve(c, [f"{key}={value!r}" for key, value in changes.items()])


def test_values_of_two_columns_reach_the_batch(tmp_path):
  path = table(tmp_path, "image,price,area,color", "1.5,20,a", ",30,b", "2,,c", ",,d", "x,1,e")
  columns = {"value": "price+area"}
  summary = run(tmp_path, path, columns=columns)
  assert summary.examples == 3 and summary.skipped == {"no value": 1, "broken row": 1}
  source, records = read(tmp_path / "data")
  assert source.values == ("price", "area")
  expected = np.array([[1.5, 20], [np.nan, 30], [2, np.nan]], np.float32)
  np.testing.assert_array_equal([r["value"] for r in records], expected)
  config = batches_of(tmp_path, **{"data.values": 2})
  assert batch_spec(config)["value"].shape == (4, 2)
  rows = {r["id"]: r["value"] for r in records}
  for step in range(3):
    batch = Pipeline(config).batch(step)
    assert batch["value"].dtype == np.float32
    np.testing.assert_array_equal(batch["value"], [rows[name] for name in batch["id"]])
  data = EvaluationData(config, dict(name="mine", split="train"), 4)
  np.testing.assert_array_equal(data.values, expected)
  (batch,) = data.batches(("image",))
  np.testing.assert_array_equal(batch["value"][:3], expected)
  assert np.isnan(batch["value"][3]).all() and not batch["valid"][3]
  found = measure("mine", data_dir=tmp_path / "data")
  np.testing.assert_allclose(found.mean(), [1.75, 25])
  np.testing.assert_allclose(found.std(), [0.25, 5])
  assert found.value_names == ("price", "area")


@pytest.mark.parametrize(
  "changes, what", (({"data.values": 3}, "mine has 2: price, area. Set data.values to 2"), ({}, ""))
)
def test_a_config_names_how_many_values_there_are(tmp_path, changes, what):
  path = table(tmp_path, "image,price,area", "1,2", "3,4")
  run(tmp_path, path, columns={"value": "price+area"})
  config = batches_of(tmp_path, **changes)
  if what:
    with pytest.raises(UserError, match=what):
      Pipeline(config)
  else:
    assert "value" not in Pipeline(config).batch(0)


def test_lists_of_values_must_be_of_one_length(tmp_path):
  root = folder_of(tmp_path / "in", 2)
  lines = [dict(image="p000.png", y=[1, 2.5]), dict(image="p001.png", y=[3, None])]
  (root / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
  run(tmp_path, root / "t.jsonl", "jsonl", columns={"value": "y"})
  source, records = read(tmp_path / "data")
  assert source.values == ("y[0]", "y[1]")
  np.testing.assert_array_equal(records[1]["value"], np.array([3, np.nan], np.float32))
  (root / "t.jsonl").write_text("\n".join(map(json.dumps, [lines[0], {**lines[1], "y": [1]}])))
  with pytest.raises(UserError, match="rows have 1 or 2 values in 'y'"):
    run(tmp_path, root / "t.jsonl", "jsonl", name="other", columns={"value": "y"})


def test_two_values_of_one_medium_are_not_merged_in_silence(tmp_path):
  root = folder_of(tmp_path / "in", 1)
  (root / "t.csv").write_text("image,y\np000.png,1\np000.png,1\np000.png,2\n")
  summary = run(tmp_path, root / "t.csv", columns={"value": "y"})
  assert (summary.examples, summary.rows, summary.skipped) == (1, 2, {"another value": 1})


def test_a_column_that_holds_nothing_is_refused(tmp_path):
  root = folder_of(tmp_path / "in", 1)
  (root / "t.jsonl").write_text(json.dumps(dict(image="p000.png", caption="a")))
  for role in ("value", "labels"):
    with pytest.raises(UserError, match=f"no row has anything in 'typo', its {role}"):
      run(tmp_path, root / "t.jsonl", "jsonl", columns={role: "typo"})


def test_any_number_of_labels_none_included(tmp_path):
  path = table(tmp_path, "image,tags", "a;c", "", "b", "c; a")
  summary = run(tmp_path, path, columns={"labels": "tags"}, separator=";")
  assert summary.examples == 4
  config = batches_of(tmp_path, **{"data.label": "labels", "data.classes": 3})
  data = EvaluationData(config, dict(name="mine", split="train"), 4)
  assert data.class_names == ("a", "b", "c")
  (batch,) = data.batches(("image",))
  assert batch["label"].tolist() == [
    [True, False, True], [False] * 3, [False, True, False], [True, False, True]
  ]  # fmt: skip
  found = measure("mine", data_dir=tmp_path / "data")
  assert found.labels == {"a": 2, "b": 1, "c": 2} and found.unlabelled == 1


def test_classes_keep_their_order_in_every_split(tmp_path):
  path = table(tmp_path, "image,label", "low", "high", "odd")
  summary = run(tmp_path, path, classes=("low", "medium", "high"))
  assert summary.skipped == {"another label": 1}
  assert read(tmp_path / "data")[0].labels == ("low", "medium", "high")
  run(tmp_path, path, split="test")
  assert read(tmp_path / "data", split="test")[0].labels == ("low", "medium", "high")
  with pytest.raises(UserError, match="has the label 'medium' in another split"):
    run(tmp_path, path, split="more", classes=("low", "high"))


@pytest.mark.parametrize(
  "text, expected",
  (
    ("1,2\n3,4\n", [[1, 2], [3, 4]]),
    ("time;x\n0;1.5\n1;\n", [[0, 1.5], [1, np.nan]]),
    ("1\t2\r\n3\t4", [[1, 2], [3, 4]]),
    ("0.5\n-1e3\n", [[0.5], [-1000]]),
    ("1 2\n3  4\n", [[1, 2], [3, 4]]),
    ("1, 2\n3, 4\n", [[1, 2], [3, 4]]),
  ),
)
def test_a_text_of_numbers_is_a_series(text, expected):
  np.testing.assert_array_equal(read_series(text.encode()), np.array(expected, np.float32))


def npy(shape, dtype="<f4"):
  out = io.BytesIO()
  header = dict(descr=dtype, fortran_order=False, shape=shape)
  np.lib.format.write_array_header_1_0(out, header)
  return out.getvalue() + bytes(64)


@pytest.mark.parametrize(
  "data, what",
  (
    (b"1,5;2,5\n1,6;2,6\n", "line 2 holds what is no number"),
    (b"x,y\n", "zero length"),
    (b"1,2\n3\n", "line 2 has 1 numbers, but the first 2"),
    (b"\xff\xfe\x00", "neither a .npy file nor a text"),
    (npy((1 << 40, 4)), "too short for"),
    (npy((2, 2), "|O"), "not numbers"),
    (npy((2, 2))[:30], "not a readable .npy file"),
    (npy((2, 2, 2)), "not \\[steps, channels\\]"),
  ),
)
def test_what_is_no_series_is_one_clear_line(data, what):
  with pytest.raises(Unreadable, match=what):
    read_series(data)


def test_series_by_folders_of_classes_beside_other_media_and_in_tables(tmp_path):
  values = np.arange(12, dtype=np.float32).reshape(6, 2)
  text = "x,y\n" + "\n".join(f"{x},{y}" for x, y in values)
  for name in ("walk/a", "run/b"):
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    (tmp_path / "in" / f"{name}.csv").write_text(text)
  np.save(tmp_path / "in" / "run" / "c.npy", values)
  (tmp_path / "in" / "run" / "notes.csv").write_text("who,when\nme,today\n")
  (tmp_path / "in" / "run" / "bad.csv").write_text("1,2\n3,4\n5,6\n7\n")
  summary = run(tmp_path, tmp_path / "in", "folder")
  assert summary.skipped == {"ending not read": 1, "unreadable": 1}
  source, records = read(tmp_path / "data")
  assert source.labels == ("run", "walk")
  assert {r["id"]: r["label"] for r in records} == {
    "run/b.csv": "run", "run/c.npy": "run", "walk/a.csv": "walk"
  }  # fmt: skip
  for record in records:
    np.testing.assert_array_equal(record["series"], values)
    assert record["image"] is None and record["image_key"] == records[0]["image_key"]
  rows = [
    dict(series="run/c.npy", y=1.5),
    dict(series=values.tolist(), y=2),
    dict(series="walk/a.csv", y=3),
    dict(series=[["a"]], y=3),
  ]
  (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, tmp_path / "in" / "t.jsonl", "jsonl", "other", columns={"value": "y"})
  assert summary.examples == 3 and summary.skipped == {"unreadable": 1}
  for record in read(tmp_path / "data", "other")[1]:
    np.testing.assert_array_equal(record["series"], values)


def test_the_command_takes_labels_values_and_classes(tmp_path, capsys):
  path = table(tmp_path, "image,tags,y", "a|b,1", "b,2")
  command = ["data", "convert", "csv", str(path), "--name", "cli", "--workers", "1"]
  command += ["--data-dir", str(tmp_path / "data")]
  options = ["--labels", "tags", "--separator", "|", "--classes", "b,a", "--value", "y"]
  assert cli.main([*command, *options]) == 0
  source, records = read(tmp_path / "data", "cli")
  assert source.labels == ("b", "a") and source.values == ("y",)
  assert [r["label"] for r in records] == ["a|b", "b"]
  assert cli.main([*command, "--columns", "image"]) == 2
  assert "'image' is not ROLE=COLUMN" in capsys.readouterr().err
  command[2:4] = ["folder", str(path.parent)]
  assert cli.main([*command, "--value", "y"]) == 1
  assert "columns are named, but no table" in capsys.readouterr().err


@pytest.mark.parametrize("form", ("csv", "jsonl", "parquet"))
def test_a_root_lets_annotations_name_files_beside_their_folder(tmp_path, form):
  folder_of(tmp_path / "in" / "images", 3)
  (tmp_path / "in" / "lists").mkdir()
  folder_of(tmp_path / "elsewhere", 1)
  named = ["../images/p000.png", str(tmp_path / "in" / "images" / "p001.png")]
  named += [str(tmp_path / "elsewhere" / "p000.png")]
  path = tmp_path / "in" / "lists" / f"t.{form}"
  if form == "csv":
    path.write_text("image,label\n" + "".join(f"{name},x\n" for name in named))
  elif form == "jsonl":
    path.write_text("\n".join(json.dumps(dict(image=name, label="x")) for name in named))
  else:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(image=named, label=["x"] * 3)), path)
  with pytest.raises(UserError, match="3 outside the source folder, such as .*--root names"):
    run(tmp_path, path, form)
  summary = run(tmp_path, path, form, root=tmp_path / "in")
  assert summary.examples == 2 and summary.skipped == {"outside the source folder": 1}
  assert "--root names a folder that holds them all" in str(summary)
  if form != "parquet":
    assert [r["id"] for r in read(tmp_path / "data")[1]] == ["images/p000.png", "images/p001.png"]


def test_what_is_left_out_is_counted_by_ending_too(tmp_path):
  root = folder_of(tmp_path / "in", 2)
  for name in ("a.docx", "b.docx", "c.xyz", "README", "d.tar.gz", "e.svg", "f.txt"):
    (root / name).write_text("x")
  (root / "bad.jpg").write_text("no picture")
  (root / "bad.txt").write_text("words")
  summary = run(tmp_path, root, "folder")
  assert summary.endings == {
    "ending not read": {".docx": 2, "none": 1, ".xyz": 1, ".gz": 1, ".svg": 1},
    "text without a file": {".txt": 1},
    "unreadable": {".jpg": 1},
  }
  for reason, counts in summary.endings.items():
    assert sum(counts.values()) == summary.skipped[reason]
  files = [path for path in root.iterdir() if path.suffix != ".txt"]
  assert summary.rows + sum(summary.skipped.values()) == len(files) + 1  # the stray text


@pytest.mark.parametrize("form", ("csv", "jsonl"))
def test_texts_with_labels_need_no_media(form, tmp_path):
  rows = [("a red heart", "x", 1), ("", "y", 2), ("a blue one", "y", 3), ("a red heart", "x", 4)]
  objects = [dict(text=text, label=label, stars=stars) for text, label, stars in rows]
  if form == "csv":
    lines = ["text,label,stars", *(",".join(map(str, row)) for row in rows)]
  else:
    lines = [json.dumps(one) for one in objects]
  (tmp_path / f"t.{form}").write_text("\n".join(lines))
  summary = run(tmp_path, tmp_path / f"t.{form}", form, columns={"value": "stars"})
  assert summary.examples == 3 and summary.skipped == {"no caption": 1}
  _, records = read(tmp_path / "data")
  assert [(r["captions"]["en"], r["label"], r["value"].item()) for r in records] == [
    (["a red heart"], "x", 1), (["a blue one"], "y", 3), (["a red heart"], "x", 4)
  ]  # fmt: skip
  keys = [r["image_key"] for r in records]  # equal texts stay in one split
  assert keys[0] == keys[2] != keys[1]


def test_a_row_that_lacks_its_picture_is_no_text_alone(tmp_path):
  root = folder_of(tmp_path / "in", 1)
  rows = [dict(image="p000.png", text="a", label="x"), dict(text="b", label="y")]
  (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, root / "t.jsonl", "jsonl")
  assert (summary.examples, summary.skipped) == (1, {"broken row": 1})
