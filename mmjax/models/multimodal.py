"""One model for every objective, composed of parts: encoders, a shared space, a fusion, heads and a
decoder.

Kinds: `fusion_encoder` (FLAVA, ALBEF), `captioner` (CoCa) and `multitask`, which has them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import heads, parts
from mmjax.models.block import KeyValue
from mmjax.models.decoder import shift_right
from mmjax.models.layers import Encoded
from mmjax.models.memory import MemoryTokens
from mmjax.models.methods import lacking
from mmjax.models.ordinal import OrdinalHead
from mmjax.models.shared_space import SharedSpace
from mmjax.models.stack import Memory, Stack
from mmjax.ranges import Count, Finite, Positive, Width

Array = jax.Array
Batch = Mapping[str, Any]
DECODING = (
  "decode",
  "decode_with_memory",
  "memory",
  "init_memory",
  "prefill",
  "decode_step",
  "detect_language",
)


class Multimodal(nn.Module):
  """Encoders, and the parts that a config adds to them; each method reads those that it needs.

  Several texts an example (text.tokens [B, K, L]) are B * K rows to every method; the other
  modalities' rows are repeated K times beside them.
  `space`: its parameters are the model's. `masked_patches`: modalities whose hidden patches are
  predicted. `shared`: encoders share one transformer (`trunk`) and own only their inputs, norms
  and poolings.
  """

  encoders: Mapping[str, nn.Module]
  space: SharedSpace | None = None
  fusion: nn.Module | None = None
  decoder: nn.Module | None = None
  classes: int = 0
  ordinal: bool = False  # the classes have an order
  values: int = 0  # numbers of a row that `regress` predicts
  matches: bool = False
  masked_text: bool = False
  masked_patches: tuple[str, ...] = ()
  shared: bool = False
  dtype: jnp.dtype = jnp.float32

  @property
  def joint(self) -> bool:
    """Whether it has a shared space."""
    return self.space is not None

  @property
  def shared_methods(self) -> tuple[str, ...]:
    """Methods whose result does not depend on examples."""
    return ("table", "temperature", "discriminate") if self.space is not None else ("table",)

  @property
  def methods(self) -> tuple[str, ...]:
    """The names of METHODS that this model answers."""
    answers = {
      ("encode",): True,
      ("table",): hasattr(self.encoders.get("text"), "table"),
      self.space.methods if self.space is not None else (): True,
      ("fuse",): self.fusion is not None,
      ("classify",): self.classes,
      ("regress",): self.values,
      ("match",): self.matches,
      ("masked_token_head", "predict_masked"): self.masked_text,
      ("patches", "reconstruct"): self.masked_patches,
      DECODING: self.decoder is not None,
    }
    return tuple(name for names, has in answers.items() if has for name in names)

  def setup(self) -> None:
    if self.shared:
      self.trunk = Stack(next(iter(self.encoders.values())).config)
    parts.adopt(self, self.encoders, **({"trunk": self.trunk} if self.shared else {}))
    if self.space is not None:
      nn.share_scope(self, self.space)
    owners = [""] if self.fusion is not None else [f"{modality}_" for modality in self.encoders]
    if self.classes and not getattr(self.fusion, "decides", False):
      classifier = OrdinalHead if self.ordinal else heads.linear
      names = [f"{owner}classifier" for owner in owners]
      self.classifiers = {name: classifier(self.classes, name=name) for name in names}
    if self.values:
      names = [f"{owner}regressor" for owner in owners]
      self.regressors = {name: heads.linear(self.values, name) for name in names}
    if self.matches:
      self.match_head = heads.linear(1, "matcher")
    if self.masked_text:
      self.token_head = heads.MaskedTokenHead(self.dtype, name="masked_text_head")
    self.patch_heads = {
      modality: heads.PatchHead(name=f"{modality}_patches") for modality in self.masked_patches
    }
    if self.decoder is not None:
      d = self.decoder
      how = d.config.width, d.project_memory, d.memory_positions, self.dtype
      self.memories = {
        modality: MemoryTokens(*how, name=f"{modality}_memory")
        for modality in self.encoders
        if modality != "text"
      }

  def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
    """{modality: embedding} (nothing without a shared space); uses every part once, so that `init`
    makes all parameters.
    """
    have = tuple(modality for modality in self.encoders if modality in batch)
    together = [have] if self.fusion is not None else [(modality,) for modality in have]
    out = {}
    if self.space is not None:
      self.space.make()
      out = {modality: self.embedding(modality, batch, train=train) for modality in have}
    else:
      for modality in have:
        self.encode(modality, batch, train=train)
    if self.masked_text:
      self.masked_token_head("text", batch, train=train)
    for modality in self.masked_patches:
      hidden = jnp.zeros(self.patches(modality, batch)[1].shape, bool)
      view = {**batch, modality: {**batch[modality], "patch_mask": hidden}}
      self.reconstruct(modality, view, train=train)
    if self.fusion is not None:
      self.fuse(have, batch, train=train)
    for modalities in together:
      if self.classes:
        self.classify(modalities, batch, train=train)
      if self.values:
        self.regress(modalities, batch, train=train)
    if self.matches:
      self.match(have, batch, train=train)
    if self.decoder is not None and "text" in batch:
      self.decode(tuple(m for m in have if m != "text"), batch, train=train)
    return out

  def encode(self, modality: str, batch: Batch, *, train: bool = False) -> Encoded:
    """tokens [B, L, D], mask [B, L], pooled [B, D] of one modality, in its encoder's width."""
    if modality == "text" and batch["text"]["tokens"].ndim == 3:
      batch = {**batch, "text": one_text_a_row(batch["text"])}
    return parts.encode(self, modality, batch, train)

  def embedding(self, modality: str, batch: Batch, *, train: bool = False) -> Array:
    """float32 [B, width] of length 1; zeros for a row where the modality is missing."""
    if self.space is None:
      raise lacking("embedding")
    return self.space.embed(modality, self.encode(modality, batch, train=train))

  def temperature(self) -> tuple[Array, Array]:
    """(scale, bias), float32 scalars: logits = scale * cosine + bias. scale = exp(log_scale), at
    most `scale_max`.
    """
    if self.space is None:
      raise lacking("temperature")
    return self.space.temperature()

  def discriminate(self, x: Array, modalities: tuple[str, ...]) -> Array:
    """float32 logits [N, modalities] that an embedding of x [N, width] is of each of these
    modalities.
    """
    if self.space is None:
      raise lacking("discriminate")
    return self.space.discriminate(x, modalities)

  def fuse(self, modalities: tuple[str, ...], batch: Batch, *, train: bool = False) -> Encoded:
    """What the fusion makes of these modalities: tokens [B, L, D] of all that it keeps, mask [B,
    L], pooled [B, D].
    """
    if self.fusion is None:
      raise lacking("fuse")
    return self.fusion(self._encoded(modalities, batch, train), train=train)

  def classify(self, modalities: tuple[str, ...], batch: Batch, *, train: bool = False) -> Array:
    """float32 logits [B, classes] from the fused modalities, or from one alone in a model without a
    fusion.

    The fusion "decision" classifies each modality itself: the logits are then its combined
    log-probabilities.
    """
    if not self.classes:
      raise lacking("classify")
    owner, pooled = self._pooled(modalities, batch, train)
    if getattr(self.fusion, "decides", False):
      return pooled.astype(jnp.float32)
    return self.classifiers[f"{owner}classifier"](pooled)

  def regress(self, modalities: tuple[str, ...], batch: Batch, *, train: bool = False) -> Array:
    """float32 [B, K]: the values of a row, standardised as the objective "regression" says, from
    the fused modalities, or from one alone in a model without a fusion.
    """
    if not self.values:
      raise lacking("regress")
    owner, pooled = self._pooled(modalities, batch, train)
    return self.regressors[f"{owner}regressor"](pooled)

  def _pooled(self, modalities: tuple[str, ...], batch: Batch, train: bool) -> tuple[str, Array]:
    """(whose head reads it, "" = the fusion's; [B, D])."""
    if self.fusion is not None:
      return "", self.fuse(modalities, batch, train=train).pooled
    if len(modalities) != 1:
      raise UserError(
        f"a head on {' + '.join(modalities)} needs a fusion: give config.model.fusion, or name one "
        "modality"
      )
    return f"{modalities[0]}_", self.encode(modalities[0], batch, train=train).pooled

  def match(self, modalities: tuple[str, ...], batch: Batch, *, train: bool = False) -> Array:
    """float32 logits [B] that the modalities of a row belong together."""
    if not self.matches:
      raise lacking("match")
    return self.match_head(self.fuse(modalities, batch, train=train).pooled)[:, 0]

  def masked_token_head(
    self, modality: str, batch: Batch, *, context: tuple[str, ...] = (), train: bool = False
  ) -> tuple[Array, Array, Array]:
    """(hidden [B, L, D], table [V, D], bias [V]): logits of a text's tokens are hidden table^T +
    bias. `context`: modalities that its tokens see through the fusion."""
    if not self.masked_text or modality != "text":
      raise lacking("masked_token_head")
    return self.token_head(self._in_context(modality, batch, context, train).tokens, self.table())

  def reconstruct(
    self, modality: str, batch: Batch, *, context: tuple[str, ...] = (), train: bool = False
  ) -> Array:
    """float32 [B, L, values]: predictions of the patches of `patches`, for a batch whose patch_mask
    hides some.
    """
    if modality not in self.masked_patches:
      raise lacking("reconstruct")
    values, _ = self.patches(modality, batch)
    tokens = self._in_context(modality, batch, context, train).tokens
    tokens = tokens[:, -values.shape[1] :]  # without a class token before them
    return self.patch_heads[modality](tokens, values.shape[-1])

  def patches(self, modality: str, batch: Batch, *, train: bool = False) -> tuple[Array, Array]:
    """(values float32 [B, L, values] that each token of a modality stands for, which are real bool
    [B, L]).
    """
    encoder = getattr(self, modality)
    if not hasattr(encoder, "patches"):
      raise UserError(
        f"model.masked_patches has {modality!r}, but its encoder {type(encoder).__name__} cannot "
        "hide patches"
      )
    return encoder.patches(batch[modality])

  def decode(
    self, source: tuple[str, ...], batch: Batch, *, train: bool = False
  ) -> tuple[Array, Array]:
    """(hidden [B, L, D], table [V, D]): hidden[:, l] predicts token l of batch["text"] from the
    tokens before it and the tokens of the source modalities; source () = from the text alone."""
    return self.decode_with_memory(source, batch, train=train)[:2]

  def decode_with_memory(
    self, source: tuple[str, ...], batch: Batch, *, train: bool = False
  ) -> tuple[Array, Array, Array | None, Array | None]:
    """What `decode` gives, and what the decoder attends to: tokens [B, S, D], which are real bool
    [B, S].
    """
    decoder, text = self._decoder(), one_text_a_row(batch["text"])
    memory, memory_mask = self.memory(source, batch, train=train) if source else (None, None)
    if memory is not None and memory_mask is not None:
      times = text["tokens"].shape[0] // memory.shape[0]
      memory, memory_mask = repeat_rows(memory, times), repeat_rows(memory_mask, times)
    tokens, start = shift_right(text["tokens"], decoder.prompt), len(decoder.prompt)
    mask = jnp.concatenate([jnp.ones((tokens.shape[0], start), bool), text["mask"][:, :-1]], axis=1)
    hidden = decoder(tokens, mask, memory, memory_mask, train=train)[:, start - 1 :]
    return hidden, decoder.table(), memory, memory_mask

  def _decoder(self) -> nn.Module:
    if self.decoder is None:
      raise lacking("decode")
    return self.decoder

  def memory(
    self, source: tuple[str, ...], batch: Batch, *, train: bool = False
  ) -> tuple[Array, Array]:
    """What the decoder attends to: tokens of the source modalities [B, S, decoder width], one after
    the other, mask [B, S].
    """
    if "text" in source or not source:
      raise UserError(
        f"a decoder writes text from other modalities, not from {source!r}: leave the text out of "
        "`source`"
      )
    encoded = {modality: self.encode(modality, batch, train=train) for modality in source}
    return (
      jnp.concatenate(
        [self.memories[modality](part.tokens) for modality, part in encoded.items()], axis=1
      ),
      jnp.concatenate([part.mask for part in encoded.values()], axis=1),
    )

  def init_memory(self, source: tuple[str, ...], batch: Batch) -> Memory:
    """What `prefill` and `decode_step` attend to, of the source modalities: once a generation."""
    return self._decoder().init_memory(*self.memory(source, batch))

  def prefill(self, tokens: Array, memory: Memory, *, length: int) -> tuple[Array, KeyValue]:
    """(logits float32 [B, V] of the token after the prompts int32 [B, P], a cache of `length`)."""
    return self._decoder().prefill(tokens, memory, length=length)

  def decode_step(
    self, token: Array, places: Array, cache: KeyValue, memory: Memory
  ) -> tuple[Array, KeyValue]:
    """(logits float32 [B, V] of the token after `token` int32 [B] at `places` int32 [B], the cache
    with it).
    """
    return self._decoder().decode_step(token, places, cache, memory)

  def detect_language(self, memory: Memory) -> Array:
    """int32 [B]: the decoder's language of each row, from what `init_memory` gave."""
    return self._decoder().detect_language(memory)

  def predict_masked(
    self, modality: str, context: tuple[str, ...], batch: Batch, *, train: bool = False
  ) -> Array:
    """int32 [B, L]: the likeliest token at each position of a text whose masked tokens are to be
    guessed.
    """
    head = self.masked_token_head(modality, batch, context=context, train=train)
    return heads.likeliest_tokens(*head)

  def table(self) -> Array:
    """float32 [V, D]: the text encoder's token embeddings."""
    return self.text.table()

  def _encoded(self, modalities: tuple[str, ...], batch: Batch, train: bool) -> dict[str, Encoded]:
    """{modality: Encoded} with equally many rows."""
    encoded = {modality: self.encode(modality, batch, train=train) for modality in modalities}
    rows = max(part.mask.shape[0] for part in encoded.values())
    return {
      modality: jax.tree.map(lambda x: repeat_rows(x, rows // x.shape[0]), part)
      for modality, part in encoded.items()
    }

  def _in_context(
    self, modality: str, batch: Batch, context: tuple[str, ...], train: bool
  ) -> Encoded:
    """A modality's tokens after the fusion, where it keeps them; else as its encoder gives them."""
    chosen = (modality, *context)
    kept = self.fusion.contextual_modalities(chosen) if self.fusion is not None else ()
    if self.fusion is None or modality not in kept:
      if context:
        raise UserError(
          f"{modality} tokens do not see {' and '.join(context)}: the fusion keeps no {modality} "
          "tokens that saw others. Use 'merged_attention' (or 'cross_attention' from that "
          "modality), or no context"
        )
      return self.encode(modality, batch, train=train)
    encoded = self._encoded(chosen, batch, train)
    fused = self.fusion(encoded, train=train)
    start = sum(encoded[m].tokens.shape[1] for m in kept[: kept.index(modality)])
    cut = slice(start, start + encoded[modality].tokens.shape[1])
    return Encoded(fused.tokens[:, cut], fused.mask[:, cut], fused.pooled)


def one_text_a_row(text: Mapping[str, Array]) -> dict[str, Array]:
  """tokens, mask, words [B, K, L] (and present [B] or [B, K]) as B * K rows; a batch of one text a
  row stays as it is.
  """
  if text["tokens"].ndim == 2:
    return dict(text)
  rows, times = text["tokens"].shape[:2]
  out = {name: x.reshape(rows * times, -1) for name, x in text.items() if x.ndim == 3}
  if "present" in text:
    out["present"] = jnp.broadcast_to(text["present"].reshape(rows, -1), (rows, times)).reshape(-1)
  return out


def repeat_rows(x: Array, times: int) -> Array:
  """[B, ...] -> [B * times, ...], each row `times` times in a row; rows stay on their device."""
  if times == 1:
    return x
  return jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:])).reshape(-1, *x.shape[1:])


# -- Kinds: (encoders, data, precision, *, settings) -> module -------------------------------------


def multitask(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 512,
  fusion: nn.Module | None = None,
  decoder: nn.Module | None = None,
  match: bool = False,
  masked_text: bool = False,
  masked_patches: tuple = (),
  shared: bool = False,
  joint: bool = True,
  ordinal: bool = False,
  unprojected: tuple[str, ...] = (),
  projection_bias: bool = False,
  scale_init: Positive = 1 / 0.07,
  scale_max: Positive = 100.0,
  bias: bool = False,
  bias_init: Finite = -10.0,
  discriminator: Count = 0,
) -> Multimodal:
  """Encoders with any of: a shared space, a fusion, a decoder, heads. With data.classes, also a
  classifier, and with data.values a head that predicts them.

  width: channels of the shared space, and of encoders, fusion and decoder that do not say theirs.
  fusion: settings of a fusion, such as dict(kind="cross_attention"). decoder: settings of the text
  decoder.
  match: a head that tells whether modalities belong together. masked_text: an output table for
  masked tokens, tied to the text encoder's. masked_patches: modalities whose hidden patches are
  predicted.
  shared: one transformer serves every encoder; they own their inputs, norms and poolings, and have
  the same settings of blocks.
  joint: project every modality to one space (contrastive, retrieval, matching).
  ordinal: the classes have an order, that of their numbers: a score and ascending thresholds tell
  them apart.
  unprojected, projection_bias, scale_init, scale_max, bias, bias_init, discriminator: of that
  space; see `dual_encoder`.
  """
  have = ", ".join(sorted(encoders))
  parts.check_encoders("unprojected", unprojected, encoders)
  parts.check_encoders("masked_patches", masked_patches, encoders)
  if masked_text and not hasattr(encoders.get("text"), "table"):
    raise UserError(
      "model.masked_text needs a text encoder with a table of tokens, but model.encoders has "
      f"{have}"
    )
  if match and fusion is None:
    raise UserError(
      "model.match needs a fusion: give config.model.fusion, such as dict(kind='cross_attention')"
    )
  if (ordinal or data.get("values")) and getattr(fusion, "decides", False):
    raise UserError("model.ordinal and data.values need a fusion of features, not 'decision'")
  if ordinal and data.get("classes", 0) < 2:
    raise UserError(f"model.ordinal needs data.classes of at least 2, not {data.get('classes', 0)}")
  if match and getattr(fusion, "decides", False):
    raise UserError("model.match needs a fusion of features, not 'decision'")
  if shared:
    _check_shared(encoders)
  space = SharedSpace(
    tuple(encoders),
    width,
    tuple(unprojected),
    projection_bias,
    scale_init=scale_init,
    scale_max=scale_max,
    use_bias=bias,
    bias_init=bias_init,
    discriminator_hidden=discriminator,
  )
  return Multimodal(
    dict(encoders),
    space=space if joint else None,
    fusion=fusion,
    decoder=decoder,
    classes=data.get("classes", 0),
    ordinal=ordinal,
    values=data.get("values", 0),
    matches=match,
    masked_text=masked_text,
    masked_patches=tuple(masked_patches),
    shared=shared,
    dtype=jnp.dtype(precision["compute"]),
  )


def narrows(
  kind: Callable[..., nn.Module], without: tuple[str, ...]
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
  """Gives a function (..., **settings) the settings of a kind, but for those of `without`;
  those that it names itself have its own defaults.
  """
  signature = inspect.signature(kind, eval_str=True)

  def mark(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    own = inspect.signature(function, eval_str=True).parameters
    parameters = [
      own.get(name, parameter)
      for name, parameter in signature.parameters.items()
      if name not in without
    ]
    marked: Any = function
    marked.__signature__ = signature.replace(parameters=parameters)
    return function

  return mark


@narrows(multitask, without=("decoder",))
def fusion_encoder(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  fusion: nn.Module | None = None,
  **settings: Any,
) -> Multimodal:
  """Encoders and a fusion of their outputs (FLAVA, Singh et al. 2022, arXiv:2112.04482; ALBEF).
  Settings: see `multitask`.
  """
  if fusion is None:
    raise UserError(
      "model.fusion is missing: name one, such as dict(kind='merged_attention'), or use another "
      "model"
    )
  return multitask(encoders, data, precision, fusion=fusion, **settings)


@narrows(multitask, without=("fusion", "match", "masked_text", "masked_patches"))
def captioner(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  decoder: nn.Module | None = None,
  joint: bool = False,
  **settings: Any,
) -> Multimodal:
  """Encoders and a text decoder that attends to them; with `joint` and a text encoder also
  embeddings (CoCa, Yu et al. 2022, arXiv:2205.01917). Settings: see `multitask`."""
  if decoder is None:
    raise UserError(
      "model.decoder is missing: give its settings, such as dict(depth=4), or use another model"
    )
  return multitask(encoders, data, precision, decoder=decoder, joint=joint, **settings)


def _check_shared(encoders: Mapping[str, nn.Module]) -> None:
  first = next(iter(encoders))
  for modality, encoder in encoders.items():
    if not hasattr(encoder, "trunk"):
      raise UserError(
        f"model.shared: the {modality} encoder {type(encoder).__name__} has no transformer that "
        "it could share"
      )
    if encoder.config != encoders[first].config:
      raise UserError(
        f"model.shared: the encoders {first} and {modality} differ in the settings of their "
        "blocks (width, depth, heads, mlp, norm, activation, causal, bias, eps, dropout, kernel, "
        "remat, scan_unroll). Make them equal"
      )
