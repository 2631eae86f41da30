"""The text decoder: a causal transformer that may attend to a memory in every block; whole texts,
or a prompt and one token after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.encoders.text import enough_positions
from mmjax.models.layers import Dense, constrain, normal, with_axes
from mmjax.models.positions import sinusoids
from mmjax.models.stack import Cache, Memory, Stack
from mmjax.ranges import Count, Depth, Dropout, Epsilon, Heads, TokenId, TokenIds, Width
from mmjax.special_tokens import Special

Array = jax.Array


def shift_right(tokens: Array, prompt: tuple[int, ...]) -> Array:
  """The decoder's input for teacher forcing: int32 [..., L] -> [*prompt, tokens[0], ..., tokens[L -
  2]] of P + L - 1 tokens, where output P - 1 + l predicts token l.

  The texts of a batch should not start with <bos> themselves (data.text.bos False): the decoder
  would learn to repeat it.
  """
  start = jnp.broadcast_to(jnp.asarray(prompt, tokens.dtype), (*tokens.shape[:-1], len(prompt)))
  return jnp.concatenate([start, tokens[..., :-1]], axis=-1)


class Decoder(nn.Module):
  """Tokens to hidden states that predict the next ones with the table of the embeddings: logits =
  hidden table()^T.

  Parameters: embedding [V, D], position [length, D] (learned ones), layers/... stacked with a
  leading axis "layers", norm, memory_projection where the memory is not D wide. With `cross` False,
  or without a memory, a language model: the parts that attend to the memory add nothing then, as
  for rows whose memory has no real key.
  """

  config: BlockConfig
  vocab_size: int
  length: int
  prompt: tuple[int, ...]
  eos_id: int
  pad_id: int
  positions: Literal["learned", "sinusoidal", "none"] = "learned"
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
    elif self.positions == "sinusoidal":
      self.position = jnp.asarray(sinusoids(self.length, c.width))
    else:
      self.position = jnp.zeros((self.length, 1))
    self.stack = Stack(dataclasses.replace(c, causal=True), self.cross, "cross_norm", "dropout")
    nn.share_scope(self, self.stack)  # its parameters are ours: decoder/layers
    self.norm = c.make_norm()
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
    c = self.config
    if tokens.shape[1] > self.length:
      raise UserError(
        f"text of {tokens.shape[1]} tokens for a decoder of data.text.length {self.length}. Cut "
        "it, or change the length"
      )
    memory, memory_mask = self._memory(memory, memory_mask)
    x = jnp.take(self.embedding, tokens, axis=0) + self.position[: tokens.shape[1]]
    x = constrain(self.dropout(x.astype(c.dtype), deterministic=not train))
    return self.norm(self.stack(x, mask, context=memory, context_mask=memory_mask, train=train))

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

  def init_memory(self, memory: Array | None, memory_mask: Array | None = None) -> Memory | None:
    """What `prefill` and `decode_step` need of memory [B, S, M], memory_mask bool [B, S]: once a
    generation.
    """
    memory, memory_mask = self._memory(memory, memory_mask)
    if memory is None or memory_mask is None:
      return None
    return self.stack.init_memory(memory, memory_mask)

  def prefill(
    self, tokens: Array, memory: Memory | None = None, *, length: int, lengths: Array | None = None
  ) -> tuple[Array, Cache]:
    """Prompts int32 [B, P], read at once -> (logits float32 [B, V] of the first token after each,
    a cache for `length` tokens).

    lengths: int32 [B], the tokens of each that are real; None = P. Tokens of `suppress` and
    `suppress_first` are at -1e30.
    """
    if length > self.length:
      raise UserError(
        f"a text of {length} tokens is asked of a decoder of data.text.length {self.length}. Ask "
        "for fewer"
      )
    hidden, cache = self.read(tokens, memory, length=length, lengths=lengths)
    return self._without((*self.suppress, *self.suppress_first), self.logits(hidden)), cache

  def decode_step(
    self, token: Array, places: Array, cache: Cache, memory: Memory | None = None
  ) -> tuple[Array, Cache]:
    """token int32 [B], each at its place of the cache, int32 [B] -> (logits float32 [B, V] of the
    token after it, the cache with it). Tokens of `suppress` are at -1e30.
    """
    x = jnp.take(self.embedding, token, axis=0)
    if self.positions != "none":
      x = x + jnp.take(self.position, places, axis=0)
    x, cache = self.stack.extend(x[:, None], places, cache, memory)
    return self._without(self.suppress, self.logits(self.norm(x)[:, 0])), cache

  def detect_language(self, memory: Memory) -> Array:
    """int32 [B]: the likeliest token of `languages` right after the prompt's first token (Radford
    et al. 2022, section 2.3).
    """
    rows = memory.key.shape[1]
    start = jnp.full((rows, 1), self.prompt[0], jnp.int32)
    choices = jnp.asarray(self.languages, jnp.int32)
    logits = self.logits(self.read(start, memory, length=1)[0])
    return choices[jnp.argmax(logits[:, choices], axis=-1)]

  def read(
    self, tokens: Array, memory: Memory | None = None, *, length: int, lengths: Array | None = None
  ) -> tuple[Array, Cache]:
    """As `prefill`, with the hidden state [B, D] of each prompt's last token in place of logits."""
    rows, width = tokens.shape
    x = jnp.take(self.embedding, tokens, axis=0) + self.position[:width]
    x, cache = self.stack.extend(x, 0, self.stack.init_cache(rows, length), memory)
    last = jnp.full(rows, width - 1) if lengths is None else lengths - 1
    return self.norm(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0], cache

  @staticmethod
  def _without(tokens: tuple[int, ...], logits: Array) -> Array:
    return logits.at[:, np.asarray(tokens, np.int32)].set(-1e30) if tokens else logits

  def _memory(self, memory: Array | None, mask: Array | None) -> tuple[Array | None, Array | None]:
    if memory is None or not self.cross:
      return None, None
    if memory.shape[-1] != self.config.width:
      memory = self.memory_projection(memory)
    return memory.astype(self.config.dtype), jnp.ones(
      memory.shape[:2], bool
    ) if mask is None else mask


@with_block
def decoder(
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  depth: Depth = 6,
  heads: Heads = 0,
  mlp: Width = 0,
  cross: bool = True,
  positions: Literal["learned", "sinusoidal", "none"] = "learned",
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
  positions: learned (data.text.length of them, and more for a longer prompt), sinusoidal, or none,
  where `block` has rotary ones.
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
  kernel: attention kernel. remat: what is kept for the backward
  pass, from everything (none) to the inputs of blocks (full); the rest is computed again.
  scan_unroll: blocks a loop trip.
  """
  config = BlockConfig(
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
