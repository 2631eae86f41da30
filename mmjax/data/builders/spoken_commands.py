"""`spoken_commands`: 20 words, spoken by many synthetic voices amid noise; made from packages,
without a download.

  train       each word by each training voice, at several speeds and pitches
  validation  the same words by voices that are in no other split
  test        by the 6 test voices

The voices are those of spoken_emoji: no variant of espeak-ng speaks in two of the splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.speech import RATE, Voice, speak, to_flac
from mmjax.data.builders.spoken_emoji import TEST_VOICES, TRAIN_VOICES, VALIDATION_VOICES

VERSION = "1.0.0"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", *DIGITS)
VOICES = {
  "train": TRAIN_VOICES,
  "validation": tuple(voice.name for voice in VALIDATION_VOICES),
  "test": tuple(voice.name for voice in TEST_VOICES),
}
TIMES = {"train": 3, "validation": 5, "test": 5}  # that a voice says a word
QUIET = (-5.0, 15.0)  # how much louder than the noise the speech is, in decibels
SECONDS = 1.0  # of a recording; speech that is longer ends it later

CARD = """\
# spoken_commands

20 words (ten commands and ten digits) spoken by {voices} synthetic training voices, 3 validation
voices and 6 test voices amid noise; FLAC, 16 kHz, mono.

Made by `mmjax data build spoken_commands` from the Python package `espeakng-loader` (the voices).
The words are among those of Speech Commands (Warden 2018, arXiv:1804.03209).

- Licence: espeak-ng is GPL-3; it is called as a separate library, and the sound that it makes is
  not covered by its licence.
- Fields: `id` (word, voice, number), `audio` (FLAC), `captions` (the word), `label` (the word),
  `image_key` (hash of the sound), `facts` (`voice`, `variant`, `language`, `speed` in words a
  minute, `pitch`, `decibels` of the speech above the noise).
- Splits: {splits}. They share no variant of a voice. Speed and pitch vary in all of them.
- Test voices: {test_voices}. Report each voice by itself: some are hard.
- Limits: synthetic voices; noise whose spectrum falls or is flat, no room, no hesitation.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/spoken_commands/VERSION in about half a minute, or finds it there. Raises
  UserError: a package is missing or another version.
  """
  if (built := find_version(data_dir, "spoken_commands")) and built.name == VERSION:
    return built
  sizes = {name: len(WORDS) * len(voices) * TIMES[name] for name, voices in VOICES.items()}
  log(f"spoken_commands: speaking {sum(sizes.values()):,} words")
  card = CARD.format(
    voices=len(VOICES["train"]),
    test_voices=", ".join(VOICES["test"]),
    splits=", ".join(f"{name} {count:,}" for name, count in sizes.items()),
  )
  return write_dataset(
    "spoken_commands",
    data_dir,
    {split: records(split) for split in VOICES},
    fields=("audio", "facts"),
    version=VERSION,
    card=card,
    licence="CC0",
    homepage="https://github.com/espeak-ng/espeak-ng",
  )


def records(split: str) -> Iterator[Record]:
  """Each voice says each word TIMES times."""
  for name in VOICES[split]:
    for word in WORDS:
      for number in range(TIMES[split]):
        yield make_record(word, name, number)


def make_record(word: str, name: str, number: int) -> Record:
  """Record `number` of a word in a voice, a function of the three alone."""
  rng = np.random.default_rng(key_of(f"spoken_commands/{word}/{name}/{number}".encode()))
  voice = Voice(name, int(rng.integers(135, 216)), int(rng.integers(30, 71)))
  louder = float(rng.uniform(*QUIET))
  samples = _amid_noise(speak(word, voice), louder, rng)
  return {
    "id": f"{word}-{name}-{number}",
    "image": None,
    "audio": to_flac(samples),
    "captions": {"en": [word]},
    "label": word,
    "image_key": key_of(samples.tobytes()),
    "facts": {
      "voice": voice.name,
      "variant": voice.variant,
      "language": voice.language,
      "speed": voice.speed,
      "pitch": voice.pitch,
      "decibels": round(louder, 2),
    },
  }


def _amid_noise(speech: np.ndarray, louder: float, rng: np.random.Generator) -> np.ndarray:
  """int16 [samples]: speech int16 somewhere in noise, so many decibels `louder` than that."""
  whole = max(round(SECONDS * RATE), len(speech))
  noise = _noise(whole, rng)
  start = int(rng.integers(whole - len(speech) + 1))
  power = float(np.square(speech, dtype=np.float64).mean())
  noise *= np.sqrt(power / np.square(noise).mean() / 10 ** (louder / 10))
  noise[start : start + len(speech)] += speech
  return np.round(noise * min(1.0, 30_000 / np.abs(noise).max())).astype(np.int16)


def _noise(count: int, rng: np.random.Generator) -> np.ndarray:
  """float64 [count]: its power falls with a power of the frequency from 0 (white) to 2 (brown)."""
  spectrum = np.fft.rfft(rng.normal(size=count))
  frequency = np.maximum(np.fft.rfftfreq(count, 1 / RATE), 50.0)
  return np.fft.irfft(spectrum * frequency ** (-rng.uniform(0, 2) / 2), count)
