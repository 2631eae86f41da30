"""Text word by word: captions of a source (image, audio, ...) by a cross-attending decoder, and
plain language modelling.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.objectives import Forward, Losses, objective
from mmjax.objectives.alignment import ctc as alignment_loss
from mmjax.objectives.cross_entropy import row_cross_entropy
from mmjax.ranges import Dropout, NonNegative, TokenId
from mmjax.special_tokens import Special

Array = jax.Array


@objective(couples_examples=False, methods=("decode",))
def captioning(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  source: tuple[str, ...] = ("image",),
  label_smoothing: Dropout = 0.0,
  ctc: NonNegative = 0.0,
  eos_id: Annotated[TokenId, Special(("eos",), needed=("eos",), when="ctc")] = -1,
  blank: Annotated[TokenId, Special(("pad",), needed=("pad",), when="ctc", warns=False)] = -1,
) -> Losses:
  """Cross-entropy of each token of the text given the source and the tokens before it (Vinyals et
  al. 2015, arXiv:1411.4555, equation 2; the captioning loss of CoCa, Yu et al. 2022,
  arXiv:2205.01917, equation 2).

  source: modalities that the decoder attends to. label_smoothing: share of the target that is
  spread over the vocabulary.
  ctc: what the decoder attends to spells the text too, by the decoder's table, and this many times
  that loss is added (Watanabe et al. 2017, hybrid CTC/attention): for speech, whose order is that
  of its text. eos_id: the end, which nobody says; -1 = the tokenizer's. blank: the token that
  stands for no token; -1 = the tokenizer's <pad>.

  Reads batch["text"]: tokens int32 and mask bool [B, L] (or [B, K, L]: K texts a row). The loss is
  a mean over real tokens, <eos> among them. "accuracy": share of tokens that are the likeliest one;
  "sequence_accuracy": share of texts where all are, each given the true tokens before it; with
  `ctc` also "ctc", that loss a token. Rows with `valid` False, or without the source or the text,
  do not count; for "ctc" neither do those whose source has fewer tokens than the text. Raises
  UserError: ctc without a source, an end or a blank.
  """
  if ctc and not source:
    raise UserError(
      "captioning: ctc spells a text from its source, but `source` names none. Name one, or set "
      "ctc to 0"
    )
  if ctc and min(eos_id, blank) < 0:
    raise UserError(
      f"captioning: ctc needs an end and a blank, but eos_id is {eos_id} and blank {blank}. Name "
      "tokens for them"
    )
  hidden, table, *spelled = forward("decode_with_memory" if ctc else "decode", tuple(source))
  rows, length, width = hidden.shape
  text = batch["text"]
  examples = jnp.repeat(_example_mask(batch, (*source, "text")), rows // text["tokens"].shape[0])
  real = text["mask"].reshape(rows, length) & examples[:, None]
  targets = jnp.where(real, text["tokens"].reshape(rows, length), -1)
  loss, correct = row_cross_entropy(
    hidden.reshape(-1, width), table, targets.reshape(-1), label_smoothing=label_smoothing
  )

  def weight(x):
    return x.sum(dtype=jnp.float32)

  some = real.any(-1)
  whole = (correct.reshape(rows, length) | ~real).all(-1) & some
  out = {
    "accuracy": (weight(correct), weight(real)),
    "sequence_accuracy": (weight(whole), weight(some)),
  }
  if not ctc:
    return {"loss": (loss, weight(real)), **out}
  frames, heard = spelled
  tokens = text["tokens"].reshape(rows, length)
  said = real & (tokens != eos_id)
  alignment, aligned = alignment_loss(
    frames, heard & examples[:, None], table, tokens, said, blank=blank
  )
  return {
    "loss": (loss + ctc * alignment, weight(real)),
    "ctc": (alignment, weight(said & aligned[:, None])),
    **out,
  }


@objective(couples_examples=False, methods=("decode",))
def autoregressive(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  source: tuple[str, ...] = (),
  label_smoothing: Dropout = 0.0,
) -> Losses:
  """Language modelling: cross-entropy of each token given those before it (Bengio et al. 2003). See
  `captioning`.
  """
  return captioning(forward, batch, rng, source=source, label_smoothing=label_smoothing)


def _example_mask(batch: dict, modalities: tuple) -> Array:
  """bool [B]: rows that are valid and have every one of `modalities`."""
  size = batch["text"]["tokens"].shape[0]
  examples = batch.get("valid", jnp.ones(size, bool))
  for modality in modalities:
    if "present" in batch[modality]:
      examples = examples & batch[modality]["present"].reshape(size, -1).any(-1)
  return examples
