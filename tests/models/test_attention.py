"""Every attention kernel against the plain formula in float64 NumPy, masks and rows without keys
included.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.test_util import check_grads

from mmjax.config import UserError
from mmjax.models.attention import AttentionMask, attend, choose
from mmjax.models.attention.attend import LACKS, per_shard
from mmjax.models.attention.flash import flash, splash
from mmjax.models.attention.fused import fused_attention
from mmjax.models.attention.plain import plain, sdpa
from mmjax.models.block import Attention, BlockConfig

# The compiler takes longer than all runs.
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
B, L, H, G, K = 3, 8, 4, 2, 8
SCALE = K**-0.5


def formula(q, k, v, seen, cap=0.0):
  """softmax over the open keys, written out in float64; zeros for a query with none. seen [B, L,
  S].
  """
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  logits = np.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
  logits = cap * np.tanh(logits / cap) if cap else logits
  weights = np.where(seen[:, None], np.exp(logits - logits.max(-1, keepdims=True)), 0)
  total = weights.sum(-1, keepdims=True)
  return np.einsum(
    "bhls,bshd->blhd", np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), v
  )


RNG = np.random.default_rng(0)
KEYS = RNG.random((B, L)) < 0.6
KEYS[1] = False  # an example that sees nothing
SEGMENTS = np.sort(RNG.integers(0, 3, (B, L))).astype(np.int32)
TRUNKS = np.where(SEGMENTS == 2, np.arange(B)[:, None], 0).astype(np.int32)
PREFIX = np.array([0, 3, 5], np.int32)
BLOCKS = np.array([[0, 1, 1, 1, 0, 2, 2, 2], [3, 3, 3, 0, 0, 0, 4, 4], [0] * 8], np.int32)
PAIRS = RNG.random((B, L, L)) < 0.6
PAIRS[0, 2] = False  # a query that sees nothing


def one(b, i, j):
  return BLOCKS[b, i] == BLOCKS[b, j] > 0


Q, KEY, VALUE, TARGET = (
  RNG.standard_normal((B, L, heads, K)).astype(np.float32) for heads in (H, G, G, H)
)
MASKS = {
  "none": (dict(), lambda b, i, j: True),
  "keys": (dict(keys=KEYS), lambda b, i, j: KEYS[b, j]),
  "causal": (dict(causal=True, keys=KEYS), lambda b, i, j: j <= i and KEYS[b, j]),
  "window": (dict(causal=True, window=3), lambda b, i, j: i - 3 < j <= i),
  "near": (dict(window=2), lambda b, i, j: abs(i - j) < 2),
  "prefix": (
    dict(causal=True, prefix=PREFIX, keys=KEYS),
    lambda b, i, j: (j <= i or j < PREFIX[b]) and KEYS[b, j],
  ),
  "segments": (
    dict(causal=True, segments=SEGMENTS, keys=KEYS),
    lambda b, i, j: j <= i and SEGMENTS[b, i] == SEGMENTS[b, j] and KEYS[b, j],
  ),
  "packed": (
    dict(causal=True, window=4, segments=SEGMENTS),
    lambda b, i, j: i - 4 < j <= i and SEGMENTS[b, i] == SEGMENTS[b, j],
  ),
  "trunks": (
    dict(causal=True, segments=SEGMENTS, trunks=TRUNKS, keys=KEYS),
    lambda b, i, j: (
      j <= i
      and (SEGMENTS[b, i] == SEGMENTS[b, j] or SEGMENTS[b, j] == TRUNKS[b, i] > 0)
      and KEYS[b, j]
    ),
  ),
  "blocks": (
    dict(causal=True, blocks=BLOCKS, segments=SEGMENTS),
    lambda b, i, j: (j <= i or one(b, i, j)) and SEGMENTS[b, i] == SEGMENTS[b, j],
  ),
  "blocks in a window": (
    dict(causal=True, window=2, blocks=BLOCKS, keys=KEYS),
    lambda b, i, j: (j <= i or one(b, i, j)) and j > i - 2 and KEYS[b, j],
  ),
  "wide blocks": (
    dict(causal=True, window=2, blocks=BLOCKS, wide_blocks=True),
    lambda b, i, j: i - 2 < j <= i or one(b, i, j),
  ),
  "offset": (dict(causal=True, offset=-PREFIX), lambda b, i, j: j <= i - PREFIX[b]),
  "pairs": (dict(pairs=PAIRS), lambda b, i, j: PAIRS[b, i, j]),
}


def packed(q, k, v, mask, *, scale, soft_cap=0.0):
  """The kernel that takes projections in one array, by Pallas's interpreter."""
  k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
  qkv = jnp.stack([q, k, v], 2).reshape(B * L, -1)
  return fused_attention(
    qkv, None, mask, channels=K, length=L, scale=scale, soft_cap=soft_cap, interpret=True
  ).reshape(q.shape)


SPREAD = np.linalg.qr(np.random.default_rng(1).standard_normal((64, K)))[0].T.astype(np.float32)


def packed_in_pairs(q, k, v, mask, *, scale, soft_cap=0.0):
  """The same of two heads at once, which takes heads of 64 channels: vectors turned into a space of
  64 have the same products, and numbers in every channel.
  """
  k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
  qkv = (jnp.stack([q, k, v], 2) @ SPREAD).reshape(B * L, -1)
  out = fused_attention(
    qkv, None, mask, channels=64, length=L, scale=scale, soft_cap=soft_cap, interpret=True
  )
  return out.reshape(B, L, H, 64) @ SPREAD.T


RUN = {
  "xla": plain,
  "sdpa": sdpa,
  "fused": packed,
  "fused in pairs": packed_in_pairs,
  "flash": flash,
  "splash": functools.partial(splash, interpret=True),
}


SLOW = ("flash", "splash")  # to interpret: two masks show what they read and what they hold


@functools.cache
def all_masks(kernel):
  """(function of query, key, value that gives {mask: (output, gradients)} of a kernel, its masks),
  compiled once.
  """
  lacks = LACKS.get(kernel.split()[0], ())
  caps = (0.0,) if "soft_cap" in lacks else (0.0, 2.0)
  cases = {
    (name, cap): AttentionMask(**parts)
    for name, (parts, _) in MASKS.items()
    if not set(parts) & set(lacks) and (kernel not in SLOW or name in ("segments", "packed"))
    for cap in (caps if name == "packed" else (0.0,))
  }

  def loss(q, k, v, mask, cap):
    out = RUN[kernel](q, k, v, mask, scale=SCALE, soft_cap=cap)
    return (out * TARGET).sum(), out

  def run(q, k, v):
    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return {case: gradient(q, k, v, mask, case[1]) for case, mask in cases.items()}

  with pltpu.force_tpu_interpret_mode() if kernel == "flash" else jax.numpy_rank_promotion("allow"):
    return jax.jit(run).lower(Q, KEY, VALUE).compile(QUICK)


@pytest.mark.parametrize("kernel", RUN)
def test_every_mask_on_every_kernel_equals_the_formula(kernel):
  """Grouped heads, soft caps and gradients too; queries without a key give and take nothing."""
  want = all_masks("xla")(Q, KEY, VALUE)
  for (name, cap), (gradients, out) in all_masks(kernel)(Q, KEY, VALUE).items():
    seen = np.array(
      [[[MASKS[name][1](b, i, j) for j in range(L)] for i in range(L)] for b in range(B)]
    )
    np.testing.assert_allclose(
      out, formula(Q, KEY, VALUE, seen, cap), atol=2e-5, err_msg=f"{name} {cap}"
    )
    for a, b in zip(gradients, want[name, cap][0], strict=True):
      np.testing.assert_allclose(a, b, atol=5e-5, err_msg=f"{name} {cap}")
    blind = ~seen.any(-1)
    assert not np.asarray(out)[blind].any() and not np.asarray(gradients[0])[blind].any(), name
    assert not any(np.asarray(x)[~seen.any(1)].any() for x in gradients[1:]), name


@pytest.mark.parametrize("kernel", RUN)
def test_segments_do_not_see_each_other_by_a_bit(kernel):
  run, other = all_masks(kernel), SEGMENTS == 1
  changed = [np.where(other[..., None, None], 9 * x[::-1] + 1, x) for x in (Q, KEY, VALUE)]
  for case in [case for case in run(Q, KEY, VALUE) if case[0] in ("segments", "packed")]:
    (before, after) = (run(*args)[case][1] for args in ((Q, KEY, VALUE), changed))
    np.testing.assert_array_equal(before[~other], after[~other])
    assert not np.allclose(before[other], after[other])


def test_gradient_of_the_default_kernel_is_the_derivative():
  mask = AttentionMask(pairs=jnp.asarray(PAIRS))
  check_grads(
    lambda q, k, v: attend(q, k, v, mask, soft_cap=3.0),
    (Q, KEY, VALUE),
    order=1,
    modes=("rev",),
    atol=1e-2,
    rtol=1e-2,
  )


def test_masked_keys_change_nothing():
  hidden, mask = ~KEYS[:, :, None, None], AttentionMask(keys=jnp.asarray(KEYS))
  np.testing.assert_array_equal(
    attend(Q, KEY, VALUE, mask),
    attend(Q, np.where(hidden, 1e9, KEY), np.where(hidden, 1e9, VALUE), mask),
  )


def test_bfloat16_stays_close():
  half = [jnp.asarray(x, jnp.bfloat16) for x in (Q, KEY, VALUE)]
  out = attend(*half, AttentionMask(keys=jnp.asarray(KEYS)))
  assert out.dtype == jnp.bfloat16
  seen = np.broadcast_to(KEYS[:, None], (B, L, L))
  np.testing.assert_allclose(np.asarray(out, np.float32), formula(*half, seen), atol=0.03)


@pytest.mark.parametrize("kernel", ["flash", "splash", "cudnn", "flsh"])
def test_a_kernel_that_is_not_here_is_refused(kernel):
  with pytest.raises(UserError, match=f"'{kernel}'.*auto"):
    attend(Q, KEY, VALUE, kernel=kernel)


def test_what_a_kernel_cannot_have_is_refused():
  with pytest.raises(UserError, match="'sdpa' takes no soft cap. Use 'auto'"):
    attend(Q, KEY, VALUE, kernel="sdpa", soft_cap=1.0)
  with pytest.raises(UserError, match="4 query heads are no multiple of 3"):
    attend(Q, np.zeros((B, L, 3, K)), np.zeros((B, L, 3, K)))


def test_kernels_run_on_each_device_alone(devices):
  """Under a mesh, a kernel that XLA cannot split gets its own rows: no gathers in the compiled
  program.
  """
  import flax.linen as nn

  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  q, k, v, keys = (np.concatenate([x, x[:1]]) for x in (Q, KEY, VALUE, KEYS))

  def run(q, k, v, keys):
    one = functools.partial(plain, scale=SCALE)
    return per_shard(one, q, k, v, AttentionMask(causal=True, keys=keys))

  with (
    jax.set_mesh(mesh),
    nn.logical_axis_rules([("batch", "data"), ("heads", "tensor"), ("kv", None)]),
  ):
    sharding = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    args = [jax.device_put(x, sharding) for x in (q, k, v)] + [
      jax.device_put(keys, jax.NamedSharding(mesh, jax.P("data")))
    ]
    compiled = jax.jit(run).lower(*args).compile()
    out = compiled(*args)
  assert "all-gather" not in compiled.as_text() and out.sharding.is_equivalent_to(sharding, 4)
  seen = np.tril(np.ones((L, L), bool)) & keys[:, None]
  np.testing.assert_allclose(out, formula(q, k, v, seen), atol=2e-5)


@pytest.mark.parametrize("run", [flash, splash])
@pytest.mark.parametrize("shape, causal", [((2, 196, 3, 64), False), ((1, 1100, 2, 72), True)])
def test_tpu_kernels_lower_for_tpus(run, shape, causal):
  """Forward and backward pass at real shapes reach the TPU compiler's input language, on a machine
  without TPUs.
  """
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  keys = jax.ShapeDtypeStruct(shape[:2], jnp.bool_)

  def loss(q, k, v, keys):
    mask = AttentionMask(causal=causal, keys=keys, segments=keys.astype(jnp.int32))
    return run(q, k, v, mask, scale=0.1).astype(jnp.float32).sum()

  exported = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(
    x, x, x, keys
  )
  assert (
    exported.mlir_module().count("tpu_custom_call") >= 2
    and [o.shape for o in exported.out_avals] == [shape] * 3
  )


def test_auto_follows_the_devices_of_the_mesh():
  q = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)
  short = jax.ShapeDtypeStruct((1, 196, 2, 64), jnp.bfloat16)
  grouped = jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.bfloat16)
  mask = AttentionMask()
  assert choose("auto", q, q, mask) == "xla"
  for name, kind, want in (
    ("tpu", "TPU v5 lite", "flash"),
    ("cuda", "NVIDIA H100 80GB HBM3", "cudnn"),
  ):
    device = jax.sharding.AbstractDevice(platform=name, device_kind=kind, num_cores=None)
    with jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    ):
      assert choose("auto", q, q, mask) == want
      assert choose("auto", q, short, mask) == "xla"
      if name == "tpu":  # what flash attention cannot do without a dense mask, splash can
        assert choose("auto", q, grouped, mask) == "splash"
        assert choose("auto", q, q, AttentionMask(causal=True, window=9)) == "splash"
        assert choose("auto", q, q, mask, soft_cap=9.0) == "splash"
        assert choose("auto", q, q, AttentionMask(pairs=np.ones((1, 2048, 2048)))) == "xla"


def test_cross_attention_uses_the_parameters_of_self_attention():
  layer = Attention(BlockConfig(width=16, depth=1, heads=2, mlp=16))
  x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
  params = layer.init(jax.random.key(0), x, AttentionMask())
  np.testing.assert_allclose(
    layer.apply(params, x, AttentionMask()),
    layer.apply(params, x, AttentionMask(), context=x),
    atol=1e-6,
  )
