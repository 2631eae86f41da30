"""Image-text dual encoder on OpenMoji: minutes on two CPU cores (bash launch/quickstart.sh).

Hyper-parameters were chosen on the `validation` split with `configs/quickstart.py:validation`; the
run itself trains on both. The two test galleries were looked at only to report them.
"""

import mmjax


def get_config(arg: str = ""):
  """arg "validation": trains without the validation split and evaluates on it."""
  c = mmjax.config.base()
  c.train.steps = 400
  c.train.batch_size = 192

  split = "train" if arg == "validation" else "train+validation"
  c.data.sources.emoji = dict(name="openmoji", split=split, languages=("en",), cache=True)
  c.data.image.size = 48
  c.data.image.augment.shift = 0.06
  c.data.image.augment.scale = (0.86, 1.16)
  c.data.image.augment.rotate = 10.0
  c.data.text.tokenizer = "quickstart"
  c.data.text.vocab_size = 1024
  c.data.text.length = 20
  c.data.text.lowercase = True
  c.data.text.drop_words = 0.1

  c.model = dict(
    name="dual_encoder",
    width=128,
    scale_init=10.0,
    encoders=dict(
      image=dict(kind="vit", stem="half_patch", patch=8, depth=3, heads=4),
      text=dict(kind="transformer", depth=2, heads=4, pooling="mean"),
    ),
  )
  c.precision.compute = "float32"
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), loss="softmax")
  # Matrices by Muon, the rest by Adam at 0.22 of its rate; about three times as quick as AdamW
  # here.
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)
  c.log.every = 5

  retrieval = dict(kind="retrieval", source="openmoji")
  if arg == "validation":
    c.evaluation.evaluators["retrieval/validation"] = dict(**retrieval, split="validation")
  else:
    c.evaluation.evaluators["retrieval/combinations"] = dict(**retrieval, split="test_combinations")
    c.evaluation.evaluators["retrieval/concepts"] = dict(**retrieval, split="test_concepts")
    c.evaluation.evaluators["zero_shot/groups"] = dict(
      kind="zero_shot", source="openmoji", split="test_combinations"
    )
  return c
