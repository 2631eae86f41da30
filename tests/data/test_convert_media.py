"""Conversion of sound and video beside or instead of pictures, with captions, labels and questions;
what is left out and why.
"""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.data.sources import open_source
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_convert import picture, run, source
from tests.data.test_tars import write_tar
from tests.data.test_video import clip
from tests.data.test_video import encode as film


def records(tmp_path, name="mine"):
  opened = source(tmp_path, name)
  return {opened[n]["id"]: opened[n] for n in range(len(opened))}


MP4 = dict(container="mp4", codec="mpeg4", pixels="yuv420p")


def test_files_that_differ_in_their_endings_are_one_record(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  files = {
    "a.png": picture(1),
    "a.wav": sound(tone()),
    "a.txt": b"both",
    "b.mp3": sound(tone(1.0), kind="MP3"),
    "b.txt": b"sound alone",
    "b.de.txt": b"nur Ton",
    "c.mp4": film(clip(3, 16, 16), **MP4),
    "c.opus": sound(tone(), kind="OGG", subtype="OPUS"),
    "c.txt": b"a clip",
    "d.webm": film(clip(2, 16, 16), "webm", "libvpx", "yuv420p"),
    "d.txt": b"small",
    "e.flac": sound(tone(), kind="FLAC"),
    "zero.wav": sound(tone()[:0]),
    "zero.txt": b"x",
    "cut.mkv": film(clip())[:300],
    "cut.txt": b"x",
    "still.png": picture(2),
    "still.mp4": b"junk",
    "still.txt": b"x",
  }
  for name, data in files.items():
    (root / name).write_bytes(data)
  summary = run(tmp_path, "folder", root)
  assert summary.skipped == {"unreadable": 3, "no caption": 1}
  assert sorted(summary.first_skipped["unreadable"]) == [
    "cut.mkv",
    "still.png",
    "zero.wav",
  ] and summary.first_skipped["no caption"] == ["e.flac"]
  got = records(tmp_path)
  assert list(got) == ["a.png", "b.mp3", "c.opus", "d.webm"]
  assert (got["a.png"]["image"], got["a.png"]["audio"], got["a.png"]["video"]) == (
    files["a.png"],
    files["a.wav"],
    None,
  ), "bytes stay as they are"
  assert (
    got["b.mp3"]["image"] is None
    and got["b.mp3"]["audio"] == files["b.mp3"]
    and got["b.mp3"]["captions"] == {"en": ["sound alone"], "de": ["nur Ton"]}
  )
  assert got["c.opus"]["video"] == files["c.mp4"] and got["d.webm"]["video"] == files["d.webm"]
  assert len({record["image_key"] for record in got.values()}) == 4
  listed = [json.loads(line) for line in open(f"{summary.folder}/skipped-train.jsonl")]
  assert any("zero length" in row["detail"] for row in listed)
  import tensorflow_datasets as tfds

  stored = tfds.builder_from_directory(summary.folder).as_data_source(
    "train", decoders={"image": tfds.decode.SkipDecoding()}
  )
  assert stored[1]["audio"] == files["b.mp3"]


def test_a_table_with_questions_labels_and_sounds(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  (root / "x.png").write_bytes(picture(1))
  (root / "x.flac").write_bytes(sound(tone(), kind="FLAC"))
  lines = [
    dict(image="x.png", question="is it red?", answer="no"),
    dict(image="x.png", question="how many?", answer=2),
    dict(audio="x.flac", label="beep"),
    dict(
      id="both",
      image="x.png",
      audio="x.flac",
      questions=[["why?", "so"], {"question": "who?", "answer": "me"}],
    ),
    dict(file_name="x.flac", id="named", label="by its ending"),
    dict(id="nothing", image="x.png"),
    dict(id="gone", video="x.mp4", label="x"),
  ]
  (root / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
  summary = run(tmp_path, "jsonl", root / "all.jsonl")
  assert summary.skipped == {"broken row": 1, "missing file": 1} and summary.examples == 4
  got = records(tmp_path)
  assert (
    got["x.png"]["questions"] == [("is it red?", "no"), ("how many?", "2")]
    and got["x.flac"]["label"] == "beep"
  )
  assert (
    got["both"]["audio"]
    and got["both"]["questions"] == [("why?", "so"), ("who?", "me")]
    and got["named"]["audio"]
  )
  assert source(tmp_path).answers == ("2", "me", "no", "so") and source(tmp_path).labels == (
    "beep",
    "by its ending",
  )
  (root / "no.jsonl").write_text(json.dumps(dict(image="x.png", other=1)))
  with pytest.raises(
    UserError, match="captions, questions or a label; .* --value COLUMN for numbers"
  ):
    run(tmp_path, "jsonl", root / "no.jsonl", "other")


def test_tars_of_classes_sounds_and_clips(tmp_path):
  flac, mp4 = sound(tone(), kind="FLAC"), film(clip(3, 16, 16), **MP4)
  path = write_tar(
    tmp_path / "a.tar",
    [
      ("1.flac", flac),
      ("1.cls", b"dog\n"),
      ("2.mp4", mp4),
      ("2.txt", b"a clip"),
      ("2.png", picture(1)),
      ("3.wav", b"junk"),
      ("3.txt", b"x"),
      ("4.json", json.dumps(dict(questions=[["what?", "that"]])).encode()),
      ("4.mp4", mp4),
      ("5.flac", flac),
    ],
  )
  summary = run(tmp_path, "webdataset", path)
  assert summary.skipped == {"unreadable": 1, "no caption": 1}
  got = records(tmp_path)
  assert (
    got["a/1"]["audio"] == flac
    and got["a/1"]["label"] == "dog"
    and got["a/2"]["video"] == mp4
    and got["a/2"]["image"] == picture(1)
  )
  assert got["a/4"]["questions"] == [("what?", "that")] and got["a/4"]["image"] is None
  in_place = open_source(dict(name="tars", path=path))
  assert in_place[1]["video"] == mp4 and in_place[0]["audio"] == flac


@pytest.mark.parametrize("kind", ["struct", "path"])
def test_parquet_with_sound(tmp_path, kind):
  import pyarrow
  import pyarrow.parquet

  (tmp_path / "in").mkdir()
  sounds = [sound(tone(0.1 * (n + 1)), kind="FLAC") for n in range(3)]
  for n, data in enumerate(sounds):
    (tmp_path / "in" / f"{n}.flac").write_bytes(data)
  cells = (
    [dict(bytes=data, path=None) for data in sounds]
    if kind == "struct"
    else [f"{n}.flac" for n in range(3)]
  )
  table = pyarrow.table(
    {"audio" if kind == "struct" else "file": cells, "transcription": ["one", "two", None]}
  )
  pyarrow.parquet.write_table(table, tmp_path / "in" / "t.parquet")
  assert run(tmp_path, "parquet", tmp_path / "in").skipped == {"no caption": 1}
  assert [record["audio"] for record in records(tmp_path).values()] == sounds[:2]


def test_what_was_converted_trains(tmp_path, config):
  """Batches of a converted data set: any rate, stereo; a record without the modality is counted and
  named.
  """
  from mmjax.data.pipeline import Pipeline

  root = tmp_path / "in"
  root.mkdir()
  stereo = np.stack([tone(0.2, 44_100), -tone(0.2, 44_100)], axis=1)
  for name, data in {
    "a.wav": sound(tone(0.2, 8000), 8000),
    "b.flac": sound(stereo, 44_100, kind="FLAC"),
    "c.png": picture(1),
  }.items():
    (root / name).write_bytes(data)
    (root / name).with_suffix(".txt").write_text("a red thing")
  run(tmp_path, "folder", root)
  c = config(
    **{
      "data.modalities": ("audio", "text"),
      "data.audio.seconds": 0.25,
      "data.dir": str(tmp_path / "data"),
      "train.batch_size": 3,
      "data.sources": {"mine": {"name": "mine"}},
      "data.text.tokenizer": str(tokenizer(tmp_path)),
    }
  )
  pipeline = Pipeline(c)
  batch = pipeline.batch(0)
  lengths = dict(zip(batch["id"], batch["audio"]["length"].tolist(), strict=True))
  assert lengths == {"a.wav": 3200, "b.flac": 3200, "c.png": 0} and pipeline.unreadable == 1
  assert not batch["audio"]["waveform"][batch["id"].index("b.flac")].any(), (
    "the mean of two opposite channels is silence"
  )


def tokenizer(tmp_path):
  from mmjax.data.tokenizer_training import train_tokenizer

  return train_tokenizer(["a red thing and more words"] * 20, tmp_path / "t.model", 360)


def test_the_same_bytes_have_the_same_key(tmp_path):
  from mmjax.data.media import bytes_key, media_key

  data = io.BytesIO(b"x").getvalue()
  assert media_key(dict(image=data, audio=b"y")) == bytes_key(data) == media_key(
    dict(video=data)
  ) and media_key(dict(audio=b"y")) == bytes_key(b"y")
