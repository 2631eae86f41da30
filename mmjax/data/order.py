"""Which record stands in which row of which batch: a pure function of (seed, step), the same on
every host, worker and mesh.

Row b of step s is the global position p = s * batch_size + b. A periodic table says which source
position p belongs to and how many of its positions came before; that count, split into epoch and
offset, goes through a permutation of the source's records that the seed, the source and the epoch
choose. Nothing is stored and nothing is sequential: any step costs O(batch_size).
"""

from __future__ import annotations

import fractions
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError

_PERIOD = 4096  # weights that are no small fractions are rounded to multiples of 1 / _PERIOD
_ROUNDS = 8


class Balance:
  """A source of which every class is drawn equally often, without replacement within a class: a
  rare class starts anew, in another order, while a common one is still gone through.

  classes: int [N], the class of each record, -1 = none: it is not drawn. `length`: rows of an
  epoch, as many as records have a class (less a remainder). Raises UserError: no record has one.
  """

  def __init__(self, classes: np.ndarray):
    present = np.unique(classes[classes >= 0])
    if not len(present):
      raise UserError("data.sources.*.balance: no record of the source has a label")
    members = [np.flatnonzero(classes == c) for c in present]
    self._members = np.concatenate(members)
    self._size = np.array([len(of) for of in members], np.uint64)
    self._start = np.cumsum(self._size) - self._size
    self._classes = np.uint64(len(present))
    self._each = np.uint64(max(1, len(self._members) // len(present)))
    self.length = int(self._classes * self._each)

  def records(self, place: np.ndarray, epoch: np.ndarray, key: np.ndarray) -> np.ndarray:
    """uint64 [n] records of the places [n] of shuffled epochs [n]; key: chooses the orders."""
    nth, number = np.divmod(place, self._classes)
    cycle, offset = np.divmod(epoch * self._each + nth, self._size[number])
    order = permute(offset, self._size[number], _mix(cycle ^ _mix(number ^ _mix(key))))
    return self._members[(self._start[number] + order).astype(np.int64)].astype(np.uint64)

  def fingerprint(self) -> str:
    digest = hashlib.blake2b(self._members.astype("<i8").tobytes(), digest_size=6)
    digest.update(self._size.astype("<u8").tobytes())
    return digest.hexdigest()


class Order:
  """Order(lengths, weights, seed, batch_size): `rows(step)`, a shuffle per epoch of every source,
  mixed by weight.

  lengths: records of each source. weights: shares of the rows, relative to each other; a source
  with weight 0 is not drawn.
  whole_steps: all rows of a step are of one source, and the weights are shares of the steps.
  groups: of each source, how many neighbouring records stay together, in their order (a remainder
  at the end is left out).
  balances: of each source a `Balance`, or None; () = none.
  """

  def __init__(
    self,
    lengths: Sequence[int],
    weights: Sequence[float],
    seed: int,
    batch_size: int,
    *,
    whole_steps: bool = False,
    groups: Sequence[int] = (),
    balances: Sequence[Balance | None] = (),
  ):
    self.balances = tuple(balances) or (None,) * len(lengths)
    lengths = [
      balance.length if balance else length
      for balance, length in zip(self.balances, lengths, strict=True)
    ]
    if len(lengths) != len(weights) or not lengths:
      raise UserError("data.sources is empty: name at least one data set")
    if min(weights) < 0 or sum(weights) <= 0:
      raise UserError(
        f"data.sources.*.weight are {tuple(weights)}, but must not be negative, and one must be "
        "positive"
      )
    for length, weight in zip(lengths, weights, strict=True):
      if weight and length < 1:
        raise UserError("a source of data.sources has no records")
    self.lengths, self.seed, self.batch_size = tuple(map(int, lengths)), int(seed), int(batch_size)
    self.counts = whole_shares(weights)
    self._table, self._before = _mixing_table(self.counts)
    self.whole_steps, self.groups = whole_steps, tuple(map(int, groups)) or (1,) * len(lengths)
    if min(self.groups) < 1 or any(
      group > length for group, length in zip(self.groups, self.lengths, strict=True)
    ):
      raise UserError(
        f"data.sources.*.group are {self.groups}: give at least 1, and at most the records of the "
        "source"
      )
    self._group = np.asarray(self.groups, np.uint64)
    self._length = np.asarray(self.lengths, np.uint64)
    self._each = np.asarray(self.counts, np.uint64)

  @property
  def examples(self) -> int:
    """Rows of an epoch: as many as the sources that are drawn have records."""
    return sum(length for length, count in zip(self.lengths, self.counts, strict=True) if count)

  def rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source int64 [B], index int64 [B] into that source, epoch int64 [B] of that source) of the
    batch of `step`, from 0.
    """
    row = np.arange(self.batch_size, dtype=np.uint64)
    position = (
      np.full_like(row, step) if self.whole_steps else row + np.uint64(step * self.batch_size)
    )
    period, place = np.divmod(position, np.uint64(len(self._table)))
    source = self._table[place]
    nth = period * self._each[source] + self._before[place]  # of the positions of this source
    nth = nth * np.uint64(self.batch_size) + row if self.whole_steps else nth
    group = self._group[source]
    groups = self._length[source] // group  # an epoch goes through these
    epoch, offset = np.divmod(nth, groups * group)
    seed = _mix(np.full((), self.seed % 2**64, np.uint64))
    key = _mix(epoch ^ _mix(source.astype(np.uint64) ^ seed))
    index = group * permute(offset // group, groups, key) + offset % group
    for number, balance in enumerate(self.balances):
      if balance and len(own := np.flatnonzero(source == number)):
        fixed = np.full(len(own), number, np.uint64) ^ seed
        index[own] = balance.records(index[own], epoch[own], fixed)
    return source, index.astype(np.int64), epoch.astype(np.int64)

  def source(self, step: int) -> int:
    """The source of all rows of a step, where a step has one."""
    return int(self._table[step % len(self._table)])

  def fingerprint(self) -> dict[str, Any]:
    """What decides the order, JSON-able: a resumed run must find the same."""
    table = hashlib.blake2b(self._table.astype("<i8").tobytes(), digest_size=6).hexdigest()
    marks = [balance.fingerprint() if balance else "" for balance in self.balances]
    return {
      "seed": self.seed,
      "batch_size": self.batch_size,
      "lengths": list(self.lengths),
      "mixture": list(self.counts),
      "table": table,
      **({"whole_steps": True} if self.whole_steps else {}),
      **({"balances": marks} if any(marks) else {}),
      **({"groups": list(self.groups)} if max(self.groups) > 1 else {}),
    }


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
  """Weights as whole numbers with (nearly) the same proportions and a sum of at most about 4096;
  positive stays positive.
  """
  shares = [
    fractions.Fraction(weight) / fractions.Fraction(sum(map(fractions.Fraction, weights)))
    for weight in weights
  ]
  near = [share.limit_denominator(_PERIOD) for share in shares]
  period = np.lcm.reduce([share.denominator for share in near], dtype=object)
  if (
    sum(near) != 1
    or period > _PERIOD
    or any(abs(a - b) > 1e-9 or (not a and b) for a, b in zip(near, shares, strict=True))
  ):
    near, period = shares, _PERIOD
  return tuple(max(1, round(share * period)) if share else 0 for share in near)


def permute(offset: np.ndarray, length: np.ndarray, key: np.ndarray) -> np.ndarray:
  """The image of `offset` under a pseudo-random permutation of range(length) that `key` chooses;
  uint64 arrays, elementwise.

  A Feistel network on the next even number of bits, walked until it lands inside (Black & Rogaway
  2002, "Ciphers with arbitrary finite domains", cycle walking): fewer than 4 walks on average.
  """
  bits = np.ceil(np.log2(np.maximum(length, 2).astype(np.float64)))
  half = np.maximum(np.ceil(bits / 2), 1).astype(np.uint64)
  out = np.array(offset, np.uint64)
  left = np.arange(out.size)
  while left.size:
    out[left] = _feistel(out[left], half[left], key[left])
    left = left[out[left] >= length[left]]
  return out


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
  """A permutation of range(4 ** half), elementwise."""
  mask = (np.uint64(1) << half) - np.uint64(1)
  high, low = value >> half, value & mask
  for number in range(_ROUNDS):
    high, low = low, high ^ (_mix(low ^ _mix(key + np.uint64(number))) & mask)
  return (high << half) | low


def _mix(value: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele et al. 2014): uint64 -> uint64, every bit depends on every
  bit.
  """
  with np.errstate(over="ignore"):
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mixing_table(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """(source int64 [P], how many earlier places of the table are of the same source uint64 [P]), P =
  sum(counts).

  Source k stands at the places nearest to (j + 1/2) / counts[k] of the table, so every stretch of
  it has nearly the proportions.
  """
  source = np.concatenate([np.full(count, k, np.int64) for k, count in enumerate(counts)])
  nth = np.concatenate([np.arange(count) for count in counts])
  when = (nth + 0.5) / np.asarray(counts)[source]
  order = np.lexsort((source, when))
  return source[order], nth[order].astype(np.uint64)
