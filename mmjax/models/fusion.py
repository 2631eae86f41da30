"""Fusions: several modalities' encodings into one.

A fusion is a module called with {modality: Encoded} (any of its modalities, widths may differ) that
returns one Encoded.
A modality adds nothing to rows where its mask is all False; a row without any modality gives zeros
and no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.block import BlockConfig, Kernel, Remat, with_block
from mmjax.models.cross import CrossTransformer
from mmjax.models.layers import Dense, Encoded, activate, normal, with_axes
from mmjax.models.pooling import keep_rows
from mmjax.models.stack import Stack
from mmjax.ranges import Count, Depth, Dropout, Heads, Size, Width

Array = jax.Array
Parts = dict[str, Encoded]


class Fusion(nn.Module):
  """What all fusions share: each modality's tokens and pooled vector go through one linear layer to
  `config.width`, then `join`.

  Call: {modality: Encoded} -> Encoded(tokens [B, L, D], mask bool [B, L], pooled [B, D]),
  modalities in the order of `modalities`.
  """

  modalities: tuple[str, ...]
  config: BlockConfig

  projects = True  # False: `join` gets what the encoders gave
  decides = False  # True: `pooled` are logits of classes

  @nn.compact
  def __call__(self, encoded: Mapping[str, Encoded], *, train: bool = False) -> Encoded:
    for modality in encoded:
      if modality not in self.modalities:
        raise UserError(
          f"the fusion has no modality {modality!r}; it has {', '.join(self.modalities)}"
        )
    parts = {
      m: self._project(m, encoded[m]) if self.projects else encoded[m]
      for m in self.modalities
      if m in encoded
    }
    out, some = self.join(parts, train), present_modalities(parts).any(-1)
    return Encoded(
      jnp.where(some[:, None, None], out.tokens, 0),
      out.mask & some[:, None],
      jnp.where(some[:, None], out.pooled, 0),
    )

  def join(self, parts: Parts, train: bool) -> Encoded:
    """The fusion itself, of at least one projected modality; rows without any are zeroed
    afterwards.
    """
    raise NotImplementedError

  def contextual_modalities(self, modalities: tuple[str, ...]) -> tuple[str, ...]:
    """Of these, whose tokens come out one for one after seeing the others', in their order along
    the output; () = none.
    """
    return ()

  def _project(self, modality: str, part: Encoded) -> Encoded:
    c = self.config
    dense = Dense((c.width,), ("joint", "embed"), c.dtype, name=f"{modality}_in")
    return Encoded(
      jnp.where(part.mask[..., None], dense(part.tokens), 0),
      part.mask,
      keep_rows(dense(part.pooled), part.mask),
    )

  def _all_pooled(self, parts: Parts) -> Array:
    """[B, modalities * D]: zeros for those that are missing."""
    nothing = jnp.zeros_like(next(iter(parts.values())).pooled)
    return jnp.concatenate(
      [parts[m].pooled if m in parts else nothing for m in self.modalities], axis=-1
    )

  def _with_modality(self, parts: Parts) -> Parts:
    """Tokens with a learned vector of their modality added."""
    table = self.param(
      "modality",
      with_axes(normal(0.02), ("modality", "embed")),
      (len(self.modalities), self.config.width),
      jnp.float32,
    )

    def add(m, part):
      return part._replace(
        tokens=part.tokens + table[self.modalities.index(m)].astype(part.tokens.dtype)
      )

    return {m: add(m, part) for m, part in parts.items()}

  def _reader(self, rows: int) -> Array:
    """A learned token [B, 1, D] that reads the result off."""
    token = self.param(
      "class", with_axes(normal(0.02), ("embed",)), (self.config.width,), jnp.float32
    )
    return jnp.broadcast_to(token.astype(self.config.dtype), (rows, 1, self.config.width))


def present_modalities(parts: Mapping[str, Encoded]) -> Array:
  """bool [B, number of modalities]: which modalities a row has."""
  return jnp.stack([part.mask.any(-1) for part in parts.values()], axis=-1)


def concatenate_tokens(parts: Mapping[str, Encoded]) -> tuple[Array, Array]:
  """All tokens [B, L, D] one after the other, and their mask [B, L]."""
  return (
    jnp.concatenate([part.tokens for part in parts.values()], axis=1),
    jnp.concatenate([part.mask for part in parts.values()], axis=1),
  )


def weigh(parts: Mapping[str, Encoded], logits: Array) -> Array:
  """Mean of the pooled vectors [B, D] float32 with weights softmax(logits [B or 1, modalities])
  over those that are there.
  """
  has = present_modalities(parts)
  shares = jnp.where(has, jax.nn.softmax(jnp.where(has, logits, -1e30), axis=-1), 0)
  return jnp.einsum(
    "bm,bmd->bd",
    shares,
    jnp.stack([p.pooled.astype(jnp.float32) for p in parts.values()], axis=1),
    precision="highest",
  )


# -- Feature level: of the pooled vectors; the tokens pass through, one modality after the other ---


class Concat(Fusion):
  """pooled = MLP of the pooled vectors side by side (Ngiam et al. 2011, "Multimodal deep
  learning").
  """

  def join(self, parts: Parts, train: bool) -> Encoded:
    c = self.config
    x = Dense((c.mlp,), ("joint", "mlp"), c.dtype, name="up")(self._all_pooled(parts))
    x = nn.Dropout(c.dropout, deterministic=not train)(activate(c.activation, x))
    return Encoded(
      *concatenate_tokens(parts), Dense((c.width,), ("mlp", "embed"), c.dtype, name="down")(x)
    )


class WeightedSum(Fusion):
  """pooled = sum_m a_m pooled_m, a = softmax of learned weights over the modalities that a row
  has.
  """

  def join(self, parts: Parts, train: bool) -> Encoded:
    weights = self.param(
      "weights",
      with_axes(nn.initializers.zeros, ("modality",)),
      (len(self.modalities),),
      jnp.float32,
    )
    logits = jnp.stack([weights[self.modalities.index(m)] for m in parts])
    return Encoded(*concatenate_tokens(parts), weigh(parts, logits[None]))


class Average(Fusion):
  """pooled = mean of the projected pooled vectors of the modalities that a row has."""

  def join(self, parts: Parts, train: bool) -> Encoded:
    return Encoded(*concatenate_tokens(parts), weigh(parts, jnp.zeros((1, len(parts)))))


class Gated(Fusion):
  """Gated multimodal units (Arevalo et al. 2017, arXiv:1702.01992, section 3.1): h_m = tanh(W_m
  x_m), z_m = sigmoid(V_m [x_1, ..., x_M]) by channel, pooled = sum of z_m * h_m over the modalities
  that a row has."""

  def join(self, parts: Parts, train: bool) -> Encoded:
    c, gated, everything = self.config, [], self._all_pooled(parts)
    for modality, part in parts.items():
      value = jnp.tanh(
        Dense((c.width,), ("joint", "embed"), c.dtype, name=f"{modality}_value")(part.pooled)
      )
      gate = jax.nn.sigmoid(
        Dense((c.width,), ("joint", "embed"), c.dtype, name=f"{modality}_gate")(everything)
      )
      gated.append(keep_rows(gate * value, part.mask))
    return Encoded(*concatenate_tokens(parts), functools.reduce(jnp.add, gated))


# -- Deep: tokens see tokens -----------------------------------------------------------------------


class MergedAttention(Fusion):
  """One transformer over the tokens of all modalities and a learned token that is the result (Dou
  et al. 2022, METER, arXiv:2111.02387, section 3.2, "merged attention"; FLAVA,
  arXiv:2112.04482)."""

  def contextual_modalities(self, modalities: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(m for m in self.modalities if m in modalities)

  def join(self, parts: Parts, train: bool) -> Encoded:
    c = self.config
    tokens, mask = concatenate_tokens(self._with_modality(parts))
    x = jnp.concatenate([tokens, self._reader(tokens.shape[0])], axis=1)
    stack = Stack(c)
    nn.share_scope(self, stack)  # its parameters are ours: fusion/layers
    x = stack(x, jnp.concatenate([mask, mask.any(-1, keepdims=True)], axis=1), train=train)
    x = c.make_norm("norm")(x)
    return Encoded(x[:, :-1], mask, x[:, -1])


class CrossAttention(Fusion):
  """The tokens of one modality, and a learned token that is the result, attend to themselves and to
  the tokens of the others (ALBEF, Li et al. 2021, arXiv:2107.07651, section 3.1). A row without
  that modality has the learned token alone."""

  query: str = "text"

  def contextual_modalities(self, modalities: tuple[str, ...]) -> tuple[str, ...]:
    return (self.query,) if self.query in modalities else ()

  def join(self, parts: Parts, train: bool) -> Encoded:
    parts = self._with_modality(parts)
    rows = present_modalities(parts).shape[0]
    x, some = self._reader(rows), present_modalities(parts).any(-1, keepdims=True)
    mask, others = some, {m: part for m, part in parts.items() if m != self.query}
    if self.query in parts:
      x, mask = (
        jnp.concatenate([parts[self.query].tokens, x], axis=1),
        jnp.concatenate([parts[self.query].mask, some], axis=1),
      )
    context, context_mask = (
      concatenate_tokens(others)
      if others
      else (jnp.zeros_like(x[:, :1]), jnp.zeros((rows, 1), bool))
    )
    x = CrossTransformer(self.config, name="cross")(x, mask, context, context_mask, train=train)
    return Encoded(x[:, :-1], mask[:, :-1], x[:, -1])


class Perceiver(Fusion):
  """A few learned queries attend to themselves and to the tokens of all modalities (Perceiver
  resampler, Alayrac et al. 2022, arXiv:2204.14198, section 3.1.1; Q-Former, Li et al. 2023,
  arXiv:2301.12597). tokens = the queries, pooled = their mean."""

  latents: int = 16

  def join(self, parts: Parts, train: bool) -> Encoded:
    c = self.config
    context, context_mask = concatenate_tokens(self._with_modality(parts))
    x = self.param(
      "latents",
      with_axes(normal(0.02), ("position", "embed")),
      (self.latents, c.width),
      jnp.float32,
    )
    x = jnp.broadcast_to(x.astype(c.dtype), (context.shape[0], *x.shape))
    mask = jnp.broadcast_to(context_mask.any(-1, keepdims=True), x.shape[:2])
    x = CrossTransformer(c, name="cross")(x, mask, context, context_mask, train=train)
    return Encoded(x, mask, x.astype(jnp.float32).mean(1))


# -- Late: of the modalities' decisions ------------------------------------------------------------


class Decision(Fusion):
  """Each modality classifies alone; the decisions are combined (Kittler et al. 1998, "On combining
  classifiers").

  tokens [B, modalities, classes] float32: each modality's log-probabilities (`several` labels a
  row: logits), pooled [B, classes]: the combined ones, which `Multimodal.classify` returns as its
  logits.
  combine "mean": the mean with learned weights (softmax over the modalities that a row has).
  "vote": trained as the mean with equal weights; otherwise each modality votes for its likeliest
  class (for and against each label), and the mean breaks ties.
  """

  classes: int = 0
  combine: Literal["mean", "vote"] = "mean"
  several: bool = False

  projects = False
  decides = True

  def join(self, parts: Parts, train: bool) -> Encoded:
    scores = {}
    for modality, part in parts.items():
      logits = Dense(
        (self.classes,),
        ("embed", None),
        jnp.float32,
        nn.initializers.lecun_normal(),
        name=f"{modality}_classifier",
      )(part.pooled.astype(jnp.float32))
      score = logits if self.several else jax.nn.log_softmax(logits, axis=-1)
      scores[modality] = Encoded(
        keep_rows(score, part.mask)[:, None],
        part.mask.any(-1, keepdims=True),
        keep_rows(score, part.mask),
      )
    tokens, mask = concatenate_tokens(scores)
    if self.combine == "mean":
      weights = self.param(
        "weights",
        with_axes(nn.initializers.zeros, ("modality",)),
        (len(self.modalities),),
        jnp.float32,
      )
      pooled = weigh(scores, jnp.stack([weights[self.modalities.index(m)] for m in parts])[None])
    else:
      mean = weigh(scores, jnp.zeros((1, len(parts))))
      pooled = mean if train else self._votes(tokens, mask, mean)
    return Encoded(tokens, mask, pooled)

  def _votes(self, tokens: Array, mask: Array, mean: Array) -> Array:
    """[B, classes]; a whole vote weighs more than any difference of the mean."""
    if self.several:
      return jnp.where(mask[..., None], jnp.sign(tokens), 0).sum(1) + 0.5 * jnp.tanh(mean)
    votes = jax.nn.one_hot(jnp.argmax(tokens, axis=-1), self.classes) * mask[..., None]
    share = votes.sum(1) + 0.5 * jax.nn.softmax(mean, axis=-1)
    return jnp.log(jnp.maximum(share / share.sum(-1, keepdims=True), 1e-30))


# -- Kinds: (modalities, data, precision, *, settings) -> module -----------------------------------


def _config(
  precision: Mapping[str, Any],
  width: int,
  *,
  depth: int = 1,
  heads: int = 0,
  mlp: int = 0,
  dropout: float = 0.0,
  **more: Any,
) -> BlockConfig:
  heads = heads or max(1, width // 64)
  return BlockConfig(
    width=width,
    depth=depth,
    heads=heads,
    mlp=mlp or 4 * width,
    activation="gelu_tanh",
    eps=1e-6,
    dropout=dropout,
    dtype=jnp.dtype(precision["compute"]),
    **more,
  )


def concat(
  modalities: tuple,
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  mlp: Width = 0,
  dropout: Dropout = 0.0,
) -> Concat:
  """An MLP of the pooled vectors side by side.

  width: channels; 0 = the model's. mlp: hidden units; 0 = 4 * width. dropout: of the hidden units.
  """
  return Concat(modalities, _config(precision, width, heads=1, mlp=mlp, dropout=dropout))


def weighted_sum(
  modalities: tuple, data: Mapping[str, Any], precision: Mapping[str, Any], *, width: Width = 0
) -> WeightedSum:
  """A mean of the pooled vectors with learned weights, one a modality. width: channels; 0 = the
  model's.
  """
  return WeightedSum(modalities, _config(precision, width, heads=1))


def gated(
  modalities: tuple, data: Mapping[str, Any], precision: Mapping[str, Any], *, width: Width = 0
) -> Gated:
  """A sum of the pooled vectors with gates computed from all of them, example by example. width:
  channels; 0 = the model's.
  """
  return Gated(modalities, _config(precision, width, heads=1))


def average(
  modalities: tuple, data: Mapping[str, Any], precision: Mapping[str, Any], *, width: Width = 0
) -> Average:
  """The mean of the projected pooled vectors. width: channels; 0 = the model's."""
  return Average(modalities, _config(precision, width, heads=1))


@with_block
def cross_attention(
  modalities: tuple,
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  query: str = "text",
  width: Width = 0,
  depth: Depth = 2,
  heads: Heads = 0,
  mlp: Width = 0,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> CrossAttention:
  """The tokens of one modality attend to those of the others.

  query: the modality that attends. width: channels; 0 = the model's. depth: blocks. heads: 0 =
  width / 64. mlp: hidden units of a block; 0 = 4 * width. dropout: of the blocks. kernel, remat,
  scan_unroll: as in the encoders.
  """
  if query not in modalities:
    raise UserError(
      f"query {query!r} is no encoder of the model; there are: {', '.join(modalities)}"
    )
  config = _config(
    precision,
    width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    dropout=dropout,
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return CrossAttention(modalities, config, query=query)


@with_block
def merged_attention(
  modalities: tuple,
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 0,
  depth: Depth = 2,
  heads: Heads = 0,
  mlp: Width = 0,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> MergedAttention:
  """One transformer over the tokens of all modalities. Settings: see `cross_attention`."""
  config = _config(
    precision,
    width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    dropout=dropout,
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return MergedAttention(modalities, config)


@with_block
def perceiver(
  modalities: tuple,
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  latents: Size = 16,
  width: Width = 0,
  depth: Depth = 2,
  heads: Heads = 0,
  mlp: Width = 0,
  dropout: Dropout = 0.0,
  kernel: Kernel = "auto",
  remat: Remat = "none",
  scan_unroll: Count = 0,
) -> Perceiver:
  """A fixed number of learned queries read the tokens of all modalities.

  latents: number of queries.

  The other settings: see `cross_attention`.
  """
  config = _config(
    precision,
    width,
    depth=depth,
    heads=heads,
    mlp=mlp,
    dropout=dropout,
    kernel=kernel,
    remat=remat,
    scan_unroll=scan_unroll,
  )
  return Perceiver(modalities, config, latents=latents)


def decision(
  modalities: tuple,
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  combine: Literal["mean", "vote"] = "mean",
) -> Decision:
  """Each modality classifies alone into data.classes; the decisions are combined.

  combine: mean (of log-probabilities, with learned weights) or vote.
  """
  classes = data.get("classes", 0)
  if classes < 1:
    raise UserError(
      "the fusion 'decision' combines classifiers, but data.classes is 0: set it to the number of "
      "classes"
    )
  return Decision(
    modalities,
    _config(precision, 1),
    classes=classes,
    combine=combine,
    several=data.get("label") == "labels",
  )
