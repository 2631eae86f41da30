"""Adapters: what a run with config.lora trains of a model, and what it leaves as it was.

Kernels and tables of tokens that lora.params matches get low-rank factors beside them
(models/lora.py); they and what lora.full matches are trained, the rest is frozen. Where lora.full
matches one too, it is trained in full, without factors.

Checkpoints of such a run hold what is trained, and what did not come from init.from as it is. The
rest is its `Base`: named by the folder of that checkpoint, and recognised by a digest of its
parameters. Where the folder has moved, the environment variable MMJAX_BASE says where it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from mmjax import files
from mmjax.config import UserError
from mmjax.models.lora import (
  LEARNED,
  LEAVES,
  OF_TABLE,
  adapted_by,
  lora_scale,
  merge,
  table_factors,
  with_factors,
)
from mmjax.models.quantised import LEAVES as QUANTISED
from mmjax.models.quantised import quantise
from mmjax.state.paths import by_name, map_named, matches, nearest
from mmjax.state.transfer import origin, put


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
  dense = [adapted_by(name) for name in flat if name.endswith("/lora_a")]
  tables = [name for name in getattr(model, "token_tables", ()) if name in flat]
  layers = {name: _layers(flat[name]) for name in (*dense, *tables)}
  plain = {name: _layers(x) for name, x in flat.items() if not _is_factor(name)}
  adapted = {name for name in layers if matches(lora.params, name, layers[name]).any()}
  if not adapted:
    raise UserError(
      f"lora.params: {lora.params!r} matches no kernel of a dense layer and no table of tokens; "
      f"the nearest is {nearest(lora.params, layers)!r}"
    )
  for pattern in lora.full:
    found = [name for name, count in plain.items() if matches(pattern, name, count).any()]
    if not found:
      raise UserError(
        f"lora.full: {pattern!r} matches no parameter; the nearest is {nearest(pattern, plain)!r}"
      )
    adapted -= set(found)
  if not adapted:
    raise UserError("lora.full matches all that lora.params does: nothing is adapted")
  key = rngs["params"] if isinstance(rngs, Mapping) else rngs
  for number, name in enumerate(tables):
    if name in adapted:
      factors = table_factors(flat[name], lora.rank, scale, jax.random.fold_in(key, number))
      flat |= {f"{name}{OF_TABLE}/{leaf}": x for leaf, x in factors.items()}
  kept = {name: x for name, x in flat.items() if name in plain or adapted_by(name) in adapted}
  if lora.base != "float32":
    for name in dense:
      full = any(matches(pattern, name, layers[name]).any() for pattern in lora.full)
      if layers[name] and not full:
        inputs = flat[f"{name.rpartition('/')[0]}/lora_a"].value.ndim - 3
        kept |= _quantised_boxes(name, kept.pop(name), inputs, lora.base)
  return {**variables, "params": flax.traverse_util.unflatten_dict(kept, sep="/")}


def _quantised_boxes(name: str, box: Any, inputs: int, kind: str) -> dict[str, Any]:
  """{name: boxed leaf} in the place of a stacked kernel."""
  leaves = jax.vmap(lambda kernel: quantise(kernel, inputs, kind))(box.value)
  whole, features = box.names, box.names[1 + inputs :]
  axes = {"kernel_scale": ("layers", *features), "kernel_int8": whole}
  if kind == "nf4":
    axes = dict.fromkeys(leaves, (*whole[:2], *features))
  layer = name.rpartition("/")[0]
  return {
    f"{layer}/{leaf}": box.replace(value=value, names=axes[leaf]) for leaf, value in leaves.items()
  }


def in_few_bits(plain: Mapping[str, Any], like: Any) -> dict[str, Any]:
  """{name: array} with the leaves that `like` (a tree of arrays or specs) has in the place of
  kernels. plain: {name: NumPy array}, kernels among them.
  """
  out: dict[str, Any] = {}
  leaves = by_name(like)
  for name in leaves:
    layer, _, last = name.rpartition("/")
    kernel = f"{layer}/kernel"
    if last in QUANTISED and last != "kernel_scale" and kernel in plain:
      scale = leaves[f"{layer}/kernel_scale"]
      kind = last.removeprefix("kernel_")
      features = scale.ndim - (1 if kind == "int8" else 2)
      inputs = plain[kernel].ndim - 1 - features
      stack = [quantise(np.asarray(x, np.float32), inputs, kind) for x in plain[kernel]]
      out |= {f"{layer}/{key}": np.stack([x[key] for x in stack]) for key in stack[0]}
  return {**{name: x for name, x in plain.items() if name not in out}, **out}


def plain_name(name: str) -> str:
  """The parameter that a leaf is, or is a part of in few bits."""
  layer, _, last = name.rpartition("/")
  return f"{layer}/kernel" if last in QUANTISED else name


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
      return learned & matches(lora.params, adapted_by(name), count)
    full = [matches(pattern, name, count) for pattern in lora.full]
    return np.any([np.zeros(count or (), bool), *full], axis=0)

  return {name: of(name, count) for name, count in layers.items()}


def fitted(source: Any, params: Any, rules: tuple) -> tuple[Any, tuple]:
  """(source, rules) for `transfer` of the parameters of another checkpoint into `params`: factors
  that it has and `params` do not take are added to what they adapt; factors that it lacks are new.
  """
  given, here = by_name(source), [name for name in by_name(params) if _is_factor(name)]
  taken = {origin(name, rules, given) for name in here}
  if not taken >= {name for name in given if _is_factor(name)}:
    source = merge(source)
    given = by_name(source)
  new = [name for name in here if origin(name, rules, given) is None]
  return source, (*((re.escape(name), None) for name in new), *rules)


# -- Checkpoints without the base ------------------------------------------------------------------


class Base(NamedTuple):
  """What the checkpoints of an adapter leave out. folder: of the checkpoint that has it. digest: of
  those parameters. names: {name in the adapted model: name there}. merged: whether that checkpoint
  has an adapter itself, which is added into its kernels.
  """

  folder: str
  digest: str
  names: dict[str, str]
  merged: bool = False

  @classmethod
  def of(cls, facts: Mapping[str, Any]) -> Base | None:
    """By the facts of a checkpoint's manifest; None: it is whole. Raises UserError: they are in no
    form that is written here.
    """
    stated = facts.get("base")
    if stated is None:
      return None
    if isinstance(stated, Mapping) and set(stated) == set(cls._fields):
      base = cls(**stated)
      texts = isinstance(base.names, dict) and all(isinstance(x, str) for x in base.names.values())
      if texts and isinstance(base.folder, str) and isinstance(base.digest, str):
        return base
    raise UserError("a checkpoint's manifest names the base of an adapter in no known form")

  def place(self) -> str:
    return os.environ.get("MMJAX_BASE") or self.folder

  def parameters(self, source: Any, checkpoint: Any) -> dict[str, Any]:
    """{name: array} of what is left out, from the parameters of the checkpoint at `place`. Raises
    UserError: they are others than those that `checkpoint` was trained on.
    """
    given = by_name(merge(source) if self.merged else source)
    lacks = [name for name in self.names.values() if name not in given]
    if not lacks and digest(given, self.names.values()) == self.digest:
      return {name: given[origin] for name, origin in self.names.items()}
    why = f"it has no {lacks[0]}" if lacks else "its parameters have another digest"
    raise UserError(
      f"{checkpoint} is an adapter of {self.folder}, but {self.place()} is another model ({why}). "
      "Restore that checkpoint, or say with MMJAX_BASE=DIR where it is"
    )


def find_base(
  folder: epath.Path, source: Any, params_spec: Any, rules: tuple, shares: Mapping[str, float]
) -> Base:
  """The base of a run that starts from the parameters `source` of the checkpoint `folder`: what it
  takes from source_name as it is, and does not train.
  """
  fitting, rules = fitted(source, params_spec, rules)
  given, names = by_name(fitting), {}
  for name, leaf in by_name(params_spec).items():
    source_name = origin(name, rules, given)
    if source_name is not None and not shares[name]:
      value = given[source_name]
      if value.shape == leaf.shape and value.dtype == leaf.dtype:
        names[name] = source_name
  place = str(folder) if files.is_url(folder) else os.path.abspath(folder)
  return Base(place, digest(given, names.values()), names, fitting is not source)


def digest(given: Mapping[str, Any], names: Iterable[str]) -> str:
  """Of names, shapes, dtypes and values of arrays."""

  def of(name: str) -> bytes:
    x = np.ascontiguousarray(given[name])
    head = f"{name} {x.dtype.name} {x.shape} ".encode()
    return hashlib.blake2b(x.reshape(-1).view(np.uint8).data).digest() + head

  with ThreadPoolExecutor(4) as pool:
    parts = pool.map(of, sorted(set(names)))
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def without(tree: Any, base: Base | None) -> Any:
  """The parameters that a checkpoint holds, as nested dicts; the tree itself where that is all."""
  if base is None or tree is None:
    return tree
  kept = {name: x for name, x in by_name(tree).items() if plain_name(name) not in base.names}
  return flax.traverse_util.unflatten_dict(kept, sep="/")


def composed(own: Any, base: Mapping[str, Any], spec: Any = None) -> Any:
  """The whole parameters: those that a checkpoint holds and those of its base, which get dtypes and
  shardings of `spec`, where it is given.
  """
  if spec is None:
    flat = {**by_name(own), **base}
    return flax.traverse_util.unflatten_dict(flat, sep="/")
  held, base = by_name(own), in_few_bits(base, spec)

  def of(name: str, leaf: Any) -> Any:
    return held[name] if name in held else put(np.asarray(base[name], leaf.dtype), leaf)

  return map_named(of, spec)


def table(shares: Mapping[str, float], params_spec: Any) -> str:
  """What is trained of a model, as lines: layers with factors and other parts, how many parameters
  of each, and their share of all. shares: of the slices of each parameter, as of an `Optimizer`.
  """
  counts: dict[tuple[str, str], int] = {}
  for name, leaf in by_name(params_spec).items():
    if shares[name]:
      factor = _is_factor(name)
      part = adapted_by(name).removesuffix("/kernel") if factor else name.partition("/")[0]
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


def _layers(box: Any) -> int | None:
  """Layers of a boxed, stacked parameter."""
  names = getattr(box, "names", ())
  return box.value.shape[0] if names[:1] == ("layers",) else None
