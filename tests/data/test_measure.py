"""Lengths, labels and sizes of a split, measured in one pass and kept beside the data."""

from __future__ import annotations

import numpy as np
import pytest

from mmjax.data import measure as measuring
from mmjax.data.audio import audio_length, read_audio
from mmjax.data.builders import write_dataset
from mmjax.data.measure import measure
from mmjax.data.sources import open_source
from mmjax.data.tokenizers import Tokenizer
from tests.data.conftest import record
from tests.data.test_audio import encode, tone
from tests.data.test_video import clip
from tests.data.test_video import encode as film


def tokenizer_of(root):
  return Tokenizer.from_assets(
    {"tokenizer.model": (root / "tokenizers" / "tiny.model").read_bytes()}
  )


@pytest.mark.parametrize(
  "kind, subtype", (("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None))
)
def test_the_length_of_a_sound_is_that_of_its_samples(kind, subtype):
  data = encode(tone(1.234, rate=22_050), rate=22_050, kind=kind, subtype=subtype)
  samples, rate = read_audio(data)
  assert audio_length(data) == (len(samples), rate)


def test_a_wav_that_was_streamed_is_measured_to_its_end():
  data = bytearray(encode(tone(0.5)))
  at = data.index(b"data") + 4
  data[at : at + 4] = data[4:8] = bytes(4)
  assert audio_length(bytes(data)) == (8000, 16_000)


def test_texts_labels_and_pictures_are_counted_as_a_slow_count_says(tiny):
  tokenizer = tokenizer_of(tiny)
  found = measure("tiny", "train", data_dir=tiny, tokenizer=tokenizer)
  source = open_source(dict(name="tiny", split="train"), str(tiny))
  records = [source[i] for i in range(len(source))]
  captions = [text for r in records for texts in r["captions"].values() for text in texts]
  assert found.rows == 37 and found.whole and found.unreadable == found.unlabelled == 0
  assert found.labels == {
    name: sum(r["label"] == name for r in records) for name in sorted({r["label"] for r in records})
  }
  assert found.captions == {"en": 74, "de": 37}
  caption = found.texts["caption"]
  assert caption["characters"].tolist() == [len(text) for text in captions]
  assert caption["tokens"].tolist() == [len(tokenizer.encode(text)) for text in captions]
  assert sum(found.characters["en"].values()) == sum(
    len(text) for r in records for text in r["captions"]["en"]
  )
  assert found.media["image"]["width"].tolist() == [20] * 37
  assert measure("tiny", "train", data_dir=tiny).texts["caption"].keys() == {
    "row", "characters", "language", "number"
  }  # fmt: skip


def test_sounds_clips_and_series(tmp_path):
  sounds = [encode(tone(seconds)) for seconds in (0.5, 1.25)]
  clips = [film(clip(count)) for count in (5, 12)]
  series = [np.zeros((steps, 3), np.float32) for steps in (7, 11)]
  rows = [
    record(
      i, image=None, audio=sounds[i], video=clips[i], series=series[i], label="a|b" if i else ""
    )
    for i in range(2)
  ]
  rows += [record(2), record(3, audio=b"no sound", image=None)]
  write_dataset("media", tmp_path, {"train": rows}, fields=("image", "audio", "video", "series"))
  found = measure("media", data_dir=tmp_path)
  assert found.media["audio"]["row"].tolist() == [0, 1, 3]
  np.testing.assert_array_equal(found.media["audio"]["seconds"], [0.5, 1.25, np.nan])
  assert found.media["video"]["frames"].tolist() == [5, 12]
  assert found.media["video"]["height"].tolist() == [16, 16]
  assert found.media["series"]["length"].tolist() == [7, 11]
  assert found.media["series"]["channels"].tolist() == [3, 3]
  assert found.media["image"]["row"].tolist() == [2]
  assert found.labels == {"a": 1, "b": 1, "blue": 1, "white": 1} and found.unlabelled == 1


def test_a_second_measure_reads_no_record_and_new_content_is_measured_anew(tmp_path, monkeypatch):
  write_dataset("one", tmp_path, {"train": [record(i) for i in range(5)]})
  first = measure("one", data_dir=tmp_path)
  monkeypatch.setattr(measuring, "_measured", None)
  again = measure("one", data_dir=tmp_path)
  assert again.labels == first.labels and again.characters == first.characters
  monkeypatch.undo()
  rows = [record(i, label="new") for i in range(5)]
  write_dataset("one", tmp_path, {"train": rows}, version="1.0.1")
  assert measure("one", data_dir=tmp_path).labels == {"new": 5}


def test_a_part_is_spread_evenly_and_a_damaged_file_costs_nothing(tmp_path):
  write_dataset("one", tmp_path, {"train": [record(i) for i in range(9)]})
  assert measure("one", data_dir=tmp_path, most=3).row.tolist() == [0, 4, 8]
  assert not measure("one", data_dir=tmp_path, most=3).whole
  for path in (tmp_path / "measured").iterdir():
    path.write_bytes(b"PK damaged")
  assert measure("one", data_dir=tmp_path, most=3).row.tolist() == [0, 4, 8]
