"""The spoken_dialogues builder: the dialogues of scene_dialogues, their questions spoken by one
voice each.
"""

import io

import soundfile

from mmjax.data.builders import scene_dialogues
from mmjax.data.builders.speech import Voice, speak
from mmjax.data.builders.spoken_dialogues import TURNS, make_record


def test_the_sounds_are_the_questions_in_their_order():
  voices = {}
  for split in ("validation", "test"):
    for number in range(6):
      record, written = make_record(split, number), scene_dialogues.make_record(split, number)
      facts = record["facts"]
      assert record["image"] == written["image"] and len(facts["questions"]) == TURNS
      turns = written["conversations"][0][: 2 * TURNS]
      asked = [turn["content"] for turn in turns[::2]]
      assert [asked[0][1]["text"], *asked[1:]] == facts["questions"]
      (talk,) = record["conversations"]
      assert [turn["content"] for turn in talk[1::4]] == facts["questions"]
      assert talk[3::4] == turns[1::2]
      assert [turn["content"][-1] for turn in talk[::4]] == [{"type": "audio"}] * TURNS
      sounds = [record["audio"], *(content for _, content in record["media"])]
      for question, sound in zip(facts["questions"], sounds, strict=True):
        samples, _ = soundfile.read(io.BytesIO(sound), dtype="int16")
        assert (samples == speak(question, Voice(facts["voice"]))).all()
      kinds = [one["kind"] for one in written["facts"]["turns"][:TURNS]]
      assert [one["kind"] for one in facts["turns"]] == [
        kind for pair in zip(["heard"] * TURNS, kinds, strict=True) for kind in pair
      ]
      voices.setdefault(split, set()).add(facts["voice"])
  assert len(voices["test"]) == 6 and len(voices["validation"]) == 3
