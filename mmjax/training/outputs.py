"""Everything that the main process writes into the run folder while training."""

from __future__ import annotations

import contextlib
import statistics
import time

from ml_collections import FrozenConfigDict

from mmjax import evaluation, remote
from mmjax.evaluation import report
from mmjax.files import disk_errors
from mmjax.ownership import Owner
from mmjax.training.metrics import MetricsFile, TensorBoard, WeightsAndBiases


class Outputs:
  """Everything that the main process writes into the run folder while training."""

  def __init__(
    self, mirror: remote.Mirror, step: int, config: FrozenConfigDict, owner: Owner | None = None
  ):
    self._mirror, self._owner = mirror, owner
    if owner:
      owner.check()
    with self._disk_errors():
      self._file = MetricsFile(mirror.folder, step)
      self._boards: list[TensorBoard | WeightsAndBiases] = []
      if config.log.tensorboard:
        self._boards.append(TensorBoard(mirror.folder, step))
    if config.log.wandb:
      self._boards.append(
        WeightsAndBiases(config.log.wandb, mirror.place, mirror.folder, config.to_dict())
      )

  def write(self, row: dict) -> None:
    if self._owner:
      self._owner.check_known()
    with self._disk_errors():
      self._file.write(row)
      for board in self._boards:
        board.write(row)

  def evaluated(self, step: int, results: dict) -> None:
    """Writes the scores of a step, unless the last line has them: the process before got so far."""
    metrics = evaluation.flat_metrics(results)
    if self._file.last.get("step") != step or not metrics.keys() <= self._file.last.keys():
      self.write(dict(step=step, time=time.time(), **metrics))

  def step_seconds(self, batch_size: int) -> float | None:
    """Seconds a step by what is written: the median; None where no line has a speed."""
    speeds = [row.get("examples_per_second") for row in report.read_metrics(self._file.path)]
    return (
      statistics.median(batch_size / speed for speed in speeds if speed) if any(speeds) else None
    )

  def sync(self) -> None:
    """Everything that was written is on the disk, or at the URL: before a checkpoint that stands
    for it.
    """
    with self._disk_errors():
      self._file.sync()
    self._mirror.upload()

  def finish(self, config: FrozenConfigDict, results: dict | None, about: dict) -> None:
    """The scores and the report of a run that is complete. about: `evaluation.provenance`."""
    if self._owner:
      self._owner.check()
    self.sync()
    if results:
      self._mirror.fetch("eval.json")
      evaluation.write_eval_json(self._mirror.folder, results, about)
    report.write_report(self._mirror.folder, config, results or {}, self._file.path)

  def close(self) -> None:
    with self._disk_errors(), contextlib.ExitStack() as ends:
      ends.callback(self._file.close)
      for board in self._boards:
        ends.callback(board.close)

  def _disk_errors(self):
    return disk_errors(
      self._mirror.folder,
      f"{self._mirror.place}: metrics cannot be written",
      ". What was saved is intact: free space or mend the folder, then start again",
    )
