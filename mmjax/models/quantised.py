"""Frozen kernels in few bits, under low-rank factors (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314): the leaves in the place of a dense layer's kernel [*inputs, *features].

int8: kernel_int8 [*inputs, *features] times kernel_scale [*features], the largest absolute value of
each output channel / 127.
nf4: kernel_nf4 uint8 [I / 2, *features], two codes a byte, the first in the lower half; each stands
for one of LEVELS times kernel_scale [I / BLOCK, *features], the largest absolute value of a block
of inputs. I: the inputs, flattened, and filled up with zeros to whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

BLOCK = 64
LEAVES = ("kernel_int8", "kernel_nf4", "kernel_scale")
# The quantiles of a normal distribution of appendix E of the paper; zero is one of them.
LEVELS = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)


def quantise(kernel: Any, inputs: int, kind: str) -> dict[str, Any]:
  """{leaf: array} of a kernel float32 [*inputs, *features], NumPy or JAX, as `kind` ("int8" or
  "nf4") has it. inputs: how many of its dimensions are inputs.
  """
  xp: Any = np if isinstance(kernel, np.ndarray) else jnp
  features = kernel.shape[inputs:]
  flat = kernel.reshape(math.prod(kernel.shape[:inputs]), *features)
  if kind == "int8":
    scale = xp.abs(flat).max(0) / np.float32(127)
    codes = xp.round(flat / xp.where(scale > 0, scale, 1)).astype(np.int8)
    return dict(kernel_int8=codes.reshape(kernel.shape), kernel_scale=scale)
  flat = xp.pad(flat, [(0, -len(flat) % BLOCK)] + [(0, 0)] * len(features))
  blocks = flat.reshape(-1, BLOCK, *features)
  scale = xp.abs(blocks).max(1)
  unit = blocks / xp.where(scale > 0, scale, 1)[:, None]
  edges = (LEVELS[1:] + LEVELS[:-1]) / 2
  codes = xp.searchsorted(edges, unit.reshape(-1)).astype(np.uint8).reshape(-1, 2, *features)
  return dict(kernel_nf4=codes[:, 0] | codes[:, 1] << 4, kernel_scale=scale)


def dequantise(leaves: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
  """The kernel of this shape, [*inputs, *features], in `dtype`."""
  scale = leaves["kernel_scale"].astype(dtype)
  if "kernel_int8" in leaves:
    return leaves["kernel_int8"].astype(dtype) * scale
  packed, features = leaves["kernel_nf4"], leaves["kernel_nf4"].shape[1:]
  codes = jnp.stack([packed & 15, packed >> 4], axis=1).reshape(-1, BLOCK, *features)
  flat = (jnp.asarray(LEVELS, dtype)[codes] * scale[:, None]).reshape(-1, *features)
  inputs = math.prod(shape) // math.prod(features)
  return flat[:inputs].reshape(shape)
