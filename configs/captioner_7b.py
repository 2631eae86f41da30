"""A captioner of 7 billion parameters: a causal decoder of Llama 7B's width and depth that attends
to the tokens of a ViT-L/14.

Shapes of Touvron et al. 2023 (arXiv:2302.13971, table 2) with attention to the picture in every
block; pictures of 336 pixels (576 tokens), texts of 1,024 tokens, batch 512 on a v5p-128 (64
chips).
  mmjax plan --config configs/captioner_7b.py --topology v5p-128
"""

import mmjax


def get_config(arg: str = ""):
  """arg: pattern of WebDataset tars with pictures (jpg) and texts (txt)."""
  c = mmjax.config.base()
  c.train.steps = "2e8 examples"
  c.train.batch_size = 512

  c.data.sources.web = dict(name="tars", path=arg or "data/web-{00000..09999}.tar")
  c.data.workers = 8
  c.data.modalities = ("image", "text")
  c.data.image.size = 336
  c.data.text.tokenizer = (
    "c4_en"  # any sentencepiece of 32,000: mmjax data tokenizer --vocab-size 32000 --name c4_en
  )
  c.data.text.vocab_size = 32000
  c.data.text.length = 1024

  c.model = dict(
    name="captioner",
    width=4096,
    encoders=dict(
      image=dict(kind="vit", patch=14, width=1024, depth=24, heads=16, mlp=4096, remat="full")
    ),
    decoder=dict(depth=32, heads=32, mlp=11008, bias=False, remat="dots_no_batch"),
  )
  c.objectives.caption = dict(kind="captioning", source=("image",))
  c.optimizer = dict(
    name="adamw", lr=3e-4, b2=0.95, weight_decay=0.1, clip=1.0, state_dtype="bfloat16"
  )
  c.schedule = dict(name="cosine", warmup=2000, final=0.1)
  c.precision.compute = "bfloat16"
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.sharding = "fsdp"
  c.checkpoint.every = 2000
  c.checkpoint.minutes = 30.0
  c.log.every = 20
  return c
