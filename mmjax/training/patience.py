"""Early stopping: a run ends when its best checkpoint has not got better for a while."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from mmjax.state.checkpoint import best_mode


@dataclasses.dataclass
class Patience:
  """Counts the evaluations since the one with the best `checkpoint.best`. Its fields travel with
  every checkpoint, so that a run which is killed and started again ends at the same step.

  best: the value, None before the first; best_step: when. waited: evaluations since then.
  """

  best: float | None = None
  best_step: int = 0
  waited: int = 0

  @classmethod
  def of(cls, data: Mapping[str, Any]) -> Patience:
    """As a checkpoint noted it; new for a run, and for a checkpoint of an older version."""
    return cls(**data.get("patience", {}))

  def see(self, step: int, metrics: Mapping[str, float], config: FrozenConfigDict) -> None:
    """Takes the metrics of an evaluation in."""
    value = metrics.get(config.checkpoint.best, math.nan)
    sign = 1 if best_mode(config.checkpoint) == "max" else -1
    if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
      self.best, self.best_step, self.waited = value, step, 0
    else:
      self.waited += 1

  def is_over(self, config: FrozenConfigDict) -> bool:
    """Whether the run ends here."""
    limit = config.evaluation.patience
    return bool(limit) and self.waited >= limit

  def reason(self, config: FrozenConfigDict) -> str:
    """Why it ends, for people."""
    since = (
      f"the best is {self.best:.4g} of step {self.best_step}" if self.best_step else "no value"
    )
    return (
      f"{config.checkpoint.best} did not get better in {self.waited} evaluations "
      f"(evaluation.patience); {since}"
    )
