"""The parser of a command: its errors in one line, and the arguments that several commands take."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable
from typing import Any

EXIT_FAILED, EXIT_USAGE = 1, 2


class Failure(Exception):
  """Ends a command with an exit code and one line on stderr."""

  def __init__(self, code: int, why: object):
    super().__init__(str(why))
    self.code, self.why = code, why


class Parser(argparse.ArgumentParser):
  """argparse with one-line errors, for which "" names no file, folder or data set, unless it is the
  default.
  """

  def add_argument(self, *names, **settings):
    if settings.get("metavar") in ("DIR", "FILE", "FOLDER", "SRC", "NAME"):
      settings.setdefault("type", _name_or_none if settings.get("default") == "" else _name)
    return super().add_argument(*names, **settings)

  def error(self, message: str):
    raise Failure(EXIT_USAGE, f"{message}. See `{self.prog} --help`")


def _name(text: str) -> str:
  if not text.strip():
    raise argparse.ArgumentTypeError("it is empty: give a name")
  try:
    nul = b"\0" in os.fsencode(text)
  except UnicodeEncodeError:
    nul = True
  if nul:
    raise argparse.ArgumentTypeError(f"no file can be called {text!r:.200}")
  return text


def _name_or_none(text: str) -> str:
  return text and _name(text)


def number(annotation: typing.Any) -> Callable[[str], float]:
  """The `type` of an argument whose number lies in the range of `annotation` (ranges.py)."""
  kind, bounds = typing.get_args(annotation)
  noun = "a whole number" if kind is int else "a number"

  def read(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = None
    if value is None or not bounds.holds(value):
      raise argparse.ArgumentTypeError(f"it is {text!r:.40}, but must be {noun}, {bounds}")
    return value

  return read


def command(
  parent: Any, name: str, text: str, example: str, overrides: bool = False
) -> argparse.ArgumentParser:
  """The parser of a command; its options have `run`, the words that call it ("data build")."""
  sub = parent.add_parser(
    name,
    help=text,
    description=text,
    epilog=f"Example: {example}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
  run = sub.prog.partition(" ")[2]
  sub.set_defaults(run=run, parser=sub, takes_overrides=overrides)
  return sub


def allow_code(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--allow-code",
    action="append",
    default=[],
    metavar="MODULE",
    help="let a checkpoint run code of this module of yours; repeatable",
  )


def data_dir(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--data-dir",
    default="",
    metavar="DIR",
    help="folder of the data sets; default: $MMJAX_DATA, else ~/.cache/mmjax",
  )
