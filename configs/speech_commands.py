"""Speech commands: which of 20 words a voice says amid noise, by voices that were never heard.

mmjax data build spoken_commands
mmjax train --config configs/speech_commands.py --workdir runs/speech_commands
"""

import speech_text

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 1000
  c.train.batch_size = 64
  c.data.sources.commands = dict(name="spoken_commands", languages=(), cache=True)
  c.data.audio.seconds = 1.4
  c.data.audio.augment.speed = (0.85, 1.18)
  c.data.audio.augment.noise = 0.05
  c.data.label = "label"
  c.data.classes = 20

  c.model = dict(
    name="multitask", width=128, joint=False, encoders=dict(audio=speech_text.audio_encoder())
  )
  c.precision.compute = "float32"
  c.objectives.classify = dict(kind="classification", modalities=("audio",), label_smoothing=0.1)
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  words = dict(kind="classification", source="spoken_commands", modalities=("audio",))
  c.evaluation.evaluators["words/validation"] = dict(**words, split="validation")
  c.evaluation.evaluators["words/test"] = dict(**words, split="test")
  return c
