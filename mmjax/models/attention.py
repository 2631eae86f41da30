"""Attention: one function, several kernels, one result.

Every kernel computes softmax(scale * query key^T + masks) value with the softmax in float32, and
gives exactly zero output and zero gradient for a query that no key is open to. Where the mesh
splits sequences, ring attention does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmjax.config import UserError
from mmjax.models.cpu import einsum
from mmjax.models.fused_attention import LONGEST, TILE, fits, fused_attention
from mmjax.models.layers import Dense, constrain, with_axes, xavier
from mmjax.models.platform import platform
from mmjax.models.ring_attention import Ring, ring_attention
from mmjax.parallel.rules import devices_along, places

Array = jax.Array

KERNELS = ("auto", "xla", "sdpa", "fused", "flash", "splash", "cudnn")
PLATFORMS = {
  "xla": ("cpu", "tpu", "gpu"),
  "sdpa": ("cpu", "tpu", "gpu"),
  "fused": ("tpu",),
  "flash": ("tpu",),
  "splash": ("tpu",),
  "cudnn": ("gpu",),
}
LONG = 1024  # keys from which a blockwise kernel is chosen over writing the logits out
MANY = LONG**2 // 2  # pairs of query and key, likewise


def attend(
  query: Array,
  key: Array,
  value: Array,
  *,
  mask: Array | None = None,
  causal: bool = False,
  kernel: str = "auto",
  scale: float | None = None,
  bias: Array | None = None,
) -> Array:
  """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

  query [B, L, H, K], key and value [B, S, H, K] -> [B, L, H, K] in the dtype of `value`. mask: bool
  [B, S] or [B, L, S], True = may be seen. `causal` lets query i see keys up to i (counted from the
  start). scale: default 1 / sqrt(K).
  bias: float32 [H, L, S], added to the scaled logits; only kernel "xla" takes one, and "auto" then
  is that.
  kernel: "auto" picks by platform and shape; a named one that this platform or mask cannot have
  raises UserError.
  Where the logical axis "length" is split over n devices, ring attention takes the kernel's place
  (ring_attention.py);
  lengths L or S that n does not divide are gathered as far as the kernel needs them.
  """
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  if bias is not None:
    if kernel not in ("auto", "xla"):
      raise UserError(
        f"attention kernel {kernel!r} takes no bias of relative positions. Use 'auto'"
      )
    return _xla(query, key, value, mask, causal=causal, scale=scale, bias=bias)
  kernel = choose(kernel, query, key, mask)
  spec = _places(query.shape, ("batch", "length", "heads", "kv"))
  if spec is not None and (devices := devices_along(spec[1])) > 1 and key.shape[1] % devices == 0:
    return ring_attention(query, key, value, mask, Ring(spec, devices, causal, scale))
  if kernel == "fused":
    b, length, heads, channels = query.shape
    packed = jnp.stack([query, key, value], axis=2).reshape(b * length, 3, heads, channels)
    return _fused(packed, None, mask, length, causal=causal, scale=scale).reshape(query.shape)
  run = _RUN[kernel]
  if kernel in ("flash", "splash", "cudnn"):
    return _per_shard(functools.partial(run, causal=causal, scale=scale), query, key, value, mask)
  return run(query, key, value, mask, causal=causal, scale=scale)


def fuses(kernel: str, query: Array, mask: Array | None) -> bool:
  """Whether a sequence, query [B, L, H, K], attends to itself by the kernel "fused", which takes
  its projections in one array.
  """
  if devices_along(nn.logical_to_mesh_axes(("length",))[0]) > 1:
    return False
  if kernel == "auto":
    return platform() == "tpu" and _fits_fused(query, query, mask)
  return choose(kernel, query, query, mask) == "fused"


def choose(kernel: str, query: Array, key: Array, mask: Array | None) -> str:
  """The kernel that `attend` runs. Raises UserError for a named one that cannot run here."""
  if kernel not in KERNELS:
    raise UserError(f"attention kernel {kernel!r} is unknown; there are: {', '.join(KERNELS)}")
  where = platform()
  if kernel != "auto":
    if where not in PLATFORMS[kernel]:
      raise UserError(
        f"attention kernel {kernel!r} runs on {' and '.join(PLATFORMS[kernel])}, not on {where}. "
        "Use 'auto'"
      )
    if kernel == "cudnn" and not _fits_cudnn(query, key):
      raise UserError(
        "attention kernel 'cudnn' needs bfloat16, heads of at most 128 channels in multiples of "
        "8, and even lengths. Use 'auto'"
      )
    if kernel == "fused" and not _fits_fused(query, key, mask):
      raise UserError(
        f"attention kernel 'fused' takes a sequence to itself, of at most {LONGEST} tokens in "
        f"multiples of {TILE} (fewer where a chip's vector memory is small), without a mask of "
        "pairs [B, L, S]. Use 'auto'"
      )
    if kernel == "splash" and mask is not None and mask.ndim == 3:
      raise UserError(
        "attention kernel 'splash' takes masks of keys [B, S], not of pairs [B, L, S]. Use "
        "'flash' or 'auto'"
      )
    return kernel
  many = key.shape[1] >= LONG or query.shape[1] * key.shape[1] >= MANY
  if where == "tpu" and many and (mask is None or mask.ndim == 2):
    return "flash"
  if where == "gpu" and _fits_cudnn(query, key) and many:
    return "cudnn"
  return "xla"


def _fits_fused(query: Array, key: Array, mask: Array | None) -> bool:
  _, length, heads, channels = query.shape
  return (
    query.shape == key.shape
    and not length % TILE
    and (mask is None or mask.ndim == 2)
    and fits(length, heads, channels, query.dtype.itemsize)
  )


def _fits_cudnn(query: Array, key: Array) -> bool:
  return (
    query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= 128
    and query.shape[1] % 2 == 0
    and key.shape[1] % 2 == 0
  )


def _open(mask: Array | None, causal: bool, length: int, keys: int) -> Array | None:
  """Which keys each query may see: bool, broadcastable to [B, L, S]; None = all."""
  out = mask[:, None, :] if mask is not None and mask.ndim == 2 else mask
  if causal:
    triangle = jnp.tril(jnp.ones((1, length, keys), bool))
    out = triangle if out is None else out & triangle
  return out


def _blind_to_empty(seen: Array) -> tuple[Array, Array]:
  """(`seen` [B, L, S] with rows that see nothing opened wide so that they stay finite, which rows
  see something [B, L]).
  """
  some = seen.any(-1)
  return seen | ~some[..., None], some


def _xla(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  *,
  causal: bool,
  scale: float,
  bias: Array | None = None,
) -> Array:
  """The plain formula, on [B, H, L, K]: small products of contiguous matrices are what CPUs are
  quickest at.
  """
  q, k, v = (x.swapaxes(1, 2) for x in (query * jnp.asarray(scale, query.dtype), key, value))
  logits = einsum("bhld,bhsd->bhls", q, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + bias
  seen = _open(mask, causal, query.shape[1], key.shape[1])
  if seen is not None:
    seen, some = _blind_to_empty(seen)
    logits = jnp.where(seen[:, None], logits, -1e30)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  out = einsum("bhls,bhsd->bhld", weights, v).swapaxes(1, 2)
  return out if mask is None else jnp.where(some[:, :, None, None], out, 0)


def _sdpa(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  *,
  causal: bool,
  scale: float,
  implementation: str = "xla",
) -> Array:
  """`jax.nn.dot_product_attention`, which alone would give the mean of the values to a row without
  keys.
  """
  if mask is None:
    return jax.nn.dot_product_attention(
      query, key, value, is_causal=causal, scale=scale, implementation=implementation
    )
  seen, some = _blind_to_empty(
    jnp.broadcast_to(
      _open(mask, causal, query.shape[1], key.shape[1]),
      (query.shape[0], query.shape[1], key.shape[1]),
    )
  )
  out = jax.nn.dot_product_attention(
    query, key, value, mask=seen[:, None], scale=scale, implementation=implementation
  )
  return jnp.where(some[:, :, None, None], out, 0)


def _flash(
  query: Array, key: Array, value: Array, mask: Array | None, *, causal: bool, scale: float
) -> Array:
  """Pallas flash attention for TPUs (Dao et al. 2022, arXiv:2205.14135). Sequences are padded to
  whole blocks.
  """
  from jax.experimental.pallas.ops.tpu import flash_attention as pallas

  length, keys = query.shape[1], key.shape[1]
  q, k, v = (_pad(x.swapaxes(1, 2), 2) for x in (query, key, value))
  bias = segments = some = None
  if mask is not None and mask.ndim == 3:
    seen, some = _blind_to_empty(_open(mask, causal, length, keys))
    bias = _pad(_pad(jnp.where(seen, 0.0, -1e30).astype(jnp.float32), 1), 2, -1e30)
    bias = jnp.broadcast_to(bias[:, None], (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    causal = False
  elif mask is not None or k.shape[2] != keys:
    segments, some = _segments(mask, causal, q, k, length, keys)
    segments = pallas.SegmentIds(*segments)
  block_q, block_k = (math.gcd(x.shape[2], 512) for x in (q, k))
  sizes = pallas.BlockSizes(
    block_q=block_q,
    block_k_major=block_k,
    block_k=block_k,
    block_b=1,
    block_q_major_dkv=block_q,
    block_k_major_dkv=block_k,
    block_k_dkv=block_k,
    block_q_dkv=block_q,
    block_k_major_dq=block_k,
    block_k_dq=block_k,
    block_q_dq=block_q,
  )
  out = pallas.flash_attention(
    q, k, v, ab=bias, segment_ids=segments, causal=causal, sm_scale=scale, block_sizes=sizes
  )
  out = out[:, :, :length].swapaxes(1, 2)
  return out if some is None else jnp.where(some[:, :, None, None], out, 0)


def _splash(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  *,
  causal: bool,
  scale: float,
  interpret: bool = False,
) -> Array:
  """Pallas splash attention for TPUs: as flash, with blocks that a causal mask closes left out."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length, keys, heads = query.shape[1], key.shape[1], query.shape[2]
  q, k, v = (
    _pad(x.swapaxes(1, 2), 2) for x in (query * jnp.asarray(scale, query.dtype), key, value)
  )
  shape = (q.shape[2], k.shape[2])
  static = masks.MultiHeadMask(
    [masks.CausalMask(shape) if causal else masks.FullMask(shape)] * heads
  )
  segments = some = None
  if mask is not None or k.shape[2] != keys:
    segments, some = _segments(mask, causal, q, k, length, keys)
    segments = pallas.SegmentIds(*segments)
  block_q, block_k = (math.gcd(n, 512) for n in shape)
  sizes = pallas.BlockSizes(
    block_q=block_q,
    block_kv=block_k,
    block_kv_compute=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    block_kv_dkv_compute=block_k,
    block_q_dq=block_q,
    block_kv_dq=block_k,
  )
  run = pallas.make_splash_mha(
    mask=static, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
  )
  out = jax.vmap(run, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
  out = out[:, :, :length].swapaxes(1, 2)
  return out if some is None else jnp.where(some[:, :, None, None], out, 0)


def _segments(mask: Array | None, causal: bool, q: Array, k: Array, length: int, keys: int):
  """((query ids [B, L'], key ids [B, S']), which rows see a key [B, L] or None): equal ids may
  meet.

  Queries that see no key are given the id of the padding, so that they meet something finite and
  are then zeroed.
  """
  batch = q.shape[0]
  if mask is None:
    real, some = jnp.ones((batch, keys), bool), None
    open_ = jnp.ones((batch, length), bool)
  else:
    real = mask
    some = _open(mask, causal, length, keys).any(-1)
    open_ = some = jnp.broadcast_to(some, (batch, length))
  key_ids = _pad(real.astype(jnp.int32), 1)
  query_ids = _pad(open_.astype(jnp.int32), 1)
  return (query_ids, key_ids), some


def _pad(x: Array, axis: int, value: float = 0, multiple: int = 128) -> Array:
  """`x` filled up with `value` along `axis` to a multiple of a TPU's lanes."""
  amount = -x.shape[axis] % multiple
  widths = [(0, amount if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if amount else x


_RUN: dict[str, Callable[..., Array]] = {
  "xla": _xla,
  "sdpa": _sdpa,
  "flash": _flash,
  "splash": _splash,
  "cudnn": functools.partial(_sdpa, implementation="cudnn"),
}


def _fused(
  qkv: Array, bias: Array | None, mask: Array | None, length: int, *, causal: bool, scale: float
) -> Array:
  """`fused_attention` of [B * L, 3, H, K] on each device's share of the batch and the heads: [B *
  L, H, K]. bias: [3, H, K].
  """
  rows, _, heads, channels = qkv.shape

  def run(qkv: Array, bias: Array | None, mask: Array | None) -> Array:
    flat = lambda x: x if x.ndim < 3 else x.reshape(*x.shape[: x.ndim - 3], -1)
    out = fused_attention(
      flat(qkv),
      bias if bias is None else flat(bias),
      mask,
      channels=channels,
      length=length,
      causal=causal,
      scale=scale,
    )
    return out if qkv.ndim == 2 else out.reshape(out.shape[0], -1, channels)

  batch, split = _places((rows // length, heads), ("batch", "heads")) or (None, None)
  if split is None:
    # all of it as matrices: the compiler may not choose another layout for [B * L, 3, H, K] where
    # devices meet
    qkv, bias = qkv.reshape(rows, -1), bias if bias is None else bias.reshape(-1)
    out = _per_device(run, (qkv, P(batch)), (bias, P()), (mask, P(batch)), out=P(batch))
    return out.reshape(rows, heads, channels)
  return _per_device(
    run, (qkv, P(batch, None, split)), (bias, P(None, split)), (mask, P(batch)), out=P(batch, split)
  )


def _per_shard(
  run: Callable[..., Array], query: Array, key: Array, value: Array, mask: Array | None
) -> Array:
  """Runs a kernel that XLA cannot partition on each device's share of the batch and the heads."""
  spec = _places(query.shape, ("batch", None, "heads", "kv")) or P(None)
  return _per_device(run, (query, spec), (key, spec), (value, spec), (mask, P(spec[0])), out=spec)


def _per_device(run: Callable[..., Array], *operands: tuple[Array | None, P], out: P) -> Array:
  """`run` on the shares of its operands that a device holds, given with their layout; without a
  mesh, on the whole arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return run(*(x for x, _ in operands))
  there = [x is not None for x, _ in operands]

  def body(*shares: Array) -> Array:
    shares = iter(shares)
    return run(*(next(shares) if given else None for given in there))

  given = [(x, spec) for x, spec in operands if x is not None]
  return jax.shard_map(
    body, in_specs=tuple(spec for _, spec in given), out_specs=out, check_vma=False
  )(*(x for x, _ in given))


def _places(shape: tuple[int, ...], names: tuple[str | None, ...]) -> P | None:
  """Which mesh axes split the dimensions of these logical names, as the rules in force say; None
  where nothing does.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else places(shape, names)


class Attention(nn.Module):
  """Multi-head attention with its projections. Call: x [B, L, D], context [B, S, D] or None (x
  itself) -> [B, L, D].

  One parameter holds the three input projections: qkv/kernel [D, 3, H, K]; out/kernel [H, K, D].
  mask, bias: as in `attend`.
  length: L where x is given as rows [B * L, D], and returned so, for a kernel that `fuses`.
  """

  heads: int
  dtype: jnp.dtype
  causal: bool = False
  kernel: str = "auto"
  use_bias: bool = True

  @nn.compact
  def __call__(
    self,
    x: Array,
    context: Array | None = None,
    *,
    mask: Array | None = None,
    length: int = 0,
    bias: Array | None = None,
  ) -> Array:
    width = x.shape[-1]
    shape = (3, self.heads, width // self.heads)
    projection = functools.partial(
      Dense,
      shape,
      ("embed", "qkv", "heads", "kv"),
      self.dtype,
      xavier(width, width),
      self.use_bias,
      name="qkv",
    )
    if length:
      out = _fused(
        *projection(apart=True)(x), mask, length, causal=self.causal, scale=1 / math.sqrt(shape[-1])
      )
    else:
      if context is None:
        qkv = projection()(x)
        qkv = jax.lax.split(qkv, (1, 1, 1), axis=qkv.ndim - 3)
        query, key, value = (part[..., 0, :, :] for part in qkv)
      else:
        query, key, value = CrossProjection(shape, self.dtype, self.use_bias, name="qkv")(
          x, context
        )
      out = attend(query, key, value, mask=mask, causal=self.causal, kernel=self.kernel, bias=bias)
      out = constrain(out, ("batch", "length", "heads", "kv"))
    return Dense(
      (width,),
      ("heads", "kv", "embed"),
      self.dtype,
      xavier(width, width),
      self.use_bias,
      name="out",
    )(out)


class CrossProjection(nn.Module):
  """Query from x [B, L, D], key and value from context [B, S, D], with the parameters of a
  self-attention's `qkv`.
  """

  shape: tuple[int, int, int]
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array, context: Array) -> tuple[Array, Array, Array]:
    width = x.shape[-1]
    kernel = self.param(
      "kernel",
      with_axes(xavier(width, width), ("embed", "qkv", "heads", "kv")),
      (width, *self.shape),
      jnp.float32,
    ).astype(self.dtype)
    query = jnp.einsum("bld,dhk->blhk", x, kernel[:, 0])
    both = jnp.einsum("bsd,dnhk->bsnhk", context, kernel[:, 1:])
    if self.use_bias:
      bias = self.param(
        "bias", with_axes(nn.initializers.zeros, ("qkv", "heads", "kv")), self.shape, jnp.float32
      )
      query, both = query + bias[0].astype(self.dtype), both + bias[1:].astype(self.dtype)
    return query, both[:, :, 0], both[:, :, 1]
