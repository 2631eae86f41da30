"""The spoken_questions builder: what is said is asked of the picture beside it, by voices of the
split alone.
"""

import io

import soundfile

from mmjax.data.builders import emoji_scenes
from mmjax.data.builders.speech import RATE, Voice, speak
from mmjax.data.builders.spoken_questions import make_record


def test_the_sound_is_a_question_about_the_picture():
  voices = {}
  for split in ("train", "validation", "test"):
    for number in range(6):
      record, scene = make_record(split, number), emoji_scenes.make_record(split, number)
      facts = record["facts"]
      assert record["image"] == scene["image"]
      assert (facts["question"], facts["answer"]) in scene["questions"]
      assert record["captions"] == {"en": [facts["question"]]}
      (talk,) = record["conversations"]
      said = [turn["content"] for turn in talk if turn["role"] == "assistant"]
      assert said == [facts["question"], facts["answer"]]
      assert talk[0]["content"] == [{"type": "image"}, {"type": "audio"}]
      assert [turn["kind"] for turn in facts["turns"]] == ["heard", facts["kind"]]
      samples, rate = soundfile.read(io.BytesIO(record["audio"]), dtype="int16")
      voice = Voice(facts["voice"], facts["speed"], facts["pitch"])
      assert rate == RATE and (samples == speak(facts["question"], voice)).all()
      voices.setdefault(split, set()).add(voice.variant)
  assert len(voices["test"]) == 6
  assert not voices["train"] & voices["test"] and not voices["validation"] & voices["test"]
  assert not voices["train"] & voices["validation"]
