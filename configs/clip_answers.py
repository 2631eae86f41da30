"""Questions about clips of two emoji that move one after the other, by a language model over a
token a frame: what moves, which way, which first, at which second. The encoder of video_captions
learns to caption both moves first, and stays as it is then.

mmjax data build moving_emoji
mmjax data build clip_questions
mmjax data tokenizer --source moving_emoji --name moving_emoji --vocab-size 1024
mmjax data tokenizer --source clip_questions --name clips --vocab-size 1024 --model bpe --answers
mmjax train --config configs/video_captions.py --workdir runs/video_captions
mmjax train --config configs/clip_answers.py:captions --workdir runs/clip_captions
mmjax train --config configs/clip_answers.py --workdir runs/clip_answers
"""

import video_captions


def get_config(arg: str = ""):
  """arg: "captions" for these alone, by an encoder and a decoder; "" for questions and captions
  after them.
  """
  c = video_captions.clips()
  c.data.text.tokenizer = "clips"
  if arg == "captions":
    learn_to_caption(c)
    kind = dict(kind="captions", check="mmjax.data.builders.clip_questions:check_caption")
  else:
    learn_to_answer(c)
    kind = dict(kind="answers", check="mmjax.data.builders.clip_questions:check_answer")
  for split in ("validation", "test"):
    evaluator = dict(**kind, source="clip_questions", modalities=("video",), split=split)
    c.evaluation.evaluators[f"{kind['kind']}/{split}"] = evaluator
  return c


def learn_to_caption(c) -> None:
  c.init["from"] = "runs/video_captions"
  c.init.map = ((r"video/.*", r"\g<0>"), (r".*", None))
  c.train.steps = 500
  c.train.batch_size = 64
  c.data.sources.clips = dict(name="clip_questions", cache=True)
  c.data.video.augment.crop = (0.8, 1.0)
  c.data.text.length = 32
  video_captions.learn_to_caption(c)
  c.optimizer.rates = ((r"video/frame/.*", 0.1),)


def learn_to_answer(c) -> None:
  """Four questions about a clip, which see it and it them; it is encoded once."""
  c.init["from"] = "runs/clip_captions"
  c.init.map = ((r"video/.*", r"\g<0>"), (r".*", None))
  c.train.steps = 700
  c.train.batch_size = 24  # rows, of two clips each
  c.data.mix = "steps"
  c.data.sources.captions = dict(name="clip_questions", text="caption", cache=True, weight=0.2)
  c.data.sources.questions = dict(name="clip_questions", text="question", cache=True, weight=0.8)
  c.data.text.per_example = 4
  c.data.sequence.length = 200
  c.data.sequence.slots = 2
  c.data.sequence.video = 12
  c.model = dict(
    name="language_model",
    width=128,
    depth=3,
    heads=4,
    mlp=352,
    both_ways="prompt",
    encoders=dict(video=video_captions.VIDEO),
    connectors=dict(video=dict(kind="mlp", positions=True)),
  )
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer.lr = 7e-3
  c.optimizer.moments = "source"
  c.optimizer.rates = ((r"video/.*", 0.0),)
