"""The decoder: causal, blind to padding, equal token by token and at once, equal to PyTorch's
layers of the same weights.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import mmjax.config
from mmjax.config import ConfigError, UserError
from mmjax.inference.engine import generate
from mmjax.models.block import BlockConfig
from mmjax.models.decoder import Decoder, decoder, shift_right
from mmjax.objectives.captioning import captioning
from mmjax.parallel import rules
from mmjax.parallel.mesh import AXES

CONFIG = BlockConfig(width=16, depth=2, heads=2, mlp=32)
MODEL = Decoder(CONFIG, vocab_size=11, length=8, prompt=(1,), eos_id=2, pad_id=0)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 11, (3, 6)).astype(np.int32)
MASK = np.arange(6) < np.array([6, 4, 5])[:, None]
MEMORY = RNG.normal(size=(3, 5, 24)).astype(np.float32)
SEEN = np.arange(5) < np.array([5, 2, 0])[:, None]


@pytest.fixture(scope="module")
def params():
  boxed = jax.jit(MODEL.init)(jax.random.key(0), TOKENS, MASK, MEMORY, SEEN)

  def spread(x):
    return x + 0.3 * RNG.normal(size=x.shape).astype(np.float32)  # so that biases and scales matter

  return jax.tree.map(spread, nn.unbox(boxed)["params"])


@pytest.fixture(scope="module")
def run(params):
  return jax.jit(lambda *args: MODEL.apply({"params": params}, *args))


def test_parameters_are_stacked_and_named():
  boxed = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS, MASK, MEMORY, SEEN)
  spec = nn.get_partition_spec(boxed)["params"]
  for name in ("attention", "cross_attention"):
    assert spec["layers"][name]["qkv"]["kernel"] == jax.P("layers", "embed", "qkv", "heads", "kv")
    assert spec["layers"][name]["out"]["kernel"] == jax.P("layers", "heads", "kv", "embed")
  assert spec["embedding"] == jax.P("vocab", "embed") and spec["layers"]["mlp"]["up"][
    "kernel"
  ] == jax.P("layers", "embed", "mlp")
  plain = jax.eval_shape(dataclasses.replace(MODEL, cross=False).init, jax.random.key(0), TOKENS)[
    "params"
  ]
  assert "memory_projection" not in plain and "cross_attention" not in plain["layers"]


def test_looks_neither_ahead_nor_at_padding(run):
  base = run(TOKENS, MASK, MEMORY, SEEN)
  later, outside, unseen = (
    TOKENS.copy(),
    np.where(MASK, TOKENS, 3),
    np.where(SEEN[..., None], MEMORY, 9.0),
  )
  later[:, 3:] = 10
  np.testing.assert_allclose(run(later, MASK, MEMORY, SEEN)[:, :3], base[:, :3], atol=1e-6)
  np.testing.assert_allclose(run(outside, MASK, unseen, SEEN)[MASK], base[MASK], atol=1e-6)
  assert not np.allclose(run(later, MASK, MEMORY, SEEN)[:, 3:], base[:, 3:], atol=1e-3)
  # An empty memory is none.
  np.testing.assert_allclose(run(TOKENS, MASK, None, None)[2], base[2], atol=1e-6)


def test_a_prompt_read_at_once_and_tokens_after_it_equal_the_whole_text(run, params):
  """Also for prompts of unequal lengths, whose rest then stands at other places."""
  hidden = run(TOKENS, None, MEMORY, SEEN)

  def apply(method, *args, **settings):
    return MODEL.apply({"params": params}, *args, method=method, **settings)

  want = np.asarray(apply("logits", hidden))
  memory = apply("init_memory", MEMORY, SEEN)
  step = jax.jit(lambda *args: apply("decode_step", *args))
  for lengths in (np.array([3, 3, 3]), np.array([1, 4, 2])):
    prompts = np.where(np.arange(4) < lengths[:, None], TOKENS[:, :4], 9)
    logits, cache = apply("prefill", prompts, memory, length=7, lengths=jnp.asarray(lengths))
    rows = np.arange(3)
    np.testing.assert_allclose(logits, want[rows, lengths - 1], atol=1e-5)
    for i in range(2):
      places = lengths + i
      logits, cache = step(TOKENS[rows, places], places, cache, memory)
      np.testing.assert_allclose(logits, want[rows, places], atol=1e-5)


def test_remat_changes_no_gradient_and_dropout_needs_a_key(params):
  def gradient(model):
    def loss(p):
      return jnp.square(model.apply({"params": p}, TOKENS, MASK, MEMORY, SEEN)).mean()

    return jax.jit(jax.grad(loss))(params)

  other = dataclasses.replace(
    MODEL, config=dataclasses.replace(CONFIG, remat="full", scan_unroll=1)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(other), gradient(MODEL)
  )
  noisy = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, dropout=0.5))

  def call(seed):
    return noisy.apply(
      {"params": params}, TOKENS, train=True, rngs={"dropout": jax.random.key(seed)}
    )

  assert not np.allclose(call(0), call(1))
  np.testing.assert_array_equal(call(0), call(0))


def test_devices_and_the_order_of_the_batch_change_nothing(params, devices):
  rows = {"tokens": np.tile(TOKENS, (3, 1))[:8], "mask": np.tile(MASK, (3, 1))[:8]}
  memory, seen = np.tile(MEMORY, (3, 1, 1))[:8], np.tile(SEEN, (3, 1))[:8]

  @jax.jit
  def gradient(params, text, memory, seen):
    def loss(params):
      hidden = MODEL.apply(
        {"params": params}, shift_right(text["tokens"], (1,)), text["mask"], memory, seen
      )
      found = captioning(lambda *_: (hidden, params["embedding"]), {"text": text}, None, source=())
      return found["loss"][0] / found["loss"][1]

    return jax.value_and_grad(loss)(params)

  want = gradient(params, rows, memory, seen)
  mesh = Mesh(
    np.array(devices).reshape(1, 2, 2, 2, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )
  with rules.use(mesh, rules.RULES["fsdp_tensor"]):
    split = jax.device_put((rows, memory, seen), rules.batch_sharding(mesh))
    got = gradient(jax.device_put(params, rules.replicated(mesh)), *split)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  turned = gradient(params, *jax.tree.map(lambda x: x[::-1], (rows, memory, seen)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), turned, want)


def test_the_config_names_it_and_long_texts_are_refused():
  c = mmjax.config.base()
  c.data.text.tokenizer = "x"
  c.model.encoders = dict(text=dict(kind="transformer", width=16, depth=1, heads=2))
  assert "decoder" not in mmjax.config.resolve(c).model
  c.model.name = "multitask"
  c.model.decoder = dict(width=16, depth=1, heads=2)
  c.objectives.caption = dict(kind="captioning", source=("text",))
  c.objectives.language = dict(kind="autoregressive")
  resolved = mmjax.config.resolve(c)
  assert resolved.model.decoder.kind == "decoder" and resolved.objectives.language.source == ()
  built = decoder(
    resolved.data, resolved.precision, **mmjax.config.settings(resolved.model.decoder)
  )
  assert built.vocab_size == 4096 and built.config.mlp == 64 and built.config.causal
  c.model.decoder = dict(dept=1)
  with pytest.raises(ConfigError, match="model.decoder.dept.*'depth'"):
    mmjax.config.resolve(c)
  with pytest.raises(UserError, match="length 8"):
    jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, 9), np.int32))


class Copier(nn.Module):
  """Reads digits as a memory and writes them down: the smallest captioner."""

  def setup(self):
    self.decoder = Decoder(
      BlockConfig(width=32, depth=1, heads=2, mlp=64),
      vocab_size=11,
      length=6,
      prompt=(1,),
      eos_id=2,
      pad_id=0,
      positions="sinusoidal",
    )
    self.reader, self.places = nn.Embed(11, 32), nn.Embed(4, 32)

  def __call__(self, batch):
    return self.decode(("digits",), batch)

  def encode(self, batch):
    return self.reader(batch["digits"]["tokens"]) + self.places(jnp.arange(4))

  def decode(self, source, batch):
    text = batch["text"]
    return self.decoder(
      shift_right(text["tokens"], (1,)), text["mask"], self.encode(batch) if source else None
    ), self.decoder.table()

  def start(self, batch, prompt, length):
    memory = self.decoder.init_memory(self.encode(batch))
    return *self.decoder.prefill(prompt, memory, length=length), memory

  def step(self, *args):
    return self.decoder.decode_step(*args)


def digits(rows, seed):
  """Two to four digits, then <eos> = 2."""
  rng = np.random.default_rng(seed)
  tokens = np.where(
    np.arange(4) < rng.integers(2, 5, rows)[:, None], rng.integers(3, 11, (rows, 4)), 0
  ).astype(np.int32)
  text = np.concatenate([tokens, np.zeros((rows, 1), np.int32)], 1)
  text[np.arange(rows), (tokens > 0).sum(1)] = 2
  return dict(digits=dict(tokens=tokens), text=dict(tokens=text, mask=text > 0))


def test_a_decoder_learns_to_copy_and_generates_what_it_learnt():
  model, optimizer = Copier(), optax.adam(5e-3)
  params = nn.unbox(model.init(jax.random.key(0), digits(2, 0)))

  def forward(params, batch):
    return lambda method, *args: model.apply(params, *args, batch, method=method)

  @jax.jit
  def update(params, moments, batch):
    def loss(params):
      found = captioning(forward(params, batch), batch, None, source=("digits",))
      return found["loss"][0] / found["loss"][1]

    updates, moments = optimizer.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments

  moments = optimizer.init(params)
  for step in range(250):
    params, moments = update(params, moments, digits(64, step))
  test = digits(100, 10_000)
  found = captioning(forward(params, test), test, None, source=("digits",))
  assert found["sequence_accuracy"][0] / found["sequence_accuracy"][1] > 0.95

  def step(token, places, cache, memory):
    return model.apply(params, token, places, cache, memory, method="step")

  def run(test):
    prompt = jnp.ones((100, 1), jnp.int32)
    logits, cache, memory = model.apply(params, test, prompt, 5, method="start")
    places = jnp.ones(100, jnp.int32)
    return generate(step, logits, cache, memory, places=places, max_length=5, eos_id=2, pad_id=0)

  tokens, _ = jax.jit(run)(test)
  assert (np.asarray(tokens) == test["text"]["tokens"]).all(1).mean() > 0.95
