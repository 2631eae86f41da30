"""From an encoder's pooled output into a shared space: one linear layer, or two with a function
between them.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.layers import Dense, activate

Array = jax.Array
Between = Literal["none", "relu", "gelu", "gelu_tanh", "quick_gelu"]


class TwoLayers(nn.Module):
  """A linear layer, a function, a linear layer, as CLAP has (Wu et al. 2023, arXiv:2211.06687).
  Call: x [B, D] -> float32 [B, width].
  """

  width: int
  function: Between
  bias: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = activate(self.function, _layer(self.width, ("embed", "mlp"), self.bias, "hidden")(x))
    return _layer(self.width, ("mlp", "joint"), self.bias, "out")(x)


def projection(width: int, function: Between, bias: bool, name: str | None = None) -> nn.Module:
  """The module that projects to `width` channels, float32; function "none": one linear layer."""
  if function == "none":
    return _layer(width, ("embed", "joint"), bias, name)
  return TwoLayers(width, function, bias, name=name)


def _layer(width: int, axes: tuple[str, str], bias: bool, name: str | None) -> Dense:
  init = nn.initializers.lecun_normal()
  return Dense((width,), axes, jnp.float32, init, bias, name=name)
