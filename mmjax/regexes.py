"""Regular expressions of configs, which may be anybody's: matched within a bounded time."""

from __future__ import annotations

import functools
import re
import signal
import threading
import time
from typing import Any

from mmjax.errors import UserError

SECONDS = 5.0  # that the slow matches of a regex may take together
SLOW = 0.01  # seconds; usual matches take microseconds


class Slow(Exception):
  """The time is up."""


class Regex:
  """A regex. pattern: as `re.compile` takes it, with `flags`. Raises re.error: it is none."""

  def __init__(self, pattern: str, flags: int = 0):
    try:
      self._compiled = re.compile(pattern, flags)
    except (OverflowError, RecursionError, ValueError) as error:
      raise re.error(str(error)) from error
    self._left = SECONDS

  def fullmatch(self, text: str) -> re.Match | None:
    """As of `re.Pattern`. Raises UserError: the matches of this regex have taken too long, which
    repeats within repeats may without end.
    """
    start = time.monotonic()
    try:
      return self._fullmatch(text)
    except Slow as error:
      raise UserError(
        f"the regular expression {self._compiled.pattern!r} took more than {SECONDS:g} s for "
        f"names such as {text!r:.80}: write it without repeats that match the same in many ways"
      ) from error
    finally:
      took = time.monotonic() - start
      self._left = max(0.0, self._left - (took if took > SLOW else 0))

  def _fullmatch(self, text: str) -> re.Match | None:
    """`re` looks for signals as it works, but Python runs their handlers in its main thread alone;
    in another, a match is not cut short.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
      if not self._left:
        raise Slow
      return self._compiled.fullmatch(text)

    def over(*_: Any) -> None:
      raise Slow

    handler = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, max(self._left, 1e-3))
    try:
      return self._compiled.fullmatch(text)
    finally:
      signal.setitimer(signal.ITIMER_REAL, *timer)
      signal.signal(signal.SIGALRM, handler)


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str, flags: int = 0) -> Regex:
  """The regex of a pattern; the same one for the same pattern. Raises re.error: it is none."""
  return Regex(pattern, flags)
