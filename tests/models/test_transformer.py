"""The stack: how it is stored, that running it in other ways changes nothing, and what it costs to
keep.
"""

from __future__ import annotations

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mmjax.config import UserError
from mmjax.models.attention import AttentionMask
from mmjax.models.block import Block, BlockConfig
from mmjax.models.cpu import barrier
from mmjax.models.decoder import Decoder
from mmjax.models.layers import ACTIVATIONS, activate
from mmjax.models.platform import platform
from mmjax.models.positions import resize_positions, sincos_positions
from mmjax.models.stack import REMAT, Stack
from mmjax.plan import LEAST_MEMORY

CONFIG = BlockConfig(width=16, depth=3, heads=2, mlp=32)
X = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)


@pytest.fixture(scope="module")
def params():
  boxed = jax.jit(Stack(CONFIG).init)(jax.random.key(0), X, MASK)
  return nn.unbox(boxed)["params"]


def test_layers_are_stored_stacked_with_logical_axes():
  boxed = jax.eval_shape(Stack(CONFIG).init, jax.random.key(0), X, MASK)
  spec = nn.get_partition_spec(boxed)["params"]["layers"]
  assert spec["attention"]["qkv"]["kernel"] == jax.P("layers", "embed", "qkv", "heads", "kv")
  assert spec["attention"]["out"]["kernel"] == jax.P("layers", "heads", "kv", "embed")
  assert spec["mlp"]["up"]["kernel"] == jax.P("layers", "embed", "mlp")
  assert spec["mlp"]["down"]["kernel"] == jax.P("layers", "mlp", "embed")
  assert spec["attention_norm"]["scale"] == jax.P("layers", "embed")
  assert jax.tree.leaves(nn.unbox(boxed))[0].shape[0] == CONFIG.depth


def test_layers_start_different_and_equal_blocks_run_one_after_another(params):
  kernel = params["layers"]["mlp"]["up"]["kernel"]
  assert not np.allclose(kernel[0], kernel[1])
  x = jnp.asarray(X)
  for i in range(CONFIG.depth):
    x = Block(CONFIG).apply(
      {"params": jax.tree.map(lambda p, i=i: p[i], params["layers"])}, x, AttentionMask(keys=MASK)
    )
  np.testing.assert_allclose(Stack(CONFIG).apply({"params": params}, X, MASK), x, atol=1e-5)


@pytest.mark.parametrize(
  "change",
  [
    *(dict(remat=name) for name in REMAT if name != "none"),
    dict(scan_unroll=1),
    dict(scan_unroll=2, remat="full"),
  ],
  ids=str,
)
def test_remat_and_unrolling_change_no_number(params, change):
  def gradient(config):
    def loss(p):
      return jnp.square(Stack(config).apply({"params": p}, X, MASK)).mean()

    return jax.jit(jax.value_and_grad(loss))(params)

  want, got = gradient(CONFIG), gradient(dataclasses.replace(CONFIG, **change))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, want)


def a_tpu():
  """What is traced inside is for a TPU."""
  device = jax.sharding.AbstractDevice(platform="tpu", device_kind="TPU v5 lite", num_cores=None)
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
  )


def kept_on_a_tpu(remat, kernel, capsys):
  """(bytes that the backward pass of a stack keeps besides its arguments, roundings of them)."""
  shape = dict(width=128, depth=3, heads=2, mlp=512, scan_unroll=1)
  stack = Stack(BlockConfig(**shape, dtype=jnp.bfloat16, kernel=kernel, remat=remat))
  x = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16)
  with a_tpu():
    params = jax.eval_shape(stack.init, jax.random.key(0), x)

    def loss(params, x):
      return stack.apply(params, x).astype(jnp.float32).sum()

    jax.ad_checkpoint.print_saved_residuals(loss, params, x)
    lines = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    arrays = [re.match(r"(?:bf|f|i|u)(\d+)\[([\d,]*)\]", line) for line in lines]
    traced = str(jax.make_jaxpr(jax.grad(loss))(params, x))
  sizes = [(int(a[1]) // 8, [int(n) for n in a[2].split(",") if n]) for a in arrays if a]
  return sum(bytes_each * math.prod(shape) for bytes_each, shape in sizes), traced.count(
    "reduce_precision["
  )


def test_policies_stand_in_the_order_of_what_they_keep(capsys):
  """On a chip: what waits in the memory of the host stands before what keeps as much there."""
  order = [name for name in LEAST_MEMORY if not name.startswith("offload")]
  kept = [kept_on_a_tpu(name, "xla", capsys)[0] for name in order]
  assert kept == sorted(kept, reverse=True) and len(set(kept)) >= len(kept) - 1


def test_what_attention_gives_is_kept_without_a_pass_through_memory(capsys):
  """`jax.checkpoint` rounds what it keeps where the forward pass uses it too."""
  dense, both = (kept_on_a_tpu(name, "fused", capsys) for name in ("dense", "dense_attention"))
  assert both[0] == dense[0] + 3 * 2 * 64 * 128 * 2, "one array more a layer, in bfloat16"
  assert both[1] == dense[1]


@pytest.mark.parametrize("kernel", ["fused", "flash"])
@pytest.mark.parametrize("model", [Stack, Decoder])
def test_a_stack_is_made_with_any_kernel(model, kernel):
  """Parameters are made from a single token, which most kernels refuse."""
  config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16, kernel=kernel)
  with a_tpu():
    if model is Stack:
      shapes = jax.eval_shape(
        Stack(config).init, jax.random.key(0), jnp.zeros((2, 8, 16), jnp.bfloat16)
      )
    else:
      decoder = Decoder(
        dataclasses.replace(config, causal=True),
        vocab_size=16,
        length=8,
        prompt=(1,),
        eos_id=2,
        pad_id=0,
        cross=False,
      )
      shapes = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((2, 8), jnp.int32), None)
  assert jax.tree.leaves(shapes)


def test_remat_keeps_less(params):
  def kept(config):
    def run(p):
      return Stack(config).apply({"params": p}, jnp.tile(X, (64, 1, 1)), None).sum()

    return jax.jit(jax.grad(run)).lower(params).compile().memory_analysis().temp_size_in_bytes

  config = dataclasses.replace(CONFIG, depth=3, scan_unroll=1)
  assert kept(dataclasses.replace(config, remat="full")) < 0.7 * kept(config)


def test_causal_blocks_do_not_look_ahead(params):
  stack = Stack(dataclasses.replace(CONFIG, causal=True))
  changed = X.copy()
  changed[:, 3:] += 1
  a, b = (stack.apply({"params": params}, x) for x in (X, changed))
  np.testing.assert_allclose(a[:, :3], b[:, :3], atol=1e-6)
  assert not np.allclose(a[:, 3:], b[:, 3:])


def test_dropout_needs_train_and_is_a_function_of_the_key(params):
  stack = Stack(dataclasses.replace(CONFIG, dropout=0.5))

  def run(seed):
    return stack.apply(
      {"params": params}, X, MASK, train=True, rngs={"dropout": jax.random.key(seed)}
    )

  np.testing.assert_array_equal(run(1), run(1))
  assert not np.allclose(run(1), run(2))
  np.testing.assert_allclose(
    stack.apply({"params": params}, X, MASK), Stack(CONFIG).apply({"params": params}, X, MASK)
  )


def test_post_norm_normalises_its_output():
  config = dataclasses.replace(CONFIG, norm="post")
  out, _ = jax.jit(Stack(config).init_with_output)(jax.random.key(0), X)
  np.testing.assert_allclose(out.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(out.std(-1), 1, atol=1e-3)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
  config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
  out, variables = jax.eval_shape(Stack(config).init_with_output, jax.random.key(0), X)
  assert out.dtype == jnp.bfloat16 and all(
    p.dtype == jnp.float32 for p in jax.tree.leaves(variables)
  )


def test_bad_hyper_parameters_are_refused():
  with pytest.raises(UserError, match="width 10 is not divisible by 3 heads"):
    BlockConfig(width=10, depth=1, heads=3, mlp=4)
  with pytest.raises(UserError, match="remat 'al' is unknown"):
    dataclasses.replace(CONFIG, remat="al")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_torch_and_their_derivatives_are_right(name):
  import torch

  x = np.linspace(-6, 6, 101, dtype=np.float32)
  reference = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
  }[{"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}.get(name, name)]
  t = torch.from_numpy(x).requires_grad_()
  reference(t).sum().backward()
  np.testing.assert_allclose(activate(name, x), reference(t).detach(), atol=1e-6)
  np.testing.assert_allclose(jax.grad(lambda x: activate(name, x).sum())(x), t.grad, atol=5e-6)


def test_the_barrier_is_seen_by_the_cpu_compiler_alone():
  step = jax.jit(jax.grad(lambda x: (barrier(x * 2) ** 2).sum()))

  def export(platform):
    return jax.export.export(step, platforms=[platform])(jnp.ones(3)).mlir_module()

  assert export("cpu").count(
    "stablehlo.optimization_barrier"
  ) == 2 and "optimization_barrier" not in export("tpu")
  np.testing.assert_allclose(
    jax.vmap(jax.grad(lambda x: barrier(x) ** 2))(jnp.arange(3.0)), 2 * np.arange(3.0)
  )
  assert platform() == "cpu"


def test_positions():
  table = sincos_positions(3, 4, 16)
  assert table.shape == (12, 16) and len(np.unique(table.round(4), axis=0)) == 12
  grid = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
  import torch

  want = torch.nn.functional.interpolate(
    torch.from_numpy(grid.reshape(1, 3, 3, 4)).permute(0, 3, 1, 2), (5, 4), mode="bicubic"
  )
  np.testing.assert_allclose(
    resize_positions(grid, (3, 3), (5, 4)), want[0].permute(1, 2, 0).reshape(20, 4), atol=1e-5
  )
