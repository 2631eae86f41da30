"""Questions about scenes and captions of them by a language model over picture tokens. It learns to
caption with the encoder of scene_captions, then to do both with an encoder that stays as it is.

mmjax data build emoji_scenes
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax data tokenizer --source emoji_scenes --name scenes --vocab-size 1024 --model bpe --answers
mmjax train --config configs/scene_captions.py --workdir runs/scene_captions
mmjax train --config configs/scene_answers.py:captions --workdir runs/scene_answers_captions
mmjax train --config configs/scene_answers.py --workdir runs/scene_answers
mmjax train --config configs/scene_answers.py:lora --workdir runs/scene_answers_lora  # by adapters
"""

import mmjax


def get_config(arg: str = ""):
  """arg: "captions" for these alone, "" for questions and captions after them, "lora" for both by
  adapters of low rank.
  """
  c = scenes()
  c.train.steps = 700 if arg == "captions" else 4000
  c.train.batch_size = 16  # rows, of up to four pictures each
  c.data.mix = "steps"
  c.data.sources.captions = dict(
    name="emoji_scenes", text="caption", captions=1, cache=True, weight=0.3
  )
  if arg != "captions":
    c.data.sources.questions = dict(name="emoji_scenes", text="question", cache=True, weight=0.7)
  c.data.sequence.length = 116
  c.data.sequence.slots = 4
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer = dict(
    name="muon",
    lr=7e-3,
    adam_rate=0.22,
    b2=0.98,
    weight_decay=0.1,
    decay=r".*/kernel",
    clip=0.0,
    moments="source",
  )
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)
  if arg == "captions":
    c.init["from"] = "runs/scene_captions"
    c.init.map = ((r"image/.*", r"\g<0>"), (r".*", None))
    c.optimizer.rates = ((r"image/.*", 0.1),)
  else:
    c.init["from"] = "runs/scene_answers_captions"
    c.optimizer.rates = ((r"image/.*", 0.0),)
  if arg == "lora":
    # Of the table too: words that no caption has are all alike in it.
    c.lora = dict(params=r"layers/.*kernel|embedding", rank=7, alpha=14.0)
    c.optimizer = dict(name="adamw", lr=4e-3, b2=0.98, weight_decay=0.0, moments="source")
    c.optimizer.rates = ((r"image/.*", 0.0),)

  captions = dict(
    kind="captions",
    source="emoji_scenes",
    check="mmjax.data.builders.emoji_scenes:check_caption",
    max_length=48,
  )
  answers = dict(
    kind="answers", source="emoji_scenes", check="mmjax.data.builders.emoji_scenes:check_answer"
  )
  for split in ("validation", "test"):
    c.evaluation.evaluators[f"captions/{split}"] = dict(**captions, split=split)
    if arg != "captions":
      c.evaluation.evaluators[f"answers/{split}"] = dict(**answers, split=split)
  return c


def scenes():
  """The model and what it reads, which dialogues go on with (chat_scenes.py)."""
  c = mmjax.config.base()
  c.data.image.size = 64
  c.data.text.tokenizer = "scenes"
  c.data.text.vocab_size = 1024
  c.data.sequence.image = 16
  c.model = dict(
    name="language_model",
    width=128,
    depth=3,
    heads=4,
    mlp=352,
    both_ways="prompt",
    encoders=dict(image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4)),
    connectors=dict(image=dict(kind="mlp", fold=2, positions=True)),
  )
  c.precision.compute = "float32"
  return c
