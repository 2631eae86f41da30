"""What a row of a language model is made of, in order: spans of tokens and media."""

from __future__ import annotations

from typing import NamedTuple

MEDIA = ("image", "audio", "video", "series")


class Span(NamedTuple):
  """Tokens of text; target: the loss is of them."""

  tokens: list[int]
  target: bool


class Medium(NamedTuple):
  """A medium of the record, of several of its modality the `number`-th."""

  modality: str
  number: int = 0
