"""Where a token stands: learned tables (resized to other grids), sines and cosines, rotary
positions on one axis or several.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.ranges import Count, NonNegative, Portion, Positive, Sizes

Array = jax.Array


def sinusoids(length: int, width: int) -> np.ndarray:
  """Fixed positions float32 [length, width]: sines, then cosines, of wavelengths up to 10,000 * 2
  pi (Vaswani et al. 2017, arXiv:1706.03762, section 3.5; in Whisper's order, and as it rounds).
  """
  if width % 2:
    raise UserError(f"positions of sines need an even width, not {width}")
  omega = np.exp(
    np.arange(width // 2, dtype=np.float32) * np.float32(-math.log(10_000) / max(1, width // 2 - 1))
  )
  angles = np.arange(length, dtype=np.float32)[:, None] * omega
  return np.concatenate([np.sin(angles), np.cos(angles)], 1)


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotary positions: pairs of channels of queries and keys turn by an angle that grows with the
  position (Su et al. 2021, arXiv:2104.09864), with the published ways to longer texts.

  theta: the longest wavelength is about 2 pi theta. share: of a head's channels that turn, the
  first ones. scaling: none; linear (positions / factor, arXiv:2306.15595); dynamic (theta grows
  with a row's length beyond `original`, "NTK-aware"); llama3 (long wavelengths alone are stretched,
  arXiv:2407.21783); yarn (Peng et al. 2023, arXiv:2309.00071). factor: how much longer than
  `original`, the length that the model was trained with. low, high: llama3's low_freq_factor and
  high_freq_factor. fast, slow: yarn's beta_fast and beta_slow. attention_factor: yarn's, of the
  cosines and sines; 0 = 0.1 ln(factor) + 1.
  sections: for positions on several axes [B, L, A], how many pairs of channels each axis turns
  (arXiv:2409.12191, M-RoPE); interleaved: the axes take turns, instead of one after the other;
  axial: each has all wavelengths, instead of a part of them.
  """

  theta: Positive = 10_000.0
  share: Portion = 1.0
  scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
  factor: Positive = 1.0
  original: Count = 0
  low: Positive = 1.0
  high: Positive = 4.0
  fast: Positive = 32.0
  slow: Positive = 1.0
  attention_factor: NonNegative = 0.0
  sections: Sizes = ()
  interleaved: bool = False
  axial: bool = False

  def __post_init__(self):
    if self.axial and (not self.sections or self.interleaved or self.scaling != "none"):
      raise UserError("axial rotary positions need `sections`, and are not interleaved or scaled")
    if self.scaling in ("dynamic", "llama3", "yarn") and not self.original:
      raise UserError(
        f"rotary scaling {self.scaling!r} needs `original`, the length that the model was trained "
        "with"
      )

  def angles(self, positions: Array, head_size: int) -> tuple[Array, Array]:
    """positions int32 [B, L] or [B, L, A] -> (cosines, sines) float32 [B, L, channels that turn /
    2]. Raises UserError: an odd number of them, or sections that do not add up to it.
    """
    turning = int(head_size * self.share)
    if turning % 2 or turning < 2:
      raise UserError(f"rotary positions turn pairs of channels, not {turning} of {head_size}")
    half = turning // 2
    if self.sections and sum(self.sections) != half:
      raise UserError(f"rotary sections {self.sections} do not add up to {half} pairs of channels")
    if positions.ndim == 3:
      first = positions[..., 0]
      positions = positions[..., self._axis_of_pair(half)]
    else:
      first, positions = positions, positions[..., None]
    omega, size = self._frequencies(turning, first)
    angles = positions.astype(jnp.float32) * omega
    return jnp.cos(angles) * size, jnp.sin(angles) * size

  def _frequencies(self, turning: int, positions: Array) -> tuple[Array, float]:
    """(radians a position, float32 [pairs] or [B, 1, pairs]; factor of cosines and sines)."""
    exponents = np.arange(0, turning, 2) / turning
    if self.axial:
      exponents = np.concatenate([np.arange(size) / size for size in self.sections])
    omega = self.theta**-exponents
    if self.scaling == "dynamic":
      length = jnp.maximum(positions.max(-1, keepdims=True) + 1, self.original).astype(jnp.float32)
      growth = self.factor * length / self.original - (self.factor - 1)
      theta = self.theta * growth ** (turning / (turning - 2))
      return theta[..., None] ** jnp.asarray(-exponents, jnp.float32), 1.0
    if self.scaling == "linear":
      omega = omega / self.factor
    elif self.scaling == "llama3":
      # 1 where a wavelength fits `high` times into the original length, 0 where less than `low`
      kept = (self.original * omega / (2 * math.pi) - self.low) / (self.high - self.low)
      kept = np.clip(kept, 0, 1)
      omega = kept * omega + (1 - kept) * omega / self.factor
    elif self.scaling == "yarn":
      low, high = (
        turning * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
        for turns in (self.fast, self.slow)
      )
      low, high = max(math.floor(low), 0), min(math.ceil(high), turning - 1)
      stretched = np.clip((np.arange(turning // 2) - low) / max(high - low, 1e-3), 0, 1)
      omega = omega * (1 - stretched) + omega / self.factor * stretched
      grown = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
      return jnp.asarray(omega, jnp.float32), self.attention_factor or grown
    return jnp.asarray(omega, jnp.float32), 1.0

  def _axis_of_pair(self, half: int) -> np.ndarray:
    """The axis of the positions that turns each pair of channels, int [half]."""
    if not self.sections:
      return np.zeros(half, int)
    if not self.interleaved:
      return np.repeat(np.arange(len(self.sections)), self.sections)
    axes, count = np.zeros(half, int), len(self.sections)
    for axis in range(1, count):
      axes[axis : self.sections[axis] * count : count] = axis
    return axes


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
  """x [B, L, H, K] turned by `Rotary.angles`: channel i with channel i + half of those that turn,
  in float32, the others as they are; in the dtype of x.
  """
  cos, sin = (a[:, :, None] for a in angles)
  half = cos.shape[-1]
  turning, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
  a, b = turning[..., :half], turning[..., half:]
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return jnp.concatenate([turned.astype(x.dtype), rest], -1)


def sincos_positions(
  height: int, width: int, channels: int, temperature: float = 10_000.0
) -> np.ndarray:
  """Fixed two-dimensional positions [height * width, channels], float32 (MoCo v3, Chen et al. 2021,
  arXiv:2104.02057).
  """
  if channels % 4:
    raise ValueError(f"sin-cos positions need a width divisible by 4, not {channels}")
  y, x = np.mgrid[:height, :width].astype(np.float64)
  omega = temperature ** -(np.arange(channels // 4) / max(1, channels // 4 - 1))
  angles_y, angles_x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
  return np.concatenate(
    [np.sin(angles_x), np.cos(angles_x), np.sin(angles_y), np.cos(angles_y)], 1
  ).astype(np.float32)


def resize_positions(
  table: Array, old: tuple[int, int], new: tuple[int, int], antialias: bool = False
) -> Array:
  """Learned positions of a grid `old`, [old[0] * old[1], D], interpolated to the grid `new`:
  [new[0] * new[1], D].

  Bicubic with a = -0.75 and half-pixel centres, as transformers does with
  `interpolate_pos_encoding`; antialias: with a = -0.5, over as many more places as the grid
  shrinks, as `torch.nn.functional.interpolate(..., antialias=True)`.
  """
  if old == new:
    return table
  weights = _antialiased_weights if antialias else _cubic_weights
  rows, columns = (jnp.asarray(weights(o, n), table.dtype) for o, n in zip(old, new, strict=True))
  grid = table.reshape(*old, table.shape[-1])
  return jnp.einsum("ah,bw,hwd->abd", rows, columns, grid, precision="highest").reshape(
    -1, table.shape[-1]
  )


@functools.lru_cache(maxsize=64)
def _cubic_weights(old: int, new: int) -> np.ndarray:
  """[new, old] weights of one-dimensional cubic convolution (Keys 1981, a = -0.75), edges
  repeated.
  """
  a, out = -0.75, np.zeros((new, old))
  for i in range(new):
    centre = (i + 0.5) * old / new - 0.5
    first = math.floor(centre) - 1
    for j in range(first, first + 4):
      d = abs(centre - j)
      w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
      out[i, min(max(j, 0), old - 1)] += w
  return out


@functools.lru_cache(maxsize=64)
def _antialiased_weights(old: int, new: int) -> np.ndarray:
  """[new, old] weights of one-dimensional cubic convolution (a = -0.5), stretched where `new` is
  smaller, cut off at the edges.
  """
  a, scale = -0.5, old / new
  distance = np.abs(np.arange(old) + 0.5 - scale * (np.arange(new)[:, None] + 0.5)) / max(scale, 1)
  near, far = (
    (a + 2) * distance**3 - (a + 3) * distance**2 + 1,
    a * (distance**3 - 5 * distance**2 + 8 * distance - 4),
  )
  weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
  return weights / weights.sum(1, keepdims=True)
