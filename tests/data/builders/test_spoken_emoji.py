"""The spoken_emoji builder: no voice and no phrase on two sides, sound that depends on nothing
else, what a record holds.
"""

import io
import itertools

import numpy as np
import pytest
import soundfile

from mmjax.config import UserError
from mmjax.data.builders import spoken_emoji
from mmjax.data.builders.openmoji import stem
from mmjax.data.builders.speech import RATE, Voice, speak, to_flac
from mmjax.data.builders.spoken_emoji import TEST_VOICES, plan, records


@pytest.fixture(scope="module")
def splits(emoji):
  return plan(emoji)


def test_sizes(splits, emoji):
  assert {split: len(ones) for split, ones in splits.items() if split != "train_multilingual"} == {
    "train": 11727,
    "validation": 300,
    "test_voices": 1200,
    "test_phrases": 529,
  }
  assert splits == plan(emoji)
  for ones in splits.values():
    assert len({one.id for one in ones}) == len(ones)


def test_no_variant_speaks_on_two_sides(splits):
  sides = [
    {one.voice.variant for split in side for one in splits[split]}
    for side in (("train", "train_multilingual"), ("validation",), ("test_voices", "test_phrases"))
  ]
  for a, b in itertools.combinations(sides, 2):
    assert not a & b
  assert len({one.voice.name for one in splits["train"]}) >= 24
  assert [voice.name for voice in TEST_VOICES][:2] == ["en-us+Alicia", "en-gb+Mike"] and len(
    TEST_VOICES
  ) == 6
  assert (
    {one.voice for one in splits["test_voices"]}
    == {one.voice for one in splits["test_phrases"]}
    == set(TEST_VOICES)
  )


def test_known_phrases_are_known_and_new_ones_are_new(splits, emoji):
  heard = {one.text for one in splits["train"]}
  for voice in TEST_VOICES:
    assert len({one.text for one in splits["test_voices"] if one.voice == voice} & heard) == 200
  assert {one.text for one in splits["validation"]} <= heard
  assert not {one.text for one in splits["test_phrases"]} & heard
  assert sorted(one.emoji for one in splits["test_phrases"]) == emoji.splits["test_combinations"]
  assert {one.emoji for one in splits["train"]} - {""} <= set(emoji.splits["train"])


def test_combinations_are_made_of_training_words(splits):
  names = [one.text for one in splits["train"] if one.emoji]
  made = [one.text for one in splits["train"] if not one.emoji]
  assert len(made) == spoken_emoji.COMBINATIONS and {len(text.split()) for text in made} == {2, 3}
  assert {word for text in made for word in text.split()} <= {
    word for text in names for word in text.split()
  }


def test_an_utterance_depends_on_nothing_that_was_said_before():
  first = [
    speak("red apple", Voice(name))
    for name in ("en-us", "en-us+croak", "en-gb+Mike", "en-gb-scotland+whisper")
  ]
  speak("woman and man holding hands", Voice("en-us+f2", 200, 30))
  again = [
    speak("red apple", Voice(name))
    for name in ("en-us", "en-us+croak", "en-gb+Mike", "en-gb-scotland+whisper")
  ]
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert len({samples.tobytes() for samples in first}) == 4


def test_sound():
  samples = speak("red apple", Voice("en-us"))
  assert (
    samples.dtype == np.int16 and 0.3 < len(samples) / RATE < 1.5 and np.abs(samples).max() > 3000
  )
  read, rate = soundfile.read(io.BytesIO(to_flac(samples)), dtype="int16")
  assert rate == 16000 and (read == samples).all()
  assert len(speak("red apple", Voice("en-us", speed=120))) > 1.2 * len(samples)
  spectrum = np.abs(np.fft.rfft(samples / 32768.0))
  assert np.fft.rfftfreq(len(samples), 1 / RATE)[spectrum.argmax()] < 1500  # a voice
  for voice in TEST_VOICES:
    assert len(speak("cat", voice)) > 0.1 * RATE


@pytest.mark.parametrize("name", ["en-us+nobody", "klingonish"])
def test_unknown_voices_are_refused(name):
  with pytest.raises(UserError, match=f"no voice '{name.replace('+', '[+]')}'"):
    speak("cat", Voice(name))


def test_records(splits, emoji):
  said = splits["test_phrases"][3]
  (record,) = records([said], "test_phrases", emoji)
  assert record["id"] == f"{stem(said.emoji)}-{said.voice.name}" and record["captions"] == {
    "en": [said.text]
  }
  assert record["image"].startswith(b"\x89PNG") and record["image_key"] == emoji.keys[said.emoji]
  assert (
    record["facts"]["emoji"] == stem(said.emoji) and record["facts"]["voice"] == said.voice.name
  )
  known, combined = records([splits["train"][0], splits["train"][-1]], "train", emoji)
  assert known["image"] is None and known["facts"]["language"] in spoken_emoji.LANGUAGES
  assert combined["facts"]["emoji"] == "" and combined["audio"][:4] == b"fLaC"
  assert abs(soundfile.info(io.BytesIO(known["audio"])).duration - known["facts"]["seconds"]) < 0.01
