"""Low-rank adapters: merged and unmerged models agree, only what the config names is trained, and
the rest has neither moments nor changes.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import mmjax.config as configs
from mmjax.config import UserError
from mmjax.models import make_model
from mmjax.models.lora import merge
from mmjax.models.quantised import LEVELS, dequantise, quantise
from mmjax.parallel.mesh import make_mesh
from mmjax.state import adapters, manifest, storage
from mmjax.state.checkpoint import load_params, names_and_shapes, restore_into, save_import
from mmjax.state.checkpointer import Checkpointer
from mmjax.state.paths import by_name, map_named
from mmjax.training.program import Program
from mmjax.training.start import new_state

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
    dict(params=r"(image/)?layers/.*|embedding", rank=3, alpha=6, full=("image_connector/.*",)),
    **lora,
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
  """The parameters with factors whose products are not zero."""
  draw = np.random.default_rng(seed)

  def of(name, x):
    new = name.endswith(("lora_b", "embedding_factors/lora_a"))
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
    """What objectives get, and the logits as texts are written by them."""
    apply = functools.partial(model.apply, {"params": params})
    states, table, _ = apply(batch, method="next_tokens")
    return states, table, apply(states, method="logits")

  merged = merge(jax.tree.map(np.asarray, params))
  assert not any("lora" in name for name in by_name(merged))
  for one, other in zip(hidden(params), hidden(merged), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  base = {name: x for name, x in by_name(params).items() if name in by_name(merged)}
  changed = {name for name, x in by_name(merged).items() if np.any(x != base[name])}
  kernels = {name for name in base if "layers/" in name and name.endswith("kernel")}
  assert changed == {*kernels, "embedding"}


def test_tables_of_tokens_apart_have_factors_of_their_own():
  config = make_config("model.tied=False", params="embedding|output", full=())
  params = random_factors(make_program(config).init(1).params)
  model, batch = make_model(config), make_batch(program().batch_spec)
  params["output_factors"]["lora_a"] = params["output_factors"]["lora_a"] + 0.1
  merged = merge(jax.tree.map(np.asarray, params))
  for name in ("embedding", "output"):
    assert np.abs(merged[name] - params[name]).max() > 0.01
  one, other = (
    model.apply({"params": x}, batch, method="next_tokens")[:2] for x in (params, merged)
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)


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
    (dict(params="norm/scale"), "lora.params: .norm/scale. matches no kernel"),
    (dict(full=("image_conector/.*",)), "lora.full: .* nearest is 'image_connector/"),
    (dict(params="norm.*|image_connector/.*"), "lora.full matches all that lora.params does"),
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


# -- Checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """An import folder with the model without factors."""
  folder = tmp_path_factory.mktemp("base") / "import"
  config = make_config(params="", full=())
  params = merge(jax.tree.map(np.asarray, program().init(7).params))
  save_import(str(folder), params, config, {})
  return folder


def saver_of(workdir, config):
  return Checkpointer(workdir, config, steps=10)


def test_checkpoints_hold_the_adapter_alone_and_name_their_base(base, tmp_path, monkeypatch):
  step, config = program(), make_config(f"init.from={base}")
  saver = saver_of(tmp_path / "run", config)
  state = new_state(config, step, saver=saver, log=lambda line: None)
  np.testing.assert_array_equal(state.params["embedding"], load_params(base)["embedding"])
  state, _ = step.train(state, make_batch(step.batch_spec))
  whole = jax.tree.map(np.asarray, state.params)
  rest = jax.tree.map(np.asarray, state.opt_states)
  saver.save(1, state, data={}, config=config, assets={}, force=True)
  saver.close()
  folder = tmp_path / "run" / "checkpoints" / "1"
  held = storage.stored_leaves(epath.Path(folder / "params"))
  assert {name for name in held} == {
    name for name in by_name(whole) if "lora_" in name or name.startswith("image_connector/")
  }
  # The same bits come back: in a run, without a spec, and on other devices.
  other = saver_of(tmp_path / "run", config)
  restored, _, at = other.restore(step.state_spec)
  assert at == 1 and other.base == saver.base and other.base.folder == str(base)
  tiny = make_program(make_config("sharding=fsdp", "mesh.fsdp=8"), 8)
  for tree in (restored.params, load_params(folder), load_params(folder, tiny.params_spec)):
    jax.tree.map(np.testing.assert_array_equal, whole, tree)
  jax.tree.map(np.testing.assert_array_equal, rest, restored.opt_states)
  assert names_and_shapes(folder)["embedding"].shape == (64, 32)
  # The base moves, and is found again; another one is refused, and so is none.
  moved = base.parent / "moved"
  shutil.copytree(base, moved)
  monkeypatch.setenv("MMJAX_BASE", str(moved))
  jax.tree.map(np.testing.assert_array_equal, whole, load_params(folder))
  another = tmp_path / "another"
  params = merge(jax.tree.map(np.asarray, step.init(8).params))
  save_import(str(another), params, make_config(params="", full=()), {})
  monkeypatch.setenv("MMJAX_BASE", str(another))
  with pytest.raises(
    UserError, match=rf"1 is an adapter of {base}, but {another} is another model"
  ):
    load_params(folder)
  monkeypatch.setenv("MMJAX_BASE", str(tmp_path / "nothing"))
  with pytest.raises(UserError, match=rf"needs its base {base}: .*no checkpoint here"):
    saver_of(tmp_path / "run", config).restore(step.state_spec)
  # What strangers write: a base that is the adapter itself, and facts of another form.
  monkeypatch.delenv("MMJAX_BASE")
  facts = saver.base._asdict()
  for forged, words in (
    (dict(facts, folder=str(folder)), "1 is its own base"),
    (dict(facts, names=[1]), "names the base of an adapter in no known form"),
    (7, "names the base of an adapter in no known form"),
  ):
    manifest.update(epath.Path(folder), base=forged)
    with pytest.raises(UserError, match=words):
      load_params(folder)


@pytest.mark.slow
def test_an_adapted_model_is_a_start_for_others(base, tmp_path):
  """Merged where no factors are trained, and as a base of further ones."""
  step, config = program(), make_config(f"init.from={base}")
  saver = saver_of(tmp_path / "run", config)
  state = new_state(config, step, saver=saver, log=lambda line: None)
  state = state.replace(params=random_factors(state.params))
  saver.save(1, state, data={}, config=config, assets={}, force=True)
  saver.close()
  folder = tmp_path / "run" / "checkpoints" / "1"
  merged = merge(jax.tree.map(np.asarray, state.params))
  plain = make_program(make_config(params="", full=()))
  loaded, _, lines = restore_into(plain.init(3).params, folder)
  jax.tree.map(np.testing.assert_array_equal, merged, jax.tree.map(np.asarray, loaded))
  assert not any(line.startswith("left") for line in lines)
  again = make_config(params="layers/mlp/.*", full=())
  loaded, _, lines = restore_into(make_program(again).init(3).params, folder)
  assert {line.partition("lora")[0] for line in lines if line.startswith("new")} == {
    "new layers/mlp/down/",
    "new layers/mlp/up/",
  }
  np.testing.assert_array_equal(loaded["embedding"], merged["embedding"])


# -- Kernels in few bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_kernels_equal_the_formulas(kind):
  kernel = np.random.default_rng(0).normal(size=(5, 30, 3, 4)).astype(np.float32)
  kernel[:, :, 0, 0] = 0
  leaves = quantise(kernel, 2, kind)
  for part, leaf in quantise(jnp.asarray(kernel), 2, kind).items():
    np.testing.assert_allclose(
      np.asarray(leaf, np.float32), leaves[part].astype(np.float32), rtol=1e-6
    )
  flat = kernel.reshape(150, 12)
  if kind == "int8":
    scale = np.abs(flat).max(0) / 127
    want = np.rint(flat / np.where(scale, scale, 1)) * scale
    assert leaves["kernel_int8"].dtype == np.int8
  else:
    want = np.zeros_like(flat)
    for start in range(0, 150, 64):
      block = flat[start : start + 64]
      scale = np.abs(block).max(0)
      unit = block / np.where(scale, scale, 1)
      nearest = np.abs(unit[..., None] - LEVELS).argmin(-1)
      want[start : start + 64] = LEVELS[nearest] * scale
    assert leaves["kernel_nf4"].shape == (96, 3, 4) and leaves["kernel_nf4"].dtype == np.uint8
  found = dequantise(jax.tree.map(jnp.asarray, leaves), kernel.shape, jnp.float32)
  np.testing.assert_allclose(found, want.reshape(kernel.shape), rtol=1e-6, atol=1e-7)
  bits = {"int8": 8.1, "nf4": 5.2}[kind]  # 150 inputs of 4 bits are filled up to 192
  assert np.abs(found - kernel).mean() < {"int8": 0.01, "nf4": 0.1}[kind]
  assert 8 * sum(x.nbytes for x in leaves.values()) / kernel.size < bits + 32 * 3 / 150


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_quantised_base_is_trained_under_and_comes_back(kind, base, tmp_path):
  config = make_config(f"init.from={base}", base=kind)
  step = make_program(config)
  saver = saver_of(tmp_path / "run", config)
  state = new_state(config, step, saver=saver, log=lambda line: None)
  held = {name: x for name, x in by_name(state.params).items() if "layers/" in name}
  few = sum(x.nbytes for name, x in held.items() if "kernel_" in name)
  whole = by_name(load_params(base))
  kernels = [x for name, x in whole.items() if "layers/" in name and name.endswith("kernel")]
  assert few < {"int8": 0.3, "nf4": 0.27}[kind] * sum(x.nbytes for x in kernels)
  assert not any(name.endswith("/kernel") for name in held)
  up = dequantise(
    {name: x[0] for name, x in state.params["layers"]["mlp"]["up"].items() if "kernel" in name},
    (32, 96),
    jnp.float32,
  )
  error = np.abs(up - whole["layers/mlp/up/kernel"][0]).mean() / np.abs(up).mean()
  assert 0 < error < {"int8": 0.02, "nf4": 0.15}[kind]
  before = jax.tree.map(np.asarray, state.params)
  state, metrics = step.train(state, make_batch(step.batch_spec))
  assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
  after = jax.tree.map(np.asarray, state.params)
  changed = {n for n, x in by_name(after).items() if np.any(x != by_name(before)[n])}
  assert changed and not any("kernel_" in name for name in changed)
  saver.save(1, state, data={}, config=config, assets={}, force=True)
  saver.close()
  restored, _, _ = saver_of(tmp_path / "run", config).restore(step.state_spec)
  jax.tree.map(np.testing.assert_array_equal, after, restored.params)
  folder = tmp_path / "run" / "checkpoints" / "1"
  assert not any("kernel_" in name for name in storage.stored_leaves(epath.Path(folder / "params")))
  np.testing.assert_array_equal(by_name(load_params(folder))["embedding"], whole["embedding"])
