"""Reads a large JSON document value by value, so that what is not needed is never held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from mmjax.config import UserError

_CHUNK = 1 << 20  # characters


class Twice(dict):
  """An object in which a key stands twice, so that a value of it is lost."""


class Several(Exception):
  """An object is not all of its file: another value follows."""


def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON, as decoders take it for `object_pairs_hook`."""
  found = dict(pairs)
  return found if len(found) == len(pairs) else Twice(found)


_DECODER = json.JSONDecoder(object_pairs_hook=as_object)


def values(file: IO[str], path: str) -> Iterator[tuple[str | None, Any]]:
  """The items of the array that a document is, or of the arrays that it is one after the other, as
  (None, item); of an object (key, value), an array item by item.

  Raises UserError: no JSON, or neither an array nor an object. Raises Several, at the end: an
  object, and more.
  """
  stream = _Stream(file)
  try:
    start = stream.take("[{")
    if start == "[":
      yield from ((None, item) for item in stream.items())
      while stream.peek():
        stream.take("[")
        yield from ((None, item) for item in stream.items())
      return
    while stream.more("}"):
      key = stream.value()
      stream.take(":")
      if stream.peek() == "[":
        stream.take("[")
        yield key, []
        yield from ((key, item) for item in stream.items())
      else:
        yield key, stream.value()
    if stream.peek():
      raise Several
  except (ValueError, RecursionError) as error:
    raise stream.error(path, error) from error


def objects(file: IO[str], path: str) -> Iterator[Any]:
  """Values that stand one after the other. Raises UserError: no JSON."""
  stream = _Stream(file)
  try:
    while stream.peek():
      yield stream.value()
  except (ValueError, RecursionError) as error:
    raise stream.error(path, error) from error


class _Stream:
  """Characters of a file, of which those that are read are forgotten."""

  def __init__(self, file: IO[str]):
    self.file, self.text, self.at, self.before, self.ended, self.first = file, "", 0, 0, False, True

  def error(self, path: str, why: Exception) -> UserError:
    where = f"about character {self.before + self.at:,}"
    return UserError(f"{path}: no readable JSON ({why}; {where})")

  def peek(self) -> str:
    """The next character that is not white space, "" at the end."""
    while True:
      while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
        self.at += 1
      if self.at < len(self.text) or self.ended:
        return self.text[self.at : self.at + 1]
      self._read_more()

  def take(self, wanted: str) -> str:
    """The next character, one of `wanted`. Raises ValueError."""
    found = self.peek()
    if not found or found not in wanted:
      raise ValueError(f"{' or '.join(wanted)} expected, not {found or 'the end'}")
    self.at += 1
    return found

  def more(self, end: str) -> bool:
    """Whether another item comes before `end`; passes the comma before it, or the end. Raises
    ValueError.
    """
    if self.first and self.peek() != end:
      self.first = False
      return True
    self.first = True
    if self.take(f",{end}") == end:
      return False
    self.first = False
    return True

  def items(self) -> Iterator[Any]:
    """The items of an array that has been entered."""
    self.first = True
    while self.more("]"):
      yield self.value()
    self.first = False

  def value(self) -> Any:
    """The next value. Raises ValueError, RecursionError."""
    self.peek()
    while True:
      try:
        value, end = _DECODER.raw_decode(self.text, self.at)
        if end < len(self.text) or self.ended:  # else a number may go on
          self.at = end
          return value
      except ValueError:
        if self.ended:
          raise
      self._read_more()

  def _read_more(self) -> None:
    """Reads on: as much again as a value has already taken, so that a long one is not parsed many
    times.
    """
    more = self.file.read(max(_CHUNK, len(self.text) - self.at))
    self.before += self.at
    self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more
