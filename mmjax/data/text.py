"""Captions as arrays of tokens: prepared, cut, padded, with a key each."""

from __future__ import annotations

import hashlib
import string
import unicodedata
from collections.abc import Sequence

import numpy as np

from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextTransform:
  """Captions as arrays: TextTransform(config.data.text, tokenizer)(captions, length) -> dict of

  tokens int32 [N, L] (cut with <eos> kept, padded; L = length, 0 = data.text.length), mask bool [N,
  L] (True = real), key uint32 [N, 2] (`text_key`), and with data.text.words: words int32 [N, L],
  the number of the word of each token (-1 = none).
  """

  def __init__(self, config, tokenizer: Tokenizer):
    self.tokenizer, self.length, self.lowercase, self.mask_padding = (
      tokenizer,
      config.length,
      config.lowercase,
      config.mask_padding,
    )
    self.punctuation, self.words = config.punctuation, config.get("words", False)
    self.pad_id = config.pad_id if config.pad_id >= 0 else max(tokenizer.pad_id, 0)
    if not 0 <= self.pad_id < config.vocab_size:
      raise UserError(
        f"data.text.pad_id is {self.pad_id}, but must be below data.text.vocab_size "
        f"{config.vocab_size}"
      )
    for name in ("bos", "eos"):
      if config[name] and getattr(tokenizer, f"{name}_id") < 0:
        raise UserError(
          f"data.text.{name} is true, but tokenizer {config.tokenizer!r} has no <{name}>. Set "
          f"data.text.{name}=false"
        )
    self.start = [tokenizer.bos_id] if config.bos else []
    self.end = [tokenizer.eos_id] if config.eos else []
    if len(self.start) + len(self.end) > self.length:
      raise UserError(f"data.text.length is {self.length}: no room for <bos> and <eos>")

  def __call__(self, captions: Sequence[str], length: int = 0) -> dict[str, np.ndarray]:
    tokens = np.full((len(captions), length or self.length), self.pad_id, np.int32)
    mask = np.full(tokens.shape, not self.mask_padding)
    words = np.full(tokens.shape, -1, np.int32)
    for row, caption in enumerate(captions):
      ids = self.encode(caption, length)
      tokens[row, : len(ids)] = ids
      mask[row, : len(ids)] = True
      if self.words:
        inner = slice(len(self.start), len(ids) - len(self.end))
        starts = self.tokenizer.word_starts(self._prepared(caption))[: inner.stop - inner.start]
        words[row, inner] = np.cumsum([False, *starts[1:]])[: len(starts)]
    keys = np.array([text_key(c) for c in captions], np.uint32).reshape(-1, 2)
    return {"tokens": tokens, "mask": mask, "key": keys, **({"words": words} if self.words else {})}

  def encode(self, caption: str, length: int = 0) -> list[int]:
    """At most `length` ids (0 = data.text.length), with <bos> and <eos> as configured."""
    ids = self.tokenizer.encode(self._prepared(caption))
    return self.start + ids[: (length or self.length) - len(self.start) - len(self.end)] + self.end

  def _prepared(self, caption: str) -> str:
    return prepared(caption, self.lowercase, self.punctuation)


def prepared(caption: str, lowercase: bool, punctuation: bool) -> str:
  """A caption as the tokenizer reads it: data.text.lowercase, data.text.punctuation."""
  if lowercase:
    caption = caption.lower()
  return caption if punctuation else " ".join(caption.translate(_NO_PUNCTUATION).split())


def normalise_caption(caption: str) -> str:
  """What makes two captions equal: NFKC, case folded, white space as single spaces."""
  return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def text_key(caption: str) -> tuple[int, int]:
  """Hash of the normalised caption as two uint32, high half first: equal captions have equal
  keys.
  """
  return split_key(
    int.from_bytes(
      hashlib.blake2b(normalise_caption(caption).encode(), digest_size=8).digest(), "big"
    )
  )


def split_key(key: int) -> tuple[int, int]:
  """A uint64 as two uint32, high half first: JAX has no uint64 by default."""
  return key >> 32, key & 0xFFFFFFFF


def drop_words(caption: str, probability: float, rng: np.random.Generator) -> str:
  """The caption without some of its words, each left out with `probability`; at least one stays."""
  words = caption.split()
  if len(words) < 2:
    return caption
  keep = rng.random(len(words)) >= probability
  keep[rng.integers(len(words))] |= not keep.any()
  return " ".join(word for word, kept in zip(words, keep, strict=True) if kept)


# -- Training a tokenizer --------------------------------------------------------------------------


# -- The three kinds -------------------------------------------------------------------------------
