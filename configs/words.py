"""A language model from scratch on English that every Python has: the topics of its help, and the
docstrings of its standard library.

mmjax data build python_topics
mmjax data tokenizer --source python_topics --split train+docstrings --name python_topics --vocab-size 2048
mmjax train --config configs/words.py --workdir runs/words
"""  # noqa: E501

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 400
  c.train.batch_size = 16
  words = dict(name="python_topics", text="document", cache=True)
  c.data.sources.topics = dict(**words, weight=0.25)
  c.data.sources.docstrings = dict(**words, split="docstrings", weight=0.75)
  c.data.text.tokenizer = "python_topics"
  c.data.text.vocab_size = 2048
  c.data.sequence.length = 256

  c.model = dict(
    name="language_model", width=128, depth=3, heads=4, mlp=352, dropout=0.05, encoders={}
  )
  c.precision.compute = "float32"
  c.objectives.words = dict(kind="language_modelling")
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.3, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="5%", final=0.01)

  for split in ("validation", "test"):
    likelihood = dict(kind="likelihood", source="python_topics", split=split)
    c.evaluation.evaluators[f"likelihood/{split}"] = likelihood
  return c
