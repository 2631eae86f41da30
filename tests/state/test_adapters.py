"""Low-rank adapters: merged and unmerged models agree, only what the config names is trained, and
the rest has neither moments nor changes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.config import UserError
from mmjax.models import make_model
from mmjax.models.lora import merge
from mmjax.parallel.mesh import make_mesh
from mmjax.state import adapters
from mmjax.state.paths import by_name, map_named
from mmjax.training.program import Program

LENGTH, PLACES, BATCH, SIZE = 12, 4, 8, 8


def make_config(*overrides, **lora):
  """A language model with pictures: grouped heads, a gated MLP, an encoder with biases."""
  c = configs.base()
  c.data.text.tokenizer, c.data.text.vocab_size = "none", 64
  c.data.image.size, c.data.sequence.length, c.data.sequence.image = SIZE, LENGTH, PLACES
  c.model = dict(
    name="language_model",
    width=32,
    depth=2,
    heads=4,
    mlp=48,
    encoders=dict(image=dict(kind="vit", patch=4, depth=1, heads=2)),
    connectors=dict(image=dict(kind="mlp")),
    block=dict(key_value_heads=2),
  )
  c.objectives.words = dict(kind="language_modelling")
  c.lora = dict(
    dict(params=r"(image/)?layers/.*", rank=3, alpha=6, full=("image_connector/.*",)), **lora
  )
  c.optimizer.lr, c.optimizer.weight_decay, c.schedule.warmup = 0.05, 0.1, 0
  c.train.batch_size, c.precision.compute = BATCH, "float32"
  return configs.resolve(c, overrides)


def make_program(config, devices=1):
  return Program(config, make_mesh(config, jax.devices()[:devices]), steps=10)


def make_batch(spec, seed=0):
  draw = np.random.default_rng(seed)
  batch = jax.tree.map(
    lambda x: draw.integers(0, 2 if x.dtype == bool else 60, x.shape).astype(x.dtype), spec
  )
  s = batch["sequence"]
  s["media_index"][:] = np.where(np.arange(LENGTH) < PLACES, 0, -1)
  s["media_offset"][:] = np.minimum(np.arange(LENGTH), PLACES - 1)
  s["positions"][:], s["segment_ids"][:] = np.arange(LENGTH), 1
  batch["valid"][:], batch["media"]["image"]["present"][:] = True, True
  return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch, spec)


def random_factors(params, seed=0):
  """The parameters with factors B that are not zero."""
  draw = np.random.default_rng(seed)

  def of(name, x):
    new = name.endswith("lora_b")
    return jnp.asarray(draw.normal(size=x.shape), x.dtype) * 0.3 if new else x

  return map_named(of, params)


@functools.cache
def program():
  return make_program(make_config())


def test_merged_equals_unmerged():
  model, params = make_model(make_config()), random_factors(program().init(1).params)
  batch = make_batch(program().batch_spec)

  @jax.jit
  def hidden(params):
    return model.apply({"params": params}, batch)

  merged = merge(jax.tree.map(np.asarray, params))
  assert not any("lora" in name for name in by_name(merged))
  np.testing.assert_allclose(hidden(params), hidden(merged), atol=1e-5)
  base = {name: x for name, x in by_name(params).items() if name in by_name(merged)}
  changed = {name for name, x in by_name(merged).items() if np.any(x != base[name])}
  assert changed == {name for name in base if "layers/" in name and name.endswith("kernel")}


def test_new_factors_change_nothing_and_leave_the_other_parameters_as_they_are():
  plain = make_program(make_config(params="", full=())).init(1).params
  params = program().init(1).params
  for name, x in by_name(merge(jax.tree.map(np.asarray, params))).items():
    np.testing.assert_array_equal(x, by_name(plain)[name], name)
  a = params["layers"]["mlp"]["down"]["lora_a"]  # Kaiming's uniform rule with a = sqrt(5)
  assert 0.95 < np.abs(a).max() * 48**0.5 <= 1 and abs(np.std(a) * (3 * 48) ** 0.5 - 1) < 0.1


@pytest.mark.parametrize(
  "overrides", [(), ("sharding=fsdp_tensor", "mesh.fsdp=2", "mesh.tensor=2")]
)
def test_only_what_is_named_is_trained(overrides):
  config = make_config(*overrides, full=("image_connector/.*", "norm/scale"))
  step = make_program(config, 8 if overrides else 1)
  state = step.init(1)
  before = jax.tree.map(np.asarray, state.params)
  learned = {
    name
    for name in by_name(before)
    if name.endswith(("lora_a", "lora_b")) or name.startswith(("image_connector/", "norm/"))
  }
  moments = by_name(state.opt_states["main"].rule)
  assert {name.partition("mu/")[2] for name in moments if "mu/" in name} == learned
  losses = []
  for seed in range(3):
    state, metrics = step.train(state, make_batch(step.batch_spec, seed))
    losses.append(float(metrics["loss"]))
  after = by_name(state.params)
  assert {name for name, x in by_name(before).items() if np.any(x != after[name])} == learned
  np.testing.assert_allclose(losses, LOSSES.setdefault("one", losses), rtol=1e-5)


LOSSES = {}  # of the run on one device


def test_the_table_names_and_counts_what_is_trained():
  shares = program().optimizer.shares
  lines = adapters.table(shares, program().params_spec).splitlines()
  spec = by_name(program().params_spec)
  size = sum(x.size for x in spec.values())
  connector = sum(x.size for name, x in spec.items() if name.startswith("image_connector"))
  up = 2 * (2 * 32 * 3 + 2 * 3 * 48)  # layers, of gate and up: A and B
  assert lines[0].split() == ["trained", "parameters", "of", "all"]
  assert f"layers/mlp/up low rank {up} {up / size:.2%}" in [" ".join(x.split()) for x in lines]
  assert any(x.split()[:4] == ["image_connector", "in", "full", f"{connector:,}"] for x in lines)
  whole = sum(x.size * shares[name] for name, x in spec.items())
  assert lines[-1].split()[-2:] == [f"{whole:,.0f}", f"{whole / size:.2%}"]


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(params="layers/attention/qkv/kernel"), "lora.params: .* nearest is .*attention/"),
    (dict(params="embedding"), "lora.params: 'embedding' matches no kernel"),
    (dict(full=("image_conector/.*",)), "lora.full: .* nearest is 'image_connector/"),
    (dict(params="norm.*|image_connector/.*"), "lora.full matches every kernel"),
  ],
)
def test_a_regex_that_matches_nothing_is_an_error_with_the_nearest_name(settings, message):
  with pytest.raises(UserError, match=message):
    make_program(make_config(**settings))


def test_some_layers_alone():
  step = make_program(make_config(params=r"layers[1]/mlp/.*", full=()))
  a = step.init(1).opt_states["main"].rule[1].mu["layers"]["mlp"]["down"]["lora_a"]
  assert a.shape == (1, 48, 1, 3)
  trained = step.optimizer.shares
  assert trained["layers/mlp/down/lora_a"] == 0.5 and not trained["layers/mlp/down/kernel"]


def test_dropout_is_of_the_factors_input_and_of_training_alone():
  config = make_config(dropout=0.5)
  params = random_factors(make_program(config).init(1).params)
  model, batch = make_model(config), make_batch(program().batch_spec)

  @jax.jit
  def hidden(params, seed):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, batch, train=True, rngs=rngs)

  @jax.jit
  def evaluated(params):
    return model.apply({"params": params}, batch)

  still = evaluated(params)
  np.testing.assert_allclose(still, evaluated(merge(jax.tree.map(np.asarray, params))), atol=1e-5)
  assert np.abs(hidden(params, 0) - still).max() > 0.1
  assert np.abs(hidden(params, 0) - hidden(params, 1)).max() > 0.1
  off = map_named(lambda name, x: 0 * x if name.endswith("lora_b") else x, params)
  # the kernels' own input stays whole
  np.testing.assert_allclose(hidden(off, 0), evaluated(off), atol=1e-6)


def test_encoders_of_other_models_take_factors_too():
  c = configs.base()
  c.data.text.tokenizer, c.data.image.size = "none", 16
  c.model.encoders = dict(
    image=dict(kind="swin", window=2, depths=(1,), width=16), text=dict(kind="transformer", depth=1)
  )
  c.model.width = 32
  c.objectives.align = dict(kind="contrastive", between=("image", "text"))
  c.lora.params, c.train.batch_size = "(image|text)/.*qkv.*", 8
  shares = make_program(configs.resolve(c)).optimizer.shares
  trained = {name.rpartition("/")[0] for name, share in shares.items() if share}
  assert {name.partition("/")[0] for name in trained} == {"image", "text"}
  assert all(name.endswith("qkv") for name in trained)
