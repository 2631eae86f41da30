"""Optimizers: equal to optax where there are no stacks, equal for stacked and unstacked layers,
rates, freezing, decay.
"""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from mmjax.config import UserError
from mmjax.state.muon import matrix_axes, orthogonalize, scale_by_muon
from mmjax.state.optimizer import make_optimizer, state_axes
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


def is_names(x):
  return type(x) is tuple and all(a is None or isinstance(a, str) for a in x)


def random_tree(seed, scale=1.0):
  """Stacked values: every layer at its own scale, so that statistics over the whole stack would
  differ from a layer's.
  """
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


@pytest.mark.parametrize(
  "name, state_dtype", [*((name, "float32") for name in SETTINGS), ("muon", "bfloat16")]
)
def test_a_stack_gets_the_update_of_its_layers(make_config, name, state_dtype):
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

  def decay(params):
    return nest({k: k.endswith(("kernel", "embedding")) for k in by_name(params)})

  return {
    "adamw": (dict(), lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decay)),
    "lion": (dict(), lambda: optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.1, mask=decay)),
    "adafactor": (
      dict(max_decay=1.0, parameter_scale=True, momentum=0.0),
      lambda: optax.adafactor(None, min_dim_size_to_factor=32, multiply_by_parameter_scale=True),
    ),
    "muon": (
      dict(),
      lambda: optax.contrib.muon(
        1e-2,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=0.2,
        weight_decay=0.1,
        adam_weight_decay=0.0,
      ),
    ),
  }


@pytest.mark.parametrize("name", list(SETTINGS))
def test_without_stacks_it_is_optax(make_config, name):
  settings, peer = peers()[name]
  theirs_tx = peer()
  decay = 0.0 if name == "adafactor" else 0.1
  config = make_config(
    name,
    weight_decay=decay,
    clip=0.0,
    **settings,
    **({"decay": r".*(qkv|out|up|projection)/kernel"} if name == "muon" else {}),
    **({"lr": 1.0} if name == "adafactor" else {}),
  )
  params = unstack(random_tree(0))
  ours = make_optimizer(config, axes_tree(False), spec_of(params), steps=10)
  _, _, history = run(ours, params, transform=unstack)
  state, update, p = theirs_tx.init(params), jax.jit(theirs_tx.update), params
  for i in range(4):
    updates, state = update(unstack(random_tree(i + 1, 0.1)), state, p)
    p = optax.apply_updates(p, updates)
    if name == "muon":  # optax's muon gives the rest to an Adam with Nesterov momentum
      axes = by_name(axes_tree(False), is_leaf=lambda x: isinstance(x, tuple))
      updates, history[i] = (
        {k: v for k, v in by_name(tree).items() if matrix_axes(k, axes[k])}
        for tree in (updates, history[i])
      )
    assert_close(history[i], updates, 1e-5, f"step {i}")


def optimizer_for(make_config, name="adamw", **settings):
  return make_optimizer(
    make_config(name, **settings), axes_tree(True), spec_of(random_tree(0)), steps=10
  )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_leaves_and_layers(make_config, name):
  """Frozen: no update, no state, no part in the clipped norm. The rest gets the update that it
  would get alone.
  """
  rates = ((r"image/layers[0:1]/.*", 0.0), (r"text/.*", 0.0), (r".*/projection/.*", 0.5))
  optimizer = optimizer_for(
    make_config, name, rates=rates, weight_decay=0.1, clip=0.5, **SETTINGS[name]
  )
  params = random_tree(0)
  after, state, _ = run(optimizer, params)
  before, after = by_name(unstack(params)), by_name(unstack(after))
  frozen = {key for key in before if key.startswith(("image/layers_0/", "text/"))}
  for key in before:
    assert np.array_equal(before[key], after[key]) == (key in frozen), key
  assert (
    by_name(optimizer.trained)["text/embedding"] is False
    and by_name(optimizer.trained)["image/layers/norm/scale"] is True
  )
  sizes = [
    leaf.shape
    for key, leaf in by_name(state).items()
    if key.endswith("mlp/up/kernel") and leaf.ndim
  ]
  assert all(shape[0] == LAYERS - 1 for shape in sizes) and not [
    key for key in by_name(state) if "text" in key
  ]

  def drop(tree):
    return nest({key: leaf for key, leaf in by_name(unstack(tree)).items() if key not in frozen})

  axes = nest({key: leaf for key, (_, leaf) in shapes(False).items() if key not in frozen})
  alone = make_optimizer(
    make_config(
      name, rates=rates[2:], weight_decay=0.1, clip=0.5, **SETTINGS[name], decay=r".*/kernel"
    ),
    axes,
    spec_of(drop(params)),
    steps=10,
  )
  expected, _, _ = run(alone, drop(params), transform=drop)
  assert_close({key: after[key] for key in by_name(expected)}, by_name(expected), 1e-5, "the end")


def test_rates_first_match_and_layer_addresses(make_config):
  optimizer = optimizer_for(
    make_config,
    "lion",
    clip=0.0,
    lr=1.0,
    rates=(
      (r"image/layers\[1\]/mlp/.*", 0.25),
      (r"image/layers[-1:]/.*", 0.5),
      (r"image/.*", 0.75),
    ),
  )
  _, _, (updates,) = run(optimizer, random_tree(0), steps=1)
  sizes = {key: np.unique(np.abs(leaf)).tolist() for key, leaf in by_name(unstack(updates)).items()}
  assert sizes["image/layers_1/mlp/up/kernel"] == [0.25] and sizes["image/layers_1/norm/scale"] == [
    0.5
  ]
  assert sizes["image/layers_0/mlp/up/kernel"] == [0.75] and sizes["image/position"] == [0.75]
  assert sizes["text/embedding"] == [1.0]


@pytest.mark.parametrize(
  "settings, message",
  [
    (
      dict(rates=((r"image/layer/.*", 0.5),)),
      "'image/layer/.*' matches no parameter; the nearest is 'image/layers/",
    ),
    (dict(rates=((r"image/layers[2:4]/.*", 0.5),)), "matches no parameter"),
    (
      dict(weight_decay=0.1, decay=r".*/kernels"),
      "optimizer.decay: '.*/kernels' matches no parameter; the nearest is .*/kernel'",
    ),
    (dict(rates=((".*", 0.0),)), "freezes every parameter"),
    (dict(rates=((".*", -1.0),)), "must be a number of 0 or more"),
  ],
)
def test_refusals(make_config, settings, message):
  with pytest.raises(UserError, match=message) as error:
    optimizer_for(make_config, **settings)
  assert "\n" not in str(error.value)


def test_a_given_rate_goes_before_the_schedule(make_config):
  optimizer = optimizer_for(make_config, "lion", warmup=10, clip=0.0)
  params = random_tree(0)
  state = optimizer.tx.init(params)
  gradients = random_tree(1)
  for rate, expected in ((None, 1e-3), (6e-3, 6e-3), (None, 3e-3)):
    updates, state = optimizer.tx.update(gradients, state, params, rate=rate)
    np.testing.assert_allclose(abs(updates["log_scale"]), expected, rtol=1e-6)
  np.testing.assert_allclose(optimizer.schedule(5), 6e-3, rtol=1e-6)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_state_axes_follow_the_parameters(make_config, name):
  optimizer = optimizer_for(
    make_config, name, rates=((r"image/layers[:1]/.*", 0.0),), **SETTINGS[name]
  )
  spec = spec_of(random_tree(0))
  axes = state_axes(optimizer, spec, axes_tree(True))
  state = jax.eval_shape(optimizer.tx.init, spec)
  names = jax.tree.leaves(axes, is_leaf=is_names)
  assert [len(n) for n in names] == [leaf.ndim for leaf in jax.tree.leaves(state)]
  found = {
    key: n
    for key, n in zip(by_name(state), names, strict=True)
    if "/image/" in key or "/text/" in key
  }
  assert {n for key, n in found.items() if key.endswith("text/embedding")} <= {
    ("vocab", "embed"),
    ("vocab",),
    ("embed",),
    (None,),
  }
  up = {
    key.split("/image/")[0].split("/")[-1]: n
    for key, n in found.items()
    if key.endswith("mlp/up/kernel")
  }
  full = ("layers", "embed", "mlp")
  assert (
    up
    == {
      "adamw": {"mu": full, "nu": full},
      "lion": {"mu": full},
      "muon": {"mu": full},
      "adafactor": {
        "v_row": ("layers", "embed"),
        "v_col": ("layers", "mlp"),
        "v": ("layers", None),
        "ema": full,
      },
    }[name]
  )


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_optax_with_the_sides_as_dimension_numbers(nesterov):
  """Stacked layers, query, key and value in one leaf, and heads that are one side together."""
  sides = {"qkv": ((1,), (3, 4)), "out": ((1, 2), (3,)), "plain": ((0,), (1,))}
  shapes = {"qkv": (2, 8, 3, 2, 4), "out": (2, 2, 4, 8), "plain": (6, 10)}
  width = {"qkv": 8, "out": 8, "plain": 10}  # the larger side of a matrix
  number = optax.contrib.MuonDimensionNumbers
  theirs = optax.contrib.scale_by_muon(
    beta=0.9,
    nesterov=nesterov,
    weight_dimension_numbers={name: number(*pair) for name, pair in sides.items()},
  )
  settings = dict(beta=0.9, nesterov=nesterov, iterations=5, rms=0.2)
  ours = scale_by_muon(sides, precision="float32", momentum_dtype="float32", **settings)
  rng = np.random.default_rng(0)
  state, their_state = (
    tx.init({k: np.zeros(v, np.float32) for k, v in shapes.items()}) for tx in (ours, theirs)
  )
  for _ in range(3):
    gradients = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
    updates, state = ours.update(gradients, state)
    their_updates, their_state = theirs.update(gradients, their_state)
    for name, update in updates.items():
      want = 0.2 * np.sqrt(width[name]) * np.asarray(their_updates[name])
      np.testing.assert_allclose(update, want, rtol=2e-5, atol=2e-6)


def test_matrices_of_muon():
  expected = {
    "attention/qkv/kernel": ((1,), (3, 4)),
    "attention/out/kernel": ((1, 2), (3,)),
    "mlp/up/kernel": ((1,), (2,)),
    "attention/qkv/bias": None,
    "norm/scale": None,
  }
  for name, sides in expected.items():
    assert matrix_axes(name, ("layers", *BLOCK[name][1])) == sides
  assert [key for key, (_, axes) in OUTSIDE.items() if matrix_axes(key, axes)] == [
    "image/projection/kernel"
  ]
  assert matrix_axes("conv/kernel", (None, None, "embed", "mlp")) == ((0, 1, 2), (3,))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(precision, shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  values = np.linalg.svd(orthogonalize(x, 5, precision), compute_uv=False)
  assert 0.6 < values.min() and values.max() < 1.3
  ours, (u, _, v) = orthogonalize(x, 5, precision), np.linalg.svd(x, full_matrices=False)
  assert np.linalg.norm(ours - u @ v) / np.linalg.norm(u @ v) < 0.35


def test_sharded_states_update_like_whole_ones(make_config):
  """With every state leaf sharded by its axes, the update is that of one device."""
  mesh = jax.make_mesh(
    (2,), ("fsdp",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
  )
  optimizer = optimizer_for(make_config, "muon", weight_decay=0.1)
  params, gradients = random_tree(0), random_tree(1, 0.1)

  def place(names):
    return jax.NamedSharding(mesh, jax.P(*("fsdp" if name == "embed" else None for name in names)))

  param_shardings = jax.tree.map(place, axes_tree(True), is_leaf=is_names)
  state_shardings = jax.tree.map(
    place, state_axes(optimizer, spec_of(params), axes_tree(True)), is_leaf=is_names
  )
  state = jax.jit(optimizer.tx.init, out_shardings=state_shardings)(params)
  update = jax.jit(optimizer.tx.update, out_shardings=(param_shardings, state_shardings))
  updates, _ = update(
    jax.device_put(gradients, param_shardings), state, jax.device_put(params, param_shardings)
  )
  expected, _ = jax.jit(optimizer.tx.update)(gradients, optimizer.tx.init(params), params)
  assert_close(updates, expected, 1e-5, "the first step")


@pytest.mark.parametrize(
  "rates, dropout, warns",
  [
    (((r"image/layers[0:1]/.*", 0.0),), 0.1, True),
    (((r"image/layers[0:1]/.*", 0.0),), 0.0, False),
    (((r"image/.*", 0.0),), 0.1, False),
    (((r"image/layers[0:1]/attention/.*", 0.0),), 0.1, False),  # no layer is frozen whole
  ],
)
def test_dropout_in_frozen_layers_of_a_stack_is_said(rates, dropout, warns, make_config, caplog):
  c = ConfigDict(make_config(rates=rates).to_dict())
  c.model.encoders = dict(image=dict(kind="vit", dropout=dropout))
  spec = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
    nest({name: shape for name, (shape, _) in shapes(True).items()}),
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )
  make_optimizer(FrozenConfigDict(c), axes_tree(True), spec, steps=10)
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == warns
  assert not warns or "freezes layers of image/layers" in said[0] and "dropout 0.1" in said[0]
