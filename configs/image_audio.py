"""Pictures and speech that meet in text alone: no picture is ever shown with its sound (as in
ImageBind, Girdhar et al. 2023).

mmjax data build openmoji && mmjax data build spoken_emoji
mmjax data tokenizer --source openmoji --split train+validation --languages en --vocab-size 1024 --name quickstart
mmjax train --config configs/image_audio.py --workdir runs/image_audio
"""  # noqa: E501

import speech_text

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 900
  c.train.batch_size = 128
  c.data.mix = "steps"
  c.data.sources.pictures = dict(
    name="openmoji",
    split="train+validation",
    languages=("en",),
    modalities=("image", "text"),
    cache=True,
  )
  c.data.sources.speech = dict(
    name="spoken_emoji", languages=("en",), modalities=("audio", "text"), cache=True
  )
  c.data.image.size = 48
  c.data.image.augment.shift = 0.06
  c.data.image.augment.scale = (0.86, 1.16)
  c.data.image.augment.rotate = 10.0
  c.data.audio.seconds = 2.6
  c.data.audio.augment.speed = (0.85, 1.18)
  c.data.audio.augment.noise = 0.05
  c.data.text.tokenizer = "quickstart"
  c.data.text.vocab_size = 1024
  c.data.text.length = 20
  c.data.text.lowercase = True

  c.model = dict(
    name="dual_encoder",
    width=128,
    scale_init=10.0,
    encoders=dict(
      image=dict(kind="vit", stem="half_patch", patch=8, depth=3, heads=4),
      audio=speech_text.audio_encoder(),
      text=dict(kind="transformer", depth=2, heads=4, pooling="mean"),
    ),
  )
  c.precision.compute = "float32"
  c.objectives.image_text = dict(
    kind="contrastive", between=("image", "text"), sources=("pictures",)
  )
  c.objectives.audio_text = dict(kind="contrastive", between=("audio", "text"), sources=("speech",))
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  # Settings are those of quickstart.py and speech_text.py, which were chosen on validation splits;
  # nothing was compared on these.
  c.evaluation.evaluators["retrieval/image_audio"] = dict(
    kind="retrieval", source="spoken_emoji", split="test_phrases", between=("image", "audio")
  )
  c.evaluation.evaluators["retrieval/image_text"] = dict(
    kind="retrieval", source="openmoji", split="test_combinations"
  )
  c.evaluation.evaluators["retrieval/audio_text"] = dict(
    kind="retrieval",
    source="spoken_emoji",
    split="test_phrases",
    between=("audio", "text"),
    by="voice",
  )
  return c
