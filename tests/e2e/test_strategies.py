"""The same losses wherever arrays lie: real train steps on 1, 2, 4 and 8 devices under every
strategy.
"""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.program import Program

BATCH, SIZE, TOKENS, WORDS, STEPS = 16, 16, 16, 96, 200
PLACES = 4  # tokens of a picture in a row of a language model
BLOCKS = dict(depth=2, heads=4, scan_unroll=1)
ENCODERS = dict(image=dict(kind="vit", patch=4, **BLOCKS), text=dict(kind="transformer", **BLOCKS))
RECIPES = {
  "contrastive": (
    dict(name="dual_encoder"),
    dict(align=dict(kind="contrastive", between=("image", "text"), chunk=2)),
  ),
  "captioning": (
    dict(name="captioner", decoder=dict(BLOCKS)),
    dict(caption=dict(kind="captioning", source=("image",))),
  ),
  "masked": (
    dict(
      name="fusion_encoder",
      joint=False,
      masked_text=True,
      fusion=dict(kind="merged_attention", **BLOCKS),
    ),
    dict(words=dict(kind="masked_tokens", context=("image",), rate=0.4)),
  ),
  "language": (
    dict(
      name="language_model",
      **BLOCKS,
      encoders=dict(image=ENCODERS["image"]),
      connectors=dict(image=dict(kind="mlp", fold=2)),
      eos_id=2,
      pad_id=0,
    ),
    dict(words=dict(kind="language_modelling")),
  ),
}
STRATEGIES = {
  "replicated": {n: (f"mesh.data={n}",) for n in (2, 4, 8)},
  "fsdp": {n: ("mesh.data=1", f"mesh.fsdp={n}", "sharding=fsdp") for n in (2, 4, 8)},
  "fsdp_tensor": {
    n: ("mesh.data=1", f"mesh.fsdp={n // 2}", "mesh.tensor=2", "sharding=fsdp_tensor")
    for n in (2, 4, 8)
  },
  "context": {
    2: ("mesh.data=1", "mesh.context=2"),
    4: ("mesh.data=2", "mesh.context=2"),
    8: ("mesh.data=1", "mesh.fsdp=2", "mesh.context=4", "sharding=fsdp"),
  },
}
# Compiling takes longer than the steps.
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
# relative, float32; one device against eight differs by 2e-6 at most after 200 steps, whatever
# splits the sums
WITHIN = 1e-5


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  """Machine code as the compiler first writes it; how arrays are split and what travels is decided
  before.
  """
  monkeypatch.setattr(Program, "compiled", lambda step, lowered: lowered.compile(QUICK))


def make_step(model, objectives, devices, *overrides):
  c = configs.base()
  c.seed = 5
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    SIZE,
    TOKENS,
    WORDS,
    "none",
  )
  c.model = dict(encoders=ENCODERS, width=64) | model
  c.objectives, language = objectives, model["name"] == "language_model"
  if language:
    c.data.sequence.length, c.data.sequence.image, c.data.sequence.slots = 2 * TOKENS, PLACES, 2
  c.train.batch_size, c.train.steps, c.precision.compute = BATCH, STEPS, "float32"
  config = configs.resolve(c, overrides)
  batch = make_batch(0, language)
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  return Program(config, make_mesh(config, jax.devices()[:devices]), steps=STEPS, batch_spec=spec)


def make_batch(number, language=False):
  """Pictures of one of eight kinds and texts that name the kind, with noise in both; some rows do
  not count. language: as the rows of a language model, of two examples each.
  """
  rng = np.random.default_rng(number)
  kinds = rng.integers(0, 8, BATCH)
  world = np.random.default_rng(0)
  pictures, texts = (
    world.integers(0, 256, (8, SIZE, SIZE, 3)),
    world.integers(5, WORDS, (8, TOKENS)),
  )
  pixels = 0.6 * pictures[kinds] + 0.4 * rng.integers(0, 256, (BATCH, SIZE, SIZE, 3))
  tokens = np.where(
    rng.random((BATCH, TOKENS)) < 0.8, texts[kinds], rng.integers(5, WORDS, (BATCH, TOKENS))
  )
  if language:
    return make_rows(pixels.astype(np.uint8), tokens.astype(np.int32), rng)
  return dict(
    image=dict(pixels=pixels.astype(np.uint8)),
    valid=rng.random(BATCH) < 0.9,
    text=dict(
      tokens=tokens.astype(np.int32),
      mask=np.arange(TOKENS) < rng.integers(4, TOKENS + 1, (BATCH, 1)),
      key=np.stack([kinds, kinds], 1).astype(np.uint32),
    ),
  )


def make_rows(pixels, tokens, rng):
  """Each row: a picture and its text, then the next one's, cut at random."""
  shape, long = (BATCH, 2 * TOKENS), TOKENS - PLACES
  names = ("tokens", "positions", "segment_ids", "media_index", "media_offset")
  s = {name: np.zeros(shape, np.int32) for name in names} | dict(loss_mask=np.zeros(shape, bool))
  s["media_index"] -= 1
  for half in range(2):
    places, at = np.arange(TOKENS), slice(half * TOKENS, (half + 1) * TOKENS)
    length = PLACES + rng.integers(4, long + 1, (BATCH, 1))
    text = (places >= PLACES) & (places < length)
    s["tokens"][:, at] = np.where(text, np.roll(np.roll(tokens, PLACES, 1), -half, 0), 0)
    s["positions"][:, at], s["loss_mask"][:, at] = places, text
    s["segment_ids"][:, at] = np.where(places < length, half + 1, 0)
    s["media_index"][:, at] = np.where(places < PLACES, half, -1)
    s["media_offset"][:, at] = np.where(places < PLACES, places, 0)
  both = np.stack([pixels, np.roll(pixels, -1, 0)], axis=1)
  media = dict(image=dict(pixels=both, present=np.ones((BATCH, 2), bool)))
  return dict(sequence=s, media=media, valid=rng.random(BATCH) < 0.9)


def losses_of(step, steps):
  """float64 [2, steps] of a training from the start: losses, and norms of the gradients (Adam would
  hide one of another scale).
  """
  state, rows = step.init(0), []
  for number in range(steps):
    batch = make_batch(number, "sequence" in step.batch_spec)
    state, metrics = step.train(state, multihost.to_device(batch, step.mesh))
    rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
  return np.array(rows).T


def gap(losses, reference):
  """The largest relative difference of losses, and of the norms of the first ten gradients."""
  apart = np.abs(losses / reference - 1)
  return apart[0].max(), apart[1, :10].max()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_losses_agree_under_every_strategy(devices, recipe):
  reference = losses_of(make_step(*RECIPES[recipe], 1), STEPS)
  assert reference[0, -20:].mean() < 0.9 * reference[0, :20].mean()  # it learns
  found = {}
  for strategy, meshes in STRATEGIES.items():
    for count, overrides in meshes.items():
      found[strategy, count] = gap(
        losses_of(make_step(*RECIPES[recipe], count, *overrides), STEPS), reference
      )
      print(
        f"{recipe}: {strategy} on {count}: losses {found[strategy, count][0]:.1e}, gradients "
        f"{found[strategy, count][1]:.1e}",
        flush=True,
      )
  assert not {key: value for key, value in found.items() if max(value) > WITHIN}


def test_sequences_split_over_devices_change_no_loss(devices):
  """Pictures, and a decoder that attends to them and to itself; the rest only with --all, compiling
  takes too long.
  """
  recipe = RECIPES["captioning"]
  want = losses_of(make_step(*recipe, 1), 3)
  got = losses_of(make_step(*recipe, 4, *STRATEGIES["context"][4]), 3)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_layers_exchange_keys_and_values_and_gather_no_sequence(devices):
  step = make_step(*RECIPES["contrastive"], 4, *STRATEGIES["context"][4])
  text = step.compile()[0].as_text()

  def shapes(name):
    return re.findall(rf"= \(?(\w+\[[\d,]*\])\S* {name}(?:-start)?\(", text)

  rows, length, heads = BATCH // 2, TOKENS // 2, 4
  blocks = [
    shape for shape in shapes("collective-permute") if shape == f"f32[{rows},{heads},{length},16]"
  ]
  assert len(blocks) >= 8  # keys and values, there and back, in both encoders
  assert not shapes("all-to-all")
  assert not [
    shape for shape in shapes("all-gather") if shape.startswith("f") and shape.count(",") > 1
  ]
