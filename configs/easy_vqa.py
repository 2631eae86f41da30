"""Visual question answering on easy-VQA, with any fusion: `configs/easy_vqa.py:cross_attention`.

mmjax data build easy_vqa
mmjax data tokenizer --source easy_vqa --name easy_vqa --vocab-size 512
mmjax train --config configs/easy_vqa.py:cross_attention --workdir runs/easy_vqa
"""

import mmjax

# The others: concat, gated, weighted_sum, average, decision.
ATTENDING = ("cross_attention", "merged_attention", "perceiver")


def get_config(arg: str = "cross_attention"):
  """arg: the kind of fusion, or "question" for a model that is never shown the picture."""
  c = mmjax.config.base()
  c.train.steps = 1600
  c.train.batch_size = 64  # pictures, with 4 questions each: every picture is encoded once
  c.data.sources.vqa = dict(name="easy_vqa", text="question", cache=True)
  c.data.image.size = 64
  c.data.image.augment.flip = 0.5  # triangles stand upright: nothing else
  c.data.text.tokenizer = "easy_vqa"
  c.data.text.vocab_size = 512
  c.data.text.length = 16
  c.data.text.per_example = 4
  c.data.label = "answer"
  c.data.classes = 13

  blind = arg == "question"
  text = dict(kind="transformer", depth=2, heads=4, pooling="mean")
  image = dict(kind="vit", stem="convolution", patch=8, depth=1, heads=4)
  modalities = ("text",) if blind else ("text", "image")
  c.data.modalities = modalities
  c.model = dict(
    name="multitask",
    width=96,
    joint=False,
    encoders=dict(text=text) if blind else dict(text=text, image=image),
  )
  if not blind:
    c.model.fusion = dict(kind=arg, heads=4, depth=2) if arg in ATTENDING else dict(kind=arg)
  c.precision.compute = "float32"
  c.objectives.answer = dict(kind="classification", modalities=modalities)
  c.optimizer = dict(name="adamw", lr=1.5e-3, weight_decay=0.05)
  c.schedule = dict(name="cosine", warmup="10%")

  answers = dict(kind="classification", source="easy_vqa", modalities=modalities, text="question")
  c.evaluation.evaluators["answers/validation"] = dict(**answers, split="validation")
  c.evaluation.evaluators["answers/test"] = dict(**answers, split="test")
  return c
