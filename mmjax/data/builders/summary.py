"""What a conversion made of a source: how many examples, and what it left out, by reason."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax import printing
from mmjax.data.readers.cells import Skip, printable
from mmjax.data.readers.rows import OUTSIDE

_ENDING = "ending not read"
# Of what is left out: id, reason, detail, how many rows of the source.
Entry = tuple[str, str, str, int]


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a conversion made: examples of the split, from how many rows of the source, {reason:
  count} of the rows that were left out and the first names of each (of files whose ending is not
  read: the endings), and how the source was understood.

  Rows about one medium are one example: `rows` and the counts in `skipped` add up to all rows and
  files of the source; `endings` has the same counts by {reason: {file ending: count}}, "none" of
  what is no file.
  """

  name: str
  split: str
  folder: str
  examples: int
  skipped: dict[str, int]
  first_skipped: dict[str, list[str]]
  seconds: float
  rows: int = 0
  notes: tuple[str, ...] = ()
  endings: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  others: tuple[Summary, ...] = ()

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    joined = f" from {self.rows:,} rows" if self.rows > self.examples else ""
    lines = [
      f"{self.folder}: {self.examples:,} examples{joined} in split {self.split!r}, "
      f"{self.seconds:.0f} s"
    ]
    lines += [f"  {note}" for note in self.notes]
    for reason, count in self.skipped.items():
      first = self.first_skipped[reason]
      names = ", ".join(map(printing.printable, first))
      more = ", ..." if count > len(first) and reason != _ENDING else ""
      more += "; --root names a folder that holds them all" if reason == OUTSIDE else ""
      lines.append(f"  left out {count:,}: {reason} ({names}{more})")
    return "\n".join([*lines, *map(str, self.others)])


def entry_of(name: str, skip: Skip, count: int = 1) -> Entry:
  return printable(name), skip.reason, printable(skip.detail), count


def counts_of(skipped: list[Entry]) -> dict[str, int]:
  """{reason: how many rows}, the most first."""
  counts: Counter[str] = Counter()
  for _, reason, _, count in skipped:
    counts[reason] += count
  return dict(counts.most_common())


def _endings(skipped: list[Entry]) -> dict[str, dict[str, int]]:
  """{reason: {file ending: rows}}, the most first."""
  found: dict[str, Counter[str]] = {}
  for row, reason, _, count in skipped:
    ending = os.path.splitext(row)[1].lower()
    ending = ending if re.fullmatch(r"\.\w{1,16}", ending) else "none"
    found.setdefault(reason, Counter())[ending] += count
  return {reason: dict(counts.most_common()) for reason, counts in found.items()}


def reasons(skipped: list[Entry]) -> str:
  """' (3 missing file, such as a.jpg; ...)', or ''."""
  parts = []
  for reason, count in list(counts_of(skipped).items())[:4]:
    row, _, detail, _ = next(entry for entry in skipped if entry[1] == reason)
    parts.append(
      f"{count} {reason}, such as {row}" + (f": {detail}" if detail and detail != row else "")
    )
  return f" ({'; '.join(parts)})" if parts else ""


def summary_of(
  name: str,
  split: str,
  folder: Path,
  origin: Mapping[str, Any],
  skipped: list[Entry],
  seconds: float,
) -> Summary:
  counts, first, endings = counts_of(skipped), {}, _endings(skipped)
  for reason in counts:
    names = [row for row, why, *_ in skipped if why == reason]
    if reason == _ENDING:
      names = [f"{ending} {count:,}" for ending, count in endings[reason].items()]
    first[reason] = names if reason == _ENDING else names[:3]
  return Summary(
    name,
    split,
    os.fspath(folder),
    origin["examples"],
    counts,
    first,
    seconds,
    origin.get("rows", origin["examples"]),
    tuple(origin.get("notes", ())),
    endings,
  )
