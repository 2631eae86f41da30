"""Pretraining of a multimodal language model of 8.5 billion parameters on a v5e-256: captions of
pictures and conversations about them.

The shape of Idefics3 8B (Laurencon et al. 2024, arXiv:2408.12637), Llama 3.1 8B that reads SigLIP
So400m/14 through a matrix over squares of four tokens; pictures of 364 pixels (169 tokens), rows of
2,048 tokens with up to eight of them, 512 rows a step.
  mmjax plan --config configs/multimodal_8b.py --topology v5e-256
"""

import mmjax


def get_config(arg: str = ""):
  """arg: pattern of WebDataset tars with pictures (jpg) and captions (txt)."""
  c = mmjax.config.base()
  c.train.steps = 50_000
  c.train.batch_size = 512

  c.data.sources.web = dict(
    name="tars", path=arg or "data/web-{00000..09999}.tar", text="caption", weight=0.5
  )
  c.data.sources.talks = dict(name="talks", text="conversation", weight=0.5)
  c.data.workers = 8
  c.data.image.size = 364
  c.data.image.resize = "squash"
  # the tokenizer.json of the model below, put where `mmjax data tokenizer` puts its own
  c.data.text.update(tokenizer="llama_8b", template="llama-3", vocab_size=128_256, pad_id=128_004)
  c.data.sequence.update(length=2048, image=169, slots=8)

  c.model = dict(
    name="language_model",
    width=4096,
    depth=32,
    heads=32,
    mlp=14336,
    eps=1e-5,
    theta=500_000.0,
    tied=False,
    remat="full",
    block=dict(key_value_heads=8),
    encoders=dict(
      image=dict(
        kind="vit", patch=14, width=1152, depth=27, heads=16, mlp=4304, pooling="mean", remat="full"
      )
    ),
    connectors=dict(image=dict(kind="mlp", layers=1, fold=2, bias=False)),
  )
  c.init["from"] = "runs/llama_8b"  # mmjax import --from hf Llama-3.1-8B-Instruct
  c.init.map = ((r"image.*", None), (r".*", r"\g<0>"))
  c.objectives.text = dict(kind="language_modelling")
  c.optimizer = dict(
    name="adamw", lr=1e-4, b2=0.95, weight_decay=0.1, clip=1.0, state_dtype="bfloat16"
  )
  c.optimizer.rates = ((r"(layers|embedding|output|norm).*", 0.1),)
  c.schedule = dict(name="cosine", warmup=500, final=0.1)
  c.precision.compute = "bfloat16"
  c.mesh.data, c.mesh.fsdp = -1, 64  # 64 divides the tower's width of 1,152
  c.sharding = "fsdp"
  c.checkpoint.every = 1000
  c.checkpoint.minutes = 30.0
  c.log.every = 20
  return c
