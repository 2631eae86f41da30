"""Two (or more) encoders into one space: CLIP (Radford et al. 2021, arXiv:2103.00020), SigLIP (Zhai
et al. 2023, arXiv:2303.15343).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mmjax.models import parts
from mmjax.models.layers import Encoded
from mmjax.models.projection import Between
from mmjax.models.shared_space import SharedSpace
from mmjax.ranges import Count, Finite, Positive, Width

Array = jax.Array
Batch = Mapping[str, Any]


class DualEncoder(nn.Module):
  """One encoder a modality, and the space that they share, whose parameters are the model's.

  `batch` is the nested dict of mmjax/README.md, {modality: {...}}.
  """

  encoders: Mapping[str, nn.Module]
  space: SharedSpace

  shared_methods = ("temperature", "discriminate")  # their result does not depend on examples

  @property
  def methods(self) -> tuple[str, ...]:
    """The names of METHODS that this model answers."""
    return ("encode", *self.space.methods)

  def setup(self) -> None:
    parts.adopt(self, self.encoders)
    nn.share_scope(self, self.space)

  def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
    """{modality: embedding} of every modality in the batch; reads every parameter, so that `init`
    makes them all.
    """
    self.space.make()
    return {m: self.embedding(m, batch, train=train) for m in self.encoders if m in batch}

  def encode(self, modality: str, batch: Batch, *, train: bool = False) -> Encoded:
    """tokens [B, L, D], mask [B, L], pooled [B, D] of one modality, in its encoder's width."""
    return parts.encode(self, modality, batch, train)

  def embedding(self, modality: str, batch: Batch, *, train: bool = False) -> Array:
    """float32 [B, width] of length 1; zeros for a row where the modality is missing."""
    return self.space.embed(modality, self.encode(modality, batch, train=train))

  def discriminate(self, x: Array, modalities: tuple[str, ...]) -> Array:
    """float32 logits [N, modalities] that an embedding of x [N, width] is of each of these
    modalities.
    """
    return self.space.discriminate(x, modalities)

  def temperature(self) -> tuple[Array, Array]:
    """(scale, bias), float32 scalars: logits = scale * cosine + bias. scale = exp(log_scale), at
    most `scale_max`.
    """
    return self.space.temperature()


def dual_encoder(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 512,
  unprojected: tuple[str, ...] = (),
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
  parts.check_encoders("unprojected", unprojected, encoders)
  space = SharedSpace(
    tuple(encoders),
    width,
    tuple(unprojected),
    projection_bias,
    projection_function,
    scale_init,
    scale_max,
    bias,
    bias_init,
    discriminator,
  )
  return DualEncoder(dict(encoders), space)
