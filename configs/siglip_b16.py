"""SigLIP B/16 (Zhai et al. 2023, arXiv:2303.15343): pictures of 224 pixels, texts of 64 tokens,
batch 2048 on a v5e-16.

The shapes of Hugging Face's google/siglip-base-patch16-224, the loss and optimizer of the paper.
  mmjax plan --config configs/siglip_b16.py --topology v5e-16
"""

import mmjax


def get_config(arg: str = ""):
  """arg: pattern of WebDataset tars with pictures (jpg) and captions (txt)."""
  c = mmjax.config.base()
  c.train.steps = "9e9 examples"
  c.train.batch_size = 2048

  c.data.sources.web = dict(name="tars", path=arg or "data/web-{00000..09999}.tar")
  c.data.workers = 8
  c.data.image.size = 224
  c.data.image.resize = "squash"
  c.data.text.tokenizer = (
    "c4_en"  # any sentencepiece of 32,000: mmjax data tokenizer --vocab-size 32000 --name c4_en
  )
  c.data.text.vocab_size = 32000
  c.data.text.length = 64
  c.data.text.lowercase = True
  c.data.text.mask_padding = False
  c.data.text.punctuation = False

  tower = dict(width=768, depth=12, heads=12, mlp=3072, remat="dense_attention", scan_unroll=12)
  c.model = dict(
    name="dual_encoder",
    width=768,
    unprojected=("image",),
    projection_bias=True,
    bias=True,
    bias_init=-10.0,
    scale_init=10.0,
    scale_max=10_000.0,
    encoders=dict(
      image=dict(kind="vit", patch=16, pooling="attention", **tower),
      text=dict(kind="transformer", pooling="final", **tower),
    ),
  )
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), loss="sigmoid")
  c.optimizer = dict(
    name="adamw", lr=1e-3, b2=0.95, weight_decay=1e-4, clip=1.0, state_dtype="bfloat16"
  )
  c.schedule = dict(name="rsqrt", warmup=20_000, timescale=10_000, cooldown=50_000)
  c.precision.compute = "bfloat16"
  c.sharding = "replicated"
  c.checkpoint.every = 5000
  c.checkpoint.minutes = 30.0
  c.log.every = 50
  return c
