"""A language model from scratch on English that every Python has: the topics of its help.

mmjax data build python_topics
mmjax data tokenizer --source python_topics --name python_topics --vocab-size 1536
mmjax train --config configs/words.py --workdir runs/words
"""

import mmjax


def get_config(arg: str = ""):
  c = mmjax.config.base()
  c.train.steps = 900
  c.train.batch_size = 16
  c.data.sources.topics = dict(name="python_topics", text="document", cache=True)
  c.data.text.tokenizer = "python_topics"
  c.data.text.vocab_size = 1536
  c.data.sequence.length = 256

  c.model = dict(
    name="language_model", width=192, depth=4, heads=4, mlp=512, dropout=0.2, encoders={}
  )
  c.precision.compute = "float32"
  c.objectives.words = dict(kind="language_modelling")
  c.optimizer = dict(name="muon", lr=9e-3, adam_rate=0.3, weight_decay=0.1, decay=r".*/kernel")
  c.schedule = dict(name="cosine", warmup="5%", final=0.02)

  likelihood = dict(kind="likelihood", source="python_topics")
  c.evaluation.evaluators["likelihood/validation"] = dict(**likelihood, split="validation")
  c.evaluation.evaluators["likelihood/test"] = dict(**likelihood, split="test")
  return c
