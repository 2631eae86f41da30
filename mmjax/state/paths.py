"""Names of parameters, and regexes over them that can address the layers of a stacked leaf.

A leaf's name is its path in the tree, joined by slashes: "image/layers/attention/qkv/kernel". A
leaf under "layers" is
stacked: its first axis counts the layers, and slice i also has the name
"image/layers[i]/attention/qkv/kernel". A regex matches a name as a whole (`re.fullmatch`). One that
names the stacked leaf takes all slices; `layers[2:6]`, `layers[3]` or `layers[-2:]` in a regex
takes the slices that Python's indexing would; backslashes before the brackets are needed only if
the stop is negative.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mmjax import regexes
from mmjax.regexes import Regex

_RANGE = re.compile(r"layers\\?\[(-?\d{1,9})?(:(-?\d{1,9})?)?\\?\]")


def name_of(keys: tuple) -> str:
  """The name of a key path of `jax.tree_util`."""
  return "/".join(
    str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys
  )


def by_name(tree: Any, is_leaf=None) -> dict[str, Any]:
  """{name: leaf}, in the order of the tree."""
  return {
    name_of(keys): leaf
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  }


def map_named(function, tree: Any, *rest: Any, is_leaf=None) -> Any:
  """Like `jax.tree.map`, with the name as the first argument."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, *leaves: function(name_of(keys), *leaves), tree, *rest, is_leaf=is_leaf
  )


def matches(pattern: str, name: str, layers: int | None = None) -> np.ndarray:
  """Which slices of a leaf a regex takes: bool [layers] for a stacked leaf, bool [] for another.
  Raises UserError: the regex does not end.
  """
  if layers is None:
    return np.array(bool(_compiled(pattern, 0).fullmatch(name)))
  regex = _compiled(pattern, layers)
  if regex.fullmatch(name):
    return np.ones(layers, bool)
  head, _, tail = name.partition("layers/")
  return np.array([bool(regex.fullmatch(f"{head}layers[{i}]/{tail}")) for i in range(layers)])


def nearest(pattern: str, names: Iterable[str]) -> str:
  """The name that looks most like a regex."""
  plain = re.sub(r"[\\^$()?]|\.\*|\.\+", "", _RANGE.sub("layers", pattern))
  return max(names, key=lambda name: difflib.SequenceMatcher(None, plain, name).ratio(), default="")


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str, layers: int) -> Regex:
  """The regex with `layers[a:b]` spelt out for a stack of so many layers."""

  def numbers(match: re.Match) -> str:
    start, colon, stop = match[1], match[2], match[3]
    if colon is None:
      if not start:
        return match[0]
      chosen = range(layers)[int(start) :][:1] if -layers <= int(start) < layers else ()
    else:
      chosen = range(layers)[int(start) if start else None : int(stop) if stop else None]
    return rf"layers\[(?:{'|'.join(map(str, chosen)) or '(?!)'})\]"

  return regexes.compiled(_RANGE.sub(numbers, pattern))
