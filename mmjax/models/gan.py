"""A small text-conditional GAN: a generator of pictures from a text and noise, and a projection
discriminator. No batch statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.layers import Dense
from mmjax.models.parts import unbound
from mmjax.ranges import Size, Sizes, Width

Array = jax.Array
SLOPE = 0.2  # of the leaky rectifiers


class TextToImageGan(nn.Module):
  """A text encoder (parameters text/...), a generator (generator/...) and a discriminator
  (discriminator/...).

  Pictures are float32 [B, size, size, 3] in [-1, 1]. Both players see the text through `condition`;
  the encoder belongs to whichever player's optimizer takes it.
  """

  encoders: Mapping[str, nn.Module]
  width: int
  size: int
  noise: int
  channels: tuple[int, ...]
  discriminator_channels: tuple[int, ...]
  dtype: jnp.dtype

  shared_methods = ("draw", "score")  # methods that take arrays, not the batch
  methods = ("condition", "draw", "score", "generate")  # the names of METHODS that it answers
  joint = False  # it gives no embeddings

  def setup(self) -> None:
    self.text = unbound(self.encoders["text"])
    self.generator = Generator(self.channels, self.size, self.dtype)
    self.discriminator = Discriminator(self.discriminator_channels, self.dtype)

  def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> dict[str, Array]:
    """{"text": condition}; uses every part once, so that `init` makes all parameters."""
    text = self.condition(batch, train=train)
    self.score(self.draw(text, jnp.zeros((len(text), self.noise))), text)
    return {"text": text}

  def condition(self, batch: Mapping[str, Any], *, train: bool = False) -> Array:
    """float32 [B, D]: the texts, normalised to a mean square of 1."""
    x = self.text(batch["text"], train=train).pooled.astype(jnp.float32)
    return unit(x)

  def draw(self, text: Array, noise: Array) -> Array:
    """Pictures of conditions [B, D] and standard normal noise [B, noise]."""
    return self.generator(jnp.concatenate([text, unit(noise)], axis=-1))

  def score(self, pictures: Array, text: Array) -> Array:
    """float32 [B, T]: how real each picture [B, ...] looks, as a picture of each condition [T,
    D].
    """
    return self.discriminator(pictures, text)

  def generate(self, seed: int, batch: Mapping[str, Any], *, train: bool = False) -> Array:
    """uint8 [B, size, size, 3]. A row's noise depends on the seed and its text alone, whatever the
    batch that it is in.
    """
    key = jax.random.key(seed)

    def of_text(name):
      return jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(key, name[0]), name[1]), (self.noise,)
      )

    x = self.draw(self.condition(batch, train=train), jax.vmap(of_text)(batch["text"]["key"]))
    return jnp.round((x + 1) * 127.5).astype(jnp.uint8)


class Generator(nn.Module):
  """Upsampling convolutions; each stage is modulated by the input (as in StyleGAN, Karras et al.
  2019, arXiv:1812.04948).

  Call: [B, I] -> float32 [B, size, size, 3] in [-1, 1]. Stage i has channels[i] at twice the side
  of the one before; the last doubling is a rearrangement of channels to pixels (Shi et al. 2016,
  arXiv:1609.05158).
  """

  channels: tuple[int, ...]
  size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, z: Array) -> Array:
    side = self.size // 2 ** len(self.channels)
    z = leaky(dense(2 * self.channels[0], self.dtype, "input")(z))
    x = dense(side * side * self.channels[0], self.dtype, "start")(z).reshape(
      -1, side, side, self.channels[0]
    )
    for i, channels in enumerate(self.channels):
      if i:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      y = leaky(Convolution(channels, 1, self.dtype, name=f"convolution{i}")(x))
      scale, shift = jnp.split(
        dense(2 * channels, self.dtype, f"modulation{i}")(z)[:, None, None], 2, axis=-1
      )
      x = unit(y) * (1 + scale) + shift
    x = Convolution(12, 1, jnp.float32, name="out")(leaky(x))
    b, h, w, _ = x.shape
    return jnp.tanh(x.reshape(b, h, w, 2, 2, 3).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, 3))


class Discriminator(nn.Module):
  """psi(h) + <V text, h> of the features h of a picture: a projection discriminator (Miyato and
  Koyama 2018, arXiv:1802.05637, eq. 3).

  Call: pictures [B, H, W, 3], text [T, D] -> float32 [B, T], every picture with every text. The
  first stage works on 2x2 pixels, each further one halves the side.
  """

  channels: tuple[int, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:
    b, h, w, _ = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, 3).swapaxes(2, 3).reshape(b, h // 2, w // 2, 12)
    for i, channels in enumerate(self.channels):
      x = leaky(Convolution(channels, 2 if i else 1, self.dtype, name=f"convolution{i}")(x))
    features = leaky(dense(self.channels[-1], self.dtype, "features")(x.reshape(b, -1)))
    features = features.astype(jnp.float32)
    wanted = dense(self.channels[-1], jnp.float32, "text")(
      leaky(dense(self.channels[-1], self.dtype, "text_hidden")(text))
    )
    agreement = features @ wanted.T / math.sqrt(features.shape[-1])
    return dense(1, jnp.float32, "real")(features) + agreement


class Convolution(nn.Module):
  """3x3 convolution, zeros around: [B, H, W, C] -> [B, H / stride, W / stride, channels], as one
  matrix product of nine shifted pictures, which CPUs run faster than a convolution with its
  derivatives."""

  channels: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h, w = x.shape[1:3]
    x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    s = self.stride
    x = jnp.concatenate(
      [x[:, i : i + h : s, j : j + w : s] for i in range(3) for j in range(3)], axis=-1
    )
    return Dense(
      (self.channels,), ("embed", "mlp"), self.dtype, nn.initializers.he_normal(), name="dense"
    )(x)


def dense(features: int, dtype: jnp.dtype, name: str) -> Dense:
  return Dense((features,), ("embed", "mlp"), dtype, nn.initializers.he_normal(), name=name)


def leaky(x: Array) -> Array:
  return jnp.where(x > 0, x, SLOPE * x)


def unit(x: Array) -> Array:
  """Vectors over the last axis scaled to a mean square of 1 (Karras et al. 2018, arXiv:1710.10196,
  section 4.2); float32 inside.
  """
  y = x.astype(jnp.float32)
  return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-8)).astype(x.dtype)


def text_to_image_gan(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 128,
  noise: Size = 16,
  channels: Sizes = (),
  discriminator: Sizes = (),
) -> TextToImageGan:
  """A generator of small pictures from texts, and its opponent: for the objective "gan". Takes a
  text encoder alone.

  width: channels of a text encoder that does not say its own. noise: dimensions of the noise.
  channels: of the generator's stages; data.image.size is the first side times two for each; () =
  (128, 96, 48).
  discriminator: channels of its stages; () = (48, 96, 128).
  """
  if set(encoders) != {"text"}:
    raise UserError(
      "text_to_image_gan takes a text encoder alone, but model.encoders has "
      f"{', '.join(sorted(encoders))}"
    )
  size = data["image"]["size"]
  channels, discriminator = tuple(channels) or (128, 96, 48), tuple(discriminator) or (48, 96, 128)
  for name, stages in dict(channels=channels, discriminator=discriminator).items():
    _check(name, stages, size)
  return TextToImageGan(
    dict(encoders), width, size, noise, channels, discriminator, jnp.dtype(precision["compute"])
  )


def _check(name: str, stages: Sequence[int], size: int) -> None:
  if not stages or not all(isinstance(n, int) and n > 0 for n in stages):
    raise UserError(f"model.{name} is {stages!r}, but must be channels, such as (128, 96, 48)")
  if size % 2 ** len(stages):
    raise UserError(
      f"data.image.size {size} cannot be halved {len(stages)} times, once for each of "
      f"model.{name}. Change one"
    )
