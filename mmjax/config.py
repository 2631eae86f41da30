"""The whole run in one file: loading a config, resolution, overrides, and errors that help. The
keys stand in keys.py.

A config file defines `get_config(arg="") -> ConfigDict`: it starts from `base()` and assigns.
`resolve()` merges every entry that has a `name` or a `kind` with the defaults of that kind, refuses
what it does not know (naming the nearest key or value), checks types and contradictions, and
freezes. Nothing here imports JAX or touches a device. What a kind is stands in kinds.py, what keys
contradict each other in contradictions.py.
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import importlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import sys
import types
import typing
from typing import Annotated, Any, Literal

import ml_collections
from ml_collections import ConfigDict, FrozenConfigDict

from mmjax.contradictions import check
from mmjax.errors import ConfigError, UntrustedCode, UserError, nearest
from mmjax.keys import COLLECTIONS, FREE_ON_RESUME, KEYS, Key
from mmjax.kinds import (
  COLLECTIONS_OF_KINDS,
  ENTRIES,
  FUNCTION,
  FUNCTIONS,
  KINDS,
  entry_at,
  kind_function,
  kind_settings,
  what_happened,
)
from mmjax.ranges import INT32, Duration, Fields, Function, Range
from mmjax.special_tokens import SPECIAL_TOKENS, fill_special_tokens, special_settings, token_ids

log = logging.getLogger("mmjax")
_DEEPEST = 32  # levels of a config: the deepest key has six
_FLOAT32 = Range(2.0**-126, 2.0**128 - 2.0**104)  # what numbers become on devices
_MOST_BITS = 4096  # of a whole number; Python shows none of more than 4,300 digits


def base() -> ConfigDict:
  """A config with every default: start from it, assign, return it from `get_config`."""
  tree: dict[str, Any] = {name.split(".")[-1]: {} for name in COLLECTIONS if "." not in name}
  for key in KEYS:
    if "*" not in key.path:
      _set(tree, key.path.split("."), key.default if not isinstance(key.default, dict) else {})
  for path in COLLECTIONS:
    if path.count(".") and entry_at(tree, path.split(".")) is None:
      _set(tree, path.split("."), {})
  return ConfigDict(tree, type_safe=False)


def load(
  file: str, overrides: typing.Sequence[str] = (), allow_code: typing.Sequence[str] = ()
) -> FrozenConfigDict:
  """Runs `get_config` of FILE (or `FILE:ARG`, which passes ARG to it), applies overrides, resolves.

  The modules of `allow_code`, and those that the config itself names, join its `allow_code`.
  Raises ConfigError: the file is missing or fails, or the config is wrong.
  """
  path, _, arg = file.partition(":")
  if not os.path.isfile(path):
    near = (
      nearest(os.path.basename(path), os.listdir(os.path.dirname(path) or "."))
      if os.path.isdir(os.path.dirname(path) or ".")
      else ""
    )
    raise ConfigError(f"{path}: no such config file{near}")
  loader = importlib.machinery.SourceFileLoader("mmjax_user_config", path)
  module = types.ModuleType(loader.name)
  module.__file__ = path
  try:
    with _siblings(path):
      loader.exec_module(module)
      config = module.get_config(arg) if arg else module.get_config()
  except ConfigError:
    raise
  except AttributeError as error:
    raise ConfigError(
      f"{path}: {error}. A config file defines get_config(arg='') and assigns to "
      "mmjax.config.base()"
    ) from error
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise ConfigError(f"{path}: {what_happened(error)}") from error
  try:
    resolved = resolve(config, overrides).to_dict()
    resolved["allow_code"] = tuple(
      dict.fromkeys((*resolved["allow_code"], *allow_code, *own_code(resolved)))
    )
    return FrozenConfigDict(resolved)
  except ConfigError as error:
    raise type(error)(f"{path}: {error}") from error.__cause__
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # of the values' own methods
    raise ConfigError(f"{path}: {what_happened(error)}") from error


@contextlib.contextmanager
def _siblings(path: str) -> typing.Iterator[None]:
  """Within, a config file may import the files beside it. They are forgotten afterwards, so that
  the next config may have others of the same names beside it.
  """
  folder, before = os.path.dirname(os.path.abspath(path)), set(sys.modules)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    if folder in sys.path:
      sys.path.remove(folder)
    for name in set(sys.modules) - before:
      file = getattr(sys.modules[name], "__file__", None) or ""
      if name.split(".")[0] not in before and file.startswith(folder + os.sep):
        del sys.modules[name]


def resolve(
  config: ConfigDict | dict,
  overrides: typing.Sequence[str] = (),
  special_tokens: typing.Mapping[str, int] | None = None,
) -> FrozenConfigDict:
  """Merges defaults, applies overrides (`optimizer.lr=3e-4`), checks keys, types and
  contradictions, freezes.

  special_tokens: {role: id} of a checkpoint's own tokenizer, which stands for data.text.tokenizer,
  whatever that is by now.
  Raises ConfigError naming the key, what is wrong with it, and the nearest valid one.
  """
  if not hasattr(config, "items"):
    raise ConfigError(
      f"get_config() returned {config!r:.80}, not a config. Let it return mmjax.config.base() "
      "with your changes"
    )
  raw = _tree(config)
  for override in overrides:
    path, sep, text = override.removeprefix("--").removeprefix("config.").partition("=")
    if not sep or not path:
      raise ConfigError(f"override {override!r}: write --config.KEY=VALUE")
    _set_override(raw, path, _parse(text))
  resolved = _resolve_tree(raw)
  fill_special_tokens(resolved, special_tokens)
  check(resolved)
  return FrozenConfigDict(resolved)


def from_json(text: str, allow_code: typing.Sequence[str] = ()) -> FrozenConfigDict:
  """The resolved config that `to_json` wrote; keys that newer versions added get their defaults.

  No tokenizer is read: special tokens that an older version did not write are the ids that it used,
  0 to 4.
  It may come from a stranger: it names kinds of this package and functions of the modules in
  `allow_code`, nothing else is imported. Its own `allow_code` becomes the one given here. Raises
  UntrustedCode, ConfigError, ValueError.
  """
  allow_code = (allow_code,) if isinstance(allow_code, str) else tuple(allow_code)
  try:
    stored = json.loads(text)
  except RecursionError as error:
    raise ConfigError("a config is not nested as deep as this") from error
  if not isinstance(stored, dict):
    raise ConfigError(f"a config is an object of keys, not {stored!r:.80}")
  resolved = _resolve_tree(_tree(stored) | {"allow_code": allow_code}, allow_code)
  for path, entry, name, special in special_settings(resolved):
    if name not in (entry_at(stored, path) or {}) or entry[name] == ():
      entry[name] = token_ids(
        special, dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True)), entry[name]
      )
  return FrozenConfigDict(resolved)


def to_json(config: FrozenConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2)


def settings(
  entry: typing.Mapping, group: str | None = None, *, without: typing.Sequence[str] = ()
) -> dict[str, Any]:
  """The keyword arguments that an entry's kind function takes: the entry less `kind`, `name` and
  the common keys.

  group: where the kind stands in KINDS; needed where groups have kinds of the same name.
  """
  function = kind_function(entry, group)
  names = kind_settings(function)
  return {k: v for k, v in _plain(entry).items() if k in names and k not in without}


def in_steps(
  value: int | str, *, steps: int | None, batch_size: int, examples: int | None = None
) -> int:
  """A duration in steps: 1000, '5%' of `steps`, '2 epochs' of `examples`, '1e6 examples'. At least
  1 unless zero.
  """
  if isinstance(value, (int, float)):
    return int(value)
  match = re.fullmatch(
    r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*(%|epochs?|examples?|steps?)\s*", value
  )
  if not match or not math.isfinite(float(match[1])):
    raise ConfigError(f"duration {value!r}: write steps (1000), '5%', '2 epochs' or '1e6 examples'")
  number, unit = float(match[1]), match[2].rstrip("s")
  if unit == "%" and steps is None or unit == "epoch" and examples is None:
    raise ConfigError(f"duration {value!r} cannot be used here: its whole is not known")
  whole = {
    "%": (steps or 0) / 100,
    "step": 1,
    "example": 1 / batch_size,
    "epoch": (examples or 0) / batch_size,
  }[unit]
  return max(1, round(number * whole)) if number else 0


def changed_on_resume(old: FrozenConfigDict, new: FrozenConfigDict) -> list[str]:
  """Names of the keys that differ and alter the numbers of a run, as 'optimizer.lr: 0.001 ->
  0.002'.
  """
  before, after = dict(flatten(old)), dict(flatten(new))
  lines = []
  for path in sorted(before.keys() | after.keys()):
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in FREE_ON_RESUME):
      continue
    if _jsonable(before.get(path)) != _jsonable(after.get(path)):
      lines.append(f"{path}: {before.get(path)!r} -> {after.get(path)!r}")
  return lines


@contextlib.contextmanager
def mistakes() -> typing.Iterator[None]:
  """Within, what a model, an objective or an optimizer refuses is a mistake in the config: exit
  code 2, not 1.
  """
  try:
    yield
  except ConfigError:
    raise
  except UserError as error:
    raise ConfigError(str(error)) from error


def flatten(config: typing.Mapping, prefix: str = "") -> list[tuple[str, Any]]:
  """[(dotted path, value)] in the order of the config."""
  rows = []
  for name, value in _plain(config).items():
    if isinstance(value, dict) and value:
      rows += flatten(value, f"{prefix}{name}.")
    else:
      rows.append((prefix + name, value))
  return rows


# -- resolution ------------------------------------------------------------------------------------


def _tree(node: typing.Any, path: str = "", above: tuple[int, ...] = ()) -> Any:
  """A config as nested dicts. Raises ConfigError: it contains itself, is too deep, or a key is no
  string.
  """
  if not hasattr(node, "items") and not isinstance(node, (list, tuple)):
    return _value(node, path)
  if id(node) in above:
    raise ConfigError(f"{path} contains itself")
  if len(above) >= _DEEPEST:
    raise ConfigError(f"{'.'.join(path.split('.')[:4])}... is nested deeper than {_DEEPEST} levels")
  above = (*above, id(node))
  if isinstance(node, (list, tuple)):
    return (
      type(node)([_tree(value, path, above) for value in node])
      if type(node) in (list, tuple)
      else node
    )
  tree = {}
  for name, value in node.items():
    if not isinstance(name, str) or not name:
      raise ConfigError(f"{path or 'the config'} has the key {name!r:.80}, but keys are words")
    tree[name] = _tree(value, f"{path}.{name}" if path else name, above)
  return tree


def _value(value: Any, path: str) -> Any:
  """A value as one of Python's own types, where it is of a type made of one, or a NumPy number.
  Raises ConfigError: an array, or a number that could not even be shown.
  """
  if hasattr(value, "shape") and hasattr(value, "item"):
    if value.shape:
      raise ConfigError(f"{path} is an array ({type(value).__name__}). Write a tuple of numbers")
    value = value.item()
  if isinstance(value, int) and value.bit_length() > _MOST_BITS:
    raise ConfigError(
      f"{path} is a whole number of {value.bit_length():,} bits, which no key takes"
    )
  for plain in (bool, int, float, str):
    if isinstance(value, plain):
      return value if type(value) is plain else getattr(plain, f"__{plain.__name__}__")(value)
  return value


def own_code(config: typing.Mapping) -> list[str]:
  """Modules outside this package that the entries of a resolved config name."""
  patterns = [f"{pattern}.{selector}" for pattern, (_, selector) in ENTRIES.items()]
  patterns += ["evaluation.evaluators.*.check", "evaluation.evaluators.*.choices"]
  named = [
    value.partition(":")[0]
    for path, value in flatten(config)
    if isinstance(value, str)
    and re.fullmatch(FUNCTION, value)
    and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
  ]
  return [module for module in named if module.split(".")[0] != "mmjax"]


def _check_code(
  target: str, known: typing.Collection[str], path: str, allow_code: tuple[str, ...] | None
) -> None:
  """Raises UntrustedCode: `target`, at `path` of a config that is not the user's, may not be
  imported. None allows all.
  """
  if allow_code is None or ":" not in target or target in known:
    return
  module = target.partition(":")[0]
  if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in allow_code):
    own = module.split(".")[0] == "mmjax"
    raise UntrustedCode(
      f"{path} is {target!r}: the checkpoint wants to run code of the module {module!r}, which is "
      f"not {'for checkpoints to name' if own else 'of this package'}. If you trust that code, "
      f"allow it with --allow-code {module} (in Python: allow_code=({module!r},))"
    )


def _resolve_tree(raw: dict, allow_code: tuple[str, ...] | None = None) -> dict:
  """Resolves a whole config. allow_code: modules that it may import from, None = any, for the
  user's own.
  """
  common = {key.path: key for key in KEYS}
  return _resolve_node(_plain(raw), "", "", common, allow_code)


def _resolve_node(
  node: dict, path: str, pattern: str, common: dict[str, Key], allow_code: tuple[str, ...] | None
) -> dict:
  """Resolves the dict at `path`; `pattern` is the path with entry names replaced by `*`."""
  prefix, pattern_prefix = (f"{path}.", f"{pattern}.") if path else ("", "")
  collections = (*COLLECTIONS, *COLLECTIONS_OF_KINDS)
  if path in collections or pattern in collections:
    for name, entry in node.items():
      if not isinstance(entry, dict):
        raise ConfigError(f"{prefix}{name} must be a dict of settings, not {entry!r}")
    return {
      name: _resolve_node(entry, f"{prefix}{name}", f"{pattern_prefix}*", common, allow_code)
      for name, entry in node.items()
    }
  known: dict[str, tuple[Any, Any]] = {}  # name -> (type, default); type None = a nested dict
  for key in common.values():
    if key.path.startswith(pattern_prefix) and (rest := key.path[len(pattern_prefix) :]):
      head, _, tail = rest.partition(".")
      if tail or isinstance(key.default, dict):
        known[head] = (None, {})
      elif head != "*":
        known.setdefault(head, (key.type, key.default))
  for collection in COLLECTIONS:
    if collection.startswith(pattern_prefix) and "." not in collection[len(pattern_prefix) :]:
      known[collection[len(pattern_prefix) :]] = (None, {})
  if pattern in ENTRIES:
    group, selector = ENTRIES[pattern]
    usual = group if group in KINDS[group] else ""  # a group with a kind of its own name
    name = node.get(selector, known.get(selector, (str, usual))[1])
    if not name:
      raise ConfigError(f"{path} has no `{selector}`; there are: {', '.join(KINDS[group])}")
    if not isinstance(name, str) or (name not in KINDS[group] and ":" not in name):
      raise ConfigError(
        f"{prefix}{selector} is {name!r}, which is no {group}{nearest(str(name), KINDS[group])}"
      )
    known[selector] = (str, name)
    _check_code(name, KINDS[group].values(), f"{prefix}{selector}", allow_code)
    for setting, parameter in kind_settings(kind_function({"kind": name}, group)).items():
      default = None if parameter.default is inspect.Parameter.empty else parameter.default
      known.setdefault(setting, (parameter.annotation, default))
  out: dict[str, Any] = {}
  for name in node:
    if name not in known:
      elsewhere = [key.path for key in KEYS if key.path.split(".")[-1] == name]
      hint = f". Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(name, known)
      hint = hint or f"; there are: {', '.join(known)}"
      raise ConfigError(f"unknown key {prefix}{name}{hint}")
  for name, (kind, default) in known.items():
    value = node.get(name, default)
    if f"{pattern_prefix}{name}" in ENTRIES and value is None:
      out[name] = None
    elif kind is None or f"{pattern_prefix}{name}" in (*ENTRIES, *COLLECTIONS_OF_KINDS):
      if not isinstance(value, dict):
        raise ConfigError(f"{prefix}{name} must be a dict of settings, not {value!r}")
      out[name] = _resolve_node(
        value, f"{prefix}{name}", f"{pattern_prefix}{name}", common, allow_code
      )
    else:
      if value == {} and any(isinstance(note, Fields) for note in typing.get_args(kind)):
        continue  # nothing is asked of it, and old configs do not have it
      out[name] = _typed(value, kind, f"{prefix}{name}", default)
      if Function() in typing.get_args(kind):
        _check_code(out[name], FUNCTIONS, f"{prefix}{name}", allow_code)
  return out


def _typed(value: Any, kind: Any, path: str, default: Any) -> Any:
  """`value` as `kind`, or a ConfigError: also out of the range that `kind` states. Ints pass as
  floats, lists as tuples.
  """
  if typing.get_origin(kind) is Annotated:
    bare, *notes = typing.get_args(kind)
    for wanted in notes:
      if isinstance(wanted, Fields):
        return _fields(value, wanted, path)
    value = _typed(value, bare, path, default)
    for wanted in notes:
      if isinstance(wanted, Range) and not wanted.holds(value):
        raise ConfigError(f"{path} is {value!r}, but must be {wanted}")
    return value
  if kind in (inspect.Parameter.empty, Any):
    return _jsonable(value)
  origin = typing.get_origin(kind)
  if origin is Literal:
    choices = typing.get_args(kind)
    if value not in choices:
      raise ConfigError(
        f"{path} is {value!r}, but must be one of "
        f"{', '.join(map(repr, choices))}{nearest(str(value), [str(c) for c in choices])}"
      )
    return value
  if origin in (typing.Union, types.UnionType):
    errors = []
    for option in typing.get_args(kind):
      if option is type(None):
        if value is None:
          return None
        continue
      try:
        return _typed(value, option, path, default)
      except ConfigError as error:
        errors.append(error)
    raise errors[0]
  if kind is Duration:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
      raise ConfigError(
        f"{path} is {value!r}, but must be a duration: steps (1000), '5%', '2 epochs' or '1e6 "
        "examples'"
      )
    if isinstance(value, int) and abs(value) > INT32:
      raise ConfigError(f"{path} is {value!r:.40}, but must be at most {INT32}")
    try:
      in_steps(value, steps=1, batch_size=1, examples=1)
    except ConfigError as error:
      raise ConfigError(f"{path}: {error}") from error
    if isinstance(value, str) and "%" in value and in_steps(value, steps=1000, batch_size=1) > 1000:
      raise ConfigError(f"{path} is {value!r}, but must be at most 100%")
    return value
  plain = origin or kind
  if plain is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < 1e300 else math.inf
  if plain is float and isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{path} is {value!r}, but must be a finite number")
  if plain is float and isinstance(value, float) and not _FLOAT32.holds(abs(value) or 1.0):
    raise ConfigError(f"{path} is {value!r}, which float32 takes for 0 or infinity")
  if plain is tuple and isinstance(value, (list, tuple)):
    if isinstance(default, tuple) and default and all(isinstance(d, (int, float)) for d in default):
      any_length = typing.get_args(kind)[1:] == (...,)
      numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
      if not value or not numbers or (len(value) != len(default) and not any_length):
        wanted = "numbers" if any_length else f"{len(default)} numbers"
        raise ConfigError(f"{path} is {tuple(value)!r}, but must be {wanted}, such as {default!r}")
    if typing.get_args(kind) == (str, ...) and not all(isinstance(v, str) for v in value):
      raise ConfigError(f"{path} is {tuple(value)!r}, but must be a tuple of words, such as ('a',)")
    return _tuples(value)
  if plain is dict and isinstance(value, dict):
    return value
  if isinstance(value, plain) and not (plain in (int, float) and isinstance(value, bool)):
    return value
  hint = f", such as {default!r}" if default not in (None, "", ()) else ""
  raise ConfigError(
    f"{path} is {value!r} ({type(value).__name__}), but must be {_article(plain.__name__)}{hint}"
  )


def _fields(value: Any, wanted: Fields, path: str) -> dict[str, Any] | None:
  """The settings of a dict that belong to a dataclass or a function, typed; None stays None."""
  if value is None:
    return None
  if not isinstance(value, dict):
    raise ConfigError(f"{path} must be a dict of settings, not {value!r}")
  parameters = inspect.signature(wanted.of, eval_str=True).parameters
  known = {name: p for name, p in parameters.items() if name not in wanted.without}
  for name in value:
    if name not in known:
      elsewhere = f". It is {path.rpartition('.')[0]}.{name}" if name in wanted.without else ""
      hint = elsewhere or nearest(name, known) or f"; there are: {', '.join(known)}"
      raise ConfigError(f"unknown key {path}.{name}{hint}")
  return {
    name: _typed(given, known[name].annotation, f"{path}.{name}", known[name].default)
    for name, given in value.items()
  }


def _set_override(tree: dict, path: str, value: Any) -> None:
  """Sets a dotted path; entry names with slashes or dots (`retrieval/val`) match the longest
  existing key first.
  """
  keys, node = path.split("."), tree
  if len(keys) > _DEEPEST:
    raise ConfigError(f"override {'.'.join(keys[:4])}... names a key deeper than {_DEEPEST} levels")
  while keys:
    for n in range(len(keys), 0, -1):
      head = ".".join(keys[:n])
      if n == len(keys) or (isinstance(node.get(head), dict)):
        break
    if n == len(keys) and n > 1 and head not in node:
      head, n = keys[0], 1
    keys = keys[n:]
    if not keys:
      node[head] = value
      return
    child = node.setdefault(head, {})
    if not isinstance(child, dict):
      raise ConfigError(f"override {path}={value!r}: {head} is a value, not a group of keys")
    node = child


def _parse(text: str) -> Any:
  if text in ("true", "false"):
    return text == "true"
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def _set(tree: dict, keys: list[str], value: Any) -> None:
  for key in keys[:-1]:
    tree = tree.setdefault(key, {})
  tree[keys[-1]] = value


def _plain(node: Any) -> Any:
  if isinstance(node, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict)):
    node = node.to_dict()
  return {k: _plain(v) for k, v in node.items()} if isinstance(node, dict) else node


def _tuples(value: Any) -> Any:
  return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _jsonable(value: Any) -> Any:
  return _tuples(value) if isinstance(value, (list, tuple)) else value


def _article(noun: str) -> str:
  return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
