"""Optimizers: equal to optax where there are no stacks, equal for stacked and unstacked layers, rates, freezing, decay."""

import jax
import numpy as np
import optax
import pytest

from mmjax import config as config_lib
from mmjax.state.optimizer import make_optimizer, matrix_axes
from mmjax.state.paths import by_name

LAYERS = 2
# name -> (shape, axes) of one layer, and of leaves outside the stack
BLOCK = {
    "attention/qkv/kernel": ((48, 3, 4, 8), ("embed", "qkv", "heads", "kv")),
    "attention/qkv/bias": ((3, 4, 8), ("qkv", "heads", "kv")),
    "attention/out/kernel": ((4, 8, 48), ("heads", "kv", "embed")),
    "mlp/up/kernel": ((48, 64), ("embed", "mlp")),
    "norm/scale": ((48,), ("embed",)),
}
OUTSIDE = {
    "image/patch/kernel": ((12, 48), ("patch", "embed")),
    "image/position": ((5, 48), ("position", "embed")),
    "text/embedding": ((40, 48), ("vocab", "embed")),
    "image/projection/kernel": ((48, 40), ("embed", "joint")),
    "log_scale": ((), ()),
}
SETTINGS = {
    "adamw": dict(b2=0.95),
    "lion": dict(),
    "adafactor": dict(parameter_scale=True),
    "muon": dict(adam_rate=0.5),
}


def nest(flat):
  tree = {}
  for name, leaf in flat.items():
    node = tree
    *heads, last = name.split("/")
    for head in heads:
      node = node.setdefault(head, {})
    node[last] = leaf
  return tree


def shapes(stacked):
  if stacked:
    block = {f"image/layers/{k}": ((LAYERS, *s), ("layers", *a)) for k, (s, a) in BLOCK.items()}
  else:
    block = {f"image/layers_{i}/{k}": v for i in range(LAYERS) for k, v in BLOCK.items()}
  return {**block, **OUTSIDE}


def axes_tree(stacked):
  return nest({k: a for k, (_, a) in shapes(stacked).items()})


def random_tree(seed, scale=1.0):
  """Stacked values: every layer at its own scale, so that statistics over the whole stack would differ from a layer's."""
  rng = np.random.default_rng(seed)
  flat = {}
  for name, (shape, axes) in shapes(True).items():
    value = rng.normal(size=shape) * scale
    if axes[:1] == ("layers",):
      value = value * (10.0 ** np.arange(LAYERS)).reshape((-1,) + (1,) * (len(shape) - 1))
    flat[name] = np.asarray(value, np.float32)
  return nest(flat)


def unstack(tree):
  flat = {}
  for name, leaf in by_name(tree).items():
    if "/layers/" in name:
      flat.update({name.replace("/layers/", f"/layers_{i}/"): leaf[i] for i in range(LAYERS)})
    else:
      flat[name] = leaf
  return nest(flat)


def make_config(name="adamw", schedule="constant", lr=1e-2, warmup=0, **settings):
  """A resolved config without a model: only the optimizer and the schedule matter here."""
  c = config_lib.base()
  c.optimizer = dict(name=name, lr=lr, **settings)
  c.schedule = dict(name=schedule, warmup=warmup)
  raw, common = c.to_dict(), {key.path: key for key in config_lib.KEYS}
  for part in ("optimizer", "schedule"):
    raw[part] = config_lib._resolve_node(raw[part], part, part, common)
  return config_lib.FrozenConfigDict(raw)


def assert_close(ours, theirs, tolerance, hint):
  """Every leaf within `tolerance` of the other, by the norm of the difference."""
  ours, theirs = by_name(ours), by_name(theirs)
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    error = np.linalg.norm(np.ravel(ours[key] - value)) / (np.linalg.norm(np.ravel(value)) + 1e-12)
    assert error < tolerance, f"{key} at {hint}: {error}"


def run(optimizer, params, steps=4, transform=lambda x: x):
  state = optimizer.tx.init(params)
  update = jax.jit(optimizer.tx.update)
  history = []
  for i in range(steps):
    updates, state = update(transform(random_tree(i + 1, 0.1)), state, params)
    params = optax.apply_updates(params, updates)
    history.append(updates)
  return params, state, history


def spec_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("name, state_dtype", [*((name, "float32") for name in SETTINGS), ("muon", "bfloat16")])
def test_a_stack_gets_the_update_of_its_layers(name, state_dtype):
  config = make_config(name, weight_decay=0.1, clip=1.0, state_dtype=state_dtype, **SETTINGS[name])
  params = random_tree(0)
  stacked = make_optimizer(config, axes_tree(True), spec_of(params), steps=10)
  alone = make_optimizer(config, axes_tree(False), spec_of(unstack(params)), steps=10)
  _, _, history = run(stacked, params)
  _, _, expected = run(alone, unstack(params), transform=unstack)
  for step, (ours, theirs) in enumerate(zip(history, expected, strict=True)):
    assert_close(unstack(ours), theirs, 1e-5 if state_dtype == "float32" else 1e-3, f"step {step}")


def peers():
  dims = optax.contrib.MuonDimensionNumbers

  def number(name):
    if name.endswith("qkv/kernel"):
      return dims((0,), (2, 3))
    if name.endswith("out/kernel"):
      return dims((0, 1), (2,))
    return dims((0,), (1,)) if name.endswith(("up/kernel", "projection/kernel")) else None

  numbers = nest({k: number(k) for k in shapes(False)})
  decay = lambda params: nest({k: k.endswith(("kernel", "embedding")) for k in by_name(params)})
  return {
      "adamw": (dict(), lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decay)),
      "lion": (dict(), lambda: optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.1, mask=decay)),
      "adafactor": (dict(max_decay=1.0, parameter_scale=True, momentum=0.0), lambda: optax.adafactor(
          None, min_dim_size_to_factor=32, multiply_by_parameter_scale=True)),
      "muon": (dict(), lambda: optax.contrib.muon(
          1e-2, muon_weight_dimension_numbers=numbers, consistent_rms=0.2, weight_decay=0.1, adam_weight_decay=0.0)),
  }


@pytest.mark.parametrize("name", list(SETTINGS))
def test_without_stacks_it_is_optax(name):
  settings, peer = peers()[name]
  theirs_tx = peer()
  decay = 0.0 if name == "adafactor" else 0.1
  config = make_config(name, weight_decay=decay, clip=0.0, **settings,
                       **({"decay": r".*(qkv|out|up|projection)/kernel"} if name == "muon" else {}),
                       **({"lr": 1.0} if name == "adafactor" else {}))
  params = unstack(random_tree(0))
  ours = make_optimizer(config, axes_tree(False), spec_of(params), steps=10)
  _, _, history = run(ours, params, transform=unstack)
  state, update, p = theirs_tx.init(params), jax.jit(theirs_tx.update), params
  for i in range(4):
    updates, state = update(unstack(random_tree(i + 1, 0.1)), state, p)
    p = optax.apply_updates(p, updates)
    if name == "muon":  # optax's muon gives the rest to an Adam with Nesterov momentum
      axes = by_name(axes_tree(False), is_leaf=lambda x: isinstance(x, tuple))
      updates, history[i] = ({k: v for k, v in by_name(tree).items() if matrix_axes(k, axes[k])} for tree in (updates, history[i]))
    assert_close(history[i], updates, 1e-5, f"step {i}")
