"""Text pretraining of a language model of 1.1 billion parameters on a v5e-64.

The shape and recipe of TinyLlama (Zhang et al. 2024, arXiv:2401.02385): rows of 2,048 tokens, two
million tokens a step; here 300 billion in all.
  mmjax data convert documents texts --name texts
  mmjax plan --config configs/words_1b.py --topology v5e-64
"""

import mmjax


def get_config(arg: str = ""):
  """arg: name of a data set of documents."""
  c = mmjax.config.base()
  c.train.steps = 143_000
  c.train.batch_size = 1024

  c.data.sources.texts = dict(name=arg or "texts", text="document")
  c.data.workers = 8
  c.data.text.tokenizer = (
    "c4_en"  # any sentencepiece of 32,000: mmjax data tokenizer --vocab-size 32000 --name c4_en
  )
  c.data.text.vocab_size = 32000
  c.data.sequence.length = 2048

  c.model = dict(
    name="language_model",
    width=2048,
    depth=22,
    heads=32,
    mlp=5632,
    tied=False,
    eos_id=2,
    pad_id=0,
    remat="full",
    block=dict(key_value_heads=4),
    encoders={},
  )
  c.objectives.words = dict(kind="language_modelling")
  c.optimizer = dict(name="adamw", lr=4e-4, b2=0.95, weight_decay=0.1, clip=1.0)
  c.schedule = dict(name="cosine", warmup=2000, final=0.1)
  c.precision.compute = "bfloat16"
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.sharding = "fsdp"
  c.checkpoint.every = 2000
  c.checkpoint.minutes = 30.0
  c.log.every = 20
  return c
