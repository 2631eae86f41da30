"""Retrieval against a brute-force ranking, and its independence of order, batch size, padding,
blocks and devices.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.evaluation.retrieval import merge, ranks, recall
from mmjax.parallel.mesh import make_mesh, single_device_mesh
from tests.evaluation.fakes import Data, evaluation

MESH = {n: make_mesh(configs.base(), jax.devices()[:n]) for n in (1, 2, 8)}


def brute_force(queries, gallery, pairs) -> np.ndarray:
  """Rank by sorting: the best positive stands behind every negative of the same similarity."""
  out = []
  for q, vector in enumerate(queries):
    positives = {g for a, g in pairs if a == q}
    order = sorted(range(len(gallery)), key=lambda g: (-float(vector @ gallery[g]), g in positives))
    out.append(
      1
      + next(
        sum(h not in positives for h in order[:i]) for i, g in enumerate(order) if g in positives
      )
    )
  return np.array(out)


@st.composite
def problems(draw):
  """Vectors of small integers, so that similarities are exact and ties frequent; every query has a
  positive.
  """
  q, g, d = draw(st.integers(1, 9)), draw(st.integers(1, 11)), draw(st.integers(1, 3))
  cell = st.integers(-2, 2)
  queries = np.array(
    draw(st.lists(st.lists(cell, min_size=d, max_size=d), min_size=q, max_size=q)), np.float32
  )
  gallery = np.array(
    draw(st.lists(st.lists(cell, min_size=d, max_size=d), min_size=g, max_size=g)), np.float32
  )
  pairs = {(i, draw(st.integers(0, g - 1))) for i in range(q)}
  pairs |= draw(st.sets(st.tuples(st.integers(0, q - 1), st.integers(0, g - 1)), max_size=6))
  return queries, gallery, np.array(sorted(pairs))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1, 2, 8]))
def test_ranks_equal_brute_force_whatever_the_mesh(problem, devices):
  queries, gallery, pairs = problem
  np.testing.assert_array_equal(
    ranks(queries, gallery, pairs, MESH[devices], block=(8, 4)),
    brute_force(queries, gallery, pairs),
  )


def test_blocks_order_and_devices_do_not_matter():
  rng = np.random.default_rng(0)
  queries, gallery = (rng.normal(size=(n, 16)).astype(np.float32) for n in (37, 53))
  pairs = np.unique(
    np.concatenate(
      [np.stack([np.arange(37), rng.integers(0, 53, 37)], 1), rng.integers(0, 37, (40, 2))]
    ),
    axis=0,
  )
  expected = brute_force(queries, gallery, pairs.tolist())
  for devices, block in ((1, (1024, 4096)), (8, (8, 7)), (8, (16, 53)), (2, (5, 1))):
    np.testing.assert_array_equal(ranks(queries, gallery, pairs, MESH[devices], block), expected)
  order = rng.permutation(53)
  moved = np.stack([pairs[:, 0], np.argsort(order)[pairs[:, 1]]], 1)
  np.testing.assert_array_equal(
    ranks(queries, gallery[order], rng.permutation(moved), MESH[8], (8, 16)), expected
  )


def test_a_block_is_all_that_a_device_holds():
  from mmjax.evaluation import retrieval

  count = retrieval._count(retrieval.rules.batch_sharding(MESH[8]))
  shapes = [
    jax.ShapeDtypeStruct(s, d)
    for s, d in (
      ((64, 4), np.float32),
      ((32, 4), np.float32),
      ((64,), np.float32),
      ((64, 32), bool),
    )
  ]
  sharded, whole = retrieval.rules.batch_sharding(MESH[8]), retrieval.rules.replicated(MESH[8])
  shapes = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    for x, s in zip(shapes, (sharded, whole, sharded, sharded), strict=True)
  ]
  memory = count.lower(*shapes).compile().memory_analysis()
  assert memory.temp_size_in_bytes <= 64 * 32 * 4 // 8 + 4096


def test_a_collapsed_model_and_nan_rank_last():
  pairs = np.stack([np.arange(6)] * 2, 1)
  same = np.full((6, 4), 0.5, np.float32)
  assert (ranks(same, same, pairs, MESH[8]) == 6).all()
  assert (ranks(same * np.nan, same, pairs, MESH[8]) == 6).all()
  assert (ranks(same, np.eye(6, 4, dtype=np.float32) * np.nan, pairs, MESH[8]) == 6).all()


def test_equal_pictures_and_equal_captions_are_one_item():
  keys = np.array([5, 9, 5, 7], np.uint64)
  owners, texts = np.array([0, 1, 2, 2, 3]), np.array([11, 12, 11, 13, 14], np.uint64)
  items = merge(keys, np.array([True, True, True, False]), owners, texts)
  assert keys[items.images].tolist() == [5, 9] and texts[items.texts].tolist() == [11, 12, 13]
  assert sorted(map(tuple, items.pairs.tolist())) == [(0, 0), (0, 2), (1, 1)]


def test_recall_by_hand():
  assert recall(np.array([1, 2, 6, 11])) == {
    "R@1": 0.25,
    "R@5": 0.5,
    "R@10": 0.75,
    "median_rank": 4.0,
  }


def small_world(batch_size, shuffle=None):
  """Six pictures (two identical, one unreadable) with captions, some shared; vectors are random but
  fixed.
  """
  rng = np.random.default_rng(1)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  vectors = unit(rng.normal(size=(6, 8)))
  vectors[3] = vectors[0]
  texts = {name: v for name, v in zip("abcdef", unit(rng.normal(size=(6, 8))), strict=True)}
  captions = [("a", 0), ("b", 1), ("a", 2), ("c", 2), ("d", 3), ("e", 4), ("f", 5)]
  order = np.arange(6) if shuffle is None else np.random.default_rng(shuffle).permutation(6)
  place = np.argsort(order)
  captions = [(t, "en", np.uint64(ord(t)), int(place[i])) for t, i in captions]
  return Data(
    vectors[order],
    captions,
    texts,
    batch_size=batch_size,
    valid=np.array([i != 4 for i in order]),
    image_keys=np.array([1, 2, 3, 1, 5, 6])[order],
  )


ENTRY = {"retrieval/x": dict(kind="retrieval", source="s", split="test")}


def test_metrics_do_not_depend_on_batch_size_padding_order_or_devices():
  results = [
    evaluation(ENTRY, small_world(b, s), n).run(1.0)["retrieval/x"]
    for b, s, n in ((8, None, 8), (8, 3, 1), (16, 4, 2), (6, 5, 1))
  ]
  for result in results[1:]:
    assert result.metrics == results[0].metrics
  metrics = results[0].metrics
  assert metrics["images"] == 4 and metrics["texts"] == 5 and metrics["unreadable"] == 1
  assert set(metrics) == {
    f"{way}/{m}"
    for way in ("image_to_text", "text_to_image")
    for m in ("R@1", "R@5", "R@10", "median_rank")
  } | {"images", "texts", "unreadable"}


def test_examples_mark_what_is_right():
  result = evaluation(ENTRY, small_world(8)).run(1.0)["retrieval/x"]
  for figure in result.figures.values():
    for row in figure["rows"]:
      assert [h["score"] for h in row["top"]] == sorted(
        (h["score"] for h in row["top"]), reverse=True
      )
      assert (row["rank"] == 1) == row["top"][0]["correct"]
  assert all(row["picture"].shape == (8, 8, 3) for row in result.figures["image_to_text"]["rows"])


def test_unknown_evaluator_names_the_nearest():
  run = evaluation(ENTRY, small_world(8))
  with pytest.raises(UserError, match="'retrieval/y'.*'retrieval/x'"):
    run.run(1.0, names=["retrieval/y"])
  assert list(run.run(1.0, names="retrieval/*")) == ["retrieval/x"]


def test_no_readable_pair_is_an_error():
  data = small_world(8)
  data.valid[:] = False
  with pytest.raises(UserError, match="no readable picture"):
    evaluation(ENTRY, data).run(1.0)


def test_single_device_mesh_works():
  assert ranks(
    np.eye(3, dtype=np.float32),
    np.eye(3, dtype=np.float32),
    np.stack([np.arange(3)] * 2, 1),
    single_device_mesh(),
  ).tolist() == [1, 1, 1]
