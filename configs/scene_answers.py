"""Questions about scenes and captions of them by a language model over picture tokens, in two
commands: it learns to caption, then to do both.

mmjax data build emoji_scenes
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax train --config configs/scene_answers.py:captions --workdir runs/scene_answers_captions
mmjax train --config configs/scene_answers.py --workdir runs/scene_answers
"""

import mmjax


def get_config(arg: str = ""):
  """arg: "captions" for the first command, "" for the second."""
  both = arg != "captions"
  c = scenes()
  c.train.steps = 1000 if both else 900
  c.train.batch_size = 16  # rows, of up to four pictures each
  c.data.mix = "steps"
  c.data.sources.captions = dict(name="emoji_scenes", text="caption", captions=1, cache=True)
  if both:
    c.data.sources.questions = dict(name="emoji_scenes", text="question", cache=True)
    c.init["from"] = "runs/scene_answers_captions"
  c.data.text.per_example = 2  # questions about each picture, which is encoded once
  c.data.sequence.length = 160 if both else 128
  c.data.sequence.slots = 4
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer = dict(
    name="muon",
    lr=7e-3 if both else 9e-3,
    adam_rate=0.22,
    b2=0.98,
    weight_decay=0.1,
    decay=r".*/kernel",
    clip=0.0,
    moments="source",
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  captions = dict(
    kind="captions",
    source="emoji_scenes",
    check="mmjax.data.builders.emoji_scenes:check_caption",
    max_length=48,
  )
  for split in ("validation", "test"):
    c.evaluation.evaluators[f"captions/{split}"] = dict(**captions, split=split)
    if both:
      answers = dict(kind="answers", source="emoji_scenes", split=split)
      c.evaluation.evaluators[f"answers/{split}"] = answers
  return c


def scenes():
  """The model and what it reads, which dialogues go on with (chat_scenes.py)."""
  c = mmjax.config.base()
  c.data.image.size = 64
  c.data.text.tokenizer = "emoji_scenes"
  c.data.text.vocab_size = 640
  c.data.sequence.image = 16
  c.model = dict(
    name="language_model",
    width=128,
    depth=3,
    heads=4,
    mlp=352,
    encoders=dict(image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4)),
    connectors=dict(image=dict(kind="mlp", fold=2)),
  )
  c.precision.compute = "float32"
  return c
