"""A config as the text of a Python file: assignments to `c`, each with a comment, laid out as
`ruff format` lays them out.
"""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs

WIDTH = 100


@dataclasses.dataclass
class Draft:
  """The lines of `get_config` between its first and its last one, and what they set."""

  lines: list[str] = dataclasses.field(default_factory=list)
  values: dict[str, Any] = dataclasses.field(default_factory=dict)

  def set(self, path: str, value: Any, comment: str = "") -> None:
    """`c.PATH = value  # comment`; the comment stands above where there is no room beside it."""
    comment = " ".join(comment.split())
    self.values[path] = value
    target = "c" + "".join(_step(part) for part in _parts(path))
    body = _value(value, indent=2, before=len(target) + 3)
    whole = f"  {target} = {body}"
    beside = f"{whole}  # {comment}"
    if comment and ("\n" in body or len(beside) > WIDTH):
      self.note(comment)
      self.lines.append(whole)
    else:
      self.lines.append(beside if comment else whole)

  def note(self, comment: str) -> None:
    """Lines of comment."""
    line = "  #"
    for word in comment.split():
      if len(line) + 1 + len(word) > WIDTH:
        self.lines.append(line)
        line = "  #"
      line += f" {word}"
    self.lines.append(line)

  def gap(self) -> None:
    """An empty line."""
    self.lines.append("")

  def config(self) -> ConfigDict:
    """The usual config with what was set so far."""
    c = configs.base()
    for path, value in self.values.items():
      node = c
      *above, last = (part.strip("[]") for part in _parts(path))
      for name in above:
        node = node[name]
      node[last] = value
    return c

  def file(self, docstring: str) -> str:
    """The whole file."""
    body = "\n".join(self.lines)
    docstring = docstring.replace("\\", "/").replace('"', "'")
    return (
      f'"""{docstring.strip()}\n"""\n\nimport mmjax\n\n\ndef get_config(arg: str = ""):\n'
      f"  c = mmjax.config.base()\n{body}\n  return c\n"
    )


def _parts(path: str) -> list[str]:
  """The parts of "a.b[c/d]": a name of an entry that is no word stands in brackets."""
  return re.findall(r"\[[^\]]+\]|[^.\[\]]+", path)


def _step(part: str) -> str:
  if part.startswith("["):
    return f"[{_quoted(part[1:-1])}]"
  return f"[{_quoted(part)}]" if keyword.iskeyword(part) else f".{part}"


def _value(value: Any, indent: int, before: int) -> str:
  """`value` as Python, in lines of at most WIDTH where that can be. indent: of its statement;
  before: characters of its first line that stand before it."""
  flat = _flat(value)
  if indent + before + len(flat) <= WIDTH or not isinstance(value, (Mapping, tuple)) or not value:
    return flat
  inner = indent + 2
  opening, closing = ("dict(", ")") if isinstance(value, Mapping) else ("(", ")")
  items: Sequence[tuple[str, Any]]
  items = list(value.items()) if isinstance(value, Mapping) else [("", item) for item in value]
  named = [(f"{name}=" if name else "", item) for name, item in items]
  together = ", ".join(name + _flat(item) for name, item in named)
  if isinstance(value, Mapping) and inner + len(together) <= WIDTH:
    return f"{opening}\n{' ' * inner}{together}\n{' ' * indent}{closing}"
  comma = "," if len(named) > 1 or not isinstance(value, Mapping) else ""
  lines = [
    f"{' ' * inner}{name}{_value(item, inner, len(name) + 1)}{comma}" for name, item in named
  ]
  return "\n".join([opening, *lines, f"{' ' * indent}{closing}"])


def _flat(value: Any) -> str:
  if isinstance(value, Mapping):
    return f"dict({', '.join(f'{name}={_flat(item)}' for name, item in value.items())})"
  if isinstance(value, (tuple, list)):
    inner = ", ".join(map(_flat, value))
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
  """A string with double quotes, as `ruff format` writes it; a regex stays readable."""
  if "\\" in text and '"' not in text and text.isprintable():
    return f'r"{text}"'
  single = repr(text)
  if single.startswith('"') or '"' in text:
    return single
  return f'"{single[1:-1]}"'
