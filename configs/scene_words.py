"""Masked language modelling of scene captions, with the picture in sight and without it.

mmjax data build emoji_scenes
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax train --config configs/scene_words.py --workdir runs/scene_words
mmjax train --config configs/scene_words.py:blind --workdir runs/scene_words_blind
"""

import mmjax


def get_config(arg: str = ""):
  """arg "blind": the same model is never shown the picture."""
  c = mmjax.config.base()
  c.train.steps = 620
  c.train.batch_size = 64
  # The one in reading order.
  c.data.sources.scenes = dict(name="emoji_scenes", captions=1, cache=True)
  c.data.image.size = 64
  c.data.text.tokenizer = "emoji_scenes"
  c.data.text.vocab_size = 640
  c.data.text.length = 48
  c.data.text.words = True

  context = () if arg == "blind" else ("image",)
  c.data.modalities = ("text", *context)
  encoders = dict(text=dict(kind="transformer", depth=1, heads=4, pooling="mean"))
  if context:
    encoders["image"] = dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4)
  c.model = dict(
    name="fusion_encoder",
    width=128,
    joint=True,
    masked_text=True,
    scale_init=10.0,
    encoders=encoders,
    fusion=dict(kind="cross_attention", depth=2, heads=4),
  )
  c.precision.compute = "float32"
  c.objectives.words = dict(kind="masked_tokens", context=context, rate=0.4)
  # what a picture shows is learned from whole captions; which word it is, from the hidden ones
  # (ALBEF)
  if context:
    c.objectives.align = dict(kind="contrastive", between=("image", "text"), weight=0.1)
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  # A first try (both captions, 15% hidden, no contrastive loss) learned nothing from pictures on
  # either split; this is the second.
  words = dict(kind="masked_words", source="emoji_scenes", context_modalities=context)
  c.evaluation.evaluators["words/validation"] = dict(**words, split="validation")
  c.evaluation.evaluators["words/test"] = dict(**words, split="test")
  return c
