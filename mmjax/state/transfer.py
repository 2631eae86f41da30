"""Fine-tuning: parameters of one model from those of another, by regex, with a report of what
happened to each.

Rules are ((regex of a name here, the name there or None), ...); the first that matches a name
decides. Those of init.map may name a checkpoint of their own as a third item (`rules_of`). The name
there may use groups of the regex (r"\\1"); None leaves the new parameter as it was initialised.
Nothing is dropped or filled in silently:
a name that no rule covers, one that the checkpoint lacks, and shapes that differ are errors.
Exceptions, each in the report:

Tables of positions, leaves called "position" of shape [L, D], fit another length. Under "image"
they are square grids of patches, row by row, after at most one position of a class token: the grid
is resized (bicubic, Keys a = -0.5, half-pixel centres, antialiased when it shrinks:
`jax.image.resize`), the class token's row is copied, or left out where the model has none.
Elsewhere they count tokens: a shorter table takes the first rows.

What a model keeps besides parameters (batch statistics) goes with the parameters of its module:
`transfer_state`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import regexes
from mmjax.config import UserError
from mmjax.state.paths import by_name, map_named, nearest


def transfer(
  params: Any, source: Any, rules: tuple, where: str = "the checkpoint"
) -> tuple[Any, list[str]]:
  """(parameters, report lines): `params` (a tree of arrays) with values of `source` (a tree of
  NumPy arrays) by `rules`.

  Values get the dtype and the sharding of the parameter they replace; a change of dtype is said in
  the report.
  """
  here, given = by_name(params), by_name(source)
  for pattern, _ in rules:
    if not any(regexes.compiled(pattern).fullmatch(name) for name in here):
      raise UserError(
        f"init.map: {pattern!r} matches no parameter of this model; the nearest is "
        f"{nearest(pattern, here)!r}"
      )
  return _taken(params, {name: _origin(name, rules, given, where) for name in here}, given, where)


def transfer_state(
  state: Any,
  source: Any,
  params: Any,
  source_params: Any,
  rules: tuple,
  where: str = "the checkpoint",
) -> tuple[Any, list[str]]:
  """The same for what a model keeps besides parameters, {collection: nested dict}: batch statistics
  come from the module that the parameters beside them come from, and stay new where all of those
  are new.

  Raises UserError: that module has none in the checkpoint, or of another shape; or the parameters
  come from several modules.
  """
  names, given = by_name(source_params), by_name(source)
  modules: dict[str, set[str]] = {}
  for name in by_name(params):
    if (origin := _origin(name, rules, names, where)) is not None:
      modules.setdefault(_split(name)[0], set()).add(_split(origin)[0])
  origins: dict[str, str | None] = {}
  for name in by_name(state):
    collection, _, rest = name.partition("/")
    module, leaf = _split(rest)
    found = sorted(modules.get(module, ()))
    if len(found) > 1:
      raise UserError(
        f"init.map: {name} belongs to parameters that come from several places: "
        f"{', '.join(found)}. Take all of {module} from one"
      )
    origins[name] = "/".join(filter(None, (collection, found[0], leaf))) if found else None
    if found and origins[name] not in given:
      raise UserError(
        f"init.map: {module} comes from {found[0]!r}, but {where} has no {origins[name]}. Map "
        f"{module}/.* to None to keep it new"
      )
  return _taken(state, origins, given, where)


def _taken(
  tree: Any, origins: Mapping[str, str | None], given: Mapping[str, Any], where: str
) -> tuple[Any, list[str]]:
  """(`tree` with the leaves `there` that `origins` names for it, report lines)."""
  values: dict[str, jax.Array] = {}
  lines: dict[str, list[str]] = {"loaded": [], "resized": [], "new": []}
  used: set[str] = set()
  for name, leaf in by_name(tree).items():
    origin = origins[name]
    if origin is None:
      values[name] = leaf
      lines["new"].append(f"new {name} {list(leaf.shape)}")
      continue
    used.add(origin)
    value, change = _fit(name, np.asarray(given[origin]), leaf.shape, where)
    cast = f" ({value.dtype} -> {leaf.dtype})" if value.dtype != leaf.dtype else ""
    values[name] = put(value.astype(leaf.dtype), leaf)
    source_name = f" from {origin}" if origin != name else ""
    lines["resized" if change else "loaded"].append(
      f"{'resized' if change else 'loaded'} {name}{source_name}{change}{cast}"
    )
  left = [f"left {name} {list(given[name].shape)}" for name in given if name not in used]
  return map_named(lambda name, _: values[name], tree), lines["loaded"] + lines["resized"] + lines[
    "new"
  ] + left


def others_of(rules: tuple) -> tuple[str, ...]:
  """The checkpoints that rules of init.map name besides init.from, each once."""
  return tuple(dict.fromkeys(rule[2] for rule in rules if len(rule) == 3))


def rules_of(checkpoint: str, rules: tuple) -> tuple[tuple[str, str | None], ...]:
  """The rules of init.map as they are for one checkpoint ("" = init.from): what comes from another
  one is not loaded.
  """
  names = [rule[2] if len(rule) == 3 else "" for rule in rules]
  return tuple(
    (rule[0], rule[1] if name == checkpoint else None)
    for rule, name in zip(rules, names, strict=True)
  )


def merged(lines: list[str], more: list[str], checkpoint: str) -> list[str]:
  """The report of a start, with that of a further checkpoint: nothing is new that one of them had.
  What the further one has left is not said: it was asked for some of its parameters.
  """
  found = [line for line in more if line.startswith(("loaded ", "resized "))]
  known = {line.split()[1] for line in found}
  kept = [line for line in lines if not (line.startswith("new ") and line.split()[1] in known)]
  return [*(f"{line} of {checkpoint}" for line in found), *kept]


def origin(name: str, rules: tuple, stored: Mapping[str, Any]) -> str | None:
  """The name from which the rules take this parameter of a checkpoint that has the names `stored`;
  None = they do not.
  """
  for pattern, target in rules:
    if match := regexes.compiled(pattern).fullmatch(name):
      found = None if target is None else _expanded(match, target)
      return found if found in stored else None
  return None


def _expanded(match: re.Match, target: str) -> str:
  try:
    return match.expand(target)
  except (re.error, IndexError, TypeError) as error:
    raise UserError(
      f"init.map: {target!r} is no name with groups of {match.re.pattern!r} ({error})"
    ) from error


def resize_grid(table: np.ndarray, length: int) -> np.ndarray | None:
  """Positions [L, D] of a square grid as [length, D] of another; None if either is no square (plus
  one class token).
  """
  old, new = _grid(len(table)), _grid(length)
  if old is None or new is None or (new[1] and not old[1]):
    return None
  (old_side, old_class), (new_side, new_class) = old, new
  grid = jnp.asarray(table[old_class:], jnp.float32).reshape(old_side, old_side, -1)
  shape = new_side, new_side, grid.shape[-1]
  resized = np.asarray(jax.image.resize(grid, shape, "bicubic", antialias=True))
  resized = resized.reshape(new_side * new_side, -1).astype(table.dtype)
  return np.concatenate([table[:new_class], resized])


def _grid(length: int) -> tuple[int, int] | None:
  """(side, class tokens) of a table of so many positions."""
  for extra in (0, 1):
    side = math.isqrt(length - extra)
    if side and side * side == length - extra:
      return side, extra
  return None


def _origin(name: str, rules: tuple, given: Mapping[str, Any], where: str) -> str | None:
  for pattern, target in rules:
    if match := regexes.compiled(pattern).fullmatch(name):
      origin = None if target is None else _expanded(match, target)
      if origin is not None and origin not in given:
        raise UserError(
          f"init.map: {name} should come from {origin!r}, which {where} lacks; the nearest there "
          f"is {nearest(re.escape(origin), given)!r}. Map it to another name, or to None to keep "
          "it new"
        )
      return origin
  raise UserError(
    f"init.map: no rule covers {name}. Add one, such as ({name!r}, None) to keep it new"
  )


def _split(name: str) -> tuple[str, str]:
  """(module, leaf) of a name."""
  module, _, leaf = name.rpartition("/")
  return module, leaf


def _fit(
  name: str, value: np.ndarray, shape: tuple[int, ...], where: str
) -> tuple[np.ndarray, str]:
  """The value in this shape, and " [old] -> [new]" if it had to change. Raises UserError if it
  cannot.
  """
  if value.shape == shape:
    return value, ""
  parts = name.split("/")
  if parts[-1] == "position" and value.ndim == len(shape) == 2 and value.shape[1] == shape[1]:
    if parts[0] == "image":
      resized = resize_grid(value, shape[0])
    else:
      resized = value[: shape[0]] if shape[0] < len(value) else None
    if resized is not None:
      return resized, f" {list(value.shape)} -> {list(shape)}"
  raise UserError(
    f"init.map: {name} is {list(shape)} here, but {list(value.shape)} in {where}. Change the "
    "model, or map it to None to keep it new"
  )


def put(value: np.ndarray, like: Any) -> Any:
  """The value with the sharding of `like`, where it has one, in every process."""
  if getattr(like, "sharding", None) is None:
    return value
  return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
