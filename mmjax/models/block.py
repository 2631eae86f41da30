"""The block of every transformer here: attention and an MLP, each with its norm and a residual, and
attention to other tokens between them where asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmjax.config import UserError
from mmjax.models.attention import AttentionMask, attend
from mmjax.models.attention.attend import packed_attention
from mmjax.models.layers import Dense, LayerNorm, RMSNorm, activate, constrain, with_axes, xavier
from mmjax.models.positions import Rotary, rotate
from mmjax.models.products import Products
from mmjax.ranges import Fields, Heads, NonNegative, Width, Windows

Array = jax.Array
Activation = Literal[
  "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu", "geglu", "geglu_tanh"
]
GATED = ("swiglu", "geglu", "geglu_tanh")
Kernel = Literal["auto", "xla", "sdpa", "fused", "flash", "splash", "cudnn"]
Placement = Literal["pre", "post", "both"]
Remat = Literal[
  "none",
  "full",
  "dots",
  "dense",
  "dense_attention",
  "projections",
  "dots_no_batch",
  "attention",
  "offload",
  "offload_dense",
]
Turns = tuple[Array, Array]  # cosines and sines of `Rotary.angles`


class KeyValue(NamedTuple):
  """Keys and values of attention, [B, S, G, K] each; in a cache [layers, B, G, T, K], arrays or
  `Int8`.
  """

  key: Any
  value: Any


class Int8(NamedTuple):
  """Vectors of a cache in a quarter of float32's memory: codes int8 [..., K] times scale float32
  [..., 1], the largest absolute value of each / 127.
  """

  codes: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """Hyper-parameters of a block and of the stack of them; encoders fill it from their settings.

  width: channels. heads of head_size channels (0 = width / heads); key_value_heads: of keys and
  values, each for equally many query heads (0 = heads). mlp: hidden units. norm: before a part
  (pre), after its residual (post), or before and after the part (both, as Gemma 2).
  activation: of the MLP; one of GATED, or any with `gated`: its activated half multiplies another
  (Shazeer 2020, arXiv:2002.05202). bias: of all dense layers, unless qkv_bias, out_bias or mlp_bias
  say otherwise.
  qk_norm: RMS norms of each head's queries and keys. scale: of the logits; 0 = 1 /
  sqrt(head_size). soft_cap: logits become cap * tanh(logits / cap); 0 = none.
  windows: tokens that a layer sees of those before and at its own (see AttentionMask), one entry a
  layer, repeated over the depth; 0 = all. rotary: positions; local_rotary: those of layers with a
  window; None = `rotary`.
  layer_scale: a learned factor a channel of what each part adds, at the start; 0 = none
  (arXiv:2103.17239). kernel: of attention. remat: what backward passes keep (stack.py REMAT).
  scan_unroll: blocks a trip of the loop; 0 = all of a short stack on CPUs, 1 elsewhere; changes
  speed only. products: of the dense layers, forward and for their inputs' gradients, in eight bits
  or in full (products.py).
  """

  width: int
  depth: int
  heads: int
  mlp: int
  norm: Placement = "pre"
  activation: Activation = "gelu"
  causal: bool = False
  bias: bool = True
  eps: float = 1e-6
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  kernel: Kernel = "auto"
  remat: Remat = "none"
  gated: bool = False
  layer_scale: float = 0.0
  scan_unroll: int = 0
  key_value_heads: Heads = 0
  head_size: Width = 0
  norm_kind: Literal["layer", "rms"] = "layer"
  qkv_bias: bool | None = None
  out_bias: bool | None = None
  mlp_bias: bool | None = None
  qk_norm: bool = False
  scale: NonNegative = 0.0
  soft_cap: NonNegative = 0.0
  windows: Windows = ()
  rotary: Annotated[Rotary | None, Fields(Rotary)] = None
  local_rotary: Annotated[Rotary | None, Fields(Rotary)] = None
  products: Products = "full"

  def __post_init__(self):
    if not self.head_size and self.width % self.heads:
      raise UserError(
        f"width {self.width} is not divisible by {self.heads} heads. Change `heads` or `width` of "
        "the encoder"
      )
    if self.heads % self.groups:
      raise UserError(
        f"{self.heads} heads are no multiple of {self.groups} key-value heads. Change one"
      )
    if self.remat not in get_args(Remat):
      raise UserError(f"remat {self.remat!r} is unknown; there are: {', '.join(get_args(Remat))}")

  @property
  def channels(self) -> int:
    """Channels of a head."""
    return self.head_size or self.width // self.heads

  @property
  def groups(self) -> int:
    """Heads of keys and values."""
    return self.key_value_heads or self.heads

  @property
  def shares_qkv(self) -> bool:
    """Whether one parameter makes queries, keys and values."""
    return self.groups == self.heads

  @property
  def packs(self) -> bool:
    """Whether nothing happens between the one projection of queries, keys and values and their
    attention, so that a kernel can read it as it is.
    """
    return self.shares_qkv and not self.qk_norm and self.rotary is None

  def has_bias(self, part: Literal["qkv", "out", "mlp"]) -> bool:
    own = getattr(self, f"{part}_bias")
    return self.bias if own is None else own

  def make_norm(self, name: str | None = None) -> nn.Module:
    kind = LayerNorm if self.norm_kind == "layer" else RMSNorm
    return kind(self.eps, self.dtype, name=name)


def with_block(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
  """A kind whose modules have a `config` of blocks, with one setting more: `block`, a dict of any
  fields of BlockConfig that are no settings of the kind itself.
  """
  signature = inspect.signature(kind, eval_str=True)
  without = ("width", "depth", "dtype", "causal", *signature.parameters)
  setting = inspect.Parameter(
    "block",
    inspect.Parameter.KEYWORD_ONLY,
    default={},
    annotation=Annotated[dict, Fields(BlockConfig, without)],
  )

  @functools.wraps(kind)
  def make(*first: Any, block: Mapping[str, Any] = {}, **settings: Any) -> nn.Module:  # noqa: B006
    return _with_fields(kind(*first, **settings), block)

  parameters = [*signature.parameters.values(), setting]
  make.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
  make.__doc__ = f"""{inspect.getdoc(kind)}
block: other settings of the blocks, such as dict(key_value_heads=2).
"""
  return make


def _with_fields(module: nn.Module, block: Mapping[str, Any]) -> nn.Module:
  """The module with these fields in its blocks' config, and in that of the frames' encoder."""
  if not block:
    return module
  rotary = {
    name: value
    if value is None
    else Rotary(**{**value, "sections": tuple(value.get("sections", ()))})
    for name, value in block.items()
    if name in ("rotary", "local_rotary")
  }
  fields = {**block, **rotary}
  if "windows" in fields:
    fields["windows"] = tuple(fields["windows"])
  changed = dict(config=dataclasses.replace(module.config, **fields))
  if hasattr(getattr(module, "frame", None), "config"):
    changed["frame"] = _with_fields(module.frame, block)
  return module.clone(**changed)


class Mlp(nn.Module):
  """Two dense layers with an activation between. Call: x [..., D] -> [..., D].

  Gated: the first gives twice the hidden units, of which the activated half multiplies the other.
  """

  config: BlockConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    gated = c.gated or c.activation in GATED
    dense = functools.partial(Dense, dtype=c.dtype, use_bias=c.has_bias("mlp"), products=c.products)
    up = dense((c.mlp * (1 + gated),), ("embed", "mlp"), parts=1 + gated, label="hidden", name="up")
    h = up(x)
    if gated:
      h = activate(c.activation, h[..., : c.mlp]) * h[..., c.mlp :]
    else:
      h = activate(c.activation, h)
    return dense((x.shape[-1],), ("mlp", "embed"), name="down")(h)


class Attention(nn.Module):
  """Multi-head attention with its projections. H heads of K channels, G heads of keys and values.

  Parameters: qkv/kernel [D, 3, H, K] where G = H, otherwise query/kernel [D, H, K] and
  key_value/kernel [D, 2, G, K]; query_norm, key_norm; out/kernel [H, K, D].
  """

  config: BlockConfig

  def setup(self) -> None:
    c = self.config
    init = xavier(c.width, c.heads * c.channels)
    dense = functools.partial(
      Dense, dtype=c.dtype, kernel_init=init, use_bias=c.has_bias("qkv"), products=c.products
    )
    axes = ("embed", "qkv", "heads", "kv")
    if c.shares_qkv:
      self.qkv = dense((3, c.heads, c.channels), axes, parts=3)
    else:
      self.query = dense((c.heads, c.channels), ("embed", "heads", "kv"))
      self.key_value = dense((2, c.groups, c.channels), axes, parts=2)
    if c.qk_norm:
      self.query_norm = RMSNorm(c.eps, c.dtype, "kv")
      self.key_norm = RMSNorm(c.eps, c.dtype, "kv")
    self.out = Dense(
      (c.width,),
      ("heads", "kv", "embed"),
      c.dtype,
      xavier(c.heads * c.channels, c.width),
      c.has_bias("out"),
      input_label="attended",
      products=c.products,
    )

  def __call__(
    self,
    x: Array,
    mask: AttentionMask,
    *,
    context: Array | KeyValue | None = None,
    turns: Turns | None = None,
    cache: KeyValue | None = None,
    bias: Array | None = None,
    length: int = 0,
  ) -> Any:
    """x [B, L, D] -> [B, L, D], or (that, the cache with x's keys and values) where there is one.

    context: other tokens [B, S, D] to attend to, or what `keys_and_values` made of them; None = x
    itself. turns: angles of x's positions. cache: [B, G, T, K] each, the order in which a token
    reads them, into which x's keys and values go from mask.offset on. bias: as in `attend`.
    length: L where x is given as rows [B * L, D], and returned so, for a kernel that `fuses`.
    """
    c = self.config
    settings = dict(scale=c.scale or 1 / math.sqrt(c.channels), soft_cap=c.soft_cap)
    if length:
      qkv, qkv_bias = self.qkv(x, apart=True)
      return self.out(packed_attention(qkv, qkv_bias, mask, length, **settings))
    if context is None:
      query, key, value = self._project(x, turns)
    else:
      query = self._query(x)
      key, value = context if isinstance(context, KeyValue) else self.keys_and_values(context)
    kernel = c.kernel
    if cache is not None:
      start = 0 if mask.offset is None else mask.offset
      cache = KeyValue(update_cache(cache.key, key, start), update_cache(cache.value, value, start))
      key, value = (read_cache(x, c.dtype).swapaxes(1, 2) for x in cache)
      kernel = "xla"
    out = attend(query, key, value, mask, kernel=kernel, bias=bias, **settings)
    out = self.out(constrain(out, ("batch", "length", "heads", "kv")))
    return out if cache is None else (out, cache)

  def keys_and_values(self, context: Array) -> KeyValue:
    """Keys and values [B, S, G, K] of other tokens [B, S, D]."""
    both = self.qkv(context, slice(1, 3)) if self.config.shares_qkv else self.key_value(context)
    key, value = unstack(both)
    return KeyValue(self.key_norm(key) if self.config.qk_norm else key, value)

  def _query(self, x: Array) -> Array:
    if self.config.shares_qkv:
      (query,) = unstack(self.qkv(x, slice(0, 1)))
    else:
      query = self.query(x)
    return self.query_norm(query) if self.config.qk_norm else query

  def _project(self, x: Array, turns: Turns | None) -> tuple[Array, Array, Array]:
    """query [B, L, H, K], key and value [B, L, G, K] of x, normalised and turned."""
    if self.config.shares_qkv:
      query, key, value = unstack(self.qkv(x))
    else:
      query, (key, value) = self.query(x), unstack(self.key_value(x))
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    if turns is not None:
      query, key = rotate(query, turns), rotate(key, turns)
    return query, key, value


def unstack(x: Array) -> list[Array]:
  """[..., n, H, K] -> n arrays [..., H, K]."""
  axis = x.ndim - 3
  return [part[..., 0, :, :] for part in jax.lax.split(x, (1,) * x.shape[axis], axis=axis)]


def empty_cache(shape: tuple[int, ...], dtype: Any, int8: bool = False) -> KeyValue:
  """Keys and values of zeros."""
  empty: Any = jnp.zeros(shape, jnp.int8 if int8 else dtype)
  if int8:
    empty = Int8(empty, jnp.zeros((*shape[:-1], 1), jnp.float32))
  return KeyValue(empty, empty)


def read_cache(cached: Any, dtype: Any) -> Array:
  """The vectors of a cache, [B, G, T, K]."""
  if not isinstance(cached, Int8):
    return cached
  return (cached.codes.astype(jnp.float32) * cached.scale).astype(dtype)


def update_cache(cached: Any, new: Array, start: Array | int) -> Any:
  """cached [B, G, T, K] with new [B, L, G, K] from position `start` on, int32 scalar or [B]."""
  new = new.swapaxes(1, 2)
  if isinstance(cached, Int8):
    new = new.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(new).max(-1, keepdims=True), 1e-30) / 127
    codes = jnp.round(new / scale).astype(jnp.int8)
    return Int8(_written(cached.codes, codes, start), _written(cached.scale, scale, start))
  return _written(cached, new.astype(cached.dtype), start)


def _written(cached: Array, new: Array, start: Array | int) -> Array:
  update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
  if jnp.ndim(start):
    return jax.vmap(update)(cached, new, start)
  return jax.lax.dynamic_update_slice_in_dim(cached, new, start, axis=2)


class Block(nn.Module):
  """Attention, attention to a context where there is one, and an MLP, each with a residual
  (Vaswani et al. 2017, arXiv:1706.03762, figure 1). Call: x [B, L, D] -> [B, L, D].

  mask: whom x's tokens see of themselves, without the window, which is this block's own.
  context, context_mask bool [B, S]: tokens for a second attention, or their keys and values; a row
  without any passes it unchanged. turns, cache, bias, length: as in `Attention`; with a cache the
  result is (x, cache). context_norm: the name of the norm before that attention. dropout: the name
  by which dropout draws its numbers.
  """

  config: BlockConfig
  window: int = 0
  context_norm: str = "cross_attention_norm"
  dropout: str = "Dropout_0"

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: AttentionMask = AttentionMask(),
    *,
    context: Array | KeyValue | None = None,
    context_mask: Array | None = None,
    turns: Turns | None = None,
    cache: KeyValue | None = None,
    bias: Array | None = None,
    length: int = 0,
    train: bool = False,
  ) -> Any:
    c = self.config
    drop = nn.Dropout(c.dropout, deterministic=not train, name=self.dropout)

    def add(x: Array, part: str, norm: str, run: Callable[[Array], Array]) -> Array:
      y = run(x if c.norm == "post" else c.make_norm(norm)(x))
      if c.norm == "both":
        y = c.make_norm(f"{part}_post_norm")(y)
      if c.layer_scale:
        y = LayerScale(c.layer_scale, name=f"{part}_scale")(y)
      x = x + drop(y)
      return c.make_norm(norm)(x) if c.norm == "post" else x

    def attention(y: Array) -> Array:
      nonlocal cache
      layer_mask = dataclasses.replace(mask, window=self.window)
      out = Attention(c, name="attention")(
        y, layer_mask, turns=turns, cache=cache, bias=bias, length=length
      )
      if cache is not None:
        out, cache = out
      return checkpoint_name(out, "attention")

    def cross_attention(y: Array) -> Array:
      out = Attention(c, name="cross_attention")(
        y, AttentionMask(keys=context_mask), context=context
      )
      if context_mask is not None:
        out = jnp.where(context_mask.any(-1)[:, None, None], out, 0)
      return checkpoint_name(out, "attention")

    x = checkpoint_name(constrain(x), "block")
    x = add(x, "attention", "attention_norm", attention)
    if context is not None:
      x = add(x, "cross_attention", self.context_norm, cross_attention)
    x = constrain(add(x, "mlp", "mlp_norm", Mlp(c, name="mlp")))
    return x if cache is None else (x, cache)


class LayerScale(nn.Module):
  """A learned factor for each channel, which starts at `value` (Touvron et al. 2021,
  arXiv:2103.17239). Call: [..., D] -> [..., D].
  """

  value: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = with_axes(nn.initializers.constant(self.value), ("embed",))
    scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
    return x * scale.astype(x.dtype)
