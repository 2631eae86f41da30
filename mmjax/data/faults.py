"""What could not be read or was cut, told once and counted."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from mmjax.config import UserError
from mmjax.data.media import WORDS
from mmjax.printing import printable

_LENGTHS = {"audio": "data.audio.seconds", "series": "data.series.length"}  # what cuts them


class CutMedia:
  """Counts and names sounds and series that are longer than the config takes: the first three by
  name, then each tenfold number.
  """

  LIMIT = 10_000  # names that are kept

  def __init__(self) -> None:
    self.names: dict[str, set[str]] = {}
    self._said: dict[str, int] = {}

  def add(self, cut: Iterable[tuple[str, str, str]]) -> None:
    """cut: (modality, name, how long it is) of each."""
    for modality, name, surplus in cut:
      names = self.names.setdefault(modality, set())
      if name in names or len(names) >= self.LIMIT:
        continue
      names.add(name)
      if len(names) <= 3:
        self._warn(
          f"only the beginning is used of a {WORDS[modality]}, {surplus} ({_LENGTHS[modality]}): "
          f"{name}",
          modality,
        )
      elif len(names) in (10, 100, 1000, self.LIMIT):
        self.total()

  def total(self) -> None:
    """Says how many there are so far, unless that was said."""
    for modality, names in self.names.items():
      if len(names) > max(3, self._said.get(modality, 0)):
        at_least = "at least " if len(names) >= self.LIMIT else ""
        self._warn(
          f"{at_least}{len(names):,} {WORDS[modality]}{'s' if modality == 'audio' else ''} exceed "
          f"{_LENGTHS[modality]}; only their beginning is used",
          modality,
        )

  def _warn(self, line: str, modality: str) -> None:
    self._said[modality] = len(self.names[modality])
    print(printable(line), file=sys.stderr, flush=True)


def report_unreadable(
  unreadable: Sequence[tuple[str, str]], known: dict[str, str], limit: int
) -> None:
  """Names each unusable record once on stderr; raises UserError when there are more than
  `limit`.
  """
  for name, reason in unreadable:
    if name not in known:
      known[name] = reason
      print(
        printable(f"unreadable record, its row does not count: {name}: {reason}"),
        file=sys.stderr,
        flush=True,
      )
  if len(known) > limit:
    last, reason = list(known.items())[-1]
    raise UserError(
      f"{len(known)} records could not be read (data.max_unreadable is {limit}); the last: "
      f"{last}: {reason}. Repair or convert the data again, or raise data.max_unreadable"
    )
