"""ResNet, Swin and NaFlex: rows that are absent, padding, order, the statistics of a batch; PyTorch
as the reference.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.naflex import patch_sequence
from mmjax.models import make_model
from mmjax.models.encoders.naflex import position_of
from mmjax.models.encoders.resnet import BatchNorm
from mmjax.models.encoders.swin import open_pairs

KINDS = {
  "resnet": (dict(kind="resnet", layers=18, blocks=(1, 1), multiplier=0.125, stem="small"), 16),
  "swin": (dict(kind="swin", patch=2, width=8, depths=(1, 2), heads=(2, 2), window=3), 16),
  "naflex": (dict(kind="naflex", patch=4, grid=3, width=16, depth=1, heads=2, pooling="mean"), 16),
}
ROWS = 8


def make(entry, width, size=16):
  c = configs.base()
  c.data.image.size = size
  c.precision.compute = "float32"
  c.model = dict(name="encoder", width=width, encoders=dict(image=entry))
  return make_model(configs.resolve(c))


@functools.cache
def built(name):
  """(variables, evaluation, one training step of the statistics) of a kind, compiled for eight
  rows.
  """
  model = make(*KINDS[name])
  variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs(name, 0)))

  def encode(variables, batch):
    return model.apply(variables, "image", batch, method="encode")

  def train(variables, batch):
    return model.apply(
      variables, "image", batch, method="encode", train=True, mutable=["batch_stats"]
    )

  return variables, jax.jit(encode), jax.jit(train)


def inputs(name, seed):
  rng = np.random.default_rng(seed)
  present = np.ones(ROWS, bool)
  if name != "naflex":
    return dict(
      image=dict(pixels=rng.integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8), present=present)
    )
  rows = [
    patch_sequence(
      rng.integers(0, 256, (*rng.integers(4, 40, 2), 3), dtype=np.uint8), 4, 9
    )._asdict()
    for _ in range(ROWS)
  ]
  return dict(
    image=dict({key: np.stack([row[key] for row in rows]) for key in rows[0]}, present=present)
  )


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_order_absent_rows_and_padding(name, seed):
  variables, encode, train = built(name)
  rng, batch = np.random.default_rng(seed), inputs(name, seed)
  order = rng.permutation(ROWS)
  whole, moved = (
    encode(variables, batch),
    encode(variables, jax.tree.map(lambda x: x[order], batch)),
  )
  np.testing.assert_allclose(moved.pooled, whole.pooled[order], atol=1e-5)

  absent = rng.random(ROWS) < 0.5
  absent[0], absent[1] = True, False
  less = dict(image={**batch["image"], "present": ~absent})
  noise = dict(
    image={
      key: np.where(absent.reshape(-1, *[1] * (x.ndim - 1)), x[::-1], x)
      for key, x in less["image"].items()
      if key != "present"
    }
  )
  noise["image"]["present"] = ~absent
  a, b = encode(variables, less), encode(variables, noise)
  assert not np.any(a.pooled[absent]) and not np.any(a.mask[absent])
  np.testing.assert_allclose(a.pooled[~absent], whole.pooled[~absent], atol=1e-6)
  (a, state), (b, other) = train(variables, less), train(variables, noise)
  np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state, other)
  if name == "resnet":
    nobody = train(variables, dict(image={**batch["image"], "present": np.zeros(ROWS, bool)}))[1][
      "batch_stats"
    ]
    jax.tree.map(np.testing.assert_array_equal, nobody, variables["batch_stats"])
    moved = jax.tree.map(
      lambda x, y: float(abs(x - y).max()), state["batch_stats"], variables["batch_stats"]
    )
    assert min(jax.tree.leaves(moved)) > 0
  if name == "naflex":
    hidden = ~batch["image"]["mask"][..., None]
    loud = {
      **batch["image"],
      "patches": np.where(hidden, 255, batch["image"]["patches"]),
      "positions": np.where(hidden, 1, batch["image"]["positions"]),
    }
    np.testing.assert_allclose(encode(variables, dict(image=loud)).pooled, whole.pooled, atol=1e-6)


def test_absent_rows_have_no_gradient_and_statistics_are_those_of_pytorch():
  rng = np.random.default_rng(0)
  x, present = rng.normal(1, 2, (6, 3, 4, 5)).astype(np.float32), np.array([1, 1, 0, 1, 0, 1], bool)
  module = BatchNorm(jnp.float32)
  variables = nn.unbox(module.init(jax.random.key(0), x, present, train=False))

  def run(x):
    y, state = module.apply(variables, x, present, train=True, mutable=["batch_stats"])
    return (jnp.where(present[:, None, None, None], jnp.sin(y), 0)).sum(), (y, state["batch_stats"])

  gradient, (y, state) = jax.grad(run, has_aux=True)(x)
  norm = torch.nn.BatchNorm2d(5)
  theirs = torch.tensor(x[present].transpose(0, 3, 1, 2), requires_grad=True)
  out = norm(theirs)
  torch.sin(out).sum().backward()
  np.testing.assert_allclose(y[present], out.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
  np.testing.assert_allclose(
    gradient[present], theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5
  )
  assert not np.any(gradient[~present])
  np.testing.assert_allclose(state["mean"], norm.running_mean, atol=1e-6)
  np.testing.assert_allclose(state["variance"], norm.running_var, atol=1e-5)


def test_statistics_on_eight_devices_are_those_of_one(devices):
  variables, _, train = built("resnet")
  batch = inputs("resnet", 1)
  batch["image"]["present"][2:5] = False
  alone, state = train(variables, batch)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
  split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  with jax.set_mesh(mesh):
    together, other = train(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), split)
  np.testing.assert_allclose(together.pooled, alone.pooled, atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), other, state)


def test_every_parameter_names_its_axes():
  for name, (entry, width) in KINDS.items():
    model = make(entry, width)
    boxed = jax.eval_shape(model.init, jax.random.key(0), inputs(name, 0))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
      assert (
        isinstance(leaf, nn.LogicallyPartitioned)
        and len(leaf.names) == leaf.value.ndim
        and any(leaf.names)
      ), path


def test_joined_regions_of_shifted_windows_stay_apart():
  """Brute force over a map of 6x6 whose windows of 4 are filled up to 8x8 and shifted by 2."""
  seen = open_pairs(8, 8, 4, 2)

  def part(place):
    return 0 if place < 4 else 1 if place < 6 else 2

  for window in range(4):
    top, left = divmod(window, 2)
    places = [(top * 4 + i, left * 4 + j) for i in range(4) for j in range(4)]
    want = [[(part(a), part(b)) == (part(c), part(d)) for c, d in places] for a, b in places]
    np.testing.assert_array_equal(seen[window], want)


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (9, 1), (1, 1), (5, 7)])
def test_positions_are_resized_as_pytorch_does(grid):
  table = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
  square = torch.tensor(table).reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
  want = (
    torch.nn.functional.interpolate(
      square, size=grid, mode="bilinear", align_corners=False, antialias=True
    )[0]
    .permute(1, 2, 0)
    .reshape(-1, 6)
  )
  places = np.stack(np.mgrid[: grid[0], : grid[1]], -1).reshape(1, -1, 2)
  np.testing.assert_allclose(position_of(table, places, np.array([grid]))[0], want, atol=1e-5)


def test_naflex_is_siglip_2():
  facts = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_patches=16,
    patch_size=4,
  )
  theirs = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**facts)).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
  rng = np.random.default_rng(0)
  rows = [
    patch_sequence(rng.integers(0, 256, (*size, 3), dtype=np.uint8), 4, 20)._asdict()
    for size in ((30, 40), (9, 50), (16, 16))
  ]
  batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  with torch.no_grad():
    want = theirs(
      pixel_values=torch.tensor((batch["patches"] / 255 - 0.5) / 0.5, dtype=torch.float32),
      pixel_attention_mask=torch.tensor(batch["mask"].astype(np.int64)),
      spatial_shapes=torch.tensor(batch["grid"]).long(),
    )
  params = mapped(theirs.state_dict())
  model = make(dict(kind="naflex", patch=4, grid=4, width=16, depth=1, heads=2, mlp=24), 16)
  got = jax.jit(
    lambda batch: model.apply(
      {"params": {"image": params}}, "image", dict(image=batch), method="encode"
    )
  )(batch)
  np.testing.assert_allclose(got.pooled, want.pooler_output, atol=1e-4)
  np.testing.assert_allclose(
    got.tokens[batch["mask"]], want.last_hidden_state[torch.tensor(batch["mask"])], atol=1e-4
  )


def mapped(tensors):
  """The parameters of a Siglip2VisionModel under our names."""
  from mmjax.interop.huggingface import mapping

  rules = [
    *mapping.linear("patch", "embeddings.patch_embedding"),
    mapping.same("position", "embeddings.position_embedding.weight"),
    *mapping.blocks("layers", "encoder.layers", 2, 1),
    *mapping.norm("norm", "post_layernorm"),
    *mapping.attention_pool("pool", "head", 2),
  ]
  return mapping.to_params(
    {name.removeprefix("vision_model."): x.numpy() for name, x in tensors.items()},
    rules,
    "siglip 2",
  )


def test_pixels_are_patches_of_their_own_grid():
  variables, encode, _ = built("naflex")
  pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 12, 12, 3), dtype=np.uint8)
  rows = [patch_sequence(x, 4, 9)._asdict() for x in pixels]
  batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  a, b = (
    encode(variables, dict(image={**x, "present": np.ones(ROWS, bool)}))
    for x in (batch, dict(pixels=pixels))
  )
  np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-5)


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(kind="resnet", blocks=(2, 0)), "blocks is"),
    (dict(kind="swin", width=10, heads=(3, 3, 3, 3)), "3 heads do not divide"),
    (dict(kind="swin", depths=(1, 1), heads=(1,)), "one entry for each"),
    (dict(kind="resnet", multiplier=0.001), "leaves no channels"),
  ],
)
def test_settings_that_cannot_be_are_named(change, says):
  with pytest.raises(UserError, match=says):
    make(change, 16)
