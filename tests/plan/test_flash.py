"""What the planner makes of a kernel whose cost is known: flash attention. (A stack of matrix
products: test_plan.py.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mmjax.models import attention
from mmjax.plan import cost, hlo, topology
from mmjax.plan.kernels import kernels_of

pytestmark = pytest.mark.slow  # seconds, but they need libtpu, which the tests do not install


@pytest.fixture(scope="module")
def place():
  """One v5e chip that exists for the compiler alone."""
  pytest.importorskip("libtpu")
  mesh = jax.sharding.Mesh(
    np.array(topology.devices(topology.parse("v5e-1"))), ("data",), axis_types=(AxisType.Auto,)
  )
  return jax.NamedSharding(mesh, jax.P())


def cycles_of(function, place, *shapes):
  """(the planner's figures, cycles that one FLOP takes at peak)."""
  args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
  with jax.set_mesh(place.mesh), topology.quiet():
    kernels = kernels_of(jax.make_jaxpr(function)(*args).jaxpr)
    text = jax.jit(function).lower(*args).compile().as_text()
  chip = topology.CHIPS["v5e"]
  return cost.cost(hlo.parse(text), chip, kernels), chip.clock / chip.peak


@pytest.mark.parametrize("backward", [False, True])
def test_flash_attention_takes_its_flops_at_peak(place, backward):
  b, length, heads, channels = 4, 4096, 8, 128

  def run(q, k, v):
    return attention.attend(q, k, v, kernel="flash")

  def loss(q, k, v):
    return run(q, k, v).astype(jnp.float32).sum()

  spent, each = cycles_of(
    jax.grad(loss, argnums=(0, 1, 2)) if backward else run,
    place,
    *[(b, length, heads, channels)] * 3,
  )
  # Products of [L, K] and [K, L] or the like: forward 2; backward, logits and weights' cotangent
  # once more, then dq, or dk and dv.
  product = 2.0 * b * heads * length**2 * channels
  assert sorted(row["flops"] / product for row in spent["custom_calls"]) == pytest.approx(
    [2, 3, 4] if backward else [2], rel=0.02
  )
  assert spent["custom_call_cycles"] == pytest.approx(
    (9 if backward else 2) * product * each, rel=0.02
  )
  assert all(
    row["work"] == "blocks of the kernel" and row["basis"] == "estimate"
    for row in spent["custom_calls"]
  )
