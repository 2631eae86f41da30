"""Pictures with skewed labels: whether there is an animal in a cluttered scene, as there is in one
of fourteen.

mmjax data build rare_animals
mmjax train --config configs/rare_animals.py --workdir runs/rare_animals
"""

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 1600
  c.train.batch_size = 64
  # Half of a batch has an animal.
  c.data.sources.scenes = dict(name="rare_animals", balance=True, cache=True)
  c.data.image.size = 48
  c.data.image.augment.flip = 0.5
  c.data.image.augment.shift = 0.1
  c.data.label = "label"
  c.data.classes = 2

  c.model = dict(
    name="multitask",
    width=128,
    joint=False,
    encoders=dict(
      image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4, pooling="attention")
    ),
  )
  c.precision.compute = "float32"
  c.objectives.find = dict(kind="classification", modalities=("image",))
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  animals = dict(kind="classification", source="rare_animals", positive="animal")
  c.evaluation.evaluators["animals/validation"] = dict(**animals, split="validation")
  c.evaluation.evaluators["animals/test"] = dict(**animals, split="test")
  return c
