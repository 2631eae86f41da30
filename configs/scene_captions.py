"""Captions of scenes by CoCa (Yu et al. 2022): one model that contrasts pictures with texts and
writes captions.

mmjax data build emoji_scenes
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax train --config configs/scene_captions.py --workdir runs/scene_captions
"""

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 900
  c.train.batch_size = 64
  # The one in reading order.
  c.data.sources.scenes = dict(name="emoji_scenes", captions=1, cache=True)
  c.data.image.size = 64
  c.data.text.tokenizer = "emoji_scenes"
  c.data.text.vocab_size = 640
  c.data.text.length = 48

  c.model = dict(
    name="captioner",
    width=128,
    joint=True,
    scale_init=10.0,
    encoders=dict(
      image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4),
      text=dict(kind="transformer", depth=1, heads=4, pooling="mean"),
    ),
    decoder=dict(depth=2, heads=4, memory_positions=True),
  )
  c.precision.compute = "float32"
  c.objectives.caption = dict(kind="captioning", source=("image",))
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), weight=0.1)
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  captions = dict(
    kind="captions", source="emoji_scenes", check="mmjax.data.builders.emoji_scenes:check_caption"
  )
  c.evaluation.evaluators["captions/validation"] = dict(**captions, split="validation")
  c.evaluation.evaluators["captions/test"] = dict(**captions, split="test")
  return c
