"""How many processes prepare data on this machine."""

from __future__ import annotations

import functools
import os
import sys

from mmjax.printing import log

FEWEST = 8
OF_A_CORE = 4


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_most(asked: int, what: str) -> int:
  """`asked` processes, or as many as this machine has room for: four a core, and always eight. Says
  so once where they are fewer. what: the key or option that asks.
  """
  most = max(FEWEST, OF_A_CORE * cores())
  if asked > most:
    _say(
      f"{what} is {asked}: {most} processes are started, {OF_A_CORE} for each of {cores()} cores"
    )
  return min(asked, most)


@functools.cache
def _say(line: str) -> None:
  log(line, sys.stderr)
