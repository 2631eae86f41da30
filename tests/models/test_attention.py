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
from mmjax.models import attention
from mmjax.models.attention import Attention, attend


def formula(q, k, v, mask, causal, scale):
  """softmax over the open keys, written out; zeros for a query with none."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  logits = np.einsum("blhd,bshd->bhls", q, k) * scale
  seen = np.ones(logits.shape, bool)
  if mask is not None:
    seen &= np.asarray(mask)[:, None, None] if mask.ndim == 2 else np.asarray(mask)[:, None]
  if causal:
    seen &= np.tril(np.ones(logits.shape[2:], bool))
  weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
  total = weights.sum(-1, keepdims=True)
  return np.einsum(
    "bhls,bshd->blhd", np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), v
  )


def inputs(length, keys, mask, heads=2, channels=8):
  rng = np.random.default_rng(length + keys)
  q, k, v = (
    rng.standard_normal((3, n, heads, channels)).astype(np.float32) for n in (length, keys, keys)
  )
  if mask == "none":
    return q, k, v, None
  mask = rng.random((3, keys) if mask == "keys" else (3, length, keys)) < 0.6
  mask[1] = False  # an example that sees nothing
  if mask.ndim == 3:
    mask[0, 2] = False  # and a query
  return q, k, v, mask


RUN = {
  "xla": attend,
  "sdpa": functools.partial(attend, kernel="sdpa"),
  "flash": lambda q, k, v, mask=None, causal=False, scale=None: attention._flash(
    q, k, v, mask, causal=causal, scale=scale or q.shape[-1] ** -0.5
  ),
  "splash": lambda q, k, v, mask=None, causal=False, scale=None: attention._splash(
    q, k, v, mask, causal=causal, scale=scale or q.shape[-1] ** -0.5, interpret=True
  ),
}
CASES = [
  (kernel, mask, causal)
  for kernel in RUN
  for mask in ("none", "keys", "pairs")
  for causal in (False, True)
  if (kernel, mask) != ("splash", "pairs")
]


@pytest.mark.parametrize("kernel, mask, causal", CASES)
def test_kernels_equal_the_formula_and_empty_rows_are_zero(kernel, mask, causal):
  q, k, v, seen = inputs(7, 7 if causal else 5, mask)
  target = np.random.default_rng(0).standard_normal(q.shape).astype(np.float32)

  def loss(q, k, v, run):
    out = run(q, k, v, mask=None if seen is None else jnp.asarray(seen), causal=causal)
    return (out * target).sum(), out

  def value(run):
    return jax.jit(
      jax.value_and_grad(functools.partial(loss, run=run), argnums=(0, 1, 2), has_aux=True)
    )(q, k, v)

  with pltpu.force_tpu_interpret_mode() if kernel == "flash" else jax.numpy_rank_promotion("allow"):
    (_, out), gradients = value(RUN[kernel])
  np.testing.assert_allclose(out, formula(q, k, v, seen, causal, 8**-0.5), atol=2e-5)
  if kernel != "xla":
    _, want = value(attend)
    for a, b in zip(gradients, want, strict=True):
      np.testing.assert_allclose(a, b, atol=5e-5)
  if seen is not None:
    assert not np.any(out[1]) and not any(np.any(g[1]) for g in gradients)
  if mask == "pairs":
    assert not np.any(out[0, 2]) and not np.any(gradients[0][0, 2])


def test_gradient_of_the_default_kernel_is_the_derivative():
  q, k, v, seen = inputs(4, 5, "pairs")
  check_grads(
    lambda q, k, v: attend(q, k, v, mask=jnp.asarray(seen)),
    (q, k, v),
    order=1,
    modes=("rev",),
    atol=1e-2,
    rtol=1e-2,
  )


def test_masked_keys_change_nothing():
  q, k, v, seen = inputs(4, 6, "keys")
  hidden = ~seen[:, :, None, None]
  out = attend(q, k, v, mask=jnp.asarray(seen))
  np.testing.assert_array_equal(
    out, attend(q, np.where(hidden, 1e9, k), np.where(hidden, 1e9, v), mask=jnp.asarray(seen))
  )


def test_bfloat16_stays_close():
  q, k, v, seen = inputs(6, 6, "keys")
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  out = attend(*half, mask=jnp.asarray(seen))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(out, np.float32), formula(*half, seen, False, 8**-0.5), atol=0.03
  )


@pytest.mark.parametrize("kernel", ["flash", "splash", "cudnn", "flsh"])
def test_a_kernel_that_is_not_here_is_refused(kernel):
  q, k, v, _ = inputs(4, 4, "none")
  with pytest.raises(UserError, match=f"'{kernel}'.*auto"):
    attend(q, k, v, kernel=kernel)


def test_kernels_run_on_each_device_alone(devices):
  """Under a mesh, a kernel that XLA cannot split gets its own rows: no gathers in the compiled
  program.
  """
  import flax.linen as nn

  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  q, k, v, seen = (np.concatenate([x, x[:1]]) for x in inputs(4, 4, "keys"))

  def run(q, k, v, mask):
    one = lambda q, k, v, mask: attention._xla(q, k, v, mask, causal=False, scale=8**-0.5)
    return attention._per_shard(one, q, k, v, mask)

  with (
    jax.set_mesh(mesh),
    nn.logical_axis_rules([("batch", "data"), ("heads", "tensor"), ("kv", None)]),
  ):
    sharding = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    args = [jax.device_put(x, sharding) for x in (q, k, v)] + [
      jax.device_put(seen, jax.NamedSharding(mesh, jax.P("data")))
    ]
    compiled = jax.jit(run).lower(*args).compile()
    out = compiled(*args)
  assert "all-gather" not in compiled.as_text() and out.sharding.is_equivalent_to(sharding, 4)
  np.testing.assert_allclose(out, formula(q, k, v, seen, False, 8**-0.5), atol=2e-5)


@pytest.mark.parametrize("kernel", ["flash", "splash"])
@pytest.mark.parametrize("shape, causal", [((2, 196, 3, 64), False), ((1, 1100, 2, 72), True)])
def test_tpu_kernels_lower_for_tpus(kernel, shape, causal):
  """Forward and backward pass at real shapes reach the TPU compiler's input language, on a machine
  without TPUs.
  """
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  mask = jax.ShapeDtypeStruct(shape[:2], jnp.bool_)
  run = getattr(attention, f"_{kernel}")
  loss = lambda q, k, v, m: run(q, k, v, m, causal=causal, scale=0.1).astype(jnp.float32).sum()
  exported = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(
    x, x, x, mask
  )
  assert (
    exported.mlir_module().count("tpu_custom_call") >= 2
    and [o.shape for o in exported.out_avals] == [shape] * 3
  )


def test_auto_follows_the_devices_of_the_mesh():
  q = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)
  assert attention.choose("auto", q, q, None) == "xla"
  for name, kind, want in (
    ("tpu", "TPU v5 lite", "flash"),
    ("cuda", "NVIDIA H100 80GB HBM3", "cudnn"),
  ):
    device = jax.sharding.AbstractDevice(platform=name, device_kind=kind, num_cores=None)
    with jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    ):
      assert attention.choose("auto", q, q, None) == want
      assert (
        attention.choose("auto", q, jax.ShapeDtypeStruct((1, 196, 2, 64), jnp.bfloat16), None)
        == "xla"
      )


def test_cross_attention_uses_the_parameters_of_self_attention():
  layer = Attention(heads=2, dtype=jnp.float32)
  x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
  params = layer.init(jax.random.key(0), x)
  np.testing.assert_allclose(layer.apply(params, x), layer.apply(params, x, x), atol=1e-6)
