"""The text decoder: a causal transformer that may attend to a memory in every block; whole texts or
one token at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmjax.config import UserError
from mmjax.keys import Special
from mmjax.models.attention import attend
from mmjax.models.encoders.text import enough_positions
from mmjax.models.layers import Dense, LayerNorm, Mlp, affine, constrain, normal, with_axes, xavier
from mmjax.models.platform import platform
from mmjax.models.transformer import REMAT, Activation, Kernel, Remat, TransformerConfig
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, TokenId, TokenIds, Width

Array = jax.Array
Cache = dict[str, Array]  # {"key", "value"}: [layers, B, T, H, K], the tokens read so far


class Memory(NamedTuple):
  """What every step attends to, computed once: key, value [layers, B, S, H, K]; mask bool [1, B,
  S]. Rows stand on axis 1.
  """

  key: Array
  value: Array
  mask: Array


def shift_right(tokens: Array, prompt: tuple[int, ...]) -> Array:
  """The decoder's input for teacher forcing: int32 [..., L] -> [*prompt, tokens[0], ..., tokens[L -
  2]] of P + L - 1 tokens, where output P - 1 + l predicts token l.

  The texts of a batch should not start with <bos> themselves (data.text.bos False): the decoder
  would learn to repeat it.
  """
  start = jnp.broadcast_to(jnp.asarray(prompt, tokens.dtype), (*tokens.shape[:-1], len(prompt)))
  return jnp.concatenate([start, tokens[..., :-1]], axis=-1)


class Projections(nn.Module):
  """Query, key and value of attention, kernel [D, 3, H, K] and bias [3, H, K] as in `Attention`,
  any of them alone.

  Call: x [B, L, D], parts (0 = query, 1 = key, 2 = value; neighbours) -> a list of [B, L, H, K].
  """

  width: int
  heads: int
  dtype: jnp.dtype
  use_bias: bool

  @nn.compact
  def __call__(self, x: Array, parts: tuple[int, ...]) -> list[Array]:
    shape = (3, self.heads, self.width // self.heads)
    kernel = self.param(
      "kernel",
      with_axes(xavier(self.width, self.width), ("embed", "qkv", "heads", "kv")),
      (self.width, *shape),
      jnp.float32,
    )
    bias = (
      self.param(
        "bias", with_axes(nn.initializers.zeros, ("qkv", "heads", "kv")), shape, jnp.float32
      )
      if self.use_bias
      else None
    )
    chosen = slice(parts[0], parts[-1] + 1)
    y = affine(
      x.astype(self.dtype),
      kernel[:, chosen].astype(self.dtype),
      None if bias is None else bias[chosen].astype(self.dtype),
      1,
      ("qkv", "heads", "kv"),
    )
    split = jax.lax.split(y, (1,) * len(parts), axis=y.ndim - 3)
    return [part[..., 0, :, :] for part in split]


class DecoderAttention(nn.Module):
  """Attention whose keys may come from elsewhere. Parameters as in `Attention`: qkv, out."""

  config: TransformerConfig

  def setup(self) -> None:
    c = self.config
    self.qkv = Projections(c.width, c.heads, c.dtype, c.bias)
    self.out = Dense(
      (c.width,), ("heads", "kv", "embed"), c.dtype, xavier(c.width, c.width), c.bias
    )

  def __call__(self, x: Array, mask: Array | None) -> Array:
    """Causal self-attention: x [B, L, D], mask bool [B, L] -> [B, L, D]."""
    query, key, value = self.qkv(x, (0, 1, 2))
    return self._out(attend(query, key, value, mask=mask, causal=True, kernel=self.config.kernel))

  def memory(self, memory: Array) -> tuple[Array, Array]:
    """Keys and values [B, S, H, K] of a memory [B, S, D]."""
    key, value = self.qkv(memory, (1, 2))
    return key, value

  def cross(self, x: Array, key: Array, value: Array, mask: Array) -> Array:
    """x [B, L, D] to keys and values [B, S, H, K], mask bool [B, S] -> [B, L, D]; zeros for rows
    without a key.
    """
    (query,) = self.qkv(x, (0,))
    out = self._out(attend(query, key, value, mask=mask, kernel=self.config.kernel))
    return jnp.where(mask.any(-1)[:, None, None], out, 0)

  def step(self, x: Array, key: Array, value: Array, index: Array) -> tuple[Array, Array, Array]:
    """x [B, 1, D] at position `index`, cached keys and values [B, T, H, K] -> ([B, 1, D], keys and
    values with x's).
    """
    query, new_key, new_value = self.qkv(x, (0, 1, 2))
    key = jax.lax.dynamic_update_slice_in_dim(key, new_key.astype(key.dtype), index, axis=1)
    value = jax.lax.dynamic_update_slice_in_dim(value, new_value.astype(value.dtype), index, axis=1)
    seen = jnp.broadcast_to(jnp.arange(key.shape[1]) <= index, (x.shape[0], key.shape[1]))
    return self._out(attend(query, key, value, mask=seen, kernel="xla")), key, value

  def _out(self, x: Array) -> Array:
    return self.out(constrain(x, ("batch", "length", "heads", "kv")))


class DecoderBlock(nn.Module):
  """Self-attention, attention to the memory, MLP, each normalised before and added (Vaswani et al.
  2017, figure 1; pre-norm).
  """

  config: TransformerConfig
  cross: bool

  def setup(self) -> None:
    c = self.config
    self.attention_norm, self.attention = LayerNorm(c.eps, c.dtype), DecoderAttention(c)
    if self.cross:
      self.cross_norm, self.cross_attention = LayerNorm(c.eps, c.dtype), DecoderAttention(c)
    self.mlp_norm, self.mlp = LayerNorm(c.eps, c.dtype), Mlp(c.mlp, c.activation, c.dtype, c.bias)
    self.dropout = nn.Dropout(c.dropout)

  def __call__(
    self,
    x: Array,
    mask: Array | None,
    memory: Array | None,
    memory_mask: Array | None,
    train: bool = False,
  ) -> Array:
    """x [B, L, D], mask bool [B, L], memory [B, S, D], memory_mask bool [B, S] -> [B, L, D]."""
    drop = lambda x: self.dropout(x, deterministic=not train)
    x = checkpoint_name(constrain(x), "block")
    x = x + drop(checkpoint_name(self.attention(self.attention_norm(x), mask), "attention"))
    if memory is not None:
      key, value = self.cross_attention.memory(memory)
      x = x + drop(
        checkpoint_name(
          self.cross_attention.cross(self.cross_norm(x), key, value, memory_mask), "attention"
        )
      )
    return constrain(x + drop(self.mlp(self.mlp_norm(x))))

  def memory(self, memory: Array) -> tuple[Array, Array]:
    return self.cross_attention.memory(memory)

  def step(
    self, x: Array, index: Array, cache: Cache, memory: Memory | None
  ) -> tuple[Array, Cache]:
    """One token [B, 1, D]; cache and memory of this layer alone (memory.mask [B, S])."""
    out, key, value = self.attention.step(
      self.attention_norm(x), cache["key"], cache["value"], index
    )
    x = x + out
    if memory is not None:
      x = x + self.cross_attention.cross(self.cross_norm(x), *memory)
    return x + self.mlp(self.mlp_norm(x)), {"key": key, "value": value}


class Decoder(nn.Module):
  """Tokens to hidden states that predict the next ones with the table of the embeddings: logits =
  hidden table()^T.

  Parameters: embedding [V, D], position [length, D] (learned ones), layers/... stacked with a
  leading axis "layers", norm, memory_projection where the memory is not D wide. With `cross` False,
  or without a memory, a language model: the parts that attend to the memory add nothing then, as
  for rows whose memory has no real key.
  """

  config: TransformerConfig
  vocab_size: int
  length: int
  prompt: tuple[int, ...]
  eos_id: int
  pad_id: int
  positions: Literal["learned", "sinusoidal"] = "learned"
  cross: bool = True
  memory_positions: bool = False
  project_memory: bool = True
  suppress: tuple[int, ...] = ()
  suppress_first: tuple[int, ...] = ()
  languages: tuple[int, ...] = ()
  time_tokens: int = -1
  first_time: int = -1

  def setup(self) -> None:
    c = self.config
    self.embedding = self.param(
      "embedding",
      with_axes(normal(0.02), ("vocab", "embed")),
      (self.vocab_size, c.width),
      jnp.float32,
    )
    if self.positions == "learned":
      self.position = self.param(
        "position",
        with_axes(normal(0.01), ("position", "embed")),
        (self.length, c.width),
        jnp.float32,
      )
    else:
      self.position = jnp.asarray(sinusoids(self.length, c.width))
    self.layers = self.param("layers", self._init_layers)
    self.norm = LayerNorm(c.eps, c.dtype)
    self.memory_projection = Dense((c.width,), ("embed", "embed_out"), c.dtype)
    self.dropout = nn.Dropout(c.dropout)

  def __call__(
    self,
    tokens: Array,
    mask: Array | None = None,
    memory: Array | None = None,
    memory_mask: Array | None = None,
    *,
    train: bool = False,
  ) -> Array:
    """tokens int32 [B, L], mask bool [B, L] (True = real), memory [B, S, M], memory_mask bool [B,
    S] -> hidden [B, L, D].

    hidden[:, l] depends on tokens[:, :l + 1]. For teacher forcing pass `shift_right(tokens)`.
    Randomness: stream "dropout".
    """
    c, block = self.config, self._block()
    if tokens.shape[1] > self.length:
      raise UserError(
        f"text of {tokens.shape[1]} tokens for a decoder of data.text.length {self.length}. Cut "
        "it, or change the length"
      )
    memory, memory_mask = self._memory(memory, memory_mask)
    x = jnp.take(self.embedding, tokens, axis=0) + self.position[: tokens.shape[1]]
    x = constrain(self.dropout(x.astype(c.dtype), deterministic=not train))
    keys = jax.random.split(self.make_rng("dropout"), c.depth) if train and c.dropout else None

    def run(x: Array, layer: tuple[Any, Array | None]) -> Array:
      params, key = layer
      return block.apply(
        {"params": params},
        x,
        mask,
        memory,
        memory_mask,
        train,
        rngs=None if key is None else {"dropout": key},
      )

    unroll = self._unroll()
    if c.remat != "none":
      run = jax.checkpoint(run, policy=REMAT[c.remat], prevent_cse=unroll > 1)
    return self.norm(
      jax.lax.scan(lambda x, layer: (run(x, layer), None), x, (self.layers, keys), unroll=unroll)[0]
    )

  def table(self) -> Array:
    """float32 [V, D]: the embeddings, which are the output table too."""
    return self.embedding

  def logits(self, hidden: Array) -> Array:
    """float32 [..., V] of a few hidden states [..., D]; for training see
    objectives/cross_entropy.py.
    """
    return jnp.einsum(
      "...d,vd->...v",
      hidden,
      self.embedding.astype(hidden.dtype),
      precision="highest",
      preferred_element_type=jnp.float32,
    )

  def init_cache(self, rows: int, length: int) -> Cache:
    """An empty cache for `rows` texts of up to `length` tokens."""
    c = self.config
    if length > self.length:
      raise UserError(
        f"a text of {length} tokens is asked of a decoder of data.text.length {self.length}. Ask "
        "for fewer"
      )
    empty = jnp.zeros((c.depth, rows, length, c.heads, c.width // c.heads), c.dtype)
    return {"key": empty, "value": empty}

  def init_memory(self, memory: Array | None, memory_mask: Array | None = None) -> Memory | None:
    """What `decode_step` needs of memory [B, S, M], memory_mask bool [B, S]: once a generation."""
    memory, memory_mask = self._memory(memory, memory_mask)
    if memory is None:
      return None
    body = lambda _, params: (
      None,
      self._block().apply({"params": params}, memory, method="memory"),
    )
    key, value = jax.lax.scan(body, None, self.layers)[1]
    return Memory(key, value, memory_mask[None])

  def decode_step(
    self, token: Array, index: Array, cache: Cache, memory: Memory | None = None
  ) -> tuple[Array, Cache]:
    """token int32 [B] at position `index` (int32 scalar) -> (hidden [B, D], which predicts the
    token after it, cache).
    """
    x = jnp.take(self.embedding, token, axis=0) + jax.lax.dynamic_index_in_dim(
      self.position, index, keepdims=False
    )

    def run(x: Array, layer: tuple) -> tuple[Array, Cache]:
      params, cache, stored = layer
      seen = None if stored is None else Memory(*stored, memory.mask[0])
      return self._block().apply({"params": params}, x, index, cache, seen, method="step")

    stored = None if memory is None else (memory.key, memory.value)
    x, cache = jax.lax.scan(run, x[:, None].astype(self.config.dtype), (self.layers, cache, stored))
    return self.norm(x)[:, 0], cache

  def step_logits(
    self, token: Array, index: Array, cache: Cache, memory: Memory | None = None
  ) -> tuple[Array, Cache]:
    """`decode_step` with logits float32 [B, V] in place of the hidden state: the step that
    `generation.generate` takes.
    Tokens of `suppress` are at -1e30, and those of `suppress_first` right after the prompt."""
    hidden, cache = self.decode_step(token, index, cache, memory)
    logits = self.logits(hidden)
    never = lambda tokens: logits.at[:, np.asarray(tokens, np.int32)].set(-1e30)
    if self.suppress:
      logits = never(self.suppress)
    if self.suppress_first:
      logits = jnp.where(index == len(self.prompt) - 1, never(self.suppress_first), logits)
    return logits, cache

  def detect_language(self, cache: Cache, memory: Memory | None = None) -> Array:
    """int32 [B]: the likeliest token of `languages` right after the prompt's first token (Radford
    et al. 2022, section 2.3).
    """
    start = jnp.full(cache["key"].shape[1], self.prompt[0], jnp.int32)
    choices = jnp.asarray(self.languages, jnp.int32)
    return choices[
      jnp.argmax(
        self.logits(self.decode_step(start, jnp.int32(0), cache, memory)[0])[:, choices], axis=-1
      )
    ]

  def _memory(self, memory: Array | None, mask: Array | None) -> tuple[Array | None, Array | None]:
    if memory is None or not self.cross:
      return None, None
    if memory.shape[-1] != self.config.width:
      memory = self.memory_projection(memory)
    return memory.astype(self.config.dtype), jnp.ones(
      memory.shape[:2], bool
    ) if mask is None else mask

  def _init_layers(self, key: Array) -> Any:
    x = jnp.zeros((1, 1, self.config.width), self.config.dtype)
    seen = jnp.ones((1, 1), bool)
    plain = DecoderBlock(
      dataclasses.replace(self.config, kernel="xla"), self.cross, parent=None
    )  # kernels refuse a single token
    stacked = jax.vmap(lambda k: plain.init(k, x, seen, x if self.cross else None, seen)["params"])(
      jax.random.split(key, self.config.depth)
    )
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})

  def _block(self) -> DecoderBlock:
    return DecoderBlock(self.config, self.cross, parent=None)

  def _unroll(self) -> int:
    c = self.config
    return min(c.depth, c.scan_unroll or (c.depth if platform() == "cpu" and c.depth <= 12 else 1))


def sinusoids(length: int, width: int) -> np.ndarray:
  """Fixed positions float32 [length, width]: sines, then cosines (Vaswani et al. 2017, section 3.5;
  in Whisper's order).
  """
  if width % 2:
    raise UserError(f"sinusoidal positions need an even width, not {width}")
  rates = 10_000.0 ** (-np.arange(width // 2) / max(1, width // 2 - 1))
  angles = np.arange(length)[:, None] * rates
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def decoder(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  depth: Depth = 6,
  heads: Heads = 0,
  mlp: Width = 0,
  cross: bool = True,
  positions: Literal["learned", "sinusoidal"] = "learned",
  memory_positions: bool = False,
  project_memory: bool = True,
  prompt: Annotated[TokenIds, Special(("bos",), needed=("bos",), warns=False)] = (),
  eos_id: Annotated[TokenId, Special(("eos",), needed=("eos",))] = -1,
  pad_id: Annotated[TokenId, Special(("pad",), needed=("pad",), warns=False)] = -1,
  suppress: TokenIds = (),
  suppress_first: TokenIds = (),
  languages: TokenIds = (),
  activation: Activation = "gelu_tanh",
  bias: bool = True,
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  max_positions: Count = 0,
  time_tokens: TokenId = -1,
  first_time: TokenId = -1,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> Decoder:
  """Causal text transformer that attends to a memory in every block (pre-norm, one table for input
  and output).

  width: channels; 0 = the model's width.
  depth: blocks.
  heads: attention heads; 0 = width / 64.
  mlp: hidden units of a block; 0 = 4 * width.
  cross: blocks attend to a memory; False = a language model.
  positions: learned (data.text.length of them, and more for a longer prompt) or sinusoidal.
  memory_positions: learned vectors are added to what the decoder attends to, by the place of each
  token in its source.
  project_memory: a linear layer of its own for each source; False: sources of the decoder's width
  are taken as they are.
  prompt: tokens that every text follows, without being part of it; () = the tokenizer's <bos>.
  eos_id, pad_id: what ends texts, and fills them up; -1 = the tokenizer's.
  suppress, suppress_first: tokens that are never written, or not as the first of a text.
  languages: tokens of which the likeliest, by row, stands in the second place of the prompt when a
  text is written; () = the prompt's.
  activation, bias, eps, dropout: of the blocks.
  max_positions: places for tokens, the prompt's among them; 0 = as many as the prompt and
  data.text.length need.
  time_tokens: the first of the tokens that stand for times in a sound, one a token of the encoder,
  as Whisper has them; the token before it, at the end of the prompt, says that a text has none; -1
  = there are no such tokens.
  first_time: the latest of these times that a text may begin with, counted from 0; -1 = any.
  kernel: attention kernel. remat: what backward passes keep (transformer.py REMAT). scan_unroll:
  blocks a loop trip.
  """
  config = TransformerConfig(
    width=width,
    depth=depth,
    heads=heads or max(1, width // 64),
    mlp=mlp or 4 * width,
    activation=activation,
    causal=True,
    bias=bias,
    eps=eps,
    dropout=dropout,
    dtype=jnp.dtype(precision["compute"]),
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  prompt, vocab_size = tuple(prompt), data["text"]["vocab_size"]
  if not prompt:
    raise UserError("prompt is empty: name the token that texts start from")
  for token in (*prompt, eos_id, pad_id, *suppress, *suppress_first, *languages):
    if not 0 <= token < vocab_size:
      raise UserError(
        f"prompt, eos_id, pad_id, suppress, suppress_first or languages has token {token}, but "
        f"data.text.vocab_size is {vocab_size}"
      )
  if time_tokens >= vocab_size or time_tokens == 0:
    raise UserError(
      f"time_tokens is {time_tokens}, but must be from 1 to below data.text.vocab_size "
      f"{vocab_size}, or -1"
    )
  if languages and len(prompt) < 2:
    raise UserError(
      f"languages takes the second place of the prompt, which is {prompt}. Give the prompt one of "
      "them there"
    )
  needed = data["text"]["length"] + len(prompt) - 1
  return Decoder(
    config,
    vocab_size=vocab_size,
    length=enough_positions(max_positions, needed) or needed,
    positions=positions,
    cross=cross,
    memory_positions=memory_positions,
    project_memory=project_memory,
    prompt=prompt,
    eos_id=eos_id,
    pad_id=pad_id,
    suppress=tuple(suppress),
    suppress_first=tuple(suppress_first),
    languages=tuple(languages),
    time_tokens=time_tokens,
    first_time=first_time,
  )
