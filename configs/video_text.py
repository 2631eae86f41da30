"""Video-text contrastive: which way does the emoji move? CLIP4Clip's sequential transformer against
mean pooling.

mmjax data build moving_emoji
mmjax data tokenizer --source moving_emoji --name moving_emoji --vocab-size 1024
mmjax train --config configs/video_text.py --workdir runs/video_text             # a transformer over the frames
mmjax train --config configs/video_text.py:mean --workdir runs/video_text_mean   # the mean of the frames
"""  # noqa: E501

import mmjax


def get_config(arg: str = "transformer"):
  """arg: "transformer" or "mean", what is done with the frames."""
  c = mmjax.config.base()
  c.train.steps = 500
  c.train.batch_size = (
    98  # 14 groups of one emoji in all 7 motions, so that captions differ in the motion alone
  )
  c.data.sources.clips = dict(name="moving_emoji", cache=True, group=7)
  c.data.video.size = 48
  c.data.video.frames = 12
  c.data.text.tokenizer = "moving_emoji"
  c.data.text.vocab_size = 1024
  c.data.text.length = 20

  video = dict(
    kind="frames",
    stem="convolution",
    channels=(24, 36, 96),
    temporal=arg or "transformer",
    depth=2,
    heads=4,
  )
  c.model = dict(
    name="dual_encoder",
    width=128,
    scale_init=10.0,
    encoders=dict(video=video, text=dict(kind="transformer", depth=2, heads=4, pooling="mean")),
  )
  c.precision.compute = "float32"
  c.objectives.align = dict(kind="contrastive", between=("video", "text"))
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  direction = dict(
    kind="multiple_choice",
    source="moving_emoji",
    choices="mmjax.data.builders.moving_emoji:choices",
  )
  c.evaluation.evaluators["direction/validation"] = dict(**direction, split="validation")
  c.evaluation.evaluators["direction/test"] = dict(**direction, split="test", by="motion")
  c.evaluation.evaluators["direction/new_objects"] = dict(**direction, split="test_objects")
  c.evaluation.evaluators["retrieval/test"] = dict(
    kind="retrieval", source="moving_emoji", split="test", between=("video", "text")
  )
  return c
