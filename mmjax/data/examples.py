"""Records to the rows of a batch: picture, caption, tokens; random streams of rows; records that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.builders import Record
from mmjax.data.image import ImageTransform, decode
from mmjax.data.sources import Source
from mmjax.data.text import TextTransform, drop_words, load_tokenizer, split_key

Batch = dict[str, Any]


class Examples:
  """Records to a batch: reading, the picture transform, a caption, tokens. An unusable record becomes a row of zeros."""

  def __init__(self, config, train: bool):
    self.config, self.modalities = config, modalities_of(config)
    self.image, self.drop_words = ImageTransform(config.data.image, train=train), config.data.text.drop_words if train else 0.0
    self._text: TextTransform | None = None
    if train and "text" in self.modalities:
      self.text  # noqa: B018  a missing tokenizer shows at once

  @property
  def text(self) -> TextTransform:
    if self._text is None:
      self._text = TextTransform(self.config.data.text, load_tokenizer(self.config.data))
    return self._text

  def __call__(self, places: Sequence[tuple[Source, int]], rngs: Iterable[np.random.Generator | None],
               modalities: Sequence[str] | None = None) -> Batch:
    modalities, count, size = modalities or self.modalities, len(places), self.config.data.image.size
    batch: Batch = {"valid": np.zeros(count, bool), "id": [""] * count, "unreadable": []}
    pixels = np.zeros((count, size, size, 3), np.uint8)
    keys, captions = np.zeros((count, 2), np.uint32), [""] * count
    for row, ((source, index), rng) in enumerate(zip(places, rngs, strict=True)):
      batch["id"][row] = place_of(source, index)
      try:
        record = source[index]
        batch["id"][row] = record["id"]
        if "text" in modalities:
          captions[row] = self._caption(record, source, rng)
        if "image" in modalities:
          pixels[row] = self.image(_picture(record, source), rng)
          keys[row] = split_key(record["image_key"])
        batch["valid"][row] = True
      except UserError as error:
        captions[row] = ""
        batch["unreadable"].append((f"{source.name} {batch['id'][row]}", str(error)))
    if "image" in modalities:
      batch["image"] = {"pixels": pixels, "key": keys}
    if "text" in modalities:
      batch["text"] = self.text(captions)
    return batch

  def _caption(self, record: Record, source: Source, rng: np.random.Generator) -> str:
    """One of the captions: first a language, then one of its captions, then the words that stay."""
    languages = [language for language in source.languages or record["captions"] if record["captions"].get(language)]
    if not languages:
      raise UserError(f"no caption in {', '.join(source.languages) or 'any language'}")
    captions = record["captions"][languages[rng.integers(len(languages))]]
    caption = captions[rng.integers(len(captions))]
    return drop_words(caption, self.drop_words, rng) if self.drop_words else caption


def streams(seed: int, step: int, rows: Sequence[int]) -> Iterator[np.random.Generator]:
  """A stream of random numbers for each row: Philox (Salmon et al. 2011), whose counters differ in (step, row) and never meet.

  It is one generator that is set to the next row's counter: use each before taking the next. Making one takes 5 times as long.
  """
  bits = np.random.Philox(key=seed % 2**64)
  generator, state = np.random.Generator(bits), bits.state
  for row in rows:
    state["state"]["counter"][:] = (0, 0, row, step)
    bits.state = state
    yield generator


def modalities_of(config) -> list[str]:
  """The modalities of the batches: those of model.encoders."""
  known = ("image", "text")
  for name in config.model.encoders:
    if name not in known:
      raise UserError(f"model.encoders.{name}: the data has no modality {name!r}; there are: {', '.join(known)}")
  return [name for name in known if name in config.model.encoders]


def place_of(source: Source, index: int) -> str:
  """The id of a record whose own cannot be read."""
  return f"{source.name}[{index}]"


def spread_rows(batch: Batch, real: np.ndarray) -> Batch:
  """Puts the rows of a batch where `real` bool [B] is true, and rows that are not valid (zeros, empty ids, label -1) elsewhere."""
  if real.all():
    return batch

  def spread(name: str, value: Any) -> Any:
    if isinstance(value, dict):
      return {k: spread(k, v) for k, v in value.items()}
    if isinstance(value, list):
      rest = iter(value)
      return [next(rest) if here else "" for here in real]
    out = np.full((len(real), *value.shape[1:]), -1 if name == "label" else 0, value.dtype)
    out[real] = value
    return out

  return spread("", batch)


def report_unreadable(unreadable: Sequence[tuple[str, str]], known: dict[str, str], limit: int) -> None:
  """Names each unusable record once on stderr; raises UserError when there are more than `limit`."""
  for name, reason in unreadable:
    if name not in known:
      known[name] = reason
      print(f"unreadable record, its row does not count: {name}: {reason}", file=sys.stderr, flush=True)
  if len(known) > limit:
    last, reason = list(known.items())[-1]
    raise UserError(f"{len(known)} records could not be read (data.max_unreadable is {limit}); the last: {last}: {reason}. "
                    "Repair or convert the data again, or raise data.max_unreadable")


def _picture(record: Record, source: Source) -> bytes | np.ndarray:
  """What the picture transform takes: encoded bytes, or pixels where the source keeps records in memory."""
  if record["image"] is None:
    raise UserError("it has no picture")
  if not getattr(source, "cached", False):
    return record["image"]
  if "pixels" not in record:
    record["pixels"] = decode(record["image"])
  return record["pixels"]
