"""Steps that are not finite: how many, in a row, and when a run goes back to an earlier checkpoint
because of them.

A rollback (train.rollback) takes parameters, optimizer state and averages from the last good
checkpoint; the step count, and with it data order, randomness and learning rate, goes on. So a
batch that did harm is not seen again, nothing in metrics.jsonl is taken back, and whether and where
to a run goes back depends on its steps alone: it is the same for a run that was killed in between.
Good is a checkpoint at a multiple of checkpoint.every that no skipped step came right before
(skipped steps change nothing: one saved amid them holds what made them so).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.state.checkpointer import Checkpointer
from mmjax.state.train_state import TrainState


@dataclasses.dataclass
class Faults:
  """The counts of a run; a checkpoint keeps them in its item `data`. good: the last good
  checkpoint, 0 = none yet.
  """

  skipped: int = 0
  skipped_in_a_row: int = 0
  rollbacks: int = 0
  good: int = 0

  @classmethod
  def of(cls, data: Mapping[str, Any]) -> Faults:
    """As the checkpoint's `data` has them; none for a new run."""
    return cls(**{field.name: int(data.get(field.name, 0)) for field in dataclasses.fields(cls)})

  def count(self, skipped: bool) -> None:
    self.skipped += skipped
    self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

  def decides_now(self, config: FrozenConfigDict) -> bool:
    """Whether the outcome of the step just made could call for a rollback, so that it is read
    before the next.
    """
    return bool(config.train.rollback) and self.skipped_in_a_row >= config.train.rollback - 1

  def rollback_due(self, config: FrozenConfigDict) -> bool:
    return bool(config.train.rollback) and self.skipped_in_a_row == config.train.rollback

  def roll_back(
    self, saver: Checkpointer, spec: TrainState, at: int, log: Callable[[str], None]
  ) -> TrainState:
    """The state of the last good checkpoint, its own step in it. Raises UserError: it is gone or
    corrupt.
    """
    log(
      f"step {at}: {self.skipped_in_a_row} steps in a row were not finite (train.rollback); back "
      f"to the parameters of checkpoint {self.good}, on with step {at + 1}"
    )
    self.rollbacks += 1
    found = saver.restore(spec, only=self.good)
    if found is None:
      raise UserError(
        f"checkpoint {self.good} of this run, to which it has to go back (train.rollback), is "
        "gone. Start again to go on from the newest"
      )
    return found[0]

  def saving(self, step: int, every: int) -> None:
    """A checkpoint of `step` is about to be made."""
    if every and step % every == 0 and not self.skipped_in_a_row:
      self.good = step
