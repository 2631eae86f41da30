"""Settings of objectives that only the training data can tell (class weights, the scale of values):
filled in at the start of a run, so that its config and its checkpoints have the numbers.
"""

from __future__ import annotations

from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.data.statistics import Statistics
from mmjax.kinds import kind_function


def with_statistics(
  config: FrozenConfigDict, statistics: Statistics | None = None
) -> FrozenConfigDict:
  """The config with those settings. statistics: None = numbers of the same shape, to plan with.
  Raises UserError: the data does not have what an objective asks of it.
  """
  tree = config.to_dict()
  for name, entry in tree["objectives"].items():
    fit = getattr(kind_function(entry, "objective"), "fit", None)
    if fit is None:
      continue
    try:
      entry.update(fit(entry, statistics, tree["data"]))
    except UserError as error:
      raise UserError(f"objectives.{name}: {error}") from error
  return FrozenConfigDict(tree)
