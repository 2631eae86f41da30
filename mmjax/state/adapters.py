"""Adapters: what a run with config.lora trains of a model, and what it leaves as it was.

Kernels that lora.params matches get low-rank factors beside them (models/lora.py); they and what
lora.full matches are trained, the rest is frozen. Where lora.full matches a kernel too, it is
trained in full, without factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.models.lora import LEARNED, LEAVES, lora_scale, merge, with_factors
from mmjax.state.paths import by_name, matches, nearest
from mmjax.state.transfer import origin


def init_variables(model: nn.Module, config: FrozenConfigDict, rngs: Any, batch: Any) -> Any:
  """`model.init(rngs, batch)`, boxed, with the factors that config.lora asks for. Raises UserError:
  one of its regexes matches nothing.
  """
  lora = config.lora
  if not lora.params:
    return model.init(rngs, batch)
  scale = lora_scale(lora.alpha, lora.rank, lora.rslora)
  with with_factors(lora.rank, scale, lora.dropout):
    variables = dict(model.init(rngs, batch))
  flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  dense = [_kernel_of(name) for name in flat if name.endswith("/lora_a")]
  layers = {name: _layers(flat[name]) for name in dense}
  plain = {name: _layers(x) for name, x in flat.items() if not _is_factor(name)}
  adapted = {name for name in dense if matches(lora.params, name, layers[name]).any()}
  if not adapted:
    raise UserError(
      f"lora.params: {lora.params!r} matches no kernel of a dense layer; the nearest is "
      f"{nearest(lora.params, dense)!r}"
    )
  for pattern in lora.full:
    found = [name for name, count in plain.items() if matches(pattern, name, count).any()]
    if not found:
      raise UserError(
        f"lora.full: {pattern!r} matches no parameter; the nearest is {nearest(pattern, plain)!r}"
      )
    adapted -= set(found)
  if not adapted:
    raise UserError("lora.full matches every kernel that lora.params does: nothing is adapted")
  kept = {name: x for name, x in flat.items() if name in plain or _kernel_of(name) in adapted}
  return {**variables, "params": flax.traverse_util.unflatten_dict(kept, sep="/")}


def trained_slices(
  config: FrozenConfigDict, layers: Mapping[str, int | None]
) -> dict[str, np.ndarray]:
  """Which parameters config.lora trains, {name: bool}, or bool [layers] of a stacked one. layers:
  of each parameter, None outside stacks.
  """
  lora = config.lora

  def of(name: str, count: int | None) -> np.ndarray:
    if not lora.params:
      return np.ones(count or (), bool)
    if _is_factor(name):
      learned = name.rpartition("/")[2] in LEARNED
      return learned & matches(lora.params, _kernel_of(name), count)
    full = [matches(pattern, name, count) for pattern in lora.full]
    return np.any([np.zeros(count or (), bool), *full], axis=0)

  return {name: of(name, count) for name, count in layers.items()}


def fitted(source: Any, params: Any, rules: tuple) -> tuple[Any, tuple]:
  """(source, rules) for `transfer` of the parameters of another checkpoint into `params`: factors
  that it has and `params` do not take are added into its kernels; factors that it lacks are new.
  """
  given, here = by_name(source), [name for name in by_name(params) if _is_factor(name)]
  taken = {origin(name, rules, given) for name in here}
  if not taken >= {name for name in given if _is_factor(name)}:
    source = merge(source)
    given = by_name(source)
  new = [name for name in here if origin(name, rules, given) is None]
  return source, (*((re.escape(name), None) for name in new), *rules)


def table(shares: Mapping[str, float], params_spec: Any) -> str:
  """What is trained of a model, as lines: layers with factors and other parts, how many parameters
  of each, and their share of all. shares: of the slices of each parameter, as of an `Optimizer`.
  """
  counts: dict[tuple[str, str], int] = {}
  for name, leaf in by_name(params_spec).items():
    if shares[name]:
      factor = _is_factor(name)
      part = name.rpartition("/")[0] if factor else name.partition("/")[0]
      row = part, "low rank" if factor else "in full"
      counts[row] = counts.get(row, 0) + round(shares[name] * leaf.size)
  whole = sum(leaf.size for leaf in jax.tree.leaves(params_spec))
  rows = [
    (module, how, f"{count:,}", f"{count / whole:.2%}") for (module, how), count in counts.items()
  ]
  total = sum(counts.values())
  rows = [("trained", "", "parameters", "of all"), *rows]
  rows.append(("all that is trained", "", f"{total:,}", f"{total / whole:.2%}"))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return "\n".join(
    f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows
  )


def _is_factor(name: str) -> bool:
  return name.rpartition("/")[2] in LEAVES


def _kernel_of(name: str) -> str:
  """The kernel that a factor stands beside."""
  return f"{name.rpartition('/')[0]}/kernel"


def _layers(box: Any) -> int | None:
  """Layers of a boxed, stacked parameter."""
  names = getattr(box, "names", ())
  return box.value.shape[0] if names[:1] == ("layers",) else None
