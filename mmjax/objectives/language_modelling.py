"""The loss of a language model: each token that is a target, given all before it in its example."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, objective
from mmjax.objectives.cross_entropy import row_cross_entropy
from mmjax.ranges import Dropout

Array = jax.Array


@objective(couples_examples=False, methods=("next_tokens",))
def language_modelling(
  forward: Forward, batch: dict, rng: Array, *, label_smoothing: Dropout = 0.0
) -> Losses:
  """Cross-entropy of the next token (Bengio et al. 2003), a mean over the targets of the batch.

  label_smoothing: share of the target that is spread over the vocabulary.

  Reads batch["sequence"]: tokens int32, loss_mask bool (token l is a target) and segment_ids int32
  [B, L]; the first token of an example is never a target, for nothing of it comes before. Rows with
  `valid` False do not count. Of judged answers the preferred ones are learned. "accuracy": share of
  targets that are the likeliest token.
  """
  hidden, table, cap = forward("next_tokens")
  targets = next_targets(batch)
  if "preference" in batch:
    unwanted = batch["preference"]["answers"][..., 1:].reshape(len(targets), 1, -1)
    segments = batch["sequence"]["segment_ids"][..., None]
    targets = jnp.where(((segments == unwanted) & (segments > 0)).any(-1), -1, targets)
  loss, correct = row_cross_entropy(
    hidden.reshape(-1, hidden.shape[-1]),
    table,
    targets.reshape(-1),
    label_smoothing=label_smoothing,
    cap=cap,
  )
  weight = (targets >= 0).sum(dtype=jnp.float32)
  return {"loss": (loss, weight), "accuracy": (correct.sum(dtype=jnp.float32), weight)}


def next_targets(batch: dict) -> Array:
  """int32 [B, L]: the token after each, where it is a target of the same example; -1 elsewhere."""
  s = batch["sequence"]
  counts = s["loss_mask"][:, 1:] & (s["segment_ids"][:, 1:] == s["segment_ids"][:, :-1])
  if "valid" in batch:
    counts &= batch["valid"][:, None]
  return jnp.pad(jnp.where(counts, s["tokens"][:, 1:], -1), ((0, 0), (0, 1)), constant_values=-1)
