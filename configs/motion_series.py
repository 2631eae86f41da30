"""Sensor series: which of 7 motions a noisy track of position and size shows; a minute on two CPU
cores.

mmjax data build moving_emoji
mmjax train --config configs/motion_series.py --workdir runs/motion_series
"""

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 300
  c.train.batch_size = 128
  c.data.sources.tracks = dict(name="moving_emoji", cache=True)
  c.data.series.length = 64
  c.data.series.channels = 3
  c.data.label = "label"
  c.data.classes = 7

  c.model = dict(
    name="multitask",
    width=64,
    joint=False,
    encoders=dict(series=dict(kind="series", patch=4, depth=3, heads=4)),
  )
  c.precision.compute = "float32"
  c.objectives.classify = dict(kind="classification", modalities=("series",))
  c.optimizer = dict(name="adamw", lr=2e-3, weight_decay=0.05)
  c.schedule = dict(name="cosine", warmup="5%")

  motion = dict(kind="classification", source="moving_emoji", modalities=("series",))
  c.evaluation.evaluators["motion/validation"] = dict(**motion, split="validation")
  c.evaluation.evaluators["motion/test"] = dict(**motion, split="test")
  c.evaluation.evaluators["motion/new_objects"] = dict(**motion, split="test_objects")
  return c
