"""Emoji drawn from their names by a small GAN: a generator and a discriminator, each with its own
optimizer.

mmjax data build openmoji
mmjax data tokenizer --source openmoji --split train+validation --languages en --vocab-size 1024 --name quickstart
mmjax train --config configs/emoji_gan.py --workdir runs/emoji_gan
"""  # noqa: E501

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 650
  c.train.batch_size = 64
  c.train.ema = 0.99
  c.data.sources.emoji = dict(
    name="openmoji", split="train+validation", languages=("en",), cache=True
  )
  c.data.modalities = ("image", "text")
  c.data.image.size = 32
  c.data.text.tokenizer = "quickstart"
  c.data.text.vocab_size = 1024
  c.data.text.length = 20
  c.data.text.lowercase = True
  c.data.text.drop_words = 0.1

  c.model = dict(
    name="text_to_image_gan",
    width=128,
    encoders=dict(text=dict(kind="transformer", depth=1, heads=4, pooling="mean")),
  )
  c.precision.compute = "float32"
  c.objectives.draw = dict(kind="gan", group="discriminator", reconstruction=10.0)
  # The text encoder learns with the discriminator, which tells real pictures' captions apart; the
  # generator takes it as it is.
  c.optimizer = dict(name="muon", lr=6e-3, adam_rate=0.22, beta=0.9, b2=0.98, clip=0.0)
  c.optimizers.discriminator = dict(
    name="muon",
    lr=4e-3,
    adam_rate=0.22,
    beta=0.9,
    b2=0.98,
    clip=0.0,
    params=r"(discriminator|text)/.*",
  )
  c.schedule = dict(name="cosine", warmup=20, final=0.05)
  c.checkpoint.every = "25%"

  # Settings were compared on the first of these; the second was looked at once.
  drawn = dict(kind="generated", source="openmoji", train_split="train+validation")
  c.evaluation.evaluators["generated/combinations"] = dict(**drawn, split="test_combinations")
  c.evaluation.evaluators["generated/concepts"] = dict(**drawn, split="test_concepts")
  return c
