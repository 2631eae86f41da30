"""Spoken questions about scenes, by voices that were never heard, answered in text: the language
model of scene_answers gets an encoder of sounds, which has learned to hear the questions first.

mmjax data build emoji_scenes
mmjax data build spoken_questions
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax data tokenizer --source emoji_scenes --name scenes --vocab-size 1024 --model bpe --answers
mmjax train --config configs/scene_captions.py --workdir runs/scene_captions
mmjax train --config configs/scene_answers.py:captions --workdir runs/scene_answers_captions
mmjax train --config configs/scene_answers.py --workdir runs/scene_answers
mmjax train --config configs/voice_answers.py:hearing --workdir runs/voice_hearing
mmjax train --config configs/voice_answers.py --workdir runs/voice_answers
"""

import chat_scenes
import scene_answers
import speech_text


def get_config(arg: str = ""):
  """arg: "hearing" for questions as text, by an encoder and a decoder; "" for answers."""
  c = scenes()
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)
  if arg == "hearing":
    learn_to_hear(c)
    kind = dict(kind="captions", modalities=("audio",), by="voice")
  else:
    learn_to_answer(c)
    kind = dict(kind="dialogue", modalities=("image", "audio"), max_length=24)
  for split in ("validation", "test"):
    evaluator = dict(**kind, source="spoken_questions", split=split)
    c.evaluation.evaluators[f"{kind['kind']}/{split}"] = evaluator
  return c


def scenes():
  """The model that sees and hears, which dialogues go on with (chat_voices.py)."""
  c = scene_answers.scenes()
  c.data.audio.seconds = 3.2
  c.data.audio.augment.speed = (0.85, 1.3)
  c.data.audio.augment.noise = 0.05
  c.data.sequence.audio = 20
  c.model.encoders.audio = speech_text.audio_encoder(frequency_warp=0.15)
  c.model.connectors.audio = dict(kind="mlp", join=4, positions=True)
  return c


def learn_to_hear(c) -> None:
  c.train.steps = 1500
  c.train.batch_size = 24
  c.data.sources.speech = dict(name="spoken_questions", cache=True)
  c.data.modalities = ("audio", "text")
  c.data.text.length = 24
  c.model = dict(
    name="captioner",
    width=128,
    encoders=dict(audio=c.model.encoders.audio),
    decoder=dict(depth=1, heads=4),
  )
  c.objectives.hear = dict(kind="captioning", source=("audio",), label_smoothing=0.05, ctc=0.5)


def learn_to_answer(c) -> None:
  c.init["from"] = "runs/scene_answers"
  c.init.map = (
    (r"audio/.*", r"\g<0>", "runs/voice_hearing"),
    (r"audio_connector/.*", None),
    (r".*", r"\g<0>"),
  )
  c.train.steps = 1200
  c.train.batch_size = 16  # rows, of up to four pictures and sounds each
  c.data.mix = "steps"
  c.data.sources.spoken = dict(name="spoken_questions", text="conversation", cache=True, weight=0.8)
  c.data.sources.questions = dict(name="emoji_scenes", text="question", cache=True, weight=0.2)
  c.data.text.template = chat_scenes.TEMPLATE
  c.data.text.loss = "each"  # pictures see what was heard, when it is answered
  c.data.sequence.length = 216
  c.data.sequence.slots = 4
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer.lr = 6e-3
  c.optimizer.moments = "source"
  c.optimizer.rates = ((r"image/.*", 0.0), (r"audio/.*", 0.0))
