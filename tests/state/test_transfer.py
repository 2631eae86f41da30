"""Starting from another checkpoint: rules, reports, resized positions, refusals."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.config import UserError
from mmjax.state.checkpoint import restore_into, save_import
from mmjax.state.transfer import resize_grid, transfer, transfer_state
from tests.state.conftest import mesh_of

RNG = np.random.default_rng(0)
SOURCE = {
  "image": {
    "position": RNG.normal(size=(17, 4)).astype(np.float32),
    "layers": {"kernel": np.ones((2, 4, 4), np.float32)},
  },
  "text": {"position": RNG.normal(size=(64, 4)).astype(np.float32)},
  "head": {"kernel": np.ones((4, 10), np.float32)},
}


def params(grid=17, tokens=64, classes=10):
  return {
    "image": {
      "position": np.zeros((grid, 4), np.float32),
      "layers": {"kernel": np.zeros((2, 4, 4), np.float32)},
    },
    "text": {"position": np.zeros((tokens, 4), np.float32)},
    "head": {"kernel": np.zeros((4, classes), np.float32)},
  }


IDENTITY = ((".*", r"\g<0>"),)


def test_everything_by_default():
  result, report = transfer(params(), SOURCE, IDENTITY)
  jax.tree.map(np.testing.assert_array_equal, result, SOURCE)
  assert report == [
    "loaded head/kernel",
    "loaded image/layers/kernel",
    "loaded image/position",
    "loaded text/position",
  ]


def test_report_of_loaded_resized_new_and_left():
  rules = (("head/.*", None), (".*", r"\g<0>"))
  result, report = transfer(params(grid=37, tokens=16, classes=3), SOURCE, rules)
  assert report == [
    "loaded image/layers/kernel",
    "resized image/position [17, 4] -> [37, 4]",
    "resized text/position [64, 4] -> [16, 4]",
    "new head/kernel [4, 3]",
    "left head/kernel [4, 10]",
  ]
  np.testing.assert_array_equal(result["image"]["position"][0], SOURCE["image"]["position"][0])
  np.testing.assert_array_equal(result["text"]["position"], SOURCE["text"]["position"][:16])
  assert not result["head"]["kernel"].any()


def test_renaming_from_a_checkpoint_keeps_shardings_and_tells_casts(tmp_path):
  save_import(
    str(tmp_path / "there"),
    {"vision": {"kernel": np.arange(16, dtype=np.float16).reshape(8, 2)}},
    {},
    {},
  )
  sharding = NamedSharding(mesh_of(8), P("fsdp"))
  here = {"image": {"kernel": jax.device_put(np.zeros((8, 2), np.float32), sharding)}}
  result, state, report = restore_into(
    here, str(tmp_path / "there"), (("image/(.*)", r"vision/\1"),)
  )
  assert result["image"]["kernel"].sharding == sharding
  np.testing.assert_array_equal(result["image"]["kernel"], np.arange(16).reshape(8, 2))
  assert report == ["loaded image/kernel from vision/kernel (float16 -> float32)"] and state == {}


def statistics(value, at="image"):
  return {"batch_stats": {at: {"norm": {"mean": np.full(3, value, np.float32)}}}}


def normed(at="image"):
  return {at: {"norm": {"scale": np.ones(3, np.float32), "bias": np.ones(3, np.float32)}}}


def test_statistics_go_with_the_parameters_of_their_module():
  def take(rules, source=statistics(5.0, "vision"), params=normed()):
    return transfer_state(statistics(0.0), source, params, normed("vision"), rules)

  state, report = take((("image/(.*)", r"vision/\1"),))
  np.testing.assert_array_equal(state["batch_stats"]["image"]["norm"]["mean"], [5, 5, 5])
  assert report == ["loaded batch_stats/image/norm/mean from batch_stats/vision/norm/mean"]
  state, report = take(((".*", None),))
  assert not state["batch_stats"]["image"]["norm"]["mean"].any()
  assert report == ["new batch_stats/image/norm/mean [3]", "left batch_stats/vision/norm/mean [3]"]
  with pytest.raises(
    UserError,
    match="image/norm comes from 'vision/norm', but the checkpoint has no "
    "batch_stats/vision/norm/mean",
  ):
    take((("image/(.*)", r"vision/\1"),), {})
  two = {**normed("vision"), **normed("other")}
  with pytest.raises(UserError, match="several places: other/norm, vision/norm"):
    transfer_state(
      statistics(0.0),
      statistics(5.0, "vision"),
      normed(),
      two,
      (("image/(.*)/bias", r"other/\1/bias"), ("image/(.*)", r"vision/\1")),
    )


@pytest.mark.parametrize(
  "rules, changes, message",
  [
    (IDENTITY, dict(classes=3), r"head/kernel is \[4, 3\] here, but \[4, 10\]"),
    (IDENTITY, dict(tokens=100), r"text/position is \[100, 4\] here"),
    (IDENTITY, dict(grid=18), r"image/position is \[18, 4\] here"),
    ((("image/.*", r"\g<0>"),), {}, "no rule covers head/kernel"),
    (
      (("hed/.*", None), (".*", r"\g<0>")),
      {},
      "'hed/.*' matches no parameter of this model; the nearest is 'head/kernel'",
    ),
    (
      (("head/(.*)", r"heads/\1"), (".*", r"\g<0>")),
      {},
      "from 'heads/kernel', which .* lacks; the nearest there is 'head/kernel'",
    ),
  ],
)
def test_refusals(rules, changes, message):
  with pytest.raises(UserError, match=message) as error:
    transfer(params(**changes), SOURCE, rules)
  assert "\n" not in str(error.value)


def test_grids_are_interpolated():
  y, x = np.mgrid[:8, :8]
  ramp = np.stack([y, x], -1).reshape(64, 2).astype(np.float32)
  smaller = resize_grid(ramp, 16).reshape(4, 4, 2)
  np.testing.assert_allclose(smaller[1:3, 1:3, 0], [[2.5, 2.5], [4.5, 4.5]], atol=0.05)
  np.testing.assert_allclose(smaller[1:3, 1:3, 1], [[2.5, 4.5], [2.5, 4.5]], atol=0.05)
  np.testing.assert_allclose(resize_grid(np.ones((16, 3), np.float32), 49), 1, rtol=1e-6)
  classed = np.concatenate([np.full((1, 2), 9, np.float32), ramp])
  np.testing.assert_array_equal(resize_grid(classed, 17)[1:], resize_grid(ramp, 16))
  np.testing.assert_array_equal(resize_grid(classed, 16), resize_grid(ramp, 16))
  assert resize_grid(ramp, 17) is None  # there is no class token's position to copy
