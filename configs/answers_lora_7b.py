"""LLaVA-1.5 7B (Liu et al. 2023, arXiv:2310.03744) learns to answer about pictures by adapters
beside its frozen kernels, which are held in int8: on one GPU of 80 GB.

  mmjax import --from hf llava-1.5-7b-hf --out runs/llava_7b
  mmjax data convert conversations talks.jsonl --name talks
  mmjax plan --config configs/answers_lora_7b.py --topology h100-80gb-1
"""

import mmjax

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def get_config(arg: str = ""):
  """arg: name of a data set of conversations about pictures."""
  c = mmjax.config.base()
  c.train.steps = "1 epoch"
  c.train.batch_size = 16
  c.train.microbatches = 4

  c.data.sources.talks = dict(name=arg or "talks", text="conversation")
  c.data.workers = 8
  c.data.image.update(size=336, resize="shortest", mean=MEAN, std=STD)
  # the tokenizer.json of the model, put where `mmjax data tokenizer` puts its own
  c.data.text.update(tokenizer="llava_7b", template="vicuna", vocab_size=32_064, bos=True)
  c.data.sequence.update(length=2048, image=576, slots=2)

  tower = dict(width=1024, depth=23, heads=16, mlp=4096, activation="quick_gelu", eps=1e-5)
  tower |= dict(pooling="class", input_norm=True, patch_bias=False, final_norm=False)
  c.model = dict(
    name="language_model",
    width=4096,
    depth=32,
    heads=32,
    mlp=11008,
    eps=1e-5,
    tied=False,
    eos_id=2,
    pad_id=32_001,
    media_ids=dict(image=32_000),
    remat="full",
    encoders=dict(image=dict(kind="vit", patch=14, remat="full", **tower)),
    connectors=dict(image=dict(kind="mlp", skip=1)),
  )
  c.init["from"] = "runs/llava_7b"
  c.lora = dict(params=r"layers/.*kernel", rank=128, alpha=256.0, base="int8")
  c.lora.full = (r"image_connector/.*",)
  c.objectives.answers = dict(kind="language_modelling")
  c.optimizer = dict(name="adamw", lr=2e-4, weight_decay=0.0, clip=1.0)
  c.optimizer.rates = ((r"image_connector/.*", 0.1),)
  c.schedule = dict(name="cosine", warmup="3%")
  c.precision.compute = "bfloat16"
  c.checkpoint.every = 500
  c.log.every = 10
  return c
