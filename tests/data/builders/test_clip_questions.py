"""The clip_questions builder: what is asked of a clip is true of its frames, with its times."""

import numpy as np
import pytest

from mmjax.data.builders import clip_questions
from mmjax.data.builders.clip_questions import (
  FRAMES_A_SECOND,
  WAYS,
  caption_of,
  check_answer,
  check_caption,
  make_record,
)
from mmjax.data.builders.moving_emoji import choose
from tests.data.builders.test_moving_emoji import decode


@pytest.fixture(scope="module")
def clips(emoji):
  known = choose(emoji)[0][: clip_questions.EMOJI]
  return [make_record("train", number, emoji, known) for number in range(25)]


def test_things_move_when_and_where_the_facts_say(clips):
  for record in clips:
    frames = decode(record["video"]).astype(int)
    moved = np.abs(np.diff(frames, axis=0)).sum(-1) > 30  # [T - 1, H, W]
    starts = [round(o["start"] * FRAMES_A_SECOND) for o in record["facts"]["objects"]]
    moving = {at for start in starts for at in range(start, start + clip_questions.MOVE)}
    assert set(np.flatnonzero(moved.any((1, 2)))) <= moving
    for one, start in zip(record["facts"]["objects"], starts, strict=True):
      background = np.array(record["facts"]["background"])
      centres = []
      for frame in (frames[start], frames[start + clip_questions.MOVE]):
        where = moved[start : start + clip_questions.MOVE].any(0)
        there = np.argwhere(where & (np.abs(frame - background).sum(-1) > 30))
        centres.append(there.mean(0)[::-1])
      shift = centres[1] - centres[0]
      wanted = np.array(WAYS[one["way"]])
      assert shift @ wanted > 2 and abs(shift @ wanted) > abs(shift @ wanted[::-1])


def test_questions_have_the_answers_of_the_facts(clips):
  kinds = set()
  for record in clips:
    first, last = record["facts"]["objects"]
    asked = dict(record["questions"])
    assert first["start"] + clip_questions.MOVE / FRAMES_A_SECOND <= last["start"]
    assert asked["what moves first?"] == first["name"]
    assert asked["what moves last?"] == last["name"]
    for one in (first, last):
      assert asked[f"which way does the {one['name']} move?"] == one["way"]
      when = asked[f"at which second does the {one['name']} start to move?"]
      assert float(when) == one["start"]
    kinds |= set(record["facts"]["kinds"])
  assert kinds == {"what", "way", "first", "when"}


def test_a_time_may_be_a_frame_off_and_other_answers_may_not():
  when = "at which second does the dog start to move?"
  for text, right in (("0.75", True), ("1", True), ("1.25", True), ("1.5", False), ("soon", False)):
    assert check_answer({}, when, "1", text) == {"when": right}
  assert check_answer({}, "which way does the dog move?", "left", " Left") == {"way": True}
  assert check_answer({}, "which moves first, the dog or the cat?", "dog", "cat") == {
    "first": False
  }
  assert check_answer({}, "what moves to the left?", "dog", "a dog") == {"what": False}


def test_a_caption_is_judged_by_its_parts():
  moves = [dict(name="red apple", way="left", start=0.5), dict(name="cat", way="up", start=1.75)]
  said = caption_of(moves)
  assert (
    said == "at 0.5 seconds the red apple moves to the left, then at 1.75 seconds the cat moves up"
  )
  for text, starts, names, ways in (
    (said.upper(), True, True, True),
    (said.replace("cat", "dog"), True, False, True),
    (said.replace("0.5", "1"), False, True, True),
    (said.replace("up", "down"), True, True, False),
    (said.partition(",")[0], False, False, False),
    ("a cat and an apple", False, False, False),
  ):
    want = dict(starts=starts, names=names, ways=ways)
    assert check_caption(dict(objects=moves), text) == want, text
