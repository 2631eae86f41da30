"""Dialogues about scenes, in which later questions refer back: tuned on conversations, then by
judged answers (DPO); or on fewer of them, then by rewards of its own answers (GRPO).

mmjax data build emoji_scenes
mmjax data build scene_dialogues
mmjax data build scene_preferences
mmjax data tokenizer --source emoji_scenes --name emoji_scenes --vocab-size 640
mmjax data tokenizer --source emoji_scenes --name scenes --vocab-size 1024 --model bpe --answers
mmjax train --config configs/scene_captions.py --workdir runs/scene_captions
mmjax train --config configs/scene_answers.py:captions --workdir runs/scene_answers_captions
mmjax train --config configs/scene_answers.py --workdir runs/scene_answers
mmjax train --config configs/chat_scenes.py --workdir runs/chat_scenes
mmjax train --config configs/chat_scenes.py:dpo --workdir runs/chat_scenes_dpo
mmjax train --config configs/chat_scenes.py:half --workdir runs/chat_scenes_half
mmjax train --config configs/chat_scenes.py:grpo --workdir runs/chat_scenes_grpo
"""

import scene_answers

# Short, since questions end with their mark, and answers with <eos>.
TEMPLATE = """\
{% for message in messages %}
{{- message.content + ' ' -}}
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
"""


def get_config(arg: str = ""):
  """arg: "" for conversations, "dpo" for judged answers after them; "half" for an eighth of the
  steps, which is half trained, "grpo" for rewards after these.
  """
  c = scene_answers.scenes()
  c.data.text.template = TEMPLATE
  c.data.text.loss = "each"  # a question is read with all that was said before
  if arg == "dpo":
    learn_from_judged_answers(c)
  elif arg == "grpo":
    learn_from_rewards(c)
  else:
    learn_from_conversations(c)
    c.train.steps = 250 if arg == "half" else 2000
  for split in ("validation", "test"):
    dialogue = dict(kind="dialogue", source="scene_dialogues", split=split, max_length=32)
    c.evaluation.evaluators[f"dialogue/{split}"] = dialogue
    preference = dict(kind="preference", source="scene_preferences", split=split)
    c.evaluation.evaluators[f"preference/{split}"] = preference
  return c


def learn_from_conversations(c) -> None:
  """Of captions too, which name all that is there."""
  c.init["from"] = "runs/scene_answers"
  c.train.batch_size = 16  # rows, of up to four pictures each
  c.data.sources.dialogues = dict(
    name="scene_dialogues", text="conversation", cache=True, weight=0.7
  )
  c.data.sources.captions = dict(
    name="emoji_scenes", text="caption", captions=1, cache=True, weight=0.3
  )
  c.data.sequence.length = 224
  c.data.sequence.slots = 4
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer = dict(
    name="muon", lr=6e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.optimizer.rates = ((r"image/.*", 0.0),)
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)


def learn_from_judged_answers(c) -> None:
  c.init["from"] = "runs/chat_scenes"
  c.train.steps = 200
  c.train.batch_size = 12
  c.data.sources.judged = dict(name="scene_preferences", text="preference", cache=True)
  c.data.sequence.length = 384
  c.data.sequence.slots = 4
  c.objectives.judged = dict(kind="preference", form="dpo", beta=0.1)
  c.objectives.text = dict(kind="language_modelling")  # the preferred answers as texts
  c.optimizer = dict(name="adamw", lr=1.5e-5, b2=0.98)
  c.optimizer.rates = ((r"image/.*", 0.0),)
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)


def learn_from_rewards(c) -> None:
  c.init["from"] = "runs/chat_scenes_half"
  c.train.steps = 300
  c.train.batch_size = 32  # prompts, with four answers each
  c.data.sources.dialogues = dict(name="scene_dialogues", text="conversation", cache=True)
  c.data.sequence.length = 128
  c.data.sequence.slots = 1
  c.objectives.reward = dict(kind="grpo", answers=4, max_length=10, exact=1.0)
  c.optimizer = dict(name="adamw", lr=4e-4, b2=0.98)
  c.optimizer.rates = ((r"image/.*", 0.0),)
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)
