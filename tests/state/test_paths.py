"""Regexes over names: layers are addressed as Python would index them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmjax.state.paths import by_name, matches, nearest

NAME = "image/layers/mlp/up/kernel"
BOUND = st.one_of(st.none(), st.integers(-9, 9))


@given(BOUND, BOUND, st.integers(1, 8))
def test_ranges_are_those_of_python(start, stop, layers):
  text = f"{'' if start is None else start}:{'' if stop is None else stop}"
  expected = np.isin(np.arange(layers), np.arange(layers)[start:stop])
  for pattern in (
    rf"image/layers\[{text}\]/.*",
    f"image/layers[{text}]/.*",
    rf".*layers\[{text}\]/mlp/.*",
  ):
    np.testing.assert_array_equal(matches(pattern, NAME, layers), expected)


@given(st.integers(-9, 9), st.integers(1, 8))
def test_single_layers(index, layers):
  expected = np.zeros(layers, bool)
  if -layers <= index < layers:
    expected[index] = True
  np.testing.assert_array_equal(matches(f"image/layers[{index}]/.*", NAME, layers), expected)


def test_whole_names_and_other_regexes():
  assert matches("image/.*", NAME, 3).tolist() == [True] * 3
  assert matches("image", NAME, 3).tolist() == [False] * 3
  assert matches(r"image/layers\[(0|2)\]/.*", NAME, 3).tolist() == [True, False, True]
  assert matches(r".*/(kernel|embedding)", "text/embedding").item() is True
  assert matches(r"image/layers[0:2]/.*", "text/embedding").item() is False


def test_nearest_and_names():
  names = ["image/layers/mlp/up/kernel", "text/embedding", "image/position"]
  assert nearest(r"txt/embed.*", names) == "text/embedding"
  assert nearest(r"image/layers[0:3]/mpl/.*", names) == names[0]
  assert list(by_name({"a": [1, {"b": 2}], "c": None})) == ["a/0", "a/1/b"]
