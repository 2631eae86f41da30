"""The small parts that every module uses: annotated parameters, dense layers, layer norm,
activations, the MLP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from mmjax.models import cpu
from mmjax.models.platform import on_lone_cpu, platform
from mmjax.models.products import Products, multiply
from mmjax.models.quantised import LEAVES as QUANTISED
from mmjax.models.quantised import dequantise
from mmjax.parallel.rules import partition_spec

Array = jax.Array
Init = Callable[..., Any]


class Encoded(NamedTuple):
  """What every encoder returns: tokens [B, L, D], mask bool [B, L] (True = real), pooled [B, D];
  taps: the tokens after layers that were asked for, [B, L, D] each.
  """

  tokens: Array
  mask: Array
  pooled: Array
  taps: tuple[Array, ...] = ()


def with_axes(init: Init, axes: Sequence[str | None]) -> Init:
  """An initialiser whose parameter carries logical axis names, one a dimension (mapped by
  parallel/rules.py).
  """
  return nn.with_logical_partitioning(init, tuple(axes))


def constrain(x: Array, axes: tuple[str | None, ...] | None = None) -> Array:
  """Activations laid out by their logical axes; None: batch, length, embed for [B, L, D], batch,
  embed for [B, D].

  A dimension that its devices do not divide (a text of 77 tokens over two devices) is held whole by
  each of them.
  """
  if not nn.get_logical_axis_rules() or jax.sharding.get_abstract_mesh().empty:
    return x
  axes = axes or (("batch", "length", "embed") if x.ndim == 3 else ("batch", "embed"))
  return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes))


def normal(stddev: float) -> Init:
  return nn.initializers.normal(stddev)


def xavier(fan_in: int, fan_out: int) -> Init:
  """Glorot-uniform with fans that do not depend on how the parameter is shaped (Glorot and Bengio
  2010).
  """
  limit = math.sqrt(6 / (fan_in + fan_out))
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class Dense(nn.Module):
  """y = x @ kernel + bias over the last dimensions of x, computed in `dtype`; parameters are
  float32.

  Call: x [..., *inputs] -> [..., *features]. kernel [*inputs, *features]. `axes` names the kernel's
  dimensions; the bias takes the last ones. label: of the result, and input_label: of the
  input where it has one, name them for rematerialisation.
  part: a slice of the first of the features, for some of several projections in one.
  apart: returns (x @ kernel, bias or None) for a caller that adds the bias itself.
  parts: projections that the kernel holds, side by side in the first of its features; each has
  low-rank factors of its own, where there are any beside the kernel (lora.py). Leaves of a kernel
  in few bits may stand in its place (quantised.py).
  products: of the kernel in eight bits (products.py); low-rank factors multiply in full.
  """

  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  dtype: jnp.dtype
  kernel_init: Init | None = None
  use_bias: bool = True
  parts: int = 1
  label: str = "dense"
  input_label: str = ""
  products: Products = "full"

  @nn.compact
  def __call__(self, x: Array, part: slice = slice(None), *, apart: bool = False) -> Any:
    n = len(self.axes) - len(self.features)
    inputs, axes = x.shape[x.ndim - n :], self.axes[n:]
    init = self.kernel_init or xavier(math.prod(inputs), math.prod(self.features))
    shape = (*inputs, *self.features)
    few_bits = {} if self.is_initializing() else self._few_bits()
    kernel = None
    if not few_bits:
      kernel = self.param("kernel", with_axes(init, self.axes), shape, jnp.float32)
    bias = None
    if self.use_bias:
      bias = self.param("bias", with_axes(nn.initializers.zeros, axes), self.features, jnp.float32)
      bias = bias[part].astype(self.dtype)

    def product(x: Array, kernel: Array) -> Array:
      kernel = kernel[(slice(None),) * n + (part,)].astype(self.dtype)
      added = None if apart else bias
      return affine(x, kernel, added, n, axes, self.label, self.input_label, self.products)

    def quantised_product(x: Array, leaves: dict[str, Array]) -> Array:
      return product(x, dequantise(leaves, shape, self.dtype))

    x = x.astype(self.dtype)
    # The backward pass makes the kernel again, or it would be kept whole until then.
    if kernel is None:
      y = jax.checkpoint(quantised_product)(x, few_bits)
    else:
      y = product(x, kernel)
    if self.has_variable("params", "lora_a"):
      y = y + self._low_rank(x, n, part)
    return (y, bias) if apart else y

  def _few_bits(self) -> dict[str, Array]:
    """The leaves of a quantised kernel; {} where it is not."""
    leaves: dict[str, Any] = {name: self.get_variable("params", name) for name in QUANTISED}
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}

  def _low_rank(self, x: Array, n: int, part: slice) -> Array:
    """x [..., *inputs] through the low-rank factors: [..., *features] of `part`."""
    factors: Mapping[str, Any] = self.variables["params"]
    a, b, scale = (factors[f"lora_{name}"] for name in ("a", "b", "scale"))
    if "lora_dropout" in factors and self.has_rng("dropout"):
      kept = 1 - factors["lora_dropout"]
      mask = jax.random.bernoulli(self.make_rng("dropout"), kept, x.shape)
      x = jnp.where(mask, x / kept, 0).astype(self.dtype)
    if self.parts > 1:
      a, b = a[(slice(None),) * n + (part,)], b[part]
    h = affine(x, a.astype(self.dtype), None, n, (None, None)) * scale.astype(self.dtype)
    ys = [jnp.tensordot(h[..., i, :], b[i].astype(self.dtype), 1) for i in range(len(b))]
    join = jnp.concatenate if b.ndim - 2 == len(self.features) else jnp.stack
    return join(ys, axis=-len(self.features))


def affine(
  x: Array,
  kernel: Array,
  bias: Array | None,
  n: int,
  axes: tuple[str | None, ...],
  label: str = "dense",
  input_label: str = "",
  products: Products = "full",
) -> Array:
  """x [..., *inputs] times kernel [*inputs, *features] over the `n` dimensions of inputs, plus bias
  [*features]: [..., *features].
  axes: logical names of the features. label, input_label, products: as of `Dense`.

  On a lone CPU device all are flattened to matrices first (cpu.py). So are rows [N, ...] on TPUs,
  where no device axis splits the features: the result then has the one layout that kernels read
  without a copy. Elsewhere nothing is reshaped, so that shardings pass through.
  """
  x, rows, columns = cpu.barrier(x), x.shape[: x.ndim - n], kernel.shape[n:]
  whole = (
    len(rows) == 1
    and platform() == "tpu"
    and not any(partition_spec((*rows, *columns), ("batch", *axes))[1:])
  )
  if input_label and not whole:
    x = checkpoint_name(x, input_label)
  if not (whole or on_lone_cpu()):
    y = multiply(products, functools.partial(_dot, n), n, x, kernel)
    y = checkpoint_name(y if bias is None else y + bias, label)
    return cpu.barrier(y, forward=False)
  x, kernel = x.reshape(math.prod(rows), -1), kernel.reshape(-1, math.prod(columns))
  bias = None if bias is None else bias.reshape(-1)
  if products == "full":
    y = _row_major(input_label, x, kernel, bias) if whole else cpu.matmul(x, kernel, bias)
  else:
    plain = functools.partial(_row_major, "") if whole else cpu.matmul
    y = multiply(products, plain, 1, x, kernel, input_label if whole else "")
    if bias is not None:  # its gradient is a sum of float32
      y = (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)
  return cpu.barrier(checkpoint_name(y, label).reshape(*rows, *columns), forward=False)


def _dot(n: int, x: Array, kernel: Array) -> Array:
  """x [..., *inputs] times kernel [*inputs, *features] over `n` dimensions."""
  contracted = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
  return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_major(label: str, x: Array, kernel: Array, bias: Array | None = None) -> Array:
  """x [N, I] @ kernel [I, O] + bias [O] on TPUs. The kernel's gradient is asked for row by row: in
  the layout of a parameter such as [D, 3, H, K], which the compiler stores with D innermost, it
  would have the cotangent of all rows transposed in memory.

  label: of the input as the backward pass keeps it. What is named before the product would be kept
  and used, and `jax.checkpoint` then rounds it in a pass of its own through memory."""
  return x @ kernel if bias is None else x @ kernel + bias


def _row_major_forward(
  label: str, x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
  kept = checkpoint_name(x, label) if label else x
  return _row_major(label, x, kernel, bias), (kept, kernel, bias)


def _row_major_backward(
  label: str, kept: tuple[Array, Array, Array | None], cotangent: Array
) -> tuple[Array, Array, Array | None]:
  x, kernel, bias = kept
  slope = None if bias is None else cotangent.astype(jnp.float32).sum(0).astype(bias.dtype)
  return cotangent @ kernel.T, with_layout_constraint(x.T @ cotangent, Layout((0, 1))), slope


_row_major.defvjp(_row_major_forward, _row_major_backward)


class LayerNorm(nn.Module):
  """Layer normalisation (Ba et al. 2016) with float32 statistics. Call: x [..., D] -> [..., D] in
  `dtype`.
  """

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
      "scale", with_axes(nn.initializers.ones, ("embed",)), (x.shape[-1],), jnp.float32
    )
    bias = self.param(
      "bias", with_axes(nn.initializers.zeros, ("embed",)), (x.shape[-1],), jnp.float32
    )
    return cpu.barrier(
      normalise(x.astype(jnp.float32), scale, bias, self.eps, x.dtype == jnp.bfloat16).astype(
        self.dtype
      )
    )


class RMSNorm(nn.Module):
  """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467) with float32
  statistics. Call: x [..., D] -> [..., D] in `dtype`.
  """

  eps: float
  dtype: jnp.dtype
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
      "scale", with_axes(nn.initializers.ones, (self.axis,)), (x.shape[-1],), jnp.float32
    )
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return cpu.barrier((y * scale).astype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(x: Array, scale: Array, bias: Array, eps: float, coarse: bool = False) -> Array:
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last dimension. The backward pass
  keeps x and two numbers a row.

  coarse: x was bfloat16, whose rounding is larger than that of E[x^2] - E[x]^2 in float32; both
  means then take one pass.
  """
  return _normalise_forward(x, scale, bias, eps, coarse)[0]


def _normalise_forward(
  x: Array, scale: Array, bias: Array, eps: float, coarse: bool
) -> tuple[Array, tuple[Array, ...]]:
  mean = x.mean(-1, keepdims=True)
  if coarse:
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
  else:
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + eps)
  return (x - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _normalise_backward(
  eps: float, coarse: bool, kept: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
  x, mean, inverse, scale = kept
  rows = tuple(range(x.ndim - 1))
  unit = (x - mean) * inverse
  inner = cotangent * scale
  shift, slope = inner.mean(-1, keepdims=True), (inner * unit).mean(-1, keepdims=True)
  return inverse * (inner - shift - unit * slope), (cotangent * unit).sum(rows), cotangent.sum(rows)


normalise.defvjp(_normalise_forward, _normalise_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}
# By the names of gated MLPs (block.py): what is done to the half that multiplies the other.
ACTIVATIONS |= {
  "swiglu": ACTIVATIONS["silu"],
  "geglu": ACTIVATIONS["gelu"],
  "geglu_tanh": ACTIVATIONS["gelu_tanh"],
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(name: str, x: Array) -> Array:
  """ACTIVATIONS[name](x); the backward pass keeps x alone and computes the derivative from it."""
  return cpu.barrier(ACTIVATIONS[name](x))


def _activate_forward(name: str, x: Array) -> tuple[Array, Array]:
  return activate(name, x), x


def _activate_backward(name: str, x: Array, cotangent: Array) -> tuple[Array]:
  if ACTIVATIONS[name] is ACTIVATIONS["gelu_tanh"] and platform() == "tpu":
    return ((cotangent * _gelu_tanh_derivative(x.astype(jnp.float32))).astype(x.dtype),)
  # Else the CPU compiler keeps the forward pass's intermediates, several times the size of x.
  x = cpu.barrier(x)
  _, derivative = jax.jvp(ACTIVATIONS[name], (x,), (jnp.ones_like(x),))
  return (cpu.barrier(cotangent * derivative),)


def _gelu_tanh_derivative(x: Array) -> Array:
  """In half the operations of automatic differentiation; a TPU's vector unit is the slower part of
  the products it is fused with.
  """
  square, a, b = jnp.square(x), math.sqrt(2 / math.pi), 0.044715 * math.sqrt(2 / math.pi)
  share = 0.5 + 0.5 * jnp.tanh(x * (a + b * square))  # gelu_tanh(x) / x
  return share * (1 + (x - x * share) * (2 * a + 6 * b * square))


activate.defvjp(_activate_forward, _activate_backward)


def hide_patches(module: nn.Module, x: Array, batch: Mapping[str, Array]) -> Array:
  """x [B, L, D] with a learned token of `module` where batch["patch_mask"], bool [B, L], is True;
  without it, x as it is.

  Encoders call it in their compact method between embedding their input and adding positions.
  """
  if "patch_mask" not in batch:
    return x
  token = module.param(
    "mask_token", with_axes(normal(0.02), ("embed",)), (x.shape[-1],), jnp.float32
  )
  return jnp.where(batch["patch_mask"][..., None], token.astype(x.dtype), x)
