"""The multimodal language model: a decoder-only transformer over text in which pictures, sounds,
clips and series stand as tokens of their own.

A batch has batch["sequence"], arrays [B, L]: `tokens` int32; where there are media, `media_index`
(which of the row's slots, -1 = text) and `media_offset` (which of the medium's tokens); optional
`positions` ([B, L] or [B, L, axes]), `segment_ids` (examples that share a row; 0 = padding),
`trunks` (the segment that several others see as what they go on from; 0 = none), `loss_mask` and
`prefix` ([B], tokens that all see). batch["media"] has {modality: arrays [B, K, ...] of K slots};
slots are counted through the modalities in the order of the model's encoders.
With `media_weight` float32 [B, L, 4] a place is the sum of four tokens so weighted, `media_offset`
[B, L, 4], counted from the first of the slot on through the slots after it.
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
from mmjax.models.attention import AttentionMask
from mmjax.models.block import Activation, BlockConfig, Kernel, Remat, with_block
from mmjax.models.layers import constrain, normal, with_axes
from mmjax.models.lora import TokenTable
from mmjax.models.parts import adopt, unbound
from mmjax.models.positions import Rotary
from mmjax.models.stack import Cache, Stack
from mmjax.ranges import (
  Count,
  Depth,
  Dropout,
  Epsilon,
  Heads,
  NonNegative,
  Positive,
  TokenId,
  TokenIds,
  Width,
)
from mmjax.special_tokens import Special

Array = jax.Array
Batch = Mapping[str, Any]


class LanguageModel(nn.Module):
  """Tokens to hidden states that predict the next ones with an output table.

  Parameters: embedding [V, D], position [length, D] (learned ones), layers/..., norm, output [V, D]
  unless `tied`, and each modality's encoder and MODALITY_connector.
  embedding_factor: of the token embeddings (Gemma: sqrt(D)). logit_cap: logits become cap *
  tanh(logits / cap); 0 = none. places: tokens that a medium of each modality takes in a row.
  both_ways: tokens that see each other both ways: "none"; those of a "media" slot; those of the
  "prompt", which are all before the first target of an example, whatever the blocks' windows say.
  end_ids: tokens besides eos_id that end generated texts. media_ids: the token that stands for a
  medium of each modality in prompts of other programs. clips: the encoder of pictures reads them
  too. int8_cache: texts are written with keys and values in int8.
  """

  encoders: Mapping[str, nn.Module]
  connectors: Mapping[str, nn.Module]
  config: BlockConfig
  vocab_size: int
  length: int
  eos_id: int
  pad_id: int
  places: Mapping[str, int]
  learned_positions: bool = False
  tied: bool = True
  embedding_factor: float = 1.0
  logit_cap: float = 0.0
  both_ways: str = "none"
  end_ids: tuple[int, ...] = ()
  media_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
  clips: bool = False
  int8_cache: bool = False

  shared_methods = ("table",)  # methods whose result does not depend on examples
  joint = False  # there is no shared space
  token_tables = ("embedding", "output")  # that low-rank factors may adapt
  # The names of METHODS that it answers.
  methods = (
    "table",
    "next_tokens",
    "target_scores",
    "prefill",
    "init_cache",
    "extend",
    "decode_step",
  )

  def setup(self) -> None:
    adopt(self, self.encoders)
    for modality, connector in self.connectors.items():
      setattr(self, f"{modality}_connector", unbound(connector))
    c = self.config

    def table(name: str, rows: int, axis: str, scale: float) -> Array:
      init = with_axes(normal(scale), (axis, "embed"))
      return self.param(name, init, (rows, c.width), jnp.float32)

    def tokens(name: str) -> TokenTable:
      return TokenTable.of(self, name, table(name, self.vocab_size, "vocab", 0.02))

    self.embedding = tokens("embedding")
    if self.learned_positions:
      self.position = table("position", self.length, "position", 0.01)
    if not self.tied:
      self.output = tokens("output")
    self.stack = Stack(c, dropout="dropout")
    nn.share_scope(self, self.stack)  # its parameters are ours: layers/...
    self.norm = c.make_norm()
    self.dropout = nn.Dropout(c.dropout)

  def __call__(self, batch: Batch, *, train: bool = False) -> Array:
    """hidden [B, L, D] of `next_tokens`; uses every part, so that `init` makes all parameters."""
    return self.next_tokens(batch, train=train)[0]

  # -- Training ------------------------------------------------------------------------------------

  def next_tokens(self, batch: Batch, *, train: bool = False) -> tuple[Array, Array, float]:
    """(hidden [B, L, D], table float32 [V, D], cap): hidden[:, l] predicts token l + 1 of
    batch["sequence"] by logits hidden table^T, capped where `cap` is not 0.
    """
    s = batch["sequence"]
    blocks = self._blocks(s, prompts_of(s) if self.both_ways == "prompt" else None)
    segments = dict(segments=s.get("segment_ids"), trunks=s.get("trunks"))
    mask = AttentionMask(prefix=s.get("prefix"), **segments, **blocks)
    x, added = self.embed(batch, train=train)
    x = self.stack(x, mask, positions=s.get("positions"), added=added, train=train)
    return self.norm(x), self.table(), self.logit_cap

  def _blocks(self, s: Batch, prompts: Array | None) -> dict[str, Any]:
    """The parts of a mask that open blocks of tokens; prompts: int32 [B, L], the numbers of those
    that are prompts.
    """
    if self.both_ways == "prompt":
      return dict(blocks=prompts, wide_blocks=True)
    if self.both_ways == "media" and "media_index" in s:
      return dict(blocks=s["media_index"] + 1)
    return {}

  def embed(self, batch: Batch, *, train: bool = False) -> tuple[Array, Array | None]:
    """([B, L, D]: embeddings of the tokens, and what the connectors make of the media in the places
    that are theirs; what the first blocks add of the media, [blocks, B, L, D], None = nothing).
    """
    c, s, added = self.config, batch["sequence"], None
    x = self.embedding.rows(s["tokens"]).astype(c.dtype)
    if self.embedding_factor != 1:
      x = x * jnp.asarray(self.embedding_factor, c.dtype)
    if self.encoders and "media" in batch:
      tables, first, each = self.media(batch, train=train)
      here = (s["media_index"] >= 0)[..., None]
      x = jnp.where(here, _of_media(s, tables[0], first, each), x)
      if len(tables) > 1:
        deep = [jnp.where(here, _of_media(s, table, first, each), 0) for table in tables[1:]]
        added = jnp.stack(deep)
    if self.learned_positions:
      places = s["positions"] if "positions" in s else jnp.arange(x.shape[1])
      x = x + jnp.take(self.position, places, axis=0).astype(c.dtype)
    return constrain(self.dropout(x, deterministic=not train)), added

  def media(self, batch: Batch, *, train: bool = False) -> tuple[Array, Array, Array]:
    """(tokens [1 + T, B, S, D] of all slots of the media, for the input and T blocks; the first of
    each slot among them; how many each has), both int32 [slots].
    """
    parts, each = [], []
    readers = {modality: modality for modality in self.encoders}
    for modality, reader in (readers | (dict(video="image") if self.clips else {})).items():
      if modality not in batch["media"]:
        continue
      arrays = dict(batch["media"][modality])
      rows, slots = next(iter(arrays.values())).shape[:2]
      flat = {name: x.reshape(rows * slots, *x.shape[2:]) for name, x in arrays.items()}
      encoded = getattr(self, reader)(flat, train=train)
      taps = [encoded.taps] if encoded.taps else []
      x = getattr(self, f"{reader}_connector")(encoded.tokens, encoded.mask, *taps)
      self._check_places(modality, x.shape[-2])
      each += [x.shape[-2]] * slots
      x = x.reshape(1 + len(encoded.taps), rows, slots * x.shape[-2], -1)
      parts.append(x.astype(self.config.dtype))
    first = np.concatenate([[0], np.cumsum(each)[:-1]])
    most = max(map(len, parts))
    parts = [jnp.pad(x, ((0, most - len(x)), *[(0, 0)] * 3)) for x in parts]
    return jnp.concatenate(parts, axis=2), jnp.asarray(first, jnp.int32), jnp.asarray(each)

  def _check_places(self, modality: str, tokens: int) -> None:
    wanted = self.places.get(modality, tokens)
    fewer = tokens < wanted and getattr(self.encoders[modality], "any_length", False)
    if wanted != tokens and not fewer:
      raise UserError(
        f"data.sequence.{modality} is {wanted}, but model.connectors.{modality} gives {tokens} "
        f"tokens. Set data.sequence.{modality}={tokens}, or change the connector"
      )

  def table(self) -> Array:
    """float32 [V, D]: the output table."""
    return self._output_table().whole()

  def _output_table(self) -> TokenTable:
    return self.embedding if self.tied else self.output

  def logits(self, hidden: Array) -> Array:
    """float32 [..., V] of a few hidden states [..., D]."""
    logits = self._output_table().logits(hidden)
    return self.logit_cap * jnp.tanh(logits / self.logit_cap) if self.logit_cap else logits

  def target_scores(self, batch: Batch) -> Array:
    """float32 [B, 3]: of each row the loss of its targets in nats, how many are the likeliest
    token, and how many there are; one row's logits at a time.
    """
    hidden, _, _ = self.next_tokens(batch)
    s = batch["sequence"]
    counts = s["loss_mask"][:, 1:] & (s["segment_ids"][:, 1:] == s["segment_ids"][:, :-1])

    def of_row(inputs: tuple[Array, Array, Array]) -> Array:
      row, target, counts = inputs
      logits = self.logits(row)
      chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
      loss = jax.nn.logsumexp(logits, axis=-1) - chosen
      correct = logits.argmax(-1) == target
      return jnp.stack(
        [jnp.where(counts, x, 0).sum() for x in (loss, correct, jnp.ones_like(loss))]
      )

    return jax.lax.map(of_row, (hidden[:, :-1], s["tokens"][:, 1:], counts))

  # -- Generation ----------------------------------------------------------------------------------

  def prefill(self, batch: Batch, *, length: int) -> tuple[Array, tuple[Cache, Array]]:
    """The prompts of batch["sequence"], read at once: (logits float32 [B, V] of the token after
    each, a cache for `length` tokens). `sequence.length` int32 [B]: the tokens of each.

    The cache: keys and values, and how far positions are ahead of places, int32 [1, B].
    """
    rows = batch["sequence"]["tokens"].shape[0]
    if self.learned_positions and length > self.length:
      raise UserError(
        f"a text of {length} tokens is asked of a model of {self.length} positions. Ask for fewer"
      )
    return self.extend(batch, 0, self.init_cache(rows, length))

  def init_cache(self, rows: int, length: int) -> tuple[Cache, Array]:
    """What `extend` begins with: nothing, and room for `length` tokens of each row."""
    return self.stack.init_cache(rows, length, self.int8_cache), jnp.zeros((1, rows), jnp.int32)

  def extend(
    self, batch: Batch, places: Array | int, state: tuple[Cache, Array]
  ) -> tuple[Array, tuple[Cache, Array]]:
    """As `prefill`, of prompts that go on from the first `places` tokens, int32 [B], of what
    `state` holds; what it held after these is forgotten. `sequence.length`: of the tokens given.
    """
    s, (cache, ahead) = batch["sequence"], state
    positions = s.get("positions")
    if positions is None and not isinstance(places, int):
      positions = (places + ahead[0])[:, None] + jnp.arange(s["tokens"].shape[1])
      if self.learned_positions:  # of the padding
        positions = jnp.minimum(positions, self.length - 1)
      batch = {**batch, "sequence": {**s, "positions": positions}}
    prompts = (jnp.arange(s["tokens"].shape[1]) < s["length"][:, None]).astype(jnp.int32)
    x, added = self.embed(batch)
    x, cache = self.stack.extend(
      x,
      places,
      cache,
      positions=positions,
      prefix=s.get("prefix"),
      added=added,
      **self._blocks(s, prompts),
    )
    last = s["length"] - 1
    hidden = self.norm(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0]
    if positions is not None:
      flat = positions if positions.ndim == 2 else positions.max(-1)
      ahead = (jnp.take_along_axis(flat, last[:, None], axis=1)[:, 0] - places - last)[None]
    return self.logits(hidden), (cache, ahead)

  def decode_step(
    self, token: Array, places: Array, state: tuple[Cache, Array], constants: None = None
  ) -> tuple[Array, tuple[Cache, Array]]:
    """token int32 [B], each at its place of the cache, int32 [B] -> (logits float32 [B, V] of the
    token after it, the cache with it).
    """
    cache, ahead = state
    positions = (places + ahead[0])[:, None]
    x, _ = self.embed({"sequence": {"tokens": token[:, None], "positions": positions}})
    x, cache = self.stack.extend(x, places, cache, positions=positions)
    return self.logits(self.norm(x)[:, 0]), (cache, ahead)


def _of_media(s: Batch, table: Array, first: Array, each: Array) -> Array:
  """[B, L, D]: the tokens of media in the places that are theirs; table, first, each: of
  `LanguageModel.media`.
  """
  index, offset = s["media_index"], s["media_offset"]
  if "media_weight" not in s:
    place = first[index] + jnp.minimum(offset, each[index] - 1)
    return jnp.take_along_axis(table, jnp.maximum(place, 0)[..., None], axis=1)
  total = jnp.zeros((*index.shape, table.shape[-1]), jnp.float32)
  for i in range(offset.shape[-1]):
    one = jnp.take_along_axis(table, (first[index] + offset[..., i])[..., None], axis=1)
    total = total + one * s["media_weight"][..., i, None]
  return total.astype(table.dtype)


def prompts_of(s: Batch) -> Array:
  """int32 [B, L]: the number of the example (1 in a row without segments) at its tokens before the
  first target, 0 elsewhere. Without a `loss_mask` all are.
  """
  segments = s.get("segment_ids", jnp.ones_like(s["tokens"]))
  if "loss_mask" not in s:
    return segments
  targets = s["loss_mask"].astype(jnp.int32)
  begins = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  so_far = jnp.cumsum(targets, axis=1)
  before = jax.lax.cummax(jnp.where(begins, so_far - targets, 0), axis=1)
  return jnp.where(so_far == before, segments, 0)


@with_block
def language_model(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 512,
  depth: Depth = 6,
  heads: Heads = 0,
  mlp: Width = 0,
  connectors: dict = {},  # noqa: B006
  positions: Literal["rotary", "learned", "none"] = "rotary",
  theta: Positive = 10_000.0,
  norm_kind: Literal["rms", "layer"] = "rms",
  activation: Activation = "swiglu",
  bias: bool = False,
  tied: bool = True,
  embedding_factor: NonNegative = 1.0,
  logit_cap: NonNegative = 0.0,
  both_ways: Literal["none", "media", "prompt"] = "none",
  max_positions: Count = 0,
  eos_id: Annotated[TokenId, Special(("eos",), needed=("eos",))] = -1,
  pad_id: Annotated[TokenId, Special(("pad",), needed=("pad",), warns=False)] = -1,
  end_ids: TokenIds = (),
  media_ids: dict = {},  # noqa: B006
  eps: Epsilon = 1e-6,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> LanguageModel:
  """A decoder-only language model over text and the media of its encoders (LLaVA, Liu et al. 2023,
  arXiv:2304.08485; Llama's block, Touvron et al. 2023, arXiv:2302.13971, unless told otherwise).

  width: channels. depth: blocks. heads: attention heads; 0 = width / 64. mlp: hidden units of a
  block; 0 = 4 * width.
  connectors: one for each encoder, such as image=dict(kind="mlp").
  positions: rotary, learned (data.sequence.length of them, or max_positions), or none.
  max_positions: rows of the table of learned positions; 0 = data.sequence.length.
  theta: of rotary positions. norm_kind: RMS or layer norm. activation, bias, eps, dropout: of the
  blocks.
  tied: one table of tokens for input and output. embedding_factor: of the token embeddings.
  logit_cap: logits become cap * tanh(logits / cap); 0 = none.
  both_ways: tokens that see each other both ways: none, those of a medium (media; Gemma 3), or
  those of a prompt, which are all before the first target (prompt; PaliGemma).
  eos_id, pad_id: what ends texts, and fills them up; -1 = the tokenizer's. end_ids: other tokens
  that end generated texts, such as the end of a turn. media_ids: the token that stands for a medium
  in prompts of other programs, such as dict(image=32000).
  kernel: of attention. remat: what is kept for the backward pass, from everything (none) to
  the inputs of blocks (full); the rest is computed again. scan_unroll: blocks a loop trip.
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
    norm_kind=norm_kind,
    rotary=Rotary(theta) if positions == "rotary" else None,
  )
  if set(connectors) != set(encoders):
    raise UserError(
      f"model.connectors has {', '.join(connectors) or 'none'}, but model.encoders has "
      f"{', '.join(encoders) or 'none'}: each encoder needs one, such as image=dict(kind='mlp')"
    )
  vocabulary, length = data["text"]["vocab_size"], data["sequence"]["length"]
  special = dict(eos_id=(eos_id,), pad_id=(pad_id,), end_ids=end_ids)
  for name, tokens in dict(special, media_ids=tuple(media_ids.values())).items():
    for token in tokens:
      if not 0 <= token < vocabulary:
        raise UserError(
          f"model.{name} has {token}, but data.text.vocab_size is {vocabulary}: name a token below "
          "it"
        )
  if positions == "learned" and 0 < max_positions < length:
    raise UserError(
      f"model.max_positions is {max_positions}, but data.sequence.length is {length}. Make it at "
      "least that, or 0"
    )
  return LanguageModel(
    dict(encoders),
    dict(connectors),
    config,
    vocab_size=vocabulary,
    length=max_positions or length,
    eos_id=eos_id,
    pad_id=pad_id,
    places={modality: data["sequence"][modality] for modality in encoders},
    learned_positions=positions == "learned",
    tied=tied,
    embedding_factor=embedding_factor,
    logit_cap=logit_cap,
    both_ways=both_ways,
    end_ids=tuple(end_ids),
    media_ids=dict(media_ids),
    clips=data["video"]["group"] > 0,
  )
