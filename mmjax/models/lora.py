"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): y = x @ kernel + scale * x @ A @ B,
of which A and B are learned.

The factors are leaves beside the kernel of a dense layer, which uses them where they are there
(layers.py):
  lora_a [*inputs, P, r], lora_b [P, r, *features of a part], lora_scale [] and, where the factors'
  input is dropped in training, lora_dropout [], its share.
A table of tokens has them in TABLE_factors, such as embedding_factors/lora_a: its vectors are
table + scale * A @ B, for words that the frozen table does not know. There A is zero at first, and
P is 1.
Of P projections that share one kernel (query, key and value; the two halves of a gated MLP) each
has factors of its own, as each has where they are layers of their own. In a stack every leaf has
the leading axis of layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from mmjax.models.layers import Array, Dense, with_axes, xavier

LEAVES = ("lora_a", "lora_b", "lora_scale", "lora_dropout")
LEARNED = ("lora_a", "lora_b")
OF_TABLE = "_factors"


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
  """What the product of the factors is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA,
  Kalajdzievski 2023, arXiv:2312.03732), with which a higher rank does not learn more slowly.
  """
  return alpha / (math.sqrt(rank) if rslora else rank)


def with_factors(rank: int, scale: float, dropout: float) -> contextlib.AbstractContextManager:
  """Within it, `init` of a model makes factors beside every kernel of a dense layer, after all
  other parameters of the layer, which so stay what they are without: A by Kaiming's uniform rule, B
  zero, so that they change nothing yet.
  """

  def make(function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    out, layer = function(*args, **kwargs), context.module
    if isinstance(layer, Dense) and context.method_name == "__call__" and layer.is_initializing():
      _make_factors(layer, args[0].shape, rank, scale, dropout)
    return out

  return nn.intercept_methods(make)


def _make_factors(
  layer: Dense, shape: tuple[int, ...], rank: int, scale: float, dropout: float
) -> None:
  features, parts = layer.features, layer.parts
  n = len(layer.axes) - len(features)
  inputs, axes = shape[len(shape) - n :], layer.axes[n + 1 :]
  if features[0] != parts:  # side by side in one axis of features
    features, axes = (parts, features[0] // parts, *features[1:]), layer.axes[n:]
  uniform = xavier(3 * math.prod(inputs), 3 * math.prod(inputs))  # +- 1 / sqrt(inputs)
  a, b = (*layer.axes[:n], None, None), (None, None, *axes)
  layer.param("lora_a", with_axes(uniform, a), (*inputs, parts, rank), jnp.float32)
  zeros = with_axes(nn.initializers.zeros, b)
  layer.param("lora_b", zeros, (parts, rank, *features[1:]), jnp.float32)
  for name, value in dict(lora_scale=scale, lora_dropout=dropout).items():
    if value or name == "lora_scale":
      layer.param(name, with_axes(nn.initializers.constant(value), ()), (), jnp.float32)


def table_factors(box: Any, rank: int, scale: float, key: Array) -> dict[str, Any]:
  """Boxed factors of a boxed table [V, D] that change nothing yet: A zero, B normal."""
  rows, width = box.value.shape
  vocab, embed = box.names
  init = nn.initializers
  leaves = dict(
    lora_a=(init.zeros, (vocab, None, None), (rows, 1, rank)),
    lora_b=(init.normal(1.0), (None, None, embed), (1, rank, width)),
    lora_scale=(init.constant(scale), (), ()),
  )
  return {
    name: with_axes(how, axes)(key, shape, jnp.float32)
    for name, (how, axes, shape) in leaves.items()
  }


class TokenTable(NamedTuple):
  """A table of tokens [V, D], and its low-rank factors where it has any: A [V, r], B [r, D] and
  what their product is multiplied by.
  """

  weights: Array
  factors: tuple[Array, Array, Array] | None = None

  @classmethod
  def of(cls, module: nn.Module, name: str, weights: Array) -> TokenTable:
    """The parameter `name` of a module, `weights`, and what stands beside it."""
    if not module.has_variable("params", f"{name}{OF_TABLE}"):
      return cls(weights)
    beside: Mapping[str, Any] = module.get_variable("params", f"{name}{OF_TABLE}")
    return cls(weights, (beside["lora_a"][:, 0], beside["lora_b"][0], beside["lora_scale"]))

  def rows(self, tokens: Array) -> Array:
    """float32 [..., D] of tokens int32 [...]."""
    rows = jnp.take(self.weights, tokens, axis=0)
    if self.factors is None:
      return rows
    a, b, scale = self.factors
    return rows + scale * (jnp.take(a, tokens, axis=0) @ b)

  def whole(self) -> Array:
    """float32 [V, D]."""
    if self.factors is None:
      return self.weights
    a, b, scale = self.factors
    return self.weights + scale * (a @ b)

  def logits(self, hidden: Array) -> Array:
    """float32 [..., V] of hidden states [..., D]."""

    def times(x: Array, y: Array) -> Array:
      kinds = dict(precision="highest", preferred_element_type=jnp.float32)
      return jnp.einsum("...d,vd->...v", x, y.astype(x.dtype), **kinds)

    logits = times(hidden, self.weights)
    if self.factors is None:
      return logits
    a, b, scale = self.factors
    return logits + scale * times(times(hidden, b), a)


def adapted_by(factor: str) -> str:
  """The parameter that a factor adapts: its layer's kernel, or a table of tokens."""
  layer = factor.rpartition("/")[0]
  return layer.removesuffix(OF_TABLE) if layer.endswith(OF_TABLE) else f"{layer}/kernel"


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters (nested dict of arrays) whose factors are added into kernels and tables."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  merged = {name: x for name, x in flat.items() if name.rpartition("/")[2] not in LEAVES}
  for name in flat:
    layer, _, leaf = name.rpartition("/")
    if leaf == "lora_a":
      adapted, factors = flat[adapted_by(name)], (flat[f"{layer}/{x}"] for x in LEAVES[:3])
      merged[adapted_by(name)] = adapted + product(*factors).reshape(adapted.shape)
  return flax.traverse_util.unflatten_dict(merged, sep="/")


def product(a: Array, b: Array, scale: Array) -> Array:
  """scale * A @ B, [*layers, inputs, P, features of a part], of one layer or of a stack."""
  layers = scale.shape
  parts, rank = a.shape[-2:]
  a = a.reshape(*layers, -1, parts, rank).swapaxes(-2, -3)
  y = scale[..., None, None, None] * (a @ b.reshape(*layers, parts, rank, -1))
  return y.swapaxes(-2, -3)
