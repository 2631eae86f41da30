"""Which kernel computes attention, and on which device's share of the arrays.

Every kernel computes softmax(scale * query key^T + masks) value with the softmax in float32, and
gives exactly zero output and zero gradient for a query that no key is open to. Where the mesh
splits sequences, ring attention does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmjax.config import UserError
from mmjax.models.attention.flash import flash, splash
from mmjax.models.attention.fused import LONGEST, TILE, fits, fused_attention
from mmjax.models.attention.mask import AttentionMask
from mmjax.models.attention.plain import plain, sdpa
from mmjax.models.attention.ring import Ring, ring_attention
from mmjax.models.platform import platform
from mmjax.parallel.rules import devices_along, partition_spec

Array = jax.Array
Shaped = Array | jax.ShapeDtypeStruct

KERNELS = ("auto", "xla", "sdpa", "fused", "flash", "splash", "cudnn")
PLATFORMS = {
  "xla": ("cpu", "tpu", "gpu"),
  "sdpa": ("cpu", "tpu", "gpu"),
  "fused": ("tpu",),
  "flash": ("tpu",),
  "splash": ("tpu",),
  "cudnn": ("gpu",),
}
# What a kernel cannot have; "xla" takes everything.
LACKS = {
  "sdpa": ("bias", "soft_cap"),
  "fused": ("bias", "offset", "pairs"),
  "flash": ("bias", "soft_cap"),
  "splash": ("bias", "prefix", "blocks", "trunks", "offset", "pairs"),
  "cudnn": ("bias", "soft_cap"),
}
IN_WORDS = dict(
  bias="bias of relative positions",
  soft_cap="soft cap",
  prefix="prefix",
  blocks="blocks that see each other both ways",
  trunks="segments that several others see",
  offset="offset of the queries",
  pairs="mask of pairs [B, L, S]",
)
LONG = 1024  # keys from which a blockwise kernel is chosen over writing the logits out
MANY = LONG**2 // 2  # pairs of query and key, likewise


def attend(
  query: Array,
  key: Array,
  value: Array,
  mask: AttentionMask = AttentionMask(),
  *,
  kernel: str = "auto",
  scale: float | None = None,
  soft_cap: float = 0.0,
  bias: Array | None = None,
) -> Array:
  """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

  query [B, L, H, K], key and value [B, S, G, K] -> [B, L, H, K] in the dtype of `value`. H is a
  multiple of G: query head h reads key head h // (H / G) (Ainslie et al. 2023, arXiv:2305.13245).
  scale: default 1 / sqrt(K). soft_cap: logits become cap * tanh(logits / cap); 0 = none.
  bias: float32 [H, L, S], added to the scaled logits; "auto" is then the plain formula.
  kernel: "auto" picks by platform, shape and mask; a named one that this platform, shape or mask
  cannot have raises UserError.
  Where the logical axis "length" is split over n devices, ring attention takes the kernel's place
  (ring.py); lengths L or S that n does not divide are gathered as far as the kernel needs them.
  """
  scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
  heads, groups = query.shape[2], key.shape[2]
  if heads % groups:
    raise UserError(f"{heads} query heads are no multiple of {groups} key heads")
  kernel = choose(kernel, query, key, mask, soft_cap=soft_cap, bias=bias)
  if bias is not None:
    return plain(query, key, value, mask, scale=scale, soft_cap=soft_cap, bias=bias)
  spec = _partition_spec(query.shape, ("batch", "length", "heads", "kv"))
  if spec is not None and groups % devices_along(spec[2]):
    key, value = (jnp.repeat(x, heads // groups, axis=2) for x in (key, value))
  if (
    spec is not None
    and (devices := devices_along(spec[1])) > 1
    and key.shape[1] % devices == 0
    and mask.offset is None
  ):
    return ring_attention(query, key, value, mask, Ring(spec, devices, scale, soft_cap))
  if kernel == "fused":
    b, length, _, channels = query.shape
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    packed = jnp.stack([query, key, value], axis=2).reshape(b * length, 3, heads, channels)
    return packed_attention(packed, None, mask, length, scale=scale, soft_cap=soft_cap).reshape(
      query.shape
    )
  run = functools.partial(_RUN[kernel], scale=scale, soft_cap=soft_cap)
  if kernel in ("flash", "splash", "cudnn"):
    return per_shard(run, query, key, value, mask)
  return run(query, key, value, mask)


def fuses(kernel: str, query: Shaped, mask: AttentionMask) -> bool:
  """Whether a sequence, query [B, L, H, K], attends to itself by the kernel "fused", which takes
  its projections in one array.
  """
  split = nn.logical_to_mesh_axes(("length",))
  if split is not None and devices_along(split[0]) > 1:
    return False
  if kernel == "auto":
    fitting = _fits_fused(query, query) and not _lacking("fused", mask, 0.0, None)
    return platform() == "tpu" and fitting
  return choose(kernel, query, query, mask) == "fused"


def choose(
  kernel: str,
  query: Shaped,
  key: Shaped,
  mask: AttentionMask,
  *,
  soft_cap: float = 0.0,
  bias: Array | None = None,
) -> str:
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
    if lacking := _lacking(kernel, mask, soft_cap, bias):
      raise UserError(f"attention kernel {kernel!r} takes no {lacking}. Use 'auto'")
    if kernel == "cudnn" and not _fits_cudnn(query, key):
      raise UserError(
        "attention kernel 'cudnn' needs bfloat16, heads of at most 128 channels in multiples of "
        "8, and even lengths. Use 'auto'"
      )
    if kernel == "fused" and not _fits_fused(query, key):
      raise UserError(
        f"attention kernel 'fused' takes a sequence to itself, of at most {LONGEST} tokens in "
        f"multiples of {TILE} (fewer where a chip's vector memory is small). Use 'auto'"
      )
    return kernel
  if key.shape[1] < LONG and query.shape[1] * key.shape[1] < MANY:
    return "xla"
  can = functools.partial(_lacking, mask=mask, soft_cap=soft_cap, bias=bias)
  if where == "tpu" and not can("splash"):
    plain_heads = query.shape[2] == key.shape[2]
    return "flash" if plain_heads and not mask.window and not soft_cap else "splash"
  if where == "gpu" and _fits_cudnn(query, key) and not can("cudnn"):
    return "cudnn"
  return "xla"


def _lacking(kernel: str, mask: AttentionMask, soft_cap: float, bias: Array | None) -> str:
  """The first thing asked for that a kernel cannot have, in words; "" = it has all."""
  asked = dict(
    bias=bias is not None,
    soft_cap=bool(soft_cap),
    prefix=mask.prefix is not None,
    blocks=mask.blocks is not None,
    trunks=mask.trunks is not None,
    offset=mask.offset is not None,
    pairs=mask.pairs is not None,
  )
  return next((IN_WORDS[name] for name in LACKS.get(kernel, ()) if asked[name]), "")


def _fits_fused(query: Shaped, key: Shaped) -> bool:
  b, length, heads, channels = query.shape
  return (
    (b, length) == key.shape[:2]
    and not length % TILE
    and fits(length, heads, channels, query.dtype.itemsize)
  )


def _fits_cudnn(query: Shaped, key: Shaped) -> bool:
  return (
    query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= 128
    and query.shape[1] % 2 == 0
    and key.shape[1] % 2 == 0
  )


_RUN: dict[str, Callable[..., Array]] = {
  "xla": plain,
  "sdpa": sdpa,
  "flash": flash,
  "splash": splash,
  "cudnn": functools.partial(sdpa, implementation="cudnn"),
}


def packed_attention(
  qkv: Array,
  bias: Array | None,
  mask: AttentionMask,
  length: int,
  *,
  scale: float,
  soft_cap: float = 0.0,
) -> Array:
  """`fused_attention` of [B * L, 3, H, K] on each device's share of the batch and the heads: [B *
  L, H, K]. bias: [3, H, K].
  """
  rows, _, heads, channels = qkv.shape

  def run(qkv: Array, bias: Array | None, mask: AttentionMask) -> Array:
    def flat(x):
      return x if x.ndim < 3 else x.reshape(*x.shape[: x.ndim - 3], -1)

    out = fused_attention(
      flat(qkv),
      bias if bias is None else flat(bias),
      mask,
      channels=channels,
      length=length,
      scale=scale,
      soft_cap=soft_cap,
    )
    return out if qkv.ndim == 2 else out.reshape(out.shape[0], -1, channels)

  batch, split = _partition_spec((rows // length, heads), ("batch", "heads")) or (None, None)
  if split is None:
    # all of it as matrices: the compiler may not choose another layout for [B * L, 3, H, K] where
    # devices meet
    qkv, bias = qkv.reshape(rows, -1), bias if bias is None else bias.reshape(-1)
    out = _per_device(run, (qkv, P(batch)), (bias, P()), (mask, P(batch)), out=P(batch))
    return out.reshape(rows, heads, channels)
  return _per_device(
    run, (qkv, P(batch, None, split)), (bias, P(None, split)), (mask, P(batch)), out=P(batch, split)
  )


def per_shard(
  run: Callable[..., Array], query: Array, key: Array, value: Array, mask: AttentionMask
) -> Array:
  """Runs a kernel that XLA cannot partition on each device's share of the batch and the heads."""
  spec = _partition_spec(query.shape, ("batch", None, "heads", "kv")) or P(None)
  return _per_device(run, (query, spec), (key, spec), (value, spec), (mask, P(spec[0])), out=spec)


def _per_device(run: Callable[..., Array], *operands: tuple[Any, P], out: P) -> Array:
  """`run` on the shares of its operands (arrays, masks or None) that a device holds, given with
  their layout; without a mesh, on the whole arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  arguments, specs = zip(*operands, strict=True)
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return run(*arguments)
  specs = tuple(
    jax.tree.map(lambda _, spec=spec: spec, x) for x, spec in zip(arguments, specs, strict=True)
  )
  return jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)(*arguments)


def _partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...]) -> P | None:
  """Which mesh axes split the dimensions of these logical names, as the rules in force say; None
  where nothing does.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else partition_spec(shape, names)
