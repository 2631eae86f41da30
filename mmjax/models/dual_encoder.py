"""Two (or more) encoders into one space: CLIP (Radford et al. 2021, arXiv:2103.00020), SigLIP (Zhai
et al. 2023, arXiv:2303.15343).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.layers import Dense, Encoded, activate, with_axes
from mmjax.models.pooling import keep_rows
from mmjax.models.projection import Between, projection
from mmjax.ranges import Count, Finite, Positive, Width

Array = jax.Array


class DualEncoder(nn.Module):
  """One encoder a modality, each projected to a shared space of `width`, compared by cosine times
  `temperature()`.

  `batch` is the nested dict of mmjax/README.md, {modality: {...}}. `unprojected` modalities are in
  the shared space already.
  """

  encoders: Mapping[str, nn.Module]
  width: int
  unprojected: tuple[str, ...] = ()
  projection_bias: bool = False
  projection_function: Between = "none"
  scale_init: float = 1 / 0.07
  scale_max: float = 100.0
  use_bias: bool = False
  bias_init: float = -10.0
  joint: bool = True  # False: no shared space, so neither `embedding` nor `temperature`
  discriminator_hidden: int = 0  # hidden units of the discriminator of modalities; 0 = none

  shared_methods = (
    "temperature",
    "discriminate",
  )  # methods whose result does not depend on examples

  def setup(self) -> None:
    for modality, encoder in self.encoders.items():
      setattr(
        self, modality, self.adopt(encoder)
      )  # the parameters of "image" are image/..., not encoders_image/...
    if not self.joint:
      self.projections = {}
      return
    self.projections = {
      modality: projection(
        self.width, self.projection_function, self.projection_bias, f"{modality}_projection"
      )
      for modality in self.encoders
      if modality not in self.unprojected
    }
    if self.discriminator_hidden:
      self.discriminator = Discriminator(self.discriminator_hidden, len(self.encoders))
    self.log_scale = self.param(
      "log_scale",
      with_axes(nn.initializers.constant(math.log(self.scale_init)), ()),
      (),
      jnp.float32,
    )
    if self.use_bias:
      self.bias = self.param(
        "bias", with_axes(nn.initializers.constant(self.bias_init), ()), (), jnp.float32
      )

  def adopt(self, encoder: nn.Module) -> nn.Module:
    """A given encoder as a part of this model."""
    return encoder.clone(parent=None)

  def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> dict[str, Array]:
    """{modality: embedding} of every modality in the batch; reads every parameter, so that `init`
    makes them all.
    """
    self.temperature()
    if self.discriminator_hidden:
      self.discriminate(jnp.zeros((1, self.width)), tuple(self.encoders))
    return {
      modality: self.embedding(modality, batch, train=train)
      for modality in self.encoders
      if modality in batch
    }

  def encode(self, modality: str, batch: Mapping[str, Any], *, train: bool = False) -> Encoded:
    """tokens [B, L, D], mask [B, L], pooled [B, D] of one modality, in its encoder's width."""
    if modality not in self.encoders:
      raise UserError(
        f"the model has no encoder for {modality!r}; it has {', '.join(sorted(self.encoders))}"
      )
    return getattr(self, modality)(batch[modality], train=train)

  def embedding(self, modality: str, batch: Mapping[str, Any], *, train: bool = False) -> Array:
    """float32 [B, width] of length 1; zeros for a row where the modality is missing."""
    if not self.joint:
      raise UserError(
        "the model has no shared space (model.joint is False): set it to True to get embeddings"
      )
    encoded = self.encode(modality, batch, train=train)
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
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))

  def discriminate(self, x: Array, modalities: tuple[str, ...]) -> Array:
    """float32 logits [N, modalities] that an embedding of x [N, width] is of each of these
    modalities.
    """
    if not (self.discriminator_hidden and self.joint):
      raise UserError(
        "the model has no discriminator of modalities: set model.discriminator to its hidden "
        "units, such as 64"
      )
    # Embeddings have elements of 1 / sqrt(width); the layers want them of about 1.
    logits = self.discriminator(x.astype(jnp.float32) * math.sqrt(self.width))
    order = sorted(self.encoders)
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
    x = activate(
      "relu",
      Dense(
        (self.hidden,), ("joint", "mlp"), jnp.float32, nn.initializers.he_normal(), name="hidden"
      )(x),
    )
    return Dense(
      (self.modalities,), ("mlp", None), jnp.float32, nn.initializers.lecun_normal(), name="out"
    )(x)


def dual_encoder(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 512,
  unprojected: tuple = (),
  projection_bias: bool = False,
  projection_function: Between = "none",
  scale_init: Positive = 1 / 0.07,
  scale_max: Positive = 100.0,
  bias: bool = False,
  bias_init: Finite = -10.0,
  discriminator: Count = 0,
) -> DualEncoder:
  """One encoder a modality, compared by a scaled cosine in a shared space.

  width: channels of the shared space, and of encoders that do not say theirs.
  unprojected: modalities whose encoder's output is used as it is (its width must be `width`).
  projection_bias: the projections have a bias. projection_function: between two layers that each of
  them then has, as CLAP; none = one layer.
  scale_init, scale_max: factor of the cosine at the start and at most (10 and no limit in SigLIP, 1
  / 0.07 and 100 in CLIP).
  bias, bias_init: learn a bias of the logits, for the sigmoid loss.
  discriminator: hidden units of the discriminator that the objective "modality_adversary" plays
  against; 0 = none.
  """
  for modality in unprojected:
    if modality not in encoders:
      raise UserError(
        f"model.unprojected names {modality!r}, but model.encoders has "
        f"{', '.join(sorted(encoders))}"
      )
  return DualEncoder(
    dict(encoders),
    width=width,
    unprojected=tuple(unprojected),
    projection_bias=projection_bias,
    projection_function=projection_function,
    scale_init=scale_init,
    scale_max=scale_max,
    use_bias=bias,
    bias_init=bias_init,
    discriminator_hidden=discriminator,
  )
