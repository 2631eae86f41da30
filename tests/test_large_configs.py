"""Configs of language models that no recipe runs: at a hundredth of their size or less they take
their first steps, split as they are on the real machine.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.interop.huggingface import llava
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training.program import Program

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
LENGTH, WORDS, ROWS = 32, 96, 8
SMALL = ("width=32", "depth=2", "heads=4", "mlp=48", "eos_id=2", "pad_id=0")
LORA = ("lora.rank=4", "data.sequence.image=16", "model.media_ids.image=3", "train.microbatches=2")
MULTIMODAL = ("model.block.key_value_heads=2", "data.sequence.image=4", "mesh.fsdp=4")
TOWER = ("width=32", "depth=1", "heads=2", "mlp=48", "patch=8")


def small(name, *more):
  data = (f"sequence.length={LENGTH}", f"text.vocab_size={WORDS}", "text.tokenizer=none")
  overrides = [f"model.{x}" for x in SMALL] + [f"data.{x}" for x in data] + list(more)
  overrides += [f"train.batch_size={ROWS}", "train.steps=20", "schedule.warmup=0"]
  if name != "words_1b":
    overrides += ["data.image.size=32", "data.text.pad_id=0", "data.text.template="]
    overrides += [f"model.encoders.image.{x}" for x in TOWER]
  return configs.load(str(CONFIGS / f"{name}.py"), overrides)


def rows(step):
  """A batch of its spec: a picture, then a text, in every row."""
  rng = np.random.default_rng(0)
  batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step.batch_spec)
  s, places = batch["sequence"], step.config.data.sequence.image
  shape = s["tokens"].shape
  s["tokens"][:] = rng.integers(3, WORDS, shape)
  s["positions"][:], s["segment_ids"][:] = np.arange(LENGTH), 1
  s["loss_mask"][:] = np.arange(LENGTH) >= places
  if places:
    pixels = batch["media"]["image"]["pixels"]
    pixels[:] = rng.integers(0, 256, pixels.shape)
    batch["media"]["image"]["present"][:, 0] = True
    s["media_index"][:] = np.where(np.arange(LENGTH) < places, 0, -1)
    s["media_offset"][:, :places] = np.arange(places)
  batch["valid"][:] = True
  return batch


@pytest.mark.parametrize(
  "name, devices, more",
  [
    ("words_1b", 2, ("model.block.key_value_heads=2",)),
    pytest.param("answers_lora_7b", 1, LORA, marks=pytest.mark.slow),
    pytest.param("multimodal_8b", 4, MULTIMODAL, marks=pytest.mark.slow),
  ],
)
def test_the_first_steps_of_a_small_copy_learn(name, devices, more):
  config = small(name, *more)
  step = Program(config, make_mesh(config, jax.devices()[:devices]), steps=20)
  state, losses = step.init(0), []
  for _ in range(5):
    state, metrics = step.train(state, multihost.to_device(rows(step), step.mesh))
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
  if name == "answers_lora_7b":
    trained = {x for x in jax.tree.leaves(jax.tree.map(lambda x: str(x.dtype), state.params))}
    assert "int8" in trained


def test_the_adapters_are_of_llava_as_it_is_published():
  """The model of the config is what its config.json gives (llava-hf/llava-1.5-7b-hf)."""
  text = dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064)
  vision = dict(llava.LARGE, model_type="clip_vision_model", projection_dim=768, vocab_size=32000)
  stated = dict(text_config=text, vision_config=vision, image_token_index=32_000)
  stated |= dict(pad_token_id=32_001, model_type="llava")
  found = llava.settings(stated, {})
  config = configs.load(str(CONFIGS / "answers_lora_7b.py"))
  facts = llava.facts(config.to_dict(), {})
  again = llava.settings(facts, {})
  assert again["model"] == found["model"] and again["image_size"] == found["image_size"]
