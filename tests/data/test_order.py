"""The order of examples: permutations, proportions, random access."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.data.order import Balance, Order, permute, whole_shares

lengths = st.integers(1, 300)
seeds = st.integers(0, 2**63)


@settings(max_examples=40, deadline=None)
@given(length=lengths, seed=seeds, batch=st.integers(1, 50))
def test_every_epoch_is_a_permutation_of_the_source(length, seed, batch):
  order = Order([length], [1.0], seed, batch)
  steps = -(-3 * length // batch)
  source, index, epoch = map(
    np.concatenate, zip(*(order.rows(s) for s in range(steps)), strict=True)
  )
  assert not source.any()
  for e in range(3):
    assert sorted(index[epoch == e]) == list(range(length)) or e == epoch[-1]
  assert (np.diff(epoch) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(
  sizes=st.lists(lengths, min_size=1, max_size=4),
  weights=st.data(),
  seed=seeds,
  batch=st.integers(1, 40),
)
def test_a_mixture_has_its_proportions_and_permutes_every_source(sizes, weights, seed, batch):
  weights = weights.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
  order = Order(sizes, weights, seed, batch)
  rows = [order.rows(s) for s in range(60)]
  source, index, epoch = map(np.concatenate, zip(*rows, strict=True))
  share = np.array(weights) / sum(weights)
  count = np.array(
    [(source[:n] == k).sum() for n in (len(source) // 2, len(source)) for k in range(len(sizes))]
  ).reshape(2, -1)
  for n, row in zip((len(source) // 2, len(source)), count, strict=True):
    assert np.abs(row - share * n).max() <= len(sizes)  # at every moment, not only on average
  for k, size in enumerate(sizes):
    for e in range(epoch[source == k].max() if (source == k).any() else 0):
      assert sorted(index[(source == k) & (epoch == e)]) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(length=lengths, seed=seeds, batch=st.integers(1, 40), step=st.integers(0, 10**9))
def test_the_rows_do_not_depend_on_the_batch_size(length, seed, batch, step):
  """Row p of the stream is the same however it is cut into batches, so random access equals
  sequential access.
  """
  order, one = Order([length, 5], [2, 1], seed, batch), Order([length, 5], [2, 1], seed, 1)
  whole = np.stack(order.rows(step))
  for row in {0, batch // 2, batch - 1}:
    assert np.array_equal(whole[:, row], np.stack(one.rows(step * batch + row))[:, 0])


def test_epochs_and_seeds_differ_and_look_shuffled():
  order = Order([1000], [1], 0, 1000)
  first, second = order.rows(0)[1], order.rows(1)[1]
  other = Order([1000], [1], 1, 1000).rows(0)[1]
  for a, b in ((first, second), (first, other), (first, np.arange(1000))):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.12
    assert (a == b).sum() < 10


def test_small_permutations_are_nearly_uniform():
  keys = np.arange(48_000, dtype=np.uint64)
  images = [
    permute(np.full(keys.shape, i, np.uint64), np.full(keys.shape, 4, np.uint64), keys)
    for i in range(4)
  ]
  code = sum(image * np.uint64(4**i) for i, image in enumerate(images))
  counts = np.unique(code, return_counts=True)[1]
  assert len(counts) == 24 and counts.min() > 1800 and counts.max() < 2200


def test_weights():
  assert whole_shares((0.3, 0.7)) == (3, 7)
  assert whole_shares((1 / 3, 2 / 3)) == (1, 2)
  assert whole_shares((1, 2, 0)) == (1, 2, 0)
  assert min(whole_shares((1e-9, 1))) == 1
  order = Order([10, 10], [0, 1], 0, 8)
  assert (order.rows(3)[0] == 1).all() and order.examples == 10
  for bad in ((-1, 2), (0, 0)):
    with pytest.raises(UserError, match="weight"):
      Order([1, 1], bad, 0, 1)
  with pytest.raises(UserError, match="data.sources is empty"):
    Order([], [], 0, 1)


def test_the_fingerprint_changes_with_what_decides_the_order():
  base = Order([10, 20], [1, 2], 0, 8).fingerprint()
  assert base == Order([10, 20], [2, 4], 0, 8).fingerprint()
  others = [
    Order([10, 21], [1, 2], 0, 8),
    Order([10, 20], [2, 1], 0, 8),
    Order([10, 20], [1, 2], 1, 8),
    Order([10, 20], [1, 2], 0, 4),
  ]
  assert all(other.fingerprint() != base for other in others)


def test_golden_rows():
  """A change of the order breaks every resumed run: it must be meant."""
  source, index, epoch = Order([100, 7], [3, 1], 5, 12).rows(4)
  assert source.tolist() == GOLDEN["source"]
  assert index.tolist() == GOLDEN["index"]
  assert epoch.tolist() == GOLDEN["epoch"]


GOLDEN = {
  "source": [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0],
  "index": [32, 16, 0, 46, 40, 27, 6, 23, 8, 97, 6, 30],
  "epoch": [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0],
}


def test_every_class_is_drawn_equally_often():
  """30 of one class, 8 of another, 3 of a third, 4 of none: in each epoch equally many rows of
  each, within a class no record again before all were there, and any step by itself.
  """
  classes = np.random.default_rng(0).permutation([0] * 30 + [2] * 8 + [5] * 3 + [-1] * 4)
  order = Order([45], [1], 3, 13, balances=[Balance(classes)])
  assert order.examples == 39, "41 records with a class, less what three do not divide"
  steps = list(range(12))
  batches = {step: order.rows(step) for step in reversed(steps)}
  index = np.concatenate([batches[step][1] for step in steps])
  epoch = np.concatenate([batches[step][2] for step in steps])
  for e in range(4):
    drawn = classes[index[epoch == e]]
    assert (np.unique(drawn, return_counts=True)[1] == 13).all() and len(np.unique(drawn)) == 3
  for c, size in ((0, 30), (2, 8), (5, 3)):
    own = index[(classes[index] == c) & (epoch < 4)]
    assert len(own) == 52 and np.bincount(own, minlength=45)[classes == c].min() >= 52 // size
  runs = [index[epoch == e][classes[index[epoch == e]] == 5] for e in (0, 1)]
  assert runs[0].tolist() != runs[1].tolist(), "each epoch has an order of its own"
  plain = Order([45], [1], 3, 13)
  assert plain.fingerprint() != order.fingerprint()
  with pytest.raises(UserError, match="no record of the source has a label"):
    Balance(np.full(4, -1))
