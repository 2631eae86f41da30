"""What a language model writes after prompts of text and media: in batches, or piece by piece; and
the likelihood of given answers.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.data.media import WORDS
from mmjax.data.naflex import size_class
from mmjax.data.placeholders import (
  Places,
  axes_of,
  mixes_tokens,
  placeholders,
  positions_of,
  prompted,
)
from mmjax.data.tokenizers import Tokenizer, check_texts, decode
from mmjax.inference.engine import Decoding, go_on_from_prompts, score
from mmjax.inference.inputs import Item, MediaInputs

LENGTHS = tuple(2**n for n in range(3, 21))  # of prompts: they are filled up to one of these
AT_ONCE = 8  # tokens that are decoded before a stream is looked at


class Read(NamedTuple):
  """A prompt, or the rest of one, with the slots of its media: [(modality, arrays of one slot)]."""

  parts: list[list[int] | Places]
  media: list[tuple[str, dict[str, np.ndarray]]]
  first: int = 0  # the position of the first token


class LanguageGenerator:
  """Goes on from prompts with a language model; its mesh and rules are in use by the caller."""

  def __init__(
    self,
    config,
    model: nn.Module,
    variables: Any,
    tokenizer: Tokenizer,
    media: Mapping[str, MediaInputs],
    rows: Sequence[int],
  ):
    """rows: sizes that batches are filled up to, ascending. media: readers of the model's
    modalities.
    """
    self.config, self.model, self.variables = config, model, variables
    self.tokenizer, self.media, self.rows = tokenizer, media, rows
    self._programs: dict[Any, Callable] = {}

  def generate(
    self,
    prompts: str | Sequence[str],
    media: Mapping[str, Any],
    *,
    max_length: int,
    decoding: Decoding,
    stop: Sequence[str] = (),
    seed: int = 0,
  ) -> list[str]:
    """The text after each prompt, up to its end or the first of the `stop` strings, which is left
    out. media: {modality: an item, or for each prompt an item or a list of them}.

    A medium stands where the prompt has <image>, <audio>, <video> or <series>; media come first in
    a prompt without these. Row i draws by (seed, i), whatever batch it is in.
    Raises UserError: other numbers of media than of places for them, one that cannot be read, or a
    prompt longer than the model's positions.
    """
    read = self.read(prompts, media)
    if not read:
      return []
    most = self.rows[-1]
    order = sorted(range(len(read)), key=lambda i: self.size(read[i]))  # few shapes
    found: dict[int, str] = {}
    for start in range(0, len(order), most):
      chosen = order[start : start + most]
      batch, ids = self._batch([read[i] for i in chosen], chosen, max_length)
      run = self.program(
        ("generate", max_length, decoding), functools.partial(self._generate, max_length, decoding)
      )
      tokens = np.asarray(run(self.variables, batch, jax.random.key(seed), ids))
      for i, row in zip(chosen, tokens, strict=False):
        found[i] = cut_at(self.text(row), stop)
    return [found[i] for i in range(len(read))]

  def score(
    self, prompts: str | Sequence[str], options: Sequence[str], media: Mapping[str, Any]
  ) -> np.ndarray:
    """float32 [prompts, options]: the log-likelihood in nats of each option after each prompt, its
    end included.
    """
    read = self.read(prompts, media)
    endings = [[*self.encode(option), self.model.eos_id] for option in options]
    rows = [
      (Read([*one.parts, ending], one.media), len(ending)) for one in read for ending in endings
    ]
    found = np.zeros(len(rows), np.float32)
    order = sorted(range(len(rows)), key=lambda i: self.size(rows[i][0]))
    for start in range(0, len(order), self.rows[-1]):
      chosen = order[start : start + self.rows[-1]]
      batch, _ = self._batch([rows[i][0] for i in chosen], chosen, 1)
      length = batch["sequence"]["length"]
      ends = np.ones(len(length), np.int32)
      ends[: len(chosen)] = [rows[i][1] for i in chosen]
      run = self.program(("score",), self._score)
      found[chosen] = np.asarray(run(self.variables, batch, length - ends))[: len(chosen)]
    return found.reshape(len(read), len(options))

  # -- Programs, compiled once for each shape and way of decoding ----------------------------------

  def program(self, key: tuple, make: Callable, **how: Any) -> Callable:
    """`make`, compiled once for each key; how: as of jax.jit."""
    if key not in self._programs:
      self._programs[key] = jax.jit(make, **how)
    return self._programs[key]

  def _generate(self, max_length, decoding, variables, batch, rng, ids):
    return go_on_from_prompts(self.model, variables, batch, max_length, decoding, rng=rng, ids=ids)[
      0
    ]

  def _score(self, variables, batch, first):
    s = batch["sequence"]
    places = jnp.arange(s["tokens"].shape[1])
    wanted = (places >= first[:, None]) & (places < s["length"][:, None])
    batch = {**batch, "sequence": {**s, "loss_mask": wanted}}
    hidden, table, cap = self.model.apply(variables, batch, method="next_tokens")
    targets = jnp.where(wanted, s["tokens"], -1)[:, 1:]
    return score(hidden[:, :-1], table, targets, cap)

  # -- Prompts as arrays ---------------------------------------------------------------------------

  def encode(self, text: str) -> list[int]:
    """The tokens of a piece of a prompt."""
    check_texts([text])
    return self.tokenizer.encode(text.lower() if self.config.data.text.lowercase else text)

  def text(self, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of generated tokens, up to what ends it."""
    return decode(
      self.tokenizer, [int(token) for token in tokens], (self.model.eos_id, *self.model.end_ids)
    )

  def read(self, prompts: str | Sequence[str], media: Mapping[str, Any]) -> list[Read]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    given: list[dict[str, list[Item]]] = [{} for _ in prompts]
    for modality, items in media.items():
      if modality not in self.media:
        raise UserError(
          f"this model has no encoder for {modality}; it has {', '.join(self.media) or 'none'}"
        )
      rows = list(items) if isinstance(items, (list, tuple)) else [items]
      if len(rows) != len(prompts):
        raise UserError(
          f"{len(prompts)} prompts, but {len(rows)} items of {modality}=: give one (or a list of "
          "several) for each prompt"
        )
      for row, item in zip(given, rows, strict=True):
        several = item if isinstance(item, (list, tuple)) else [] if item is None else [item]
        row[modality] = list(several)
    return [
      self._one(number, *pair) for number, pair in enumerate(zip(prompts, given, strict=True))
    ]

  def _one(self, number: int, prompt: str, given: dict[str, list[Item]]) -> Read:
    marks = "|".join(f"<{modality}>" for modality in self.media)
    pieces = re.split(f"({marks})", prompt) if marks else [prompt]
    if len(pieces) == 1:
      pieces = [*(f"<{m}>" for m, items in given.items() for _ in items), prompt]
    known = {f"<{modality}>": modality for modality in self.media}
    for mark, modality in known.items():
      have = len(given.get(modality, []))
      if (count := pieces.count(mark)) != have:
        raise UserError(
          f"prompt {number + 1} has {count} places <{modality}>, but {have} of {modality}= are "
          f"given for it. Give as many {WORDS[modality]}s as places"
        )
    sequence = self.config.data.sequence
    last = max((i for i, piece in enumerate(pieces) if piece in known), default=-1)
    pieces = [*pieces[: last + 1], prompted(sequence, "".join(pieces[last + 1 :]))]
    items = {modality: iter(several) for modality, several in given.items()}
    whole: list[str | Places] = []
    media: list[tuple[str, dict[str, np.ndarray]]] = []
    for piece in pieces:
      if piece in known:
        modality = known[piece]
        alone = len(given[modality]) == 1
        placed = self.place(modality, next(items[modality]), media, alone)
        before = placed[0]
        if before and whole and isinstance(whole[-1], str) and whole[-1].endswith(str(before)):
          placed = placed[1:-1]  # the prompt has what is written around it
        whole += placed
      else:
        whole.append(piece)
    bos = self.tokenizer.bos_id
    first: list[list[int]] = [[bos]] if self.config.data.text.bos and bos >= 0 else []
    parts = [*first, *self._parts(number, [part for part in whole if part != ""])]
    if not parts:
      raise UserError(f"prompt {number + 1} is empty: give it a text, or a medium")
    return Read(parts, media)

  def place(
    self, modality: str, item: Item, media: list[tuple[str, dict[str, np.ndarray]]], alone: bool
  ) -> list[str | Places]:
    """What stands in a prompt for a medium, whose slots are added to those of `media`. alone: no
    other of its modality is in it.
    """
    slots, tiling = self.media[modality].slots(self.media[modality](item), alone)
    before = sum(name == modality for name, _ in media)
    media += [(modality, arrays) for arrays in slots]
    return [
      part._replace(slot=before + part.slot) if isinstance(part, Places) else part
      for part in placeholders(self.config.data, modality, slots, tiling)
    ]

  def _parts(self, number: int, whole: list[str | Places]) -> list[list[int] | Places]:
    """Pieces of text as tokens. Where media have tokens of the tokenizer's own, it cuts the whole
    prompt, as in other programs: how a text is cut may depend on whether something stands before
    it.
    """
    places = [part for part in whole if isinstance(part, Places)]
    own = {m: self.model.media_ids.get(m, -1) for m in dict.fromkeys(p.modality for p in places)}
    marks = {m: self.tokenizer.piece(i) if i >= 0 else "" for m, i in own.items()}
    if not all(mark and self.encode(mark) == [own[m]] for m, mark in marks.items()):
      return [part if isinstance(part, Places) else self.encode(part) for part in whole]
    text = "".join(marks[part.modality] if isinstance(part, Places) else part for part in whole)
    tokens, media = self.encode(text), iter(places)
    if sum(token in own.values() for token in tokens) != len(places):
      raise UserError(
        f"prompt {number + 1} has {' or '.join(marks.values())} in its text, which stands for a "
        f"medium: write {' or '.join(f'<{m}>' for m in own)} where media are"
      )
    parts: list[list[int] | Places] = []
    for token in tokens:
      if token in own.values():
        parts.append(next(media))
      elif parts and isinstance(parts[-1], list):
        parts[-1].append(token)
      else:
        parts.append([token])
    return parts

  def size(self, read: Read) -> int:
    """Tokens of a prompt, its media among them."""
    return sum(len(part.offsets if isinstance(part, Places) else part) for part in read.parts)

  def _batch(
    self, rows: list[Read], ids: Sequence[int], max_length: int
  ) -> tuple[dict[str, Any], np.ndarray]:
    """(rows as arrays, filled up to a size of `self.rows` and of LENGTHS; ids of their draws).
    max_length: tokens that will follow, which need positions too.
    """
    lengths = [self.size(row) for row in rows]
    width, most = self.width(max(lengths)), LENGTHS[-1]
    if self.model.learned_positions:
      most = self.model.length - max_length + 1
    if max(lengths) > most:
      raise UserError(
        f"a prompt of {max(lengths)} tokens and {max_length} after it are asked of a model of "
        f"{self.model.length} positions. Shorten it, or ask for fewer"
      )
    count = next((size for size in self.rows if size >= len(rows)), len(rows))
    fresh = itertools.count(max(ids, default=0) + 1)
    return (
      self.arrays(rows, min(width, most), count),
      np.array([*ids, *(next(fresh) for _ in range(count - len(rows)))]),
    )

  def width(self, length: int) -> int:
    """The size that prompts of this length are filled up to."""
    return next(size for size in LENGTHS if size >= length)

  def arrays(self, rows: Sequence[Read], width: int, count: int) -> dict[str, Any]:
    """A batch of `count` rows of `width` tokens, the given prompts first."""
    lengths = [self.size(row) for row in rows]
    s: dict[str, np.ndarray] = {
      name: np.zeros((count, width), np.int32) for name in ("tokens", "media_offset")
    }
    if "image" in self.media and mixes_tokens(self.config.data):
      s["media_offset"] = np.zeros((count, width, 4), np.int32)
      s["media_weight"] = np.zeros((count, width, 4), np.float32)
    axes = axes_of(self.config.model)
    if axes > 1:
      s["positions"] = np.zeros((count, width, axes), np.int32)
    s["media_index"] = np.full((count, width), -1, np.int32)
    s["length"] = np.ones(count, np.int32)
    s["length"][: len(rows)] = lengths
    slots = max((len(row.media) for row in rows), default=0)
    slots = 1 << (slots - 1).bit_length() if slots else 0  # few shapes
    own = self.model.media_ids
    arrays: dict[str, Any] = {}
    present = [m for m in self.media if any(name == m for row in rows for name, _ in row.media)]
    for modality in present:
      examples = [x for row in rows for name, x in row.media if name == modality]
      arrays[modality] = {}
      for name, x in examples[0].items():
        shape = map(max, zip(*(example[name].shape for example in examples), strict=True))
        arrays[modality][name] = np.zeros((count, slots, *shape), x.dtype)
    for number, row in enumerate(rows):
      at, used = 0, dict.fromkeys(present, 0)
      if axes > 1:
        s["positions"][number, : lengths[number]], _ = positions_of(row.parts, axes, row.first)
      for modality, example in row.media:
        for name, x in example.items():
          arrays[modality][name][(number, used[modality], *map(slice, np.shape(x)))] = x
        used[modality] += 1
      for part in row.parts:
        if isinstance(part, Places):
          places = slice(at, at + len(part.offsets))
          s["tokens"][number, places] = own.get(part.modality, 0)
          s["media_index"][number, places] = present.index(part.modality) * slots + part.slot
          s["media_offset"][number, places] = part.offsets
          if part.weights is not None:
            s["media_weight"][number, places] = part.weights
        else:
          places = slice(at, at + len(part))
          s["tokens"][number, places] = part
        at = places.stop
    batch: dict[str, Any] = {"sequence": s}
    if arrays:
      batch["media"] = {modality: self._narrowed(x) for modality, x in arrays.items()}
    return batch

  def _narrowed(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Patches that are merged, without those of the budget that all pictures leave empty, in a few
    sizes.
    """
    merge = self.config.data.image.merge
    if "patches" not in arrays or merge == 1:
      return arrays
    size = size_class(int(arrays["mask"].sum(-1).max()), merge)  # beyond the budget: all of it
    of_patches = ("patches", "positions", "mask")
    return {name: x[:, :, :size] if name in of_patches else x for name, x in arrays.items()}


def cut_at(text: str, stop: Sequence[str]) -> str:
  """The text before the first of these strings in it."""
  places = [text.find(string) for string in stop if string and string in text]
  return text[: min(places)] if places else text
