"""The rare_animals builder: what stands in a scene says its label and its split, and is there to be
seen; few scenes have an animal.
"""

import io

import numpy as np
from PIL import Image

from mmjax.data.builders.emoji_scenes import CATEGORY
from mmjax.data.builders.rare_animals import (
  ANIMALS,
  APART,
  COUNTS,
  SHARE,
  SIZE,
  THINGS,
  make_record,
  split_of,
)


def names(record) -> list[str]:
  return [one["name"] for one in record["facts"]["objects"]]


def test_few_scenes_have_an_animal_and_their_labels_say_so():
  records = [make_record("train", number) for number in range(1000)]
  for record in records:
    assert COUNTS[0] <= len(names(record)) <= COUNTS[1]
    animals = [name for name in names(record) if CATEGORY[name] == "animal"]
    assert len(animals) == (record["label"] == "animal")
  found = sum(record["label"] == "animal" for record in records)
  error = np.sqrt(1000 * SHARE * (1 - SHARE))
  assert abs(found - 1000 * SHARE) < 3 * error
  kinds = {name for record in records for name in names(record)}
  assert kinds == {*THINGS, *ANIMALS}


def test_no_set_of_objects_is_in_two_splits():
  sets: dict[tuple, str] = {}
  for split in ("train", "validation", "test"):
    for number in range(150):
      record = make_record(split, number)
      assert split_of(names(record)[::-1]) == split
      assert sets.setdefault(tuple(sorted(names(record))), split) == split


def test_objects_stand_apart_where_the_facts_say():
  close = 0
  for number in range(60):
    record = make_record("test", number)
    pixels = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"), np.int64)
    assert pixels.shape == (SIZE, SIZE, 3)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    ground = (pixels == colours[counts.argmax()]).all(-1)
    objects = record["facts"]["objects"]
    covered = np.zeros((SIZE, SIZE), bool)
    for one in objects:
      half = (one["pixels"] + 1) // 2
      rows, columns = (slice(max(0, one[at] - half), one[at] + half) for at in ("y", "x"))
      assert not ground[rows, columns].all(), one
      covered[rows, columns] = True
    assert ground[~covered].all()
    centres = np.array([(one["x"], one["y"]) for one in objects])
    gaps = np.linalg.norm(centres[:, None] - centres, axis=-1)
    close += gaps[np.triu_indices(len(objects), 1)].min() < APART
  assert close < 4  # where no place was found in some tries


def test_a_record_is_a_function_of_its_split_and_number():
  first, again, other = (make_record(*which) for which in (("test", 3), ("test", 3), ("train", 3)))
  assert first["image"] == again["image"] and first["facts"] == again["facts"]
  assert first["image_key"] != other["image_key"]
