"""A resolved config as lines for people, with what each key and each setting of a kind means and
takes.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmjax.config import flatten
from mmjax.keys import KEYS
from mmjax.kinds import ENTRIES, KINDS, kind_function, kind_settings
from mmjax.ranges import in_words


def describe(config: Mapping[str, Any], *, docs: bool = False) -> str:
  """The lines `key = value`; with `docs` each followed by its meaning, what it takes, and its
  default.
  """
  lines = []
  for path, value in flatten(config):
    lines.append(f"{path} = {value!r}" + (f"  # {explain(path, config)}" if docs else ""))
  return "\n".join(lines)


def explain(path: str, config: Mapping[str, Any]) -> str:
  """What the key at `path` of a resolved config means: "Peak learning rate. (float, at least 0;
  default 0.001)".
  """
  found = _key(path) or _setting(path, config)
  if not found:
    return "none named"
  meaning, annotation, default = found
  ends = meaning if meaning.endswith((".", ":")) else f"{meaning}."
  default = "needed" if default is inspect.Parameter.empty else f"default {default!r}"
  return f"{ends} ({in_words(annotation)}; {default})"


def _key(path: str) -> tuple[str, Any, Any] | None:
  for key in KEYS:
    if fnmatch.fnmatchcase(path, key.path) and path.count(".") >= key.path.count("."):
      return key.doc, key.type, key.default
  return None


def _setting(path: str, config: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
  """(meaning, annotation, default) of a setting of a kind, or of the key that names the kind."""
  for pattern, (group, selector) in sorted(ENTRIES.items(), key=lambda item: -len(item[0])):
    if not fnmatch.fnmatchcase(path, f"{pattern}.*"):
      continue
    entry, rest = _entry(config, path, pattern)
    if entry is None:
      continue
    kind = entry[selector]
    if rest == selector:
      first_line = (inspect.getdoc(kind_function(entry, group)) or kind).splitlines()[0]
      return f"{group.capitalize()}: {first_line}", str, kind
    parameter = kind_settings(kind_function(entry, group)).get(rest)
    if parameter:
      return meaning(kind, group, rest), parameter.annotation, parameter.default
  return None


def _entry(config: Mapping[str, Any], path: str, pattern: str) -> tuple[Any, str]:
  """(the entry of `pattern` that `path` points into, what is left of the path). Names of entries
  may hold dots.
  """
  node, rest = config, path
  for part in pattern.split("."):
    fits = [name for name in node if part in ("*", name) and rest.startswith(f"{name}.")]
    if not fits:
      return None, rest
    name = max(fits, key=len)
    node, rest = node[name], rest[len(name) + 1 :]
    if not hasattr(node, "keys"):
      return None, rest
  return node, rest


def meaning(kind: str, group: str, setting: str) -> str:
  """What the docstring of a kind says of a setting: the text after "setting:", or of the kind that
  it refers to.
  """
  for text, names in _docstrings(kind, group, set()):
    labels = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    one = rf"`?(?:{labels})`?"
    start = rf"(?:^|(?<=[.;\n] )|(?<=\n))((?:{one},\s)*{one}):\s+"
    heads = list(re.finditer(start, text, re.M))
    for at, head in enumerate(heads):
      named = re.findall(r"\w+", head[1])
      if setting in named:
        body = text[head.end() : heads[at + 1].start() if at + 1 < len(heads) else None]
        body = re.split(r"\n\s*\n|\s(?=(?:Metrics|Returns|Raises|Needs)\b.*:)", body)[0]
        body = " ".join(body.split()).rstrip(";. ")
        if re.search(r"see\s+`\w+`", body):
          break  # that kind says it
        return f"{', '.join(named)}: {body}" if len(named) > 1 else body
  for text, _ in _docstrings(kind, group, set()):
    for sentence in re.split(r"(?<=[.:])\s+", " ".join(text.split())):
      if re.search(rf"\b{setting}\b", sentence):
        return sentence.rstrip(".")
  return ""


def _docstrings(kind: str, group: str, before: set[str]) -> Iterator[tuple[str, list[str]]]:
  """(docstring, names of settings) of a kind, then of those that it sends the reader to: "see
  `multitask`".
  """
  function = kind_function({"kind": kind}, group)
  text, names = inspect.getdoc(function) or "", list(kind_settings(function))
  yield text, names
  for other in re.findall(r"see\s+`(\w+)`", text, re.I):
    if other in KINDS[group] and other not in before:
      yield from _docstrings(other, group, {*before, kind})
