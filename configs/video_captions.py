"""Captions of clips: what moves, and how. A frame encoder with a transformer over time, and a
decoder.

mmjax data build moving_emoji
mmjax data tokenizer --source moving_emoji --name moving_emoji --vocab-size 1024
mmjax train --config configs/video_captions.py --workdir runs/video_captions
"""

import mmjax

VIDEO = dict(
  kind="frames",
  stem="convolution",
  channels=(24, 36, 96, 128),
  strides=(2, 2, 2, 1),  # the last sees a whole emoji
  where="points",
  changes=True,
  temporal="transformer",
  depth=2,
  heads=4,
)


def get_config(arg: str = ""):
  c = clips()
  c.train.steps = 560
  c.train.batch_size = 96
  c.data.sources.clips = dict(name="moving_emoji", cache=True)
  # One for all frames: else the few clips of each emoji are learned by heart.
  c.data.video.augment.crop = (0.5, 1.0)
  c.data.text.tokenizer = "moving_emoji"
  c.data.text.length = 20
  learn_to_caption(c)
  c.schedule.warmup = "10%"

  captions = dict(
    kind="captions",
    source="moving_emoji",
    modalities=("video",),
    check="mmjax.data.builders.moving_emoji:check_caption",
  )
  c.evaluation.evaluators["captions/validation"] = dict(**captions, split="validation")
  c.evaluation.evaluators["captions/test"] = dict(**captions, split="test")
  c.evaluation.evaluators["captions/new_objects"] = dict(**captions, split="test_objects")
  return c


def clips():
  """What is read of clips, and how it is learned, which clip_answers goes on with."""
  c = mmjax.config.base()
  c.data.video.size = 48
  c.data.video.frames = 12
  c.data.text.vocab_size = 1024
  c.precision.compute = "float32"
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)
  return c


def learn_to_caption(c) -> None:
  c.data.modalities = ("video", "text")
  c.model = dict(
    name="captioner",
    width=128,
    encoders=dict(video=VIDEO),
    decoder=dict(depth=2, heads=4, memory_positions=True),
  )
  c.objectives.caption = dict(kind="captioning", source=("video",))
