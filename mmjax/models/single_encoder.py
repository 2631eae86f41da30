"""One encoder as a whole model: to embed with an imported BERT, ViT, ResNet or Swin, and to
fine-tune it as a classifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models import heads, parts
from mmjax.models.layers import Dense, Encoded, normal
from mmjax.models.methods import lacking
from mmjax.models.ordinal import OrdinalHead
from mmjax.models.pooling import SentencePooling, keep_rows, sentence
from mmjax.models.projection import Between, projection
from mmjax.models.shared_space import unit_length
from mmjax.ranges import Count, Sizes, Width

Array = jax.Array
Probabilities = Literal["softmax", "sigmoid", "none"]
DenseActivation = Literal["identity", "tanh", "relu", "gelu", "sigmoid", "silu"]
DENSE_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "identity": jnp.asarray,
  "tanh": jnp.tanh,
  "relu": jax.nn.relu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "sigmoid": jax.nn.sigmoid,
  "silu": jax.nn.silu,
}


class SingleEncoder(nn.Module):
  """Exactly one encoder, and heads for what it was trained with. `embedding` is its pooled output,
  of length one.

  `sentence_pooling`: pools the encoder's tokens in place of its own pooling, and `dense` are layers
  after it, each of so many channels and with a function of `dense_activations`, as
  sentence-transformers has them.
  `projected`: the pooled output goes through a linear layer (or two) to `width` channels first, as
  CLIP's and CLAP's towers have it.
  `classes`: outputs of a linear classifier on the pooled output; 0 = none; `classifier_norm`: it
  has a layer norm before it; `ordinal`: it is an `OrdinalHead` instead. `values`: of a head for
  `regress`.
  `probabilities`: what makes probabilities of its logits: softmax, sigmoid (of one label, or
  several at once), or "none" (scores).
  `spelling`: tokens of a CTC head on each token of the encoder, for `spell`; 0 = none. `blank`: the
  one that stands for none.
  `masked_tokens`: the head of a masked language model, for `masked_token_head`. `batch` is the
  nested dict of mmjax/README.md, {modality: {...}}.
  """

  encoders: Mapping[str, nn.Module]
  width: int
  classes: int = 0
  masked_tokens: bool = False
  activation: str = "gelu"
  eps: float = 1e-12
  classifier_norm: bool = False
  projected: bool = False
  projection_bias: bool = False
  projection_function: Between = "none"
  sentence_pooling: tuple[SentencePooling, ...] = ()
  dense: tuple[int, ...] = ()
  dense_activations: tuple[DenseActivation, ...] = ()
  dense_bias: bool = True
  probabilities: Probabilities = "softmax"
  spelling: int = 0
  blank: int = 0
  ordinal: bool = False
  values: int = 0
  dtype: jnp.dtype = jnp.float32

  shared_methods = ("table", "temperature")  # methods whose result does not depend on examples

  @property
  def methods(self) -> tuple[str, ...]:
    """The names of METHODS that this model answers."""
    (encoder,) = self.encoders.values()
    answers = {
      ("encode", "embedding", "temperature"): True,
      ("table",): hasattr(encoder, "table"),
      ("classify",): self.classes,
      ("regress",): self.values,
      ("spell",): self.spelling,
      ("masked_token_head", "predict_masked"): self.masked_tokens,
    }
    return tuple(name for names, has in answers.items() if has for name in names)

  def setup(self) -> None:
    parts.adopt(self, self.encoders)
    if self.classes and self.ordinal:
      self.classifier: nn.Module = OrdinalHead(self.classes)
    elif self.classes:
      self.classifier = (
        heads.NormedClassifier(self.classes, self.eps)
        if self.classifier_norm
        else Dense((self.classes,), ("embed", "classes"), jnp.float32, normal(0.02))
      )
    if self.values:
      self.regressor = Dense((self.values,), ("embed", None), jnp.float32, normal(0.02))
    if self.projected:
      self.projection = projection(self.width, self.projection_function, self.projection_bias)
    self.dense_layer = [
      Dense((width,), ("embed", "embed_out"), jnp.float32, use_bias=self.dense_bias)
      for width in self.dense
    ]
    if self.spelling:
      self.speller = Dense((self.spelling,), ("embed", "vocab"), jnp.float32, normal(0.02))
    if self.masked_tokens:
      self.masked_head = heads.MaskedTokenHead(self.dtype, self.activation, self.eps)

  def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> dict[str, Array]:
    """{modality: embedding}; reads every parameter, so that `init` makes them all."""
    (modality,) = self.encoders
    if modality not in batch:
      return {}
    if self.classes:
      self.classify((modality,), batch, train=train)
    if self.values:
      self.regress((modality,), batch, train=train)
    if self.spelling:
      self.spell((modality,), batch)
    if self.masked_tokens:
      self.masked_token_head(modality, batch, train=train)
    return {modality: self.embedding(modality, batch, train=train)}

  def encode(self, modality: str, batch: Mapping[str, Any], *, train: bool = False) -> Encoded:
    """tokens [B, L, D], mask [B, L], pooled [B, D]."""
    encoded = parts.encode(self, modality, batch, train)
    if not self.sentence_pooling:
      return encoded
    pooled = sentence(encoded.tokens, encoded.mask, self.sentence_pooling)
    for layer, name in zip(self.dense_layer, self.dense_activations, strict=True):
      pooled = DENSE_ACTIVATIONS[name](layer(pooled))
    return encoded._replace(pooled=keep_rows(pooled, encoded.mask))

  def embedding(self, modality: str, batch: Mapping[str, Any], *, train: bool = False) -> Array:
    """float32 [B, width] of length 1; zeros for a row where the modality is missing."""
    x = self._pooled(modality, batch, train).astype(jnp.float32)
    if x.shape[-1] != self.width:
      raise UserError(
        f"model.width is {self.width}, but the encoder of {modality} gives {x.shape[-1]} "
        "channels. Set it to that"
      )
    return unit_length(x)

  def _pooled(self, modality: str, batch: Mapping[str, Any], train: bool) -> Array:
    """[B, width]: the pooled output, projected if the model does so."""
    encoded = self.encode(modality, batch, train=train)
    return (
      keep_rows(self.projection(encoded.pooled), encoded.mask) if self.projected else encoded.pooled
    )

  def temperature(self) -> tuple[Array, Array]:
    """(1, 0), float32 scalars: a single encoder compares by the cosine itself."""
    return jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)

  def classify(
    self, modalities: tuple[str, ...], batch: Mapping[str, Any], *, train: bool = False
  ) -> Array:
    """float32 logits [B, classes] from the pooled output."""
    if not self.classes:
      raise lacking("classify")
    (modality,) = modalities
    return self.classifier(self._pooled(modality, batch, train))

  def regress(
    self, modalities: tuple[str, ...], batch: Mapping[str, Any], *, train: bool = False
  ) -> Array:
    """float32 [B, K]: the values of a row, standardised as the objective "regression" says."""
    if not self.values:
      raise lacking("regress")
    (modality,) = modalities
    return self.regressor(self._pooled(modality, batch, train))

  def spell(self, modalities: tuple[str, ...], batch: Mapping[str, Any]) -> Array:
    """int32 [B, L]: the likeliest token of each token of the encoder by the CTC head, `blank` where
    it is not real.
    """
    (modality,) = modalities
    encoded = self.encode(modality, batch)
    return jnp.where(
      encoded.mask, jnp.argmax(self.speller(encoded.tokens), axis=-1), self.blank
    ).astype(jnp.int32)

  def masked_token_head(
    self,
    modality: str,
    batch: Mapping[str, Any],
    *,
    context: tuple[str, ...] = (),
    train: bool = False,
  ) -> tuple[Array, Array, Array]:
    """(hidden [B, L, D], table float32 [V, D], bias float32 [V]): logits over the vocabulary =
    hidden table^T + bias.
    """
    if not self.masked_tokens:
      raise lacking("masked_token_head")
    if context:
      raise UserError(f"a model of one encoder predicts no masked tokens from {', '.join(context)}")
    return self.masked_head(self.encode(modality, batch, train=train).tokens, self.table())

  def predict_masked(
    self, modality: str, context: tuple[str, ...], batch: Mapping[str, Any], *, train: bool = False
  ) -> Array:
    """int32 [B, L]: the likeliest token at each position of a text whose masked tokens are to be
    guessed.
    """
    head = self.masked_token_head(modality, batch, context=context, train=train)
    return heads.likeliest_tokens(*head)

  def table(self) -> Array:
    """float32 [V, D]: the text encoder's token embeddings."""
    (modality,) = self.encoders
    return getattr(self, modality).table()


def encoder(
  encoders: Mapping[str, nn.Module],
  data: Mapping[str, Any],
  precision: Mapping[str, Any],
  *,
  width: Width = 512,
  classes: Count = 0,
  classifier_norm: bool = False,
  masked_tokens: bool = False,
  projection: bool = False,
  projection_bias: bool = False,
  projection_function: Between = "none",
  sentence_pooling: tuple = (),
  dense: Sizes = (),
  dense_activations: tuple = (),
  dense_bias: bool = True,
  probabilities: Probabilities = "softmax",
  spelling: Count = 0,
  blank: Count = 0,
  ordinal: bool = False,
) -> SingleEncoder:
  """One encoder, whose pooled output is the embedding.

  width: channels that the encoder ends with, and of an encoder that does not say its own.
  classes: outputs of a linear classifier; 0 = none. classifier_norm: a layer norm before it, as AST
  has. ordinal: the classes have an order, that of their numbers: a score and ascending thresholds
  tell them apart. With data.values there is also a head that predicts them.
  probabilities: of the classifier's outputs: softmax, sigmoid (one label, or several at once) or
  none (they are scores).
  masked_tokens: a head that predicts masked tokens through the encoder's own embeddings (text
  alone).
  sentence_pooling: what is pooled of the tokens of a text, side by side, in place of the encoder's
  own pooling: class, max, mean, mean_sqrt, weighted_mean, last; () = that one.
  dense: widths of layers after it; dense_activations: of each, identity, tanh, relu, gelu, sigmoid
  or silu; dense_bias: they have one.
  spelling: tokens of a CTC head on the encoder's tokens, which writes what is said in a sound; 0 =
  none. blank: the token for nothing.
  projection: a linear layer from the pooled output to `width` channels; projection_bias: it has a
  bias; projection_function: between two such layers, as CLAP has; none = one layer.
  """
  if len(encoders) != 1:
    raise UserError(
      "model.name 'encoder' takes exactly one encoder, but model.encoders has "
      f"{', '.join(sorted(encoders)) or 'none'}"
    )
  (module,) = encoders.values()
  if masked_tokens and not hasattr(module, "table"):
    raise UserError("model.masked_tokens needs a text encoder (transformer or bert)")
  if spelling and blank >= spelling:
    raise UserError(
      f"model.blank is {blank}, but model.spelling has the tokens 0 to {spelling - 1}"
    )
  if classifier_norm and not hasattr(module, "config"):
    raise UserError(
      f"model.classifier_norm needs an encoder that is a transformer, not {type(module).__name__}"
    )
  if ordinal and (classes < 2 or classifier_norm):
    raise UserError(
      "model.ordinal needs model.classes of at least 2, and a classifier without a norm"
    )
  _check_sentence(module, sentence_pooling, dense, dense_activations)
  settings = (
    dict(activation=module.config.activation, eps=module.config.eps)
    if masked_tokens or classifier_norm
    else {}
  )
  return SingleEncoder(
    dict(encoders),
    width,
    classes,
    masked_tokens,
    classifier_norm=classifier_norm,
    projected=projection,
    projection_bias=projection_bias,
    projection_function=projection_function,
    sentence_pooling=tuple(sentence_pooling),
    dense=tuple(dense),
    dense_activations=tuple(dense_activations),
    dense_bias=dense_bias,
    probabilities=probabilities,
    spelling=spelling,
    blank=blank,
    ordinal=ordinal,
    values=data.get("values", 0),
    dtype=jnp.dtype(precision["compute"]),
    **settings,
  )


def _check_sentence(
  module: nn.Module, poolings: Sequence[str], dense: Sequence[int], activations: Sequence[str]
) -> None:
  """Raises UserError: unknown kinds, layers without a pooling, or an encoder of no text."""
  for name, values, known in (
    ("sentence_pooling", poolings, get_args(SentencePooling)),
    ("dense_activations", activations, DENSE_ACTIVATIONS),
  ):
    if unknown := [value for value in values if value not in known]:
      raise UserError(f"model.{name} has {unknown[0]!r}; there are: {', '.join(known)}")
  if (dense and not poolings) or len(dense) != len(activations):
    raise UserError(
      f"model.dense is {tuple(dense)}, which needs model.sentence_pooling and as many "
      "model.dense_activations"
    )
  if poolings and not hasattr(module, "table"):
    raise UserError("model.sentence_pooling needs a text encoder")
