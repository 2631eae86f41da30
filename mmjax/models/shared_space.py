"""The space that modalities share: projections into it, the scale of its cosines, and a
discriminator of modalities.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.layers import Dense, Encoded, activate, with_axes
from mmjax.models.methods import lacking
from mmjax.models.pooling import keep_rows
from mmjax.models.projection import Between, projection

Array = jax.Array


class SharedSpace(nn.Module):
  """Projects each modality's pooled vector to `width` channels of length 1, compared by cosine
  times `temperature()`. `unprojected` modalities are in the space already.

  Parameters: MODALITY_projection, log_scale, bias (with `use_bias`), discriminator.
  """

  modalities: tuple[str, ...]
  width: int
  unprojected: tuple[str, ...] = ()
  projection_bias: bool = False
  projection_function: Between = "none"
  scale_init: float = 1 / 0.07
  scale_max: float = 100.0
  use_bias: bool = False
  bias_init: float = -10.0
  discriminator_hidden: int = 0  # 0 = no discriminator

  @property
  def methods(self) -> tuple[str, ...]:
    """The names of METHODS that a model with this part answers."""
    return ("embedding", "temperature", *(["discriminate"] if self.discriminator_hidden else []))

  def setup(self) -> None:
    how = self.projection_function, self.projection_bias
    self.projections = {
      modality: projection(self.width, *how, f"{modality}_projection")
      for modality in self.modalities
      if modality not in self.unprojected
    }
    if self.discriminator_hidden:
      self.discriminator = Discriminator(self.discriminator_hidden, len(self.modalities))
    self.log_scale = self._scalar("log_scale", math.log(self.scale_init))
    if self.use_bias:
      self.bias = self._scalar("bias", self.bias_init)

  def _scalar(self, name: str, value: float) -> Array:
    return self.param(name, with_axes(nn.initializers.constant(value), ()), (), jnp.float32)

  def make(self) -> None:
    """Uses what no embedding does, so that `init` makes all parameters."""
    self.temperature()
    if self.discriminator_hidden:
      self.discriminate(jnp.zeros((1, self.width)), self.modalities)

  def embed(self, modality: str, encoded: Encoded) -> Array:
    """float32 [B, width] of length 1; zeros for a row where the modality is missing."""
    x = encoded.pooled.astype(jnp.float32)
    if modality in self.projections:
      x = self.projections[modality](x)
    if self.projection_bias:  # which a row without the modality would get
      x = keep_rows(x, encoded.mask)
    if x.shape[-1] != self.width:
      raise UserError(
        f"model.unprojected has {modality!r}, but its encoder gives {x.shape[-1]} channels and "
        f"model.width is {self.width}. Make them equal, or project it"
      )
    return unit_length(x)

  def discriminate(self, x: Array, modalities: tuple[str, ...]) -> Array:
    """float32 logits [N, modalities] that an embedding of x [N, width] is of each of these
    modalities.
    """
    if not self.discriminator_hidden:
      raise lacking("discriminate")
    # Embeddings have elements of 1 / sqrt(width); the layers want them of about 1.
    logits = self.discriminator(x.astype(jnp.float32) * math.sqrt(self.width))
    order = sorted(self.modalities)
    return logits[:, jnp.array([order.index(modality) for modality in modalities])]

  def temperature(self) -> tuple[Array, Array]:
    """(scale, bias), float32 scalars: logits = scale * cosine + bias. scale = exp(log_scale), at
    most `scale_max`.

    Training clamps the parameter after each update (state/train_state.py); the clip here is for
    parameters from elsewhere. The gradient passes it unchanged, so that a scale at its limit can
    come down again.
    """
    limit = math.log(self.scale_max)
    log_scale = self.log_scale + jax.lax.stop_gradient(
      jnp.minimum(self.log_scale, limit) - self.log_scale
    )
    return jnp.exp(log_scale), self.bias if self.use_bias else jnp.zeros((), jnp.float32)


class Discriminator(nn.Module):
  """Two dense layers from an embedding to a logit for each modality. Call: x float32 [N, D] ->
  float32 [N, modalities].
  """

  hidden: int
  modalities: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    he, lecun = nn.initializers.he_normal(), nn.initializers.lecun_normal()
    x = Dense((self.hidden,), ("joint", "mlp"), jnp.float32, he, name="hidden")(x)
    x = activate("relu", x)
    return Dense((self.modalities,), ("mlp", None), jnp.float32, lecun, name="out")(x)


def unit_length(x: Array) -> Array:
  """x [..., D] over its length; zeros stay zeros."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
