"""The spoken_questions builder: what is said is asked of the picture beside it, by voices of the
split alone.
"""

import io

import soundfile

from mmjax.data.builders import emoji_scenes
from mmjax.data.builders.speech import RATE, Voice, speak
from mmjax.data.builders.spoken_questions import HEARD, check_answer, make_record


def test_the_sound_is_a_question_about_the_picture():
  voices = {}
  for split in ("train", "validation", "test"):
    for number in range(6):
      record, scene = make_record(split, number), emoji_scenes.make_record(split, number)
      facts = record["facts"]
      assert record["image"] == scene["image"]
      assert (facts["question"], facts["answer"]) in scene["questions"]
      assert record["captions"] == {"en": [facts["question"]]}
      assert record["questions"] == [("", facts["answer"]), (HEARD, facts["question"])]
      samples, rate = soundfile.read(io.BytesIO(record["audio"]), dtype="int16")
      voice = Voice(facts["voice"], facts["speed"], facts["pitch"])
      assert rate == RATE and (samples == speak(facts["question"], voice)).all()
      voices.setdefault(split, set()).add(voice.variant)
  assert len(voices["test"]) == 6
  assert not voices["train"] & voices["test"] and not voices["validation"] & voices["test"]
  assert not voices["train"] & voices["validation"]


def test_what_was_heard_and_its_answer_are_judged_apart():
  facts = dict(question="is there a cat?", answer="yes", voice="en-us+f4")
  for question, answer, text, want in (
    ("", "yes", "yes", {"answer": True, "answer to existence": True, "answer to en-us+f4": True}),
    ("", "yes", "no", {"answer": False, "answer to existence": False, "answer to en-us+f4": False}),
    (HEARD, "is there a cat?", "Is there a cat? ", {"heard": True}),
    (HEARD, "is there a cat?", "is there a cap?", {"heard": False}),
  ):
    assert check_answer(facts, question, answer, text) == want, text
