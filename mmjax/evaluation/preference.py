"""Whether a language model holds preferred answers for likelier than rejected ones."""

from __future__ import annotations

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result
from mmjax.objectives.preference import JUDGED


def preference(context: Context, *, source: str, split: str = "test") -> Result:
  """Judged answers of a split under a language model, without a reference.

  source: a data set with preferences. split: which of its splits.
  Metrics: "preferred" (share of pairs whose preferred answer has the higher log-probability; a tie
  is none), "preferred/low" and "/high" (95%, Wilson 1927), "preferred_per_token" (the same by the
  mean over an answer's tokens), "margin" (mean difference in nats), "chosen" and "rejected" (mean
  log-probability of an answer), "pairs", "answers", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if not context.config.data.sequence.length:
    raise UserError(f"{where}: only a language model (data.sequence.length) judges answers")
  data = context.data(source, split, (), "preference")
  judged, valid = context.apply(JUDGED, (1,), data.batches(()))
  log_probs, tokens = np.moveaxis(np.asarray(judged[valid][:, 0, :2], np.float64), -1, 0)
  has_answer = tokens > 0
  pair = has_answer.all(1)
  chosen, rejected = log_probs[pair].T
  each = np.divide(log_probs[pair], tokens[pair])
  metrics: dict[str, float] = {}
  if pair.any():
    preferred = chosen > rejected
    low, high = wilson(int(preferred.sum()), len(preferred))
    metrics |= {"preferred": float(preferred.mean()), "preferred/low": low, "preferred/high": high}
    metrics["preferred_per_token"] = float((each[:, 0] > each[:, 1]).mean())
    metrics["margin"] = float((chosen - rejected).mean())
  for side, name in enumerate(("chosen", "rejected")):
    if has_answer[:, side].any():
      metrics[name] = float(log_probs[has_answer[:, side], side].mean())
  metrics |= dict(pairs=float(pair.sum()), answers=float(has_answer.sum()))
  metrics["unreadable"] = float(data.unreadable)
  return Result(metrics, {})


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
  """The interval of a share, 95% by default (Wilson 1927, score interval)."""
  share, weight = successes / count, z * z / count
  middle, half = share + weight / 2, z * np.sqrt(share * (1 - share) / count + weight / count / 4)
  return float((middle - half) / (1 + weight)), float((middle + half) / (1 + weight))
