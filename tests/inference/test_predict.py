"""`mmjax predict` and `mmjax classify` on tiny random models: against the predictor's own methods,
from files, folders and tables.
"""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmjax import cli
from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer
from mmjax.inference import predict
from mmjax.inference.predictor import Predictor
from tests.inference import tiny

MEAN, STD = (100.0, -5.0), (10.0, 2.0)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
  """(checkpoint, predictor) of a model that reads series: three classes and two values."""
  folder = tmp_path_factory.mktemp("machine")
  config = tiny.media_config(
    "encoder",
    ("series",),
    **{
      "data.label": "label",
      "data.classes": 3,
      "data.values": 2,
      "model.classes": 3,
      "objectives.state": dict(kind="classification", modalities=("series",)),
      "objectives.wear": dict(kind="regression", modalities=("series",), mean=MEAN, std=STD),
    },
  )
  named = {
    "classes.json": json.dumps(["idle", "ok", "broken"]).encode(),
    "values.json": json.dumps(["heat", "wear"]).encode(),
  }
  params = tiny.random_params(config)
  path = folder / "checkpoint"
  tiny.save_import(str(path), params, config, named)
  return path, Predictor(config, params, named)


def series(count):
  rng = np.random.default_rng(0)
  return [rng.normal(0, 2, (6, 2)).astype(np.float32) for _ in range(count)]


def test_a_table_gives_labels_and_values_and_names_what_cannot_be_read(machine, tmp_path, capsys):
  checkpoint, predictor = machine
  values = series(5)
  for number, x in enumerate(values):
    np.save(tmp_path / f"{number}.npy", x)
  (tmp_path / "2.npy").write_bytes(b"junk")
  table = tmp_path / "machines.csv"
  table.write_text("name,signal\n" + "".join(f"m{i},{i}.npy\n" for i in range(5)))
  out = tmp_path / "deep" / "predictions.csv"
  words = ["predict", "--checkpoint", checkpoint, table, "--columns", "id=name", "--out", out]
  assert cli.main(list(map(str, words))) == 0
  printed = capsys.readouterr().err
  assert "skipped m2" in printed and "4 of 5 rows read, 1 skipped" in printed
  with open(out, newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["file"] for row in rows] == [f"m{i}" for i in range(5)]
  assert "m2" in rows[2]["error"] and not rows[2]["label"]
  kept = [0, 1, 3, 4]
  shares = predictor.classes(series=[values[i] for i in kept])
  scaled = predictor.values(series=[values[i] for i in kept])
  assert scaled.std() > 0 and abs(scaled[:, 0].mean() - 100) < 50, "in the units of the data"
  for i, share, value in zip(kept, shares, scaled, strict=True):
    assert rows[i]["label"] == ("idle", "ok", "broken")[share.argmax()]
    assert float(rows[i]["probability"]) == pytest.approx(share.max(), rel=1e-4)
    assert float(rows[i]["probability/ok"]) == pytest.approx(share[1], rel=1e-4)
    assert float(rows[i]["wear"]) == pytest.approx(value[1], rel=1e-4)
  in_python = predictor.predict(series=values[:2])
  assert [row["heat"] for row in in_python] == pytest.approx(scaled[:2, 0])
  # The same from a folder, and from numbers that stand in a table.
  files, names = predict.rows_of(predictor, [tmp_path], {})
  assert len(files) == len(names) == 5, "files of numbers, and no tables of rows"
  lines = [json.dumps(dict(id=i, series=x.tolist())) for i, x in enumerate(values)]
  (tmp_path / "rows.jsonl").write_text("\n".join(lines))
  found = predict.command(predictor, [tmp_path / "rows.jsonl"], out=tmp_path / "found.json")
  assert [row["label"] for row in found[:2]] == [row["label"] for row in in_python]
  assert json.loads((tmp_path / "found.json").read_text()) == found
  # Files of text, a step a line, as the converters read them.
  (tmp_path / "texts").mkdir()
  for i, x in enumerate(values[:2]):
    np.savetxt(tmp_path / f"texts/{i}.csv", x, fmt="%.9g", delimiter=",", header="x,y", comments="")
  of_texts = predict.command(predictor, [tmp_path / "texts"])
  assert [row["heat"] for row in of_texts] == pytest.approx(scaled[:2, 0])
  # A table as the converters read it; a row that does not fit the header costs itself.
  (tmp_path / "odd.csv").write_text("name;signal\nm0;0.npy\nm1;1.npy;more\nm3;3.npy\n")
  columns = dict(id="name", series="signal")
  odd = predict.command(predictor, [tmp_path / "odd.csv"], columns=columns)
  assert [row["file"] for row in odd] == ["m0", "odd.csv:3", "m3"]
  assert "3 cells, but the header 2" in odd[1]["error"]
  assert [odd[0]["label"], odd[2]["label"]] == [rows[0]["label"], rows[3]["label"]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """A model whose three classes are of a picture and a sound together."""
  config = tiny.media_config(
    "multitask",
    ("image", "audio"),
    **{
      "data.label": "label",
      "data.classes": 3,
      "model.joint": False,
      "model.fusion": dict(kind="concat"),
      "objectives.kind": dict(kind="classification", modalities=("image", "audio")),
    },
  )
  return Predictor(config, tiny.random_params(config), {})


def test_a_folder_of_several_media_has_the_rows_that_the_converter_reads(both, tmp_path):
  rng = np.random.default_rng(0)
  pictures = tiny.pixels(4)
  sounds = [(0.3 * rng.normal(size=1000)).astype(np.float32) for _ in range(3)]
  for name, pixels in zip(("a", "b", "lone"), pictures, strict=False):
    (tmp_path / f"{name}.png").write_bytes(tiny.png(pixels))
  (tmp_path / "b.bmp").write_bytes(tiny.png(pictures[3]))  # of two pictures each is a row
  for name, sound in zip(("a", "b"), sounds, strict=False):
    soundfile.write(tmp_path / f"{name}.wav", sound, 8000, subtype="FLOAT")
  lines: list[str] = []
  rows, names = predict.rows_of(both, [tmp_path], {})
  said = predict.predict(both, rows, names, log=lines.append)
  assert [name.removeprefix(f"{tmp_path}/") for name in names] == [
    "a.png",
    "b.bmp",
    "b.png",
    "lone.png",
  ]
  want = both.classes(image=[pictures[0], pictures[3]], audio=sounds[:2])
  for row, shares in zip(said, want, strict=False):
    assert [row[f"probability/{c}"] for c in range(3)] == pytest.approx(shares.tolist(), rel=1e-4)
  # A file that lacks its other half costs itself, named.
  assert all("reads image and audio, but a row has only image" in row["error"] for row in said[2:])
  assert lines[-1] == "2 of 4 rows read, 2 skipped" and str(tmp_path / "lone.png") in lines[1]
  # A table says what belongs together; of two in a folder the converter reads this one.
  (tmp_path / "captions.csv").write_text("image,audio\nlone.png,a.wav\n")
  (tmp_path / "metadata.csv").write_text("image,audio\na.png,b.wav\n")
  rows, _ = predict.rows_of(both, [tmp_path], {})
  assert rows == [dict(image=tmp_path / "lone.png", audio=tmp_path / "a.wav")]


def test_answers_have_their_questions_beside_them(tmp_path):
  """Several questions are about one picture, which alone would not tell them apart."""
  config = tiny.media_config(
    "multitask",
    ("image", "text"),
    **{
      "data.label": "answer",
      "data.classes": 2,
      "model.joint": False,
      "model.fusion": dict(kind="concat"),
      "objectives.answers": dict(kind="classification", modalities=("image", "text")),
    },
  )
  assets = {**tiny.assets(tmp_path), "classes.json": json.dumps(["no", "yes"]).encode()}
  checkpoint = tmp_path / "checkpoint"
  tiny.save_import(str(checkpoint), tiny.random_params(config), config, assets)
  Image.fromarray(tiny.pixels(1)[0]).save(tmp_path / "a.png")
  asked = ["is it red?", "is it a cat?"]
  table = tmp_path / "asked.csv"
  table.write_text("image,question\n" + "".join(f"a.png,{question}\n" for question in asked))
  out = tmp_path / "answers.json"
  words = ["predict", "--checkpoint", checkpoint, table, "--out", out]
  assert cli.main(list(map(str, words))) == 0
  rows = json.loads(out.read_text())
  assert [list(row)[:3] for row in rows] == [["file", "question", "label"]] * 2
  assert [(row["file"], row["question"]) for row in rows] == [("a.png", one) for one in asked]


def test_files_of_one_name_are_rows_of_their_own_of_a_model_that_reads_one(machine, tmp_path):
  _, predictor = machine
  for name in ("a.npy", "a.csv", "a.png"):
    (tmp_path / name).write_text("1,2\n3,4\n")
  rows, names = predict.rows_of(predictor, [tmp_path], {})
  assert names == [str(tmp_path / "a.csv"), str(tmp_path / "a.npy")]


def test_mistakes_are_one_line(machine, tmp_path):
  _, predictor = machine
  (tmp_path / "t.csv").write_text("a,b\n1,2\n")
  for inputs, columns, message in (
    ([tmp_path / "t.csv"], dict(series="c"), "no column 'c'; it has: a, b"),
    ([tmp_path / "t.csv"], dict(image="a"), "names 'image', but this checkpoint reads series"),
    ([tmp_path / "x.png"], {}, "no file of series"),
  ):
    with pytest.raises(UserError, match=message):
      predict.rows_of(predictor, inputs, columns)
  with pytest.raises(UserError, match="none of the 1 rows could be read"):
    predict.predict(predictor, [dict(series=tmp_path / "none.npy")], log=lambda line: None)
  with pytest.raises(UserError, match="reads series, but a row has only"):
    predict.predict(predictor, [{}])


def test_long_sounds_go_through_the_model_in_windows(tmp_path):
  """0.6 s by a model that reads 0.25 s: classes are the mean over windows, texts are joined."""
  config = tiny.media_config(
    "encoder",
    ("audio",),
    **{"data.label": "label", "data.classes": 3, "model.classes": 3, "model.spelling": 420},
  )
  predictor = Predictor(config, tiny.random_params(config), tiny.assets(tmp_path))
  rng, rate = np.random.default_rng(1), 8000
  sound = (0.3 * rng.normal(size=int(0.6 * rate))).astype(np.float32)
  sound[1760:1920] = 0.0  # the quietest place of the first window's last fifth
  soundfile.write(tmp_path / "long.wav", sound, rate, subtype="FLOAT")
  (row,) = predictor.predict(audio=tmp_path / "long.wav", timestamps=True)
  windows = [sound[:2000], sound[2000:4000], sound[-2000:]]
  want = predictor.classes(audio=windows).mean(0)
  assert [row[f"probability/{c}"] for c in range(3)] == pytest.approx(want.tolist(), rel=1e-4)
  segments = row["segments"]
  assert segments[0]["start"] == 0 and segments[-1]["end"] == 0.6
  assert segments[0]["end"] == 0.23, "cut where it is quiet"
  assert all(a["end"] == b["start"] for a, b in zip(segments, segments[1:], strict=False))
  edges = [round(s["end"] * rate) for s in segments]
  texts = predictor.generate(audio=np.split(sound, edges[:-1]))
  assert [s["text"] for s in segments] == [text.strip() for text in texts]
  assert row["text"] == " ".join(filter(None, (s["text"] for s in segments)))
  assert Tokenizer.is_among(predictor.assets)


def test_classify_sorts_pictures_into_labels_of_ones_own(tmp_path, capsys):
  checkpoint, pictures = tiny.checkpoint(tmp_path), tmp_path / "pictures"
  pictures.mkdir()
  for number, pixels in enumerate(tiny.pixels(3)):
    (pictures / f"{number}.png").write_bytes(tiny.png(pixels))
  (pictures / "9.png").write_bytes(b"junk")
  words = [
    "classify",
    "--checkpoint",
    checkpoint,
    pictures,
    "--labels",
    "a red heart,rain",
    "--json",
  ]
  assert cli.main(list(map(str, words))) == 0
  printed = capsys.readouterr()
  rows = json.loads(printed.out)
  predictor = Predictor.load(checkpoint)
  want = predictor.classify([pictures / f"{i}.png" for i in range(3)], ["a red heart", "rain"])
  for row, share in zip(rows, want, strict=False):
    assert row["label"] == ("a red heart", "rain")[share.argmax()]
    assert row["probability/rain"] == pytest.approx(float(share[1]), rel=1e-5)
  assert "error" in rows[3] and "3 of 4 rows read, 1 skipped" in printed.err
  with pytest.raises(UserError, match="no classifier, no values and no decoder"):
    predictor.predict(image=pictures / "0.png")
