"""Image-text dual encoder on OpenMoji: minutes on two CPU cores (bash launch/quickstart.sh)."""

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 400
  c.train.batch_size = 256

  c.data.sources.emoji = dict(name="openmoji", split="train+validation", languages=("en",), cache=True)
  c.data.image.size = 48
  c.data.text = dict(tokenizer="quickstart", vocab_size=1024, length=16)

  c.model = dict(name="dual_encoder", width=128, encoders=dict(
    image=dict(kind="vit", patch=8, width=128, depth=4, heads=4),
    text=dict(kind="transformer", width=128, depth=4, heads=4),
  ))
  c.precision.compute = "float32"
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), loss="softmax")
  c.optimizer = dict(name="adamw", lr=2e-3, weight_decay=0.05)
  c.schedule = dict(name="cosine", warmup="10%")

  c.evaluation.every = "100%"
  c.evaluation.evaluators["retrieval/combinations"] = dict(kind="retrieval", source="openmoji", split="test_combinations")
  c.evaluation.evaluators["retrieval/concepts"] = dict(kind="retrieval", source="openmoji", split="test_concepts")
  c.evaluation.evaluators["zero_shot/groups"] = dict(kind="zero_shot", source="openmoji", split="test_combinations")
  return c
