"""The moving_emoji builder: every clip runs backwards in the same split, nothing is lost in the
video, new emoji are new.
"""

import io

import av
import numpy as np
import pytest

from mmjax.data.builders import moving_emoji
from mmjax.data.builders.moving_emoji import (
  FRAMES,
  MOTIONS,
  NEW,
  REVERSED,
  SIZE,
  choose,
  make_group,
  to_video,
)
from mmjax.data.builders.openmoji import caption, stem


def decode(data: bytes) -> np.ndarray:
  with av.open(io.BytesIO(data)) as container:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def groups(emoji):
  known, _ = choose(emoji)
  return [
    {record["label"]: record for record in make_group("train", one, 1, emoji, known)}
    for one in known[:6]
  ]


def test_every_clip_runs_backwards_in_its_group(groups):
  for group in groups:
    assert tuple(group) == MOTIONS
    for motion, record in group.items():
      other = group[REVERSED[motion]]
      np.testing.assert_array_equal(decode(record["video"]), decode(other["video"])[::-1])
      if motion != "still":
        np.testing.assert_array_equal(record["series"], other["series"][::-1])
      assert (
        record["facts"]["reversed"] == other["id"]
        and record["facts"]["motion"] == record["label"] == motion
      )
      assert record["facts"]["background"] == other["facts"]["background"]


def test_the_motions_are_what_they_are_called(groups):
  """By the pixels that are not background, without the distractor's: it stands still, so
  differences leave it out.
  """
  for group in groups:
    for motion, record in group.items():
      frames = decode(record["video"]).astype(int)
      assert frames.shape == (FRAMES, SIZE, SIZE, 3)
      if motion == "still":
        assert (frames == frames[0]).all()
        continue
      ink = np.abs(frames - np.array(record["facts"]["background"])).sum(-1) > 30
      y, x = (np.array([np.nonzero(frame)[axis].mean() for frame in ink]) for axis in (0, 1))
      dx, dy, grown = x[-1] - x[0], y[-1] - y[0], ink[-1].sum() / ink[0].sum()
      assert {
        "left": dx < -2,
        "right": dx > 2,
        "up": dy < -2,
        "down": dy > 2,
        "grow": grown > 1.2,
        "shrink": grown < 0.84,
      }[motion], record["id"]


def test_a_sensor_tells_the_motion(groups):
  for group in groups:
    for motion, record in group.items():
      series = record["series"]
      assert series.dtype == np.float32 and 40 <= len(series) <= 64 and series.shape[1] == 3
      change = series[-10:].mean(0) - series[:10].mean(0)
      kind = int(np.abs(change).argmax())
      told = (
        (("left", "right"), ("up", "down"), ("shrink", "grow"))[kind][int(change[kind] > 0)]
        if np.abs(change).max() > 0.06
        else "still"
      )
      assert told == motion


def test_captions_name_the_emoji_and_the_motion(groups):
  captions = [
    text for group in groups for record in group.values() for text in record["captions"]["en"]
  ]
  assert len(set(captions)) == len(captions) == 6 * 7 * 2
  for group in groups:
    for record in group.values():
      assert all(record["facts"]["name"] in text for text in record["captions"]["en"])


def test_emoji_of_the_splits(emoji):
  known, new = choose(emoji)
  assert (
    len(set(known)) == 150 and len(set(new)) == NEW and set(known) <= set(emoji.splits["train"])
  )
  assert not set(new) & set(emoji.splits["train"]) and not set(new) & set(
    emoji.splits["validation"]
  )
  assert not {caption(emoji.names[one]["en"]) for one in known} & {
    caption(emoji.names[one]["en"]) for one in new
  }
  assert moving_emoji.is_thing("\U0001f34e", "red apple") and not moving_emoji.is_thing(
    "\U0001f9e4", "gloves"
  )
  assert not moving_emoji.is_thing("\U0001f466", "boy") and not moving_emoji.is_thing(
    "\U0001f996", "T-Rex"
  )


def test_clips_depend_on_split_emoji_and_number_alone(emoji, groups):
  known, _ = choose(emoji)
  again = make_group("train", known[2], 1, emoji, known)
  for record in again:
    first = groups[2][record["label"]]
    assert (
      record["video"] == first["video"]
      and record["id"] == first["id"]
      and (record["series"] == first["series"]).all()
    )
  other = make_group("test", known[2], 1, emoji, known)
  assert not {r["image_key"] for r in other} & {r["image_key"] for r in again} and not {
    r["id"] for r in other
  } & {r["id"] for r in again}
  assert all(r["id"].startswith(stem(known[2])) for r in again)


def test_videos_lose_nothing():
  frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  np.testing.assert_array_equal(decode(to_video(frames)), frames)
