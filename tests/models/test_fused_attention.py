"""The fused kernel against the plain formula, alone and inside a transformer as TPUs run it, by
Pallas's interpreter.
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from mmjax.models import layers, platform
from mmjax.models.attention import AttentionMask, attend, fuses
from mmjax.models.attention.attend import packed_attention
from mmjax.models.attention.fused import fused_attention
from mmjax.models.attention.plain import plain as formula
from mmjax.models.block import BlockConfig
from mmjax.models.stack import Stack

kernels = importlib.import_module(attend.__module__)


def plain(qkv, bias, mask, *, channels, length, scale):
  qkv = qkv if bias is None else qkv + bias
  q, k, v = (
    qkv.reshape(-1, length, 3, qkv.shape[1] // 3 // channels, channels)[:, :, n] for n in range(3)
  )
  return formula(q, k, v, mask, scale=scale).reshape(qkv.shape[0], -1)


@settings(max_examples=4, deadline=None)
@given(
  batch=st.integers(1, 5),
  tiles=st.integers(1, 3),
  heads=st.integers(1, 4),
  channels=st.sampled_from([8, 12, 64]),
  causal=st.booleans(),
  masked=st.booleans(),
  seed=st.integers(0, 99),
)
def test_equals_the_plain_formula_with_gradients(
  batch, tiles, heads, channels, causal, masked, seed
):
  rng, length = np.random.default_rng(seed), 8 * tiles
  qkv = rng.standard_normal((batch * length, 3 * heads * channels)).astype(np.float32)
  bias = rng.standard_normal(3 * heads * channels).astype(np.float32)
  target = rng.standard_normal((batch * length, heads * channels)).astype(np.float32)
  mask = rng.random((batch, length)) < 0.6 if masked else None
  if masked:
    mask[0] = False  # an example that sees nothing

  def value(run):
    def loss(qkv, bias):
      return (
        run(
          qkv,
          bias,
          AttentionMask(causal=causal, keys=mask),
          channels=channels,
          length=length,
          scale=channels**-0.5,
        )
        * target
      ).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(qkv, bias)

  (got, slopes), (want, expected) = (
    value(functools.partial(fused_attention, interpret=True)),
    value(plain),
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  for slope, other in zip(slopes, expected, strict=True):
    np.testing.assert_allclose(slope, other, atol=1e-4)
  if masked:
    assert not np.any(np.asarray(slopes[0])[:length])


def test_a_transformer_gives_what_it_gives_on_cpus(monkeypatch):
  """Lengths that are no whole tiles are filled up by tokens that change nothing."""
  model = Stack(
    BlockConfig(
      width=32, depth=2, heads=2, mlp=64, activation="gelu_tanh", remat="dense", scan_unroll=1
    )
  )
  rng = np.random.default_rng(0)
  x, mask = rng.standard_normal((3, 13, 32)).astype(np.float32), rng.random((3, 13)) < 0.7
  params = model.init(jax.random.key(0), x, mask)

  def loss(params, x):
    return (model.apply(params, x, mask) ** 2).sum()

  def value():
    # Traced anew each time.
    return jax.jit(jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1)))(params, x)

  want = value()
  for module in (kernels, layers, platform):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
  monkeypatch.setattr(
    kernels, "fused_attention", functools.partial(fused_attention, interpret=True)
  )
  assert "pallas_call" in str(jax.make_jaxpr(loss)(params, x))
  got = value()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_one_pass_over_bfloat16_gives_the_same_norm():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 96)) * 3 + 20, jnp.bfloat16).astype(
    jnp.float32
  )
  scale, bias = jnp.full(96, 1.5), jnp.full(96, 0.5)
  np.testing.assert_allclose(
    layers.normalise(x, scale, bias, 1e-6, True), layers.normalise(x, scale, bias, 1e-6), atol=1e-4
  )


@pytest.mark.parametrize("split", [None, "tensor"])
def test_heads_and_batch_are_split_over_devices(devices, monkeypatch, split):
  """Each device runs the kernel on its own rows and heads, with nothing gathered."""
  import flax.linen as nn

  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  qkv, bias = (
    np.random.default_rng(0).standard_normal((n, 3, 2, 8)).astype(np.float32) for n in (4 * 8, 1)
  )
  bias, causal = bias[0], AttentionMask(causal=True)
  monkeypatch.setattr(
    kernels, "fused_attention", functools.partial(fused_attention, interpret=True)
  )

  def value(run):
    def loss(qkv, bias):
      return ((out := run(qkv, bias)) ** 2).sum() + 0 * out.sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

  with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data"), ("heads", split)]):

    def place(x, *axes):
      return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))

    args = place(qkv, "data", None, split), place(bias, None, split)
    compiled = (
      value(lambda qkv, bias: packed_attention(qkv, bias, causal, 8, scale=0.3))
      .lower(*args)
      .compile()
    )
    got, slopes = compiled(*args)
  assert "all-gather" not in compiled.as_text() and slopes[0].sharding.is_equivalent_to(
    args[0].sharding, 4
  )

  def flat(qkv, bias):
    return plain(qkv.reshape(32, -1), bias.reshape(-1), causal, channels=8, length=8, scale=0.3)

  want, expected = value(flat)(qkv, bias)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for slope, other in zip(slopes, expected, strict=True):
    np.testing.assert_allclose(slope, other, atol=1e-4)


@pytest.mark.parametrize(
  "rows, length, heads, channels, masked", [(1600, 200, 12, 64, True), (1024, 256, 16, 72, False)]
)
def test_lowers_for_tpus(rows, length, heads, channels, masked):
  """Forward and backward pass at real shapes reach the TPU compiler's input language, on a machine
  without TPUs.
  """
  qkv = jax.ShapeDtypeStruct((rows, 3 * heads * channels), jnp.bfloat16)
  keys = jnp.ones((rows // length, length), bool) if masked else None
  mask = AttentionMask(keys=keys, segments=None if keys is None else keys.astype(jnp.int32))

  def loss(qkv):
    return (
      fused_attention(qkv, None, mask, channels=channels, length=length, scale=0.1)
      .astype(jnp.float32)
      .sum()
    )

  exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(qkv)
  assert (
    exported.mlir_module().count("tpu_custom_call") >= 1
    and exported.out_avals[0].shape == qkv.shape
  )


def test_chosen_for_short_sequences_on_tpus_alone():
  assert not fuses("auto", jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.float32), AttentionMask())
  device = jax.sharding.AbstractDevice(platform="tpu", device_kind="TPU v5 lite", num_cores=None)
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
  ):

    def of(length, **mask):
      return fuses(
        "auto", jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32), AttentionMask(**mask)
      )

    assert (
      of(64)
      and of(200)
      and not of(2048)
      and not of(197)
      and not of(64, pairs=np.ones((2, 64, 64), bool))
    )


@pytest.mark.parametrize(
  "kind, fitting", [("TPU v4", False), ("TPU v5", True), ("TPU v5 lite", True)]
)
def test_not_chosen_where_a_chip_has_too_little_vector_memory(kind, fitting):
  """The 584 tokens of a ViT-L/14 at 336 pixels take 16.7 MB before any logits; a v4 core has 16
  MiB.
  """
  device = jax.sharding.AbstractDevice(platform="tpu", device_kind=kind, num_cores=None)
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
  ):
    assert (
      fuses("auto", jax.ShapeDtypeStruct((2, 584, 16, 64), jnp.bfloat16), AttentionMask())
      == fitting
    )
