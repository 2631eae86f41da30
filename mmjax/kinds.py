"""Kinds: the functions that entries of a config name, and their settings.

A *kind* (an encoder, an objective, an optimizer, ...) is a function whose keyword-only parameters
are its settings: their annotations are the types, their defaults the defaults, the docstring the
documentation. `keys.KINDS` has one line for each; `kind="my_package.my_file:my_function"` uses one
of your own without a line here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping

from mmjax.errors import ConfigError, nearest
from mmjax.keys import KINDS
from mmjax.printing import shorten

FUNCTION = r"[\w.]+:\w+"


def kind_function(entry: Mapping, group: str | None = None) -> Callable:
  """The function of an entry's `kind` (or `name`), e.g. `contrastive` for dict(kind="contrastive",
  ...).
  """
  name = entry.get("kind") or entry.get("name")
  groups = [group] if group else list(KINDS)
  for g in groups:
    if name in KINDS[g]:
      return load_function(KINDS[g][name])
  if name and ":" in name:
    return load_function(name)
  known = [kind for g in groups for kind in KINDS[g]]
  raise ConfigError(f"unknown kind {name!r}{nearest(str(name), known)}")


def kind_settings(function: Callable) -> dict[str, inspect.Parameter]:
  """The keyword-only parameters of a kind's function, annotations evaluated."""
  try:
    parameters = inspect.signature(function, eval_str=True).parameters
  except Exception as error:  # annotations of a user's function are code, too
    raise ConfigError(
      f"the settings of {function!r:.80} cannot be read: {what_happened(error)}"
    ) from error
  return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def load_function(target: str, what: str = "kind") -> Callable:
  """The function "module:function"; the module may also be a file in the current folder.

  what: names the setting in the error. Raises ConfigError: there is none, or `target` is not
  written so.
  """
  if not re.fullmatch(FUNCTION, target):
    raise ConfigError(f"{what} {target!r}: write module:function")
  module, _, name = target.partition(":")
  if "" not in sys.path and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # a command has only its own folder there
  try:
    function = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ConfigError(f"{what} {target!r}: {error}") from error
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise ConfigError(f"{what} {target!r}: {module}: {what_happened(error)}") from error
  if not callable(function):
    raise ConfigError(f"{what} {target!r} is no function, but {function!r:.80}")
  return function


def what_happened(error: BaseException) -> str:
  if isinstance(error, SystemExit):
    return f"it called sys.exit({error.code!r:.80}) while it was read"
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f"{shorten(error.filename)}: {error.strerror}"
  return f"{type(error).__name__}: {error!s:.600}"
