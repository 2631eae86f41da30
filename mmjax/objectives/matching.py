"""Does this picture belong to this text: a binary question on fused pairs, with hard negatives from
the whole batch.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.objectives import Forward, Losses, example_mask, objective
from mmjax.objectives.contrastive import labels_of, positives_of
from mmjax.parallel.rules import constrain_batch

Array = jax.Array


@objective(couples_examples=True, methods=("embedding", "temperature", "match"))
def matching(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  between: tuple[str, ...] = ("image", "text"),
  negatives: Literal["sampled", "hardest"] = "sampled",
) -> Losses:
  """Image-text matching (ALBEF, Li et al. 2021, arXiv:2107.07651, section 3.2) of any two
  modalities.

  between: the two. negatives: sampled or hardest, as said below.

  Three pairs a row: its own (match), its first modality with another row's second, and its second
  with another row's first (no match); the loss is the mean of binary cross-entropies. The other
  rows come from the whole global batch: "sampled" from softmax(scale * cosine) of the embeddings,
  or the "hardest". A row that is a positive in the sense of `contrastive` (an equal key, mixed from
  the same) is never a negative; where no other is left, that pair does not count.
  Rows with `valid` False or without one of the two do not count and are nobody's negative.
  Returns "accuracy": share of the pairs that are judged rightly.
  """
  first, second = between
  x, y = (jax.lax.stop_gradient(forward("embedding", side)) for side in between)
  if x.shape != y.shape:
    raise UserError(
      f"matching pairs one {first} with one {second}, but the batch has {x.shape[0]} and "
      f"{y.shape[0]}: set data.text.per_example to 1"
    )
  scale = jax.lax.stop_gradient(forward("temperature")[0])
  valid = example_mask(batch, every=between)
  to_second, to_first = _negatives(batch, between, valid, scale, x, y, rng, negatives)

  own = forward("match", tuple(between))
  views = [
    {**batch, side: take_rows(batch[side], chosen)}
    for side, (chosen, _) in ((second, to_second), (first, to_first))
  ]
  pairs = [
    (own, valid, 1.0),
    *(
      (forward("match", tuple(between), batch=view), found, -1.0)
      for view, (_, found) in zip(views, (to_second, to_first), strict=True)
    ),
  ]

  def total(values: list[Array]) -> Array:
    sums = [
      jnp.where(counts, value, 0).sum(dtype=jnp.float32)
      for value, (_, counts, _) in zip(values, pairs, strict=True)
    ]
    return functools.reduce(jnp.add, sums)

  weight = total([jnp.ones_like(logits) for logits, _, _ in pairs])
  return {
    "loss": (total([jax.nn.softplus(-sign * logits) for logits, _, sign in pairs]), weight),
    "accuracy": (total([sign * logits > 0 for logits, _, sign in pairs]), weight),
  }


def _negatives(
  batch: dict, between: tuple, valid: Array, scale: Array, x: Array, y: Array, rng: Array, how: str
) -> list[tuple[Array, Array]]:
  """For each row of the first modality a row of the second, and the reverse: [(index int32 [B],
  whether there is one bool [B])].
  """
  labels = [labels_of(batch, between, side, valid) for side in between]
  out = []
  for key, (mine, rows), (theirs, columns) in zip(
    jax.random.split(rng),
    ((x, labels[0]), (y, labels[1])),
    ((y, labels[1]), (x, labels[0])),
    strict=True,
  ):
    similar = scale * jnp.matmul(mine, theirs.T, precision="highest")
    open_ = constrain_batch(valid[:, None] & valid[None] & (positives_of(rows, columns) == 0))
    logits = constrain_batch(jnp.where(open_, similar, -jnp.inf))
    found = open_.any(-1)
    logits = jnp.where(found[:, None], logits, 0)
    chosen = (
      jax.random.categorical(key, logits) if how == "sampled" else jnp.argmax(logits, axis=-1)
    )
    out.append((chosen.astype(jnp.int32), found))
  return out


def take_rows(tree: Any, index: Array) -> Any:
  """Rows `index` int32 [B] of a global batch's arrays [B, ...], laid out like a batch."""
  return constrain_batch(jax.tree.map(lambda x: jnp.take(x, index, axis=0), tree))
