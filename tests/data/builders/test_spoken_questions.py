"""The spoken_questions builder: what is said is asked of the picture beside it, by voices of the
split alone.
"""

import io

import soundfile

from mmjax.data.builders import emoji_scenes
from mmjax.data.builders.speech import RATE, Voice, speak
from mmjax.data.builders.spoken_questions import check_answer, make_record


def test_the_sound_is_a_question_about_the_picture():
  voices = {}
  for split in ("train", "validation", "test"):
    for number in range(6):
      record, scene = make_record(split, number), emoji_scenes.make_record(split, number)
      facts = record["facts"]
      assert record["image"] == scene["image"]
      assert (facts["question"], facts["answer"]) in scene["questions"]
      assert record["captions"] == {"en": [f"{facts['question']} {facts['answer']}"]}
      samples, rate = soundfile.read(io.BytesIO(record["audio"]), dtype="int16")
      voice = Voice(facts["voice"], facts["speed"], facts["pitch"])
      assert rate == RATE and (samples == speak(facts["question"], voice)).all()
      voices.setdefault(split, set()).add(voice.variant)
  assert len(voices["test"]) == 6
  assert not voices["train"] & voices["test"] and not voices["validation"] & voices["test"]
  assert not voices["train"] & voices["validation"]


def test_the_answer_is_what_follows_the_question():
  facts = dict(question="is there a cat?", answer="yes")
  for text, question, answer in (
    ("is there a cat? yes", True, True),
    ("Is there a cat? no ", True, False),
    ("is there a cap? yes", False, True),
    ("yes", False, True),
    ("is there a cat?", True, False),
  ):
    assert check_answer(facts, text) == dict(question=question, answer=answer), text
