"""Dialogues about scenes whose questions are spoken, by voices that were never heard: the model of
chat_scenes with what hears of voice_answers, tuned on spoken and written conversations, spoken
questions and captions.

mmjax data build emoji_scenes
mmjax data build spoken_questions
mmjax data build scene_dialogues
mmjax data build scene_preferences
mmjax data build spoken_dialogues
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax data tokenizer --source emoji_scenes --name scenes --vocab-size 1024 --model bpe --answers
mmjax train --config configs/scene_captions.py --workdir runs/scene_captions
mmjax train --config configs/scene_answers.py:captions --workdir runs/scene_answers_captions
mmjax train --config configs/scene_answers.py --workdir runs/scene_answers
mmjax train --config configs/chat_scenes.py --workdir runs/chat_scenes
mmjax train --config configs/voice_answers.py:hearing --workdir runs/voice_hearing
mmjax train --config configs/voice_answers.py --workdir runs/voice_answers
mmjax train --config configs/chat_voices.py --workdir runs/chat_voices
"""

import chat_scenes
import voice_answers


def get_config(arg: str = ""):
  c = voice_answers.scenes()
  c.init["from"] = "runs/chat_scenes"
  c.init.map = ((r"audio(_connector)?/.*", r"\g<0>", "runs/voice_answers"), (r".*", r"\g<0>"))
  c.train.steps = 1700
  c.train.batch_size = 12  # rows, of up to eight sounds each
  c.data.mix = "steps"
  c.data.sources.spoken = dict(name="spoken_dialogues", text="conversation", cache=True, weight=0.4)
  c.data.sources.dialogues = dict(
    name="scene_dialogues", text="conversation", cache=True, weight=0.2
  )
  # What dialogues ask seldom, such as colours, is said anew here, and forgotten without these.
  c.data.sources.questions = dict(
    name="spoken_questions", text="conversation", cache=True, weight=0.27
  )
  c.data.sources.captions = dict(
    name="emoji_scenes", text="caption", captions=1, cache=True, weight=0.13
  )
  c.data.text.template = chat_scenes.TEMPLATE
  c.data.text.loss = "each"
  c.data.sequence.length = 240
  c.data.sequence.slots = 8
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer = dict(
    name="muon",
    lr=5e-3,
    adam_rate=0.22,
    b2=0.98,
    weight_decay=0.1,
    decay=r".*/kernel",
    clip=0.0,
    moments="source",
    rates=((r"image/.*", 0.0), (r"audio/.*", 0.0)),
  )
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)
  for split in ("validation", "test"):
    c.evaluation.evaluators[f"dialogue/{split}"] = dict(
      kind="dialogue",
      source="spoken_dialogues",
      split=split,
      modalities=("image", "audio"),
      limit=252,
    )
  return c
