"""Speech-text contrastive: spoken names of emoji find their text, by voices that were never heard
(CLAP's recipe, small).

mmjax data build spoken_emoji
mmjax data tokenizer --source spoken_emoji --name spoken_emoji --vocab-size 1024
mmjax train --config configs/speech_text.py --workdir runs/speech_text
"""

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 900
  c.train.batch_size = 96
  c.data.sources.speech = dict(name="spoken_emoji", languages=("en",), cache=True)
  c.data.audio.seconds = 2.2
  c.data.audio.augment.speed = (0.85, 1.18)
  c.data.audio.augment.noise = 0.05
  c.data.text.tokenizer = "spoken_emoji"
  c.data.text.vocab_size = 1024
  c.data.text.length = 24

  c.model = dict(
    name="dual_encoder",
    width=128,
    scale_init=10.0,
    encoders=dict(
      audio=audio_encoder(), text=dict(kind="transformer", depth=2, heads=4, pooling="mean")
    ),
  )
  c.precision.compute = "float32"
  c.objectives.align = dict(kind="contrastive", between=("audio", "text"))
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  retrieval = dict(kind="retrieval", source="spoken_emoji", between=("audio", "text"), by="voice")
  c.evaluation.evaluators["retrieval/validation"] = dict(**retrieval, split="validation")
  c.evaluation.evaluators["retrieval/test_voices"] = dict(**retrieval, split="test_voices")
  return c


def audio_encoder(frequency_warp: float = 0.1) -> dict:
  """Whisper's encoder, small, whose spectrograms are masked and warped in training; of the other
  recipes of speech too.
  """
  return dict(
    kind="whisper",
    mels=40,
    strides=(2, 2),
    normalisation="utterance",
    depth=3,
    heads=4,
    time_masks=1,
    time_width=12,
    frequency_masks=1,
    frequency_width=6,
    time_warp=0.1,
    frequency_warp=frequency_warp,
  )
