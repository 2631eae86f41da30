"""What a language model of documents has to beat: `gzip -9`, and byte n-grams with Kneser-Ney
smoothing, in bits a byte of a split.

  python tests/bench/ngram.py --source python_topics --train train+docstrings --split validation

The n-grams are interpolated, with modified discounts (Chen and Goodman 1999, section 3): three an
order, from counts of counts; orders below the highest count in how many contexts a byte was seen.
Every document starts from empty contexts and pays for its end, as a language model does.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import math
from collections.abc import Iterable, Sequence

from mmjax.data.folders import local_data_dir
from mmjax.data.sources import open_source

END = 256  # before the first byte of a document and after its last


class KneserNey:
  """n-grams of the bytes of `texts`."""

  def __init__(self, texts: Iterable[str], order: int = 5):
    self.order = order
    # counts[n]: {context of n bytes: {byte: count}}
    self.counts: list[dict[tuple[int, ...], collections.Counter[int]]] = [
      collections.defaultdict(collections.Counter) for _ in range(order)
    ]
    for text in texts:
      for context, byte in self._places(text):
        self.counts[-1][context][byte] += 1
    for n in range(order - 2, -1, -1):
      for context, seen in self.counts[n + 1].items():
        for byte in seen:
          self.counts[n][context[1:]][byte] += 1
    self.discounts = [self._discount(level) for level in self.counts]
    self._known: dict[tuple[int, ...], tuple[int, float]] = {}

  def _places(self, text: str) -> Iterable[tuple[tuple[int, ...], int]]:
    before = self.order - 1
    row = [END] * before + list(text.encode()) + [END]
    return ((tuple(row[i - before : i]), row[i]) for i in range(before, len(row)))

  @staticmethod
  def _discount(level: dict) -> list[float]:
    """What is taken from a count of 0, 1, 2, and of 3 or more."""
    found = collections.Counter(v for seen in level.values() for v in seen.values() if v < 5)
    share = found[1] / max(1, found[1] + 2 * found[2])
    return [0.0] + [
      max(0.0, k - (k + 1) * share * found[k + 1] / max(1, found[k])) for k in (1, 2, 3)
    ]

  def probability(self, context: tuple[int, ...], byte: int) -> float:
    """Of a byte after a context of up to `order` - 1 bytes."""
    lower = self.probability(context[1:], byte) if context else 1 / (END + 1)
    seen = self.counts[len(context)].get(context)
    if not seen:
      return lower
    discount = self.discounts[len(context)]
    if context not in self._known:
      taken = sum(discount[min(count, 3)] for count in seen.values())
      total = seen.total()
      self._known[context] = total, taken / total
    total, rest = self._known[context]
    count = seen.get(byte, 0)
    return max(0.0, count - discount[min(count, 3)]) / total + rest * lower

  def bits_per_byte(self, texts: Sequence[str]) -> float:
    bits = -sum(
      math.log2(self.probability(*place)) for text in texts for place in self._places(text)
    )
    return bits / sum(len(text.encode()) for text in texts)


def gzip_bits_per_byte(texts: Sequence[str]) -> float:
  """Of `gzip -9` of the texts, a line each."""
  raw = "\n".join(texts).encode()
  return 8 * len(gzip.compress(raw, 9)) / len(raw)


def read_texts(source: str, split: str) -> list[str]:
  """The first caption of every record."""
  opened = open_source(dict(name=source, split=split), local_data_dir())
  records = (opened[i] for i in range(len(opened)))
  return [next(iter(record["captions"].values()))[0] for record in records]


def measure(source: str, train: str, split: str, order: int = 5) -> dict[str, float]:
  texts = read_texts(source, split)
  model = KneserNey(read_texts(source, train), order)
  return {
    "gzip": gzip_bits_per_byte(texts),
    f"{order}-gram": model.bits_per_byte(texts),
    "bytes": sum(len(text.encode()) for text in texts),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--source", default="python_topics")
  parser.add_argument(
    "--train", default="train", help="the split, or several as a+b, in which n-grams are counted"
  )
  parser.add_argument("--split", default="validation")
  parser.add_argument("--order", type=int, default=5)
  arguments = parser.parse_args()
  print(json.dumps(measure(**vars(arguments))))


if __name__ == "__main__":
  main()
