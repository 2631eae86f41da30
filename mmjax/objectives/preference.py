"""Preferences: answers that people judged, against what a reference model thinks of them."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, objective
from mmjax.objectives.cross_entropy import log_probs
from mmjax.objectives.language_modelling import next_targets
from mmjax.ranges import Doubt, NonNegative, Positive

Array = jax.Array
JUDGED = "judged_answers"  # what Program.apply gives of a batch besides methods of the model


class Answers(NamedTuple):
  """Of the places of a batch for judged answers, [B, P, 3] (preferred, rejected, to another
  prompt): their log-probabilities float32, their tokens float32, and whether there is one.
  """

  log_probs: Array
  tokens: Array
  present: Array


@objective(couples_examples=False, methods=("next_tokens",))
def preference(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  form: Literal["dpo", "ipo", "kto"] = "dpo",
  beta: Positive = 0.1,
  label_smoothing: Doubt = 0.0,
  length_normalised: bool = False,
  desirable: NonNegative = 1.0,
  undesirable: NonNegative = 1.0,
) -> Losses:
  """Learning from judged answers against a reference, which is the model that the run starts from.

  With r(y) = log p(y | x) - log p_reference(y | x), y+ the preferred and y- the rejected answer,
  h = r(y+) - r(y-) and s the logistic function, the mean over pairs of
    dpo  -(1 - e) log s(beta h) - e log s(-beta h), e the label smoothing (Rafailov et al. 2023,
         arXiv:2305.18290, equation 7; with e, the conservative form in Mitchell 2023)
    ipo  (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17)
  or over answers, of which there need not be pairs,
    kto  desirable (1 - s(beta (r(y+) - z))), undesirable (1 - s(beta (z - r(y-)))), where z is the
         mean of r over answers to other prompts in the batch, at least 0 and a constant
         (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8)

  form: which of them. beta: how dearly a step away from the reference is paid. label_smoothing: e,
  the share of labels that are taken to be wrong. length_normalised: r is a mean over an answer's
  tokens, not a sum. desirable, undesirable: weights of the two kinds of answers in "kto".

  Reads batch["preference"] (`answers` int32 and `reference` float32 [B, P, 3]) and
  batch["sequence"]. An answer's log-probability is the sum over its targets. Rows with `valid`
  False do not count. Returns "rewards_chosen" and "rewards_rejected" (the means of beta r),
  and over pairs "margin" (of beta h), "accuracy" (share with h > 0; a tie is none) and "preferred"
  (share whose preferred answer is likelier than the rejected one, whatever the reference says);
  of "kto" also "kl", which is z.
  """
  answers = answers_of(forward("next_tokens"), batch)
  ratio = answers.log_probs - batch["preference"]["reference"]
  own = answers.log_probs
  if length_normalised:
    ratio, own = (x / jnp.maximum(answers.tokens, 1) for x in (ratio, own))
  ratio = jnp.where(answers.present, ratio, 0)
  good, bad, other = (answers.present[..., side] for side in range(3))
  pair, reward = good & bad, beta * ratio
  ahead = ratio[..., 0] - ratio[..., 1]

  def over(which: Array, x: Array) -> tuple[Array, Array]:
    return jnp.where(which, x, 0).sum(dtype=jnp.float32), which.sum(dtype=jnp.float32)

  metrics = {
    "rewards_chosen": over(good, reward[..., 0]),
    "rewards_rejected": over(bad, reward[..., 1]),
    "margin": over(pair, beta * ahead),
    "accuracy": over(pair, ahead > 0),
    "preferred": over(pair, own[..., 0] > own[..., 1]),
  }
  if form == "dpo":
    likely, unlikely = jax.nn.log_sigmoid(beta * ahead), jax.nn.log_sigmoid(-beta * ahead)
    loss = over(pair, -(1 - label_smoothing) * likely - label_smoothing * unlikely)
  elif form == "ipo":
    loss = over(pair, jnp.square(ahead - 1 / (2 * beta)))
  else:
    total, count = over(other, ratio[..., 2])
    z = jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1), 0))
    gains, weight_of_gains = over(good, desirable * jax.nn.sigmoid(beta * (z - ratio[..., 0])))
    losses, weight_of_losses = over(bad, undesirable * jax.nn.sigmoid(beta * (ratio[..., 1] - z)))
    loss = gains + losses, weight_of_gains + weight_of_losses
    metrics["kl"] = z, jnp.ones((), jnp.float32)
  return {"loss": loss, **metrics}


def answers_of(next_tokens: tuple[Array, Array, float], batch: dict) -> Answers:
  """The judged answers of a batch under a model whose `next_tokens` gave hidden [B, L, D], the
  output table and the cap of its logits.
  """
  hidden, table, cap = next_tokens
  targets, segments = next_targets(batch), batch["preference"]["answers"]
  flat = hidden.reshape(-1, hidden.shape[-1])
  found = log_probs(flat, table, targets.reshape(-1), cap=cap).reshape(targets.shape)
  count = 1 + segments[0].size  # those of answers, and 0, which is padding

  def over_segments(x: Array) -> Array:
    add = functools.partial(jax.ops.segment_sum, num_segments=count)
    sums = jax.vmap(add)(x, batch["sequence"]["segment_ids"])
    chosen = jnp.take_along_axis(sums, segments.reshape(len(segments), -1), axis=1)
    return jnp.where(segments > 0, chosen.reshape(segments.shape), 0)

  sums, tokens = over_segments(found), over_segments((targets >= 0).astype(jnp.float32))
  return Answers(sums, tokens, tokens > 0)
