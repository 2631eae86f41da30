"""Images: Swin transformers, attention within shifted windows (Liu et al. 2021,
arXiv:2103.14030).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.models import pooling as pool
from mmjax.models.block import Activation, BlockConfig, Mlp
from mmjax.models.cpu import einsum
from mmjax.models.encoders.image import normalise, patchify
from mmjax.models.layers import Dense, Encoded, LayerNorm, normal, with_axes, xavier
from mmjax.ranges import Dropout, Epsilon, Positive, Side, Sizes, Width

Array = jax.Array
EPS = 1e-5  # of the norms after the patches and before a merge, whatever `eps` the blocks have


@dataclasses.dataclass(frozen=True)
class SwinConfig:
  """Hyper-parameters; one entry of `depths` and `heads` a stage, whose width is `width` *
  2**stage.
  """

  width: int
  depths: tuple[int, ...]
  heads: tuple[int, ...]
  window: int
  mlp_ratio: float
  activation: Activation
  eps: float
  drop_path: float
  dtype: jnp.dtype


class SwinTransformer(nn.Module):
  """Call: {"pixels" uint8 or float [B, H, W, 3] in 0..255, "present" bool [B]?} -> Encoded of width
  D = width * 2**(stages - 1).

  Zeros (after normalisation) fill pixels up to whole patches, and feature maps up to whole windows
  and pairs. Randomness:
  stream "dropout", for stochastic depth, only when `train`. `pooled` is the mean of the normalised
  tokens.
  """

  config: SwinConfig
  patch: int
  size: int
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]

  @nn.compact
  def __call__(self, batch: Mapping[str, Array], *, train: bool = False) -> Encoded:
    c = self.config
    x = _pad_to_multiple(
      normalise(batch["pixels"], self.pixel_mean, self.pixel_std, c.dtype), self.patch
    )
    rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
    x = Dense(
      (c.width,), ("patch", "embed"), c.dtype, nn.initializers.lecun_normal(), name="patch"
    )(patchify(x, self.patch))
    x = LayerNorm(EPS, c.dtype, name="patch_norm")(x).reshape(x.shape[0], rows, columns, c.width)
    x = run_stages(c, x, -(-self.size // self.patch), train=train)
    x = LayerNorm(c.eps, c.dtype, name="norm")(x.reshape(x.shape[0], -1, x.shape[-1]))
    present = batch.get("present")
    mask = (
      jnp.ones(x.shape[:2], bool)
      if present is None
      else jnp.broadcast_to(present[:, None], x.shape[:2])
    )
    return Encoded(x, mask, pool.mean(x, mask))


def run_stages(c: SwinConfig, x: Array, side: int, *, train: bool) -> Array:
  """The stages, within a module's `nn.compact`: x [B, H, W, D] -> [B, H', W', D'], halved and twice
  as wide after each but the last.

  side: of the map that the model is made for, which says how large the windows of a stage are.
  """
  number, total = 0, sum(c.depths)
  for stage, depth in enumerate(c.depths):
    window = min(c.window, side)
    for i in range(depth):
      block = SwinBlock(
        c,
        c.heads[stage],
        window,
        i % 2 == 1,
        c.drop_path * number / max(1, total - 1),
        name=f"stage{stage}_block{i}",
      )
      x, number = block(x, train=train), number + 1
    if stage + 1 < len(c.depths):
      x, side = PatchMerging(c.dtype, name=f"merge{stage}")(x), -(-side // 2)
  return x


class SwinBlock(nn.Module):
  """Attention within windows, then an MLP, each after a norm and beside a residual. Call: x [B, H,
  W, D] -> [B, H, W, D].

  `shifted`: the windows are moved by half their size, unless one covers the shorter side of the map
  already. `drop`:
  probability that a row skips each of the two parts in training (Huang et al. 2016,
  arXiv:1603.09382).
  """

  config: SwinConfig
  heads: int
  window: int
  shifted: bool
  drop: float

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    c = self.config

    def constrain(x):
      return nn.with_logical_constraint(x, ("batch", None, None, "embed"))

    shift = self.window // 2 if self.shifted and min(x.shape[1:3]) > self.window else 0
    attention = WindowAttention(self.heads, self.window, c.dtype, name="attention")
    width = x.shape[-1]
    hidden = BlockConfig(
      width, 1, self.heads, int(c.mlp_ratio * width), activation=c.activation, dtype=c.dtype
    )
    mlp = Mlp(hidden, name="mlp")
    x = constrain(x)
    x = x + self._kept(attention(LayerNorm(c.eps, c.dtype, name="attention_norm")(x), shift), train)
    x = x + self._kept(mlp(LayerNorm(c.eps, c.dtype, name="mlp_norm")(x)), train)
    return constrain(x)

  def _kept(self, x: Array, train: bool) -> Array:
    if not train or not self.drop:
      return x
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.drop, (x.shape[0], 1, 1, 1))
    return jnp.where(keep, x / (1 - self.drop), 0).astype(x.dtype)


class WindowAttention(nn.Module):
  """Multi-head attention of each window to itself, with a learned bias for each relative position
  (section 3.2, equation 4).

  Call: x [B, H, W, D], shift -> [B, H, W, D]. Parameters as in `Attention`, and relative [(2 *
  window - 1)**2, heads]. The map is filled up with zeros to whole windows; these are keys like
  others, and regions that a shift has joined do not meet.
  """

  heads: int
  window: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, shift: int) -> Array:
    (b, h, w, width), n = x.shape, self.window
    x = jnp.roll(_pad_to_multiple(x, n), (-shift, -shift), axis=(1, 2))
    rows, columns = x.shape[1] // n, x.shape[2] // n
    x = (
      x.reshape(b, rows, n, columns, n, width)
      .swapaxes(2, 3)
      .reshape(b, rows * columns, n * n, width)
    )
    shape = (3, self.heads, width // self.heads)
    axes = ("embed", "qkv", "heads", "kv")
    qkv = Dense(shape, axes, self.dtype, xavier(width, width), parts=3, name="qkv")(x)
    query, key, value = (qkv[..., i, :, :] for i in range(3))
    relative = self.param(
      "relative",
      with_axes(normal(0.02), ("position", "heads")),
      ((2 * n - 1) ** 2, self.heads),
      jnp.float32,
    )
    bias = jnp.take(relative, relative_index(n), axis=0).transpose(2, 0, 1)  # [heads, n * n, n * n]
    logits = (
      jnp.einsum(
        "bwlhd,bwshd->bwhls", query * shape[-1] ** -0.5, key, preferred_element_type=jnp.float32
      )
      + bias
    )
    if shift:
      logits = jnp.where(open_pairs(rows * n, columns * n, n, shift)[:, None], logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    out = einsum("bwhls,bwshd->bwlhd", weights, value)
    out = Dense((width,), ("heads", "kv", "embed"), self.dtype, xavier(width, width), name="out")(
      out
    )
    out = (
      out.reshape(b, rows, columns, n, n, width)
      .swapaxes(2, 3)
      .reshape(b, rows * n, columns * n, width)
    )
    return jnp.roll(out, (shift, shift), axis=(1, 2))[:, :h, :w]


class PatchMerging(nn.Module):
  """Each 2x2 neighbours side by side, a norm, a linear layer: [B, H, W, D] -> [B, ceil(H / 2),
  ceil(W / 2), 2 * D].
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    x = _pad_to_multiple(x, 2)
    x = jnp.concatenate([x[:, i::2, j::2] for j in range(2) for i in range(2)], axis=-1)
    x = LayerNorm(EPS, self.dtype, name="norm")(x)
    return Dense(
      (2 * width,), ("mlp", "embed"), self.dtype, nn.initializers.lecun_normal(), False, name="out"
    )(x)


@functools.lru_cache(maxsize=16)
def relative_index(window: int) -> np.ndarray:
  """Row of the bias table for each query and key of a window: int32 [window**2, window**2]."""
  positions = np.mgrid[:window, :window].reshape(2, -1)
  rows, columns = positions[:, :, None] - positions[:, None, :] + window - 1
  return (rows * (2 * window - 1) + columns).astype(np.int32)


@functools.lru_cache(maxsize=64)
def open_pairs(height: int, width: int, window: int, shift: int) -> np.ndarray:
  """Which query sees which key of a shifted window: bool [windows, window**2, window**2] (figure
  4).
  """

  def region(size):
    return (np.arange(size) >= size - window).astype(int) + (np.arange(size) >= size - shift)

  regions = region(height)[:, None] * 3 + region(width)
  windows = (
    regions.reshape(height // window, window, width // window, window)
    .swapaxes(1, 2)
    .reshape(-1, window**2)
  )
  return windows[:, :, None] == windows[:, None, :]


def _pad_to_multiple(x: Array, multiple: int) -> Array:
  """[B, H, W, C] with zeros at the bottom and the right up to multiples."""
  down, right = -x.shape[1] % multiple, -x.shape[2] % multiple
  return jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0))) if down or right else x


def swin(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  patch: Side = 4,
  width: Width = 96,
  depths: Sizes = (),
  heads: Sizes = (),
  window: Side = 7,
  mlp_ratio: Positive = 4.0,
  activation: Activation = "gelu",
  eps: Epsilon = 1e-5,
  drop_path: Dropout = 0.0,
) -> SwinTransformer:
  """Swin transformer (reads batch["image"]): attention within windows of a map that is halved from
  stage to stage.

  patch: height and width of a patch in pixels.
  width: channels of the first stage, doubled by each further one; 0 = the model's width.
  depths: blocks of each stage; () = (2, 2, 6, 2), as Swin-T has.
  heads: attention heads of each stage; () = channels / 32.
  window: height and width of a window in patches; a stage whose map is smaller has one window of
  its size.
  mlp_ratio: hidden units of a block, as a multiple of its channels.
  activation, eps: of the blocks.
  drop_path: probability that the last block is skipped in training, a row at a time; earlier blocks
  less.
  """
  depths, heads = stages_of(width, depths, heads)
  image = data["image"]
  config = SwinConfig(
    width,
    depths,
    heads,
    window,
    mlp_ratio,
    activation,
    eps,
    drop_path,
    jnp.dtype(precision["compute"]),
  )
  return SwinTransformer(config, patch, image["size"], tuple(image["mean"]), tuple(image["std"]))


def stages_of(
  width: int, depths: tuple[int, ...], heads: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(blocks, heads) of each stage, () filled in. Raises UserError: heads that do not divide the
  channels.
  """
  depths = tuple(depths) or (2, 2, 6, 2)
  heads = tuple(heads) or tuple(max(1, width * 2**stage // 32) for stage in range(len(depths)))
  if len(heads) != len(depths):
    raise UserError(
      f"heads {heads} must have one entry for each of the {len(depths)} stages of depths {depths}"
    )
  for stage, count in enumerate(heads):
    if count < 1 or width * 2**stage % count:
      raise UserError(
        f"stage {stage} has {width * 2**stage} channels, which {count} heads do not divide. "
        "Change `heads` or `width`"
      )
  return depths, heads
