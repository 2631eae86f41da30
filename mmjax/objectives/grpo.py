"""Learning from rewards of one's own answers: group relative policy optimisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, objective
from mmjax.objectives.cross_entropy import log_probs
from mmjax.objectives.language_modelling import next_targets
from mmjax.ranges import FunctionName, NonNegative, Part, Positive, Several, Size

Array = jax.Array


@objective(
  couples_examples=False, methods=("next_tokens", "prefill", "init_cache", "extend", "decode_step")
)
def grpo(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  answers: Several = 8,
  max_length: Size = 16,
  temperature: Positive = 1.0,
  exact: NonNegative = 1.0,
  right: NonNegative = 0.0,
  check: FunctionName = "",
  form: NonNegative = 0.0,
  pattern: str = "",
  normalise: bool = True,
  clip: Part = 0.2,
  updates: Size = 1,
  beta: NonNegative = 0.0,
  teacher: str = "",
) -> Losses:
  """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, equations 3 and 4).

  At each step the model as it is draws answers to the prompts of the batch (training/rollouts.py),
  and each is rewarded by what can be checked. With A its advantage, which is its reward less the
  mean of its group, divided by the group's standard deviation, p the probability of a token and
  p_old that at the time it was drawn, the mean over answers of the mean over their tokens of
    -min(p / p_old A, clip(p / p_old, 1 - clip, 1 + clip) A)
      + beta (p_reference / p - log(p_reference / p) - 1)

  answers: to each prompt, which are a group. max_length: tokens of an answer at most. temperature:
  answers are drawn from softmax(logits / temperature), which is also what p is of.
  exact: reward of an answer that is the record's, case and spaces aside. right: of one of which all
  is true that `check` says. check: "module:function(facts, question, answer, text) -> {name:
  bool}", as of the evaluator "answers". form: reward of one that ends by itself and is, as a whole,
  of the regular expression `pattern`; "" = any. Rewards add up.
  normalise: False: advantages are not divided by the standard deviation, and the sum over an
  answer's tokens is divided by max_length, not by their number: without the bias to short right
  answers and to easy or hard questions ("Dr. GRPO", Liu et al. 2025, arXiv:2503.20783).
  clip: matters where a batch is learned from more than once: at first p = p_old.
  updates: of the optimizer on the answers of a step, all at the learning rate of this step.
  beta: how dearly a step away from the reference is paid. teacher: its checkpoint, such as that of
  init.from.

  Reads batch["rollout"] (data/rollouts.py) and batch["sequence"], an answer a row. Rows with
  `valid` False do not count. Returns of answers "reward", "exact", "formed", "right" (with
  `check`), "tied" (share in whose group all rewards are equal, so that nothing is learned) and
  "tokens"; of tokens "entropy" (estimated: the mean of -log p), "kl" (with `beta`), and "clipped",
  the share that was (with more than one of `updates`, those of the last).
  """
  rollout, counts = batch["rollout"], next_targets(batch) >= 0
  found = answer_log_probs(forward("next_tokens"), batch, temperature)
  old = rollout["old"] if "old" in rollout else jax.lax.stop_gradient(found)
  advantage, ratio = rollout["advantage"][:, None], jnp.exp(found - old)
  free, bound = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
  gain = jnp.minimum(free, bound)
  of_tokens = {"entropy": -found}
  if "old" in rollout:
    of_tokens["clipped"] = bound < free
  if beta:
    reference = answer_log_probs(forward.teacher(teacher, "next_tokens"), batch, temperature)
    of_tokens["kl"] = jnp.exp(reference - found) - (reference - found) - 1
    gain -= beta * of_tokens["kl"]

  tokens = counts.sum(axis=1, dtype=jnp.float32)
  rows = tokens > 0
  each = jnp.where(counts, gain, 0).sum(axis=1)
  each = each / (jnp.maximum(tokens, 1) if normalise else max_length)
  of_rows = {
    name: rollout[name]
    for name in ("reward", "exact", "formed", "right", "tied")
    if name in rollout
  }

  def over(which: Array, x: Array) -> tuple[Array, Array]:
    return jnp.where(which, x, 0).sum(dtype=jnp.float32), which.sum(dtype=jnp.float32)

  return {
    "loss": over(rows, -each),
    **{name: over(rows, x) for name, x in (of_rows | {"tokens": tokens}).items()},
    **{name: over(counts, x) for name, x in of_tokens.items()},
  }


def answer_log_probs(
  next_tokens: tuple[Array, Array, float], batch: dict, temperature: float
) -> Array:
  """float32 [B, L]: log softmax(logits / temperature) of the token after each, where it is of an
  answer; 0 elsewhere. next_tokens: hidden [B, L, D], the output table and the cap of its logits.
  """
  hidden, table, cap = next_tokens
  targets, flat = next_targets(batch), hidden.reshape(-1, hidden.shape[-1])
  # cap / T tanh(x / T / (cap / T)) = cap tanh(x / cap) / T
  flat, cap = (flat / temperature, cap / temperature) if temperature != 1 else (flat, cap)
  return log_probs(flat, table, targets.reshape(-1), cap=cap).reshape(targets.shape)
