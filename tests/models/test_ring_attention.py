"""Ring attention on simulated devices against the formula and its derivatives in float64 NumPy, and
what it must not hold or gather.
"""

from __future__ import annotations

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmjax.config as configs
from mmjax.models.attention import AttentionMask, attend, ring
from mmjax.models.layers import constrain
from mmjax.parallel import rules
from mmjax.parallel.mesh import make_mesh
from mmjax.training.flops import count_flops

# The compiler takes longer than all runs.
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)


def mesh_of(**sizes):
  c = configs.base()
  c.mesh.update(dict(data=1, **sizes) if "data" not in sizes else sizes)
  return make_mesh(c, jax.devices()[: int(np.prod(list(sizes.values())))])


def dense(q, k, v, seen, cotangent):
  """(result, gradients of query, key and value) of softmax attention in float64; rows that see
  nothing are zero.
  """
  q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, cotangent))
  scale = q.shape[-1] ** -0.5
  logits = np.where(seen[:, None], q @ k.swapaxes(2, 3) * scale, -np.inf)
  weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e300))
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  dlogits = g @ v.swapaxes(2, 3)
  dlogits = weights * (dlogits - (dlogits * weights).sum(-1, keepdims=True)) * scale
  return [
    x.swapaxes(1, 2)
    for x in (weights @ v, dlogits @ k, dlogits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g)
  ]


@st.composite
def cases(draw):
  sizes = draw(
    st.sampled_from(
      [dict(context=2), dict(data=2, context=4), dict(tensor=2, context=2), dict(fsdp=1, context=8)]
    )
  )
  # The latter may not divide: nothing travels then.
  length = st.integers(1, 3).map(lambda n: n * sizes["context"]) | st.integers(1, 9)
  return (
    sizes,
    draw(length),
    draw(length),
    draw(st.sampled_from(["none", "keys", "pairs", "packed", "blocks"])),
    draw(st.booleans()),
    draw(st.sampled_from([1, 2, 1024])),
    draw(st.integers(0, 2**16)),
  )


@settings(max_examples=8, deadline=None)
@given(cases())
def test_any_shape_and_mask_equals_the_dense_formula(devices, case):
  sizes, length, keys, kind, causal, tile, seed = case
  rng = np.random.default_rng(seed)
  q, k, v, cotangent = (
    rng.standard_normal((2, n, 2, 4)).astype(np.float32) for n in (length, keys, keys, length)
  )
  seen, parts = np.ones((2, length, keys), bool), {}
  reach = np.tril(seen) if causal else seen
  if kind == "keys":
    parts["keys"] = rng.random((2, keys)) < rng.random()
    seen = seen & parts["keys"][:, None]
  elif kind == "pairs":
    parts["pairs"] = seen = rng.random(seen.shape) < rng.random()
  elif kind == "packed":  # two segments, a window, and first keys that are open to all
    rows, columns = np.arange(length)[:, None], np.arange(keys)
    parts = dict(window=3, prefix=rng.integers(0, 4, 2).astype(np.int32))
    parts["segments"] = np.sort(rng.integers(0, 2, (2, length))).astype(np.int32)
    parts["key_segments"] = np.sort(rng.integers(0, 2, (2, keys))).astype(np.int32)
    reach = reach & (abs(rows - columns) < 3) | (columns < parts["prefix"][:, None, None])
    seen = parts["segments"][:, :, None] == parts["key_segments"][:, None]
  elif kind == "blocks":
    blocks, of_keys = (rng.integers(0, 3, (2, n)).astype(np.int32) for n in (length, keys))
    parts = dict(blocks=blocks, key_blocks=of_keys)
    same = (blocks[:, :, None] == of_keys[:, None]) & (blocks[:, :, None] > 0)
    reach = reach | same
  mask, seen = AttentionMask(causal=causal, **parts), seen & reach

  def both(q, k, v, mask):
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return out, *back(jnp.asarray(cotangent))

  with (
    rules.use(mesh_of(**sizes), rules.RULES["fsdp_tensor"]),
    mock.patch.object(ring, "AT_ONCE", tile),
  ):
    compiled = jax.jit(both).lower(q, k, v, mask).compile(QUICK)
    got = compiled(q, k, v, mask)
  travels = length % sizes["context"] == keys % sizes["context"] == 0
  assert ("collective-permute" in compiled.as_text()) == travels
  for a, b in zip(got, dense(q, k, v, seen, cotangent), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  blind = ~seen.any(-1)
  assert not np.asarray(got[0])[blind].any() and not np.asarray(got[1])[blind].any()
  assert not any(np.asarray(x)[~seen.any(1)].any() for x in got[2:])  # keys that nobody sees


@pytest.fixture(scope="module")
def long():
  """Forward and backward pass over 4096 positions on eight devices, compiled: (the function, its
  text, bytes of temporaries).
  """
  mesh = mesh_of(context=8)
  causal = AttentionMask(causal=True)

  def loss(q, k, v):
    return attend(q, k, v, causal).astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct(
    (1, 4096, 1, 8), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(None, "context"))
  )
  with rules.use(mesh, rules.RULES["replicated"]):
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile(QUICK)
    flops = count_flops(loss, x, x, x)
  return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes, flops


def test_nothing_is_gathered_and_logits_are_of_one_block(long):
  text, temporaries, flops = long
  assert not re.search(r"\b(all-gather|all-to-all|all-reduce)\(", text)
  # A few blocks of 512 queries by 512 keys in float32, not all logits.
  assert temporaries < 4 * 4 * 512**2 < 4 * 4096**2
  assert flops == 2 * 2 * 4096**2 * 8  # the work of the plain formula


def test_bfloat16_stays_close(devices):
  q, k, v, cotangent = (np.random.default_rng(i).standard_normal((2, 8, 2, 4)) for i in range(4))
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  with rules.use(mesh_of(context=4), rules.RULES["replicated"]):
    out, back = jax.vjp(jax.jit(functools.partial(attend, kernel="sdpa")), *half)
    got = out, *back(jnp.asarray(cotangent, jnp.bfloat16))
  for a, b in zip(got, dense(*half, np.ones((2, 8, 8), bool), cotangent), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=0.05)


@pytest.mark.parametrize("trunks", [False, True])
def test_grouped_heads_soft_caps_and_segments(devices, trunks):
  """Against the plain formula on one device; changing one segment changes no other's output.
  trunks: the last segment goes on from the first.
  """
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((2, 8, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
  segments = np.repeat(np.array([[1, 2, 3, 3]], np.int32), 2, 1).repeat(2, 0)
  trunk = (segments == 3).astype(np.int32) if trunks else None
  mask = AttentionMask(causal=True, segments=segments, trunks=trunk)

  def value(q, k, v):
    return jax.value_and_grad(
      lambda *args: (attend(*args, mask, soft_cap=2.0) ** 2).sum(), argnums=(0, 1, 2)
    )(q, k, v), attend(q, k, v, mask, soft_cap=2.0)

  want = value(q, k, v)
  other = (segments == 2)[..., None, None]
  with rules.use(mesh_of(tensor=2, context=4), rules.RULES["fsdp_tensor"]):
    run = jax.jit(value).lower(q, k, v).compile(QUICK)
    got = run(q, k, v)
    changed = run(*(np.where(other, 9 * x + 1, x) for x in (q, k, v)))[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)
  kept = segments != 2
  np.testing.assert_array_equal(np.asarray(got[1])[kept], np.asarray(changed)[kept])
  assert not np.allclose(np.asarray(got[1])[~kept], np.asarray(changed)[~kept])


def test_a_length_that_does_not_divide_is_left_whole(devices):
  with rules.use(mesh_of(data=2, context=4), rules.RULES["replicated"]):
    split, whole = (
      jax.jit(lambda x: constrain(x * 2))(jnp.ones((2, n, 4))).sharding.spec for n in (8, 6)
    )
  assert split[1] == "context" and (*whole, None, None)[1] is None
