"""What a user can mend: errors whose message is one line, and what it names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake that the user can mend. Its message is one line: what, where, how to mend. Commands
  print it and exit 1.
  """


class ConfigError(UserError):
  """A mistake in a config or on the command line. Commands exit 2."""


class UntrustedCode(UserError):
  """The config of a checkpoint names code outside this package that the user has not allowed."""


class StoreError(Exception):
  """A store does not answer: no reason to take what was asked for as missing or broken, or to go on
  without it.
  Not an OSError, which is caught where files may be missing or broken. why: the reason alone."""

  # An error that comes from another process is made of its text alone.
  def __init__(self, text: str, why: str = ""):
    super().__init__(text)
    self.why = why or text


def nearest(name: str, options: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
  return f". Did you mean {near[0]!r}?" if near else ""
