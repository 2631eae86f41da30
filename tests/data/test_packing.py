"""Packing: every example once, none cut, never more than fits."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data.packing import filling, pack


@settings(max_examples=60, deadline=None)
@given(data=st.data(), room=st.integers(1, 40), slots=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_example_stands_in_one_row_that_holds_it(data, room, slots, seed):
  lengths = np.array(data.draw(st.lists(st.integers(0, room), max_size=300)), np.int64)
  media = np.array(
    data.draw(
      st.lists(
        st.tuples(st.integers(0, slots), st.integers(0, slots)),
        min_size=len(lengths),
        max_size=len(lengths),
      )
    ),
    np.int64,
  ).reshape(len(lengths), 2)
  rows = pack(lengths, media, room, slots, seed)
  assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
  assert all(row for row in rows)
  for row in rows:
    assert lengths[row].sum() <= room
    assert (media[row].sum(0) <= slots).all()
  assert rows == pack(lengths, media, room, slots, seed)


def test_rows_are_nearly_full():
  lengths = np.random.default_rng(0).integers(5, 60, 2000)
  rows = pack(lengths, np.zeros((2000, 0), np.int64), 128, 1, 0)
  assert filling(lengths, rows, 128) > 0.95
  assert filling(lengths, [[i] for i in range(2000)], 128) < 0.3
