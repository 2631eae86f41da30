"""SigLIP So400m/14, both towers (Alabdulmohsin et al. 2023, arXiv:2305.13035), batch 4096 on a
v5e-64.

The shapes of Hugging Face's google/siglip-so400m-patch14 models: 224 pixels, or 384 with `:384`.
  mmjax plan --config configs/siglip_so400m14.py --topology v5e-64
"""

import mmjax


def get_config(arg: str = ""):
  """arg: size of the pictures, 224 or 384 pixels."""
  c = mmjax.config.base()
  c.train.steps = "9e9 examples"
  c.train.batch_size = 4096

  c.data.sources.web = dict(name="tars", path="data/web-{00000..09999}.tar")
  c.data.workers = 8
  c.data.image.size = int(arg or 224)
  c.data.image.resize = "squash"
  c.data.text.tokenizer = (
    "c4_en"  # any sentencepiece of 32,000: mmjax data tokenizer --vocab-size 32000 --name c4_en
  )
  c.data.text.vocab_size = 32000
  c.data.text.length = 64
  c.data.text.lowercase = True
  c.data.text.mask_padding = False
  c.data.text.punctuation = False

  # More than 64 pairs of 224 pixels a chip take "full" in 16 GiB.
  remat = "dense_attention" if c.data.image.size == 224 else "full"
  tower = dict(width=1152, depth=27, heads=16, mlp=4304, remat=remat)
  c.model = dict(
    name="dual_encoder",
    width=1152,
    unprojected=("image",),
    projection_bias=True,
    bias=True,
    bias_init=-10.0,
    scale_init=10.0,
    scale_max=10_000.0,
    encoders=dict(
      image=dict(kind="vit", patch=14, crop_edge=True, pooling="attention", **tower),
      text=dict(kind="transformer", pooling="final", **tower),
    ),
  )
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), loss="sigmoid")
  c.optimizer = dict(
    name="adamw", lr=1e-3, b2=0.95, weight_decay=1e-4, clip=1.0, state_dtype="bfloat16"
  )
  c.schedule = dict(name="rsqrt", warmup=20_000, timescale=10_000, cooldown=50_000)
  c.precision.compute = "bfloat16"
  c.mesh.data, c.mesh.fsdp = -1, 64  # 64 divides the width of 1,152
  c.sharding = "fsdp"
  c.checkpoint.every = 5000
  c.checkpoint.minutes = 30.0
  c.log.every = 50
  return c
