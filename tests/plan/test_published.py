"""The large configs have the shapes of the published models: parameters and FLOPs against Hugging
Face's configs of them.
"""

from __future__ import annotations

import jax
import pytest

import mmjax.config as configs
from mmjax.parallel.mesh import single_device_mesh
from mmjax.plan import model_flops, tokens_of
from mmjax.training.program import Program

BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
SO400M = dict(
  hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304
)


@pytest.fixture(
  params=[("siglip_b16", BASE, 16, 196), ("siglip_so400m14", SO400M, 14, 256)], ids=lambda p: p[0]
)
def models(request):
  """(the step of a config, Hugging Face's model of the same name, on no device)."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  name, tower, patch, tokens = request.param
  vision = dict(tower, patch_size=patch, image_size=224)
  text = dict(tower, vocab_size=32000, max_position_embeddings=64)
  with torch.device("meta"):
    theirs = transformers.SiglipModel(
      transformers.SiglipConfig(text_config=text, vision_config=vision)
    )
  config = configs.resolve(
    configs.load(f"configs/{name}.py", ()), ("train.batch_size=2", "mesh.data=1", "mesh.fsdp=1")
  )
  return Program(config, single_device_mesh(), steps=100_000), theirs, tokens


def test_parameters_tokens_and_flops_are_the_published_ones(models):
  step, theirs, tokens = models
  count = sum(p.numel() for p in theirs.parameters())
  assert sum(x.size for x in jax.tree.leaves(step.params_spec)) == pytest.approx(count, rel=1e-3)
  assert tokens_of(step) == dict(image=tokens, text=64)

  # Every weight matrix once a token, and queries with keys, weights with values; three times for
  # the backward pass too.
  def flops(tower, tokens, layers):
    products = (
      2
      * tokens
      * sum(p.numel() for name, p in tower.named_parameters() if "layers." in name and p.ndim == 2)
    )
    return products + layers * 4 * tokens**2 * tower.config.hidden_size

  def pooling(tower, tokens):  # one query over the tokens, then an MLP of one vector
    width, head = tower.config.hidden_size, tower.head
    mlp = sum(p.numel() for p in head.mlp.parameters() if p.ndim == 2)
    return 2 * (2 * tokens * width**2 + 2 * width**2 + mlp) + 4 * tokens * width

  vision, text = theirs.vision_model, theirs.text_model
  layers = vision.config.num_hidden_layers
  patches = 2 * tokens * vision.embeddings.patch_embedding.weight.numel()
  want = dict(
    image=6 * (flops(vision, tokens, layers) + patches + pooling(vision, tokens)),
    text=6 * flops(text, 64, layers),
  )
  found = model_flops(step)
  for modality, value in want.items():
    assert found[modality] == pytest.approx(value, rel=0.01)
  settings = step.config.model.encoders
  assert settings.image.patch_dropout == 0 and step.config.precision.compute == "bfloat16"
