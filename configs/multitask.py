"""One model, three tasks, a source of its own each: captions of scenes, questions about shapes,
names of emoji.

mmjax data build emoji_scenes && mmjax data build easy_vqa && mmjax data build openmoji
mmjax data tokenizer --source openmoji,emoji_scenes,easy_vqa --languages en --vocab-size 1024 --name multitask
mmjax train --config configs/multitask.py --workdir runs/multitask
mmjax train --config configs/multitask.py:captions --workdir runs/multitask_captions   # one task alone
"""  # noqa: E501

import mmjax

STEPS = dict(captions=650, questions=350, names=800)


def get_config(arg: str = ""):
  """arg: "captions", "questions" or "names" alone; "" = all three, their steps in turn."""
  tasks = (arg,) if arg else tuple(STEPS)
  c = mmjax.config.base()
  c.train.steps = sum(STEPS[task] for task in tasks)
  c.train.batch_size = 96
  c.data.mix = "steps"
  c.data.modalities = ("image", "text")
  sources = dict(
    captions=dict(name="emoji_scenes", captions=1, cache=True, length=32),
    questions=dict(name="easy_vqa", text="question", cache=True, length=16),
    names=dict(name="openmoji", split="train+validation", languages=("en",), cache=True, length=24),
  )
  for task in tasks:
    c.data.sources[task] = dict(sources[task], weight=float(STEPS[task]))
  c.data.image.size = 64
  c.data.text.tokenizer = "multitask"
  c.data.text.vocab_size = 1024
  c.data.text.length = 32
  c.data.text.lowercase = True
  if "questions" in tasks:
    c.data.label = "answer"
    c.data.classes = 13

  c.model = dict(
    name="multitask",
    width=128,
    scale_init=10.0,
    encoders=dict(
      image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4, positions="sincos"),
      text=dict(kind="transformer", depth=2, heads=4, pooling="mean"),
    ),
    fusion=dict(kind="cross_attention", depth=1, heads=4),
    decoder=dict(depth=2, heads=4, memory_positions=True),
  )
  c.precision.compute = "float32"
  objectives = dict(
    captions=dict(kind="captioning", source=("image",), sources=("captions",)),
    questions=dict(kind="classification", modalities=("text", "image"), sources=("questions",)),
    names=dict(kind="contrastive", between=("image", "text"), sources=("names",)),
  )
  for task in tasks:
    c.objectives[task] = objectives[task]
  # Gradients of the names are some ten times those of the captions in the encoder that all share:
  # in moments of their own every task takes steps of full size, and no weights are needed. Three
  # tasks' steps pass through that encoder, so that the rate is lower than for one.
  c.optimizer = dict(
    name="muon",
    lr=6e-3,
    adam_rate=0.3,
    b2=0.98,
    weight_decay=0.1,
    decay=r".*/kernel",
    clip=0.0,
    moments="source",
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  captions = dict(
    kind="captions", source="emoji_scenes", check="mmjax.data.builders.emoji_scenes:check_caption"
  )
  answers = dict(
    kind="classification", source="easy_vqa", modalities=("text", "image"), text="question"
  )
  evaluators = dict(
    captions={
      "captions/validation": dict(**captions, split="validation"),
      "captions/test": dict(**captions, split="test"),
    },
    questions={
      "answers/validation": dict(**answers, split="validation"),
      "answers/test": dict(**answers, split="test"),
    },
    names={
      "retrieval/combinations": dict(kind="retrieval", source="openmoji", split="test_combinations")
    },
  )
  for task in tasks:
    for name, entry in evaluators[task].items():
      c.evaluation.evaluators[name] = entry
  return c
