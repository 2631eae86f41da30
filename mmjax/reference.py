"""Tables of what there is, from the code itself: every key, every kind with its settings, every
method of the models.

`mmjax config keys`, `kinds` and `methods` print them as Markdown. The guides hold this output, and
a test compares the two.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.config import ConfigError
from mmjax.describe import meaning
from mmjax.keys import KEYS
from mmjax.kinds import ENTRIES, KINDS, kind_settings, load_function
from mmjax.ranges import in_words

Row = dict[str, Any]


def keys(pattern: str = "*") -> list[Row]:
  """Rows of key, default, takes, meaning: the keys that fit `pattern`, such as "data.image.*".

  Raises ConfigError: none fits.
  """
  found = [
    dict(key=key.path, default=repr(key.default), takes=in_words(key.type), meaning=key.doc)
    for key in KEYS
    if fnmatch.fnmatchcase(key.path, pattern)
  ]
  if not found:
    raise ConfigError(f"no key fits {pattern!r}: write a name or a pattern, such as 'data.image.*'")
  return found


def kinds(name: str = "") -> list[Row]:
  """Rows of group, at, kind, meaning, settings (rows of setting, default, takes, meaning): the
  kinds of this name or group; "" = all. `at`: where such an entry stands in a config.

  Raises ConfigError: there is none.
  """
  found = []
  for group, targets in KINDS.items():
    paths = [f"{path}.{selector}" for path, (owner, selector) in ENTRIES.items() if owner == group]
    for kind, target in targets.items():
      if name in ("", group, kind):
        function = load_function(target)
        found.append(
          dict(
            group=group,
            at=paths,
            kind=kind,
            meaning=_first_paragraph(function),
            settings=_settings(group, kind, function),
          )
        )
  if not found:
    groups = ", ".join(KINDS)
    raise ConfigError(
      f"no kind or group {name!r}: `mmjax config kinds` lists all; groups: {groups}"
    )
  return found


def methods() -> list[Row]:
  """Rows of method, gives, needs, models: those of METHODS (models/methods.py), which objectives
  call by name through `forward`. The batch and `train` are left out: `forward` gives them.
  """
  found: dict[str, Row] = {}
  needed = load_function("mmjax.models.methods:needed")
  for kind, target in KINDS["model"].items():
    model = typing.get_type_hints(load_function(target))["return"]
    for name, function in inspect.getmembers(model, inspect.isfunction):
      text, needs = _first_paragraph(function), needed(name)
      if not needs:
        continue
      given = inspect.signature(function).parameters
      call = ", ".join(word for word in given if word not in ("self", "batch", "train"))
      row = found.setdefault(
        name, dict(method=f"{name}({call})", gives=text, needs=needs, models=[])
      )
      row["models"].append(kind)
  return list(found.values())


def keys_table(rows: Sequence[Row]) -> str:
  """The Markdown of `keys`."""
  return _table(rows, code=("key", "default"))


def kinds_table(rows: Sequence[Row]) -> str:
  """The Markdown of `kinds`: a heading, a sentence and a table for each."""
  parts, group = [], ""
  for row in rows:
    if row["group"] != group:
      group = row["group"]
      parts.append(f"## {group}: {', '.join(f'`{path}`' for path in row['at'])}")
    parts += [f"### {group} `{row['kind']}`", _escape(row["meaning"])]
    if row["settings"]:
      parts.append(_table(row["settings"], code=("setting", "default")))
  return "\n\n".join(parts)


def methods_table(rows: Sequence[Row]) -> str:
  """The Markdown of `methods`."""
  return _table([dict(row, models=", ".join(row["models"])) for row in rows], code=("method",))


def _settings(group: str, kind: str, function: typing.Callable) -> list[Row]:
  """Rows of setting, default, takes, meaning; the key's, for one that all of the group have."""
  paths = [path for path, (owner, _) in ENTRIES.items() if owner == group]
  shared = {key.path: key.doc for key in KEYS}
  rows = []
  for name, parameter in kind_settings(function).items():
    needed = parameter.default is inspect.Parameter.empty
    rows.append(
      dict(
        setting=name,
        default="needed" if needed else repr(parameter.default),
        takes=in_words(parameter.annotation),
        meaning=meaning(kind, group, name) or shared.get(f"{paths[0]}.{name}", ""),
      )
    )
  return rows


def _first_paragraph(function: typing.Callable) -> str:
  return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def _table(rows: Sequence[Mapping[str, str]], code: Sequence[str]) -> str:
  """A Markdown table with the keys of the rows as its head; columns of `code` are set as code."""
  lines = [list(rows[0]), ["---"] * len(rows[0])]
  for row in rows:
    lines.append(
      [
        f"`{cell}`".replace("|", r"\|") if name in code else _escape(cell)
        for name, cell in row.items()
      ]
    )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
  """Text in which Markdown finds nothing to set, but for code between backticks."""
  parts = re.split(r"(`[^`]*`)", text)
  parts[::2] = [re.sub(r"([*<|])", r"\\\1", part) for part in parts[::2]]
  return "".join(part.replace("|", r"\|") if i % 2 else part for i, part in enumerate(parts))
