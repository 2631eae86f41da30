"""Questions about clips of two emoji that move one after the other, by a language model over a
token a frame: what moves, which way, which first, at which second.

mmjax data build clip_questions
mmjax data tokenizer --source clip_questions --name clip_questions --vocab-size 1024 --model bpe --answers
mmjax train --config configs/clip_answers.py --workdir runs/clip_answers
"""  # noqa: E501

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 1300
  c.train.batch_size = 16  # rows, of up to four clips each
  c.data.sources.questions = dict(name="clip_questions", text="question", cache=True)
  c.data.text.tokenizer = "clip_questions"
  c.data.text.vocab_size = 1024
  c.data.video.size = 48
  c.data.video.frames = 12
  c.data.sequence.length = 104
  c.data.sequence.slots = 4
  c.data.sequence.video = 12

  video = dict(
    kind="frames",
    stem="convolution",
    channels=(24, 36, 96),
    temporal="transformer",
    depth=2,
    heads=4,
  )
  c.model = dict(
    name="language_model",
    width=128,
    depth=3,
    heads=4,
    mlp=352,
    both_ways="prompt",
    encoders=dict(video=video),
    connectors=dict(video=dict(kind="mlp", positions=True)),
  )
  c.precision.compute = "float32"
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  answers = dict(
    kind="answers",
    source="clip_questions",
    modalities=("video",),
    check="mmjax.data.builders.clip_questions:check_answer",
  )
  c.evaluation.evaluators["answers/validation"] = dict(**answers, split="validation")
  c.evaluation.evaluators["answers/test"] = dict(**answers, split="test")
  return c
