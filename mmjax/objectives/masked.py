"""Something is hidden and predicted from the rest: tokens of a text, patches of a picture, a film,
a sound or a series.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.objectives import Forward, Losses, example_mask, objective
from mmjax.objectives.cross_entropy import token_cross_entropy
from mmjax.ranges import INT32, Dropout, Part, Portion, Range
from mmjax.special_tokens import SPECIAL_TOKENS, Special

Array = jax.Array


@objective(couples_examples=False, methods=("table", "masked_token_head"))
def masked_tokens(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  context: tuple[str, ...] = (),
  rate: Portion = 0.15,
  special: Annotated[tuple, Range(-1, INT32), Special(SPECIAL_TOKENS, needed=("mask",))] = (),
  label_smoothing: Dropout = 0.0,
) -> Losses:
  """Masked language modelling (Devlin et al. 2019, arXiv:1810.04805, section 3.1, task 1): see
  `hide_tokens`.

  context: modalities that the tokens see through the fusion. rate: share of the words that are
  hidden; whole words where the batch has text.words (data.text.words), else tokens. special: ids of
  <pad> <bos> <eos> <unk> <mask>, in this order, -1 = none; () = the tokenizer's. label_smoothing:
  share of the target that is spread over the vocabulary.

  The loss is a mean over the hidden tokens of rows that are valid and have the text. Returns
  "accuracy" over the same tokens.
  Raises UserError: `special` is not five ids, or has no <mask>.
  """
  text = batch["text"]
  vocabulary = forward("table").shape[0]
  rows = example_mask(batch, every=("text",))
  if "present" in text and text["present"].ndim == text["mask"].ndim - 1:
    rows = rows.reshape(-1, *(1,) * (text["present"].ndim - 1)) & text["present"]
  open_ = text["mask"] & rows.reshape(*rows.shape, *(1,) * (text["mask"].ndim - rows.ndim))
  tokens, targets = hide_tokens(
    text["tokens"], open_, text.get("words"), rng, rate=rate, special=special, vocabulary=vocabulary
  )
  view = {**batch, "text": {**text, "tokens": tokens}}
  hidden, table, bias = forward("masked_token_head", "text", context=tuple(context), batch=view)
  loss, weight, correct = token_cross_entropy(
    hidden.reshape(-1, hidden.shape[-1]),
    table,
    targets.reshape(-1),
    bias=bias,
    label_smoothing=label_smoothing,
  )
  return {"loss": (loss, weight), "accuracy": (correct, weight)}


def hide_tokens(
  tokens: Array,
  mask: Array,
  words: Array | None,
  rng: Array,
  *,
  rate: float,
  special: tuple,
  vocabulary: int,
) -> tuple[Array, Array]:
  """(tokens with some hidden, targets: the token where it was chosen, else -1), both int32 like
  `tokens` [..., L].

  Of the tokens with mask [..., L] True that are not special (nor words -1, where words int32 [...,
  L] are given), each word is chosen with probability `rate`; its tokens become <mask> (80%), a
  random token that is not special (10%), or stay (10%).
  """
  if len(special) != len(SPECIAL_TOKENS) or not 0 <= special[4] < vocabulary:
    raise UserError(
      f"masked_tokens.special is {tuple(special)}, but must be the ids of "
      f"{' '.join(SPECIAL_TOKENS)} (-1 = none), with a mask below the {vocabulary} of the table"
    )
  choose, how, which = jax.random.split(rng, 3)
  closed = sorted({number for number in special if number >= 0})
  ids = jnp.asarray(closed, jnp.int32)
  open_ = mask & (tokens[..., None] != ids).all(-1)
  draw = jax.random.uniform(choose, tokens.shape)
  if words is not None:
    open_ &= words >= 0
    # The tokens of a word share one draw; words are numbered below L.
    draw = jnp.take_along_axis(draw, jnp.maximum(words, 0), axis=-1)
  chosen = open_ & (draw < rate)
  random = jax.random.randint(which, tokens.shape, 0, vocabulary - len(closed), tokens.dtype)
  for number in closed:
    random += random >= number  # skips the special ids
  way = jax.random.uniform(how, tokens.shape)
  hidden = jnp.where(
    way < 0.8, jnp.asarray(special[4], tokens.dtype), jnp.where(way < 0.9, random, tokens)
  )
  return jnp.where(chosen, hidden, tokens), jnp.where(chosen, tokens, -1)


@objective(couples_examples=False, mixup="alone", methods=("patches", "reconstruct"))
def masked_patches(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  modality: str = "image",
  context: tuple[str, ...] = (),
  ratio: Part = 0.6,
  normalise: bool = True,
) -> Losses:
  """Masked autoencoding: squared error of hidden patches, mean over a patch's values (He et al.
  2022, arXiv:2111.06377, MAE;
  with mask tokens in the encoder and a linear head as SimMIM, Xie et al. 2022, arXiv:2111.09886).

  modality: image, video, audio or series, with an encoder that hides patches. context: modalities
  that the patches see through the fusion. ratio: share of a row's real patches that is hidden,
  rounded. normalise: each patch's values less their mean, divided by their standard deviation (MAE,
  section 4). The loss is a mean over the hidden patches of rows that are valid and have the
  modality. Returns "explained": 1 - error, the share of the variance that the prediction explains,
  with `normalise`.
  """
  values, real = forward("patches", modality)
  real &= example_mask(batch, every=(modality,))[:, None]
  hidden = hide_patches(real, rng, ratio)
  view = {**batch, modality: {**batch[modality], "patch_mask": hidden}}
  predicted = forward("reconstruct", modality, context=tuple(context), batch=view)
  target = jax.lax.stop_gradient(values.astype(jnp.float32))
  if normalise:
    mean = target.mean(-1, keepdims=True)
    target = (target - mean) * jax.lax.rsqrt(
      jnp.square(target - mean).mean(-1, keepdims=True) + 1e-6
    )
  error = jnp.square(predicted - target).mean(-1)
  weight = hidden.sum(dtype=jnp.float32)
  total = jnp.where(hidden, error, 0).sum()
  return {"loss": (total, weight), "explained": (weight - total, weight)}


def hide_patches(real: Array, rng: Array, ratio: float) -> Array:
  """bool [B, L]: of each row's real patches (bool [B, L]) a random share `ratio`, rounded to a
  whole number.
  """
  draw = jnp.where(real, jax.random.uniform(rng, real.shape), 2)
  rank = jnp.argsort(jnp.argsort(draw, axis=-1), axis=-1)
  return real & (rank < jnp.round(ratio * real.sum(-1, keepdims=True)))
