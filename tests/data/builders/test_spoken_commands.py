"""The spoken_commands builder: the word is in the noise, as loud as it is said to be, and the
voices of a split are its own.
"""

import io

import numpy as np
import soundfile

from mmjax.data.builders.speech import RATE, Voice, speak
from mmjax.data.builders.spoken_commands import SECONDS, VOICES, WORDS, make_record


def test_the_word_is_amid_noise_as_loud_as_is_said():
  for number, word in enumerate(("yes", "seven", "stop", "left")):
    record = make_record(word, VOICES["test"][number], number)
    facts = record["facts"]
    samples, rate = soundfile.read(io.BytesIO(record["audio"]))
    speech = speak(word, Voice(facts["voice"], facts["speed"], facts["pitch"])).astype(np.float64)
    assert rate == RATE and record["label"] == word and len(samples) >= SECONDS * RATE
    matched = np.correlate(samples, speech, "valid")
    start = np.abs(matched).argmax()
    assert matched[start] > 0
    noise = samples.copy()
    gain = matched[start] / np.square(speech).sum()
    noise[start : start + len(speech)] -= gain * speech
    ratio = np.square(gain * speech).mean() / np.square(noise).mean()
    assert abs(10 * np.log10(ratio) - facts["decibels"]) < 1.5, (word, facts)
    assert make_record(word, facts["voice"], number)["audio"] == record["audio"]


def test_no_variant_of_a_voice_speaks_in_two_splits():
  variants = {split: {Voice(name).variant for name in names} for split, names in VOICES.items()}
  train, validation, test = (variants[split] for split in ("train", "validation", "test"))
  assert not train & validation and not train & test and not validation & test
  assert len(set(WORDS)) == 20
