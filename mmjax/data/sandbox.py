"""Jinja for chat templates of strangers: nothing outside the sandbox is reached, and time and
memory are bounded.

Everything that a template computes is charged by its size, each turn of a loop and each call by a
part of the template's length; past WORK characters, or SECONDS, it ends in one error.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mmjax.config import UserError

LONGEST = 2**16  # characters of a template; published ones have up to 2**15
WORK = 2**27  # characters that a rendering may compute; one that grows step by step counts each
SECONDS = 10.0
_STEP = 2**12  # what a turn of a loop, a call or a filter costs at least
_ITEM = 2**8  # what a value costs, besides the characters of a text

_FILTERS = (
  "abs capitalize count d default dictsort e escape first float indent int items join last length "
  "list lower map reject rejectattr replace reverse round safe select selectattr sort string "
  "title trim unique upper"
).split()
_STRING_METHODS = frozenset(
  "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower "
  "lstrip partition removeprefix removesuffix replace rfind rpartition rsplit rstrip split "
  "splitlines startswith strip title upper".split()
)
_WIDTH = re.compile(r"%[^%a-zA-Z]*[\d*]")  # of "%9d": it could ask for any size


class TooMuch(Exception):
  """A template has computed more than it may."""


class Refusal(Exception):
  """A template has called raise_exception."""


class Sandbox(ImmutableSandboxedEnvironment):
  """What templates of the field expect (as in transformers), within bounds."""

  intercepted_binops = frozenset(("+", "*", "**", "%"))

  def __init__(self) -> None:
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      finalize=self.charged,
      extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    self._rendering = threading.local()
    filters = {name: self._checked(self.filters[name]) for name in _FILTERS}
    filters |= {"tojson": self._json, _CONCAT: self._concat, _EACH: self._each}
    filters |= {_BUILT: self.charged, "join": self._checked(self._join)}
    filters |= {"replace": self._checked(self._replace), "indent": self._checked(self._indent)}
    self.filters = filters
    self.globals = {
      name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")
    }
    self.globals["raise_exception"] = _refuse

  def program(self, source: str) -> jinja2.Template:
    """A template, compiled. Raises UserError: it is too long or no Jinja."""
    if len(source) > LONGEST:
      raise UserError(f"it has {len(source):,} characters; at most {LONGEST:,} are read")
    try:
      tree = _Bounded().visit(self.parse(source))
      return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))
    except jinja2.TemplateSyntaxError as error:
      raise UserError(f"it is no Jinja template (line {error.lineno}: {error.message})") from error
    except (RecursionError, SyntaxError, MemoryError, ValueError) as error:
      raise UserError(f"it is no Jinja template that can be compiled ({error})") from error

  def render(self, program: jinja2.Template, source: str, values: Mapping[str, Any]) -> str:
    """What a template makes of the values. Raises UserError: it fails, refuses or is too much."""
    state = self._rendering
    state.left, state.until, state.step = WORK, time.monotonic() + SECONDS, _STEP + len(source) // 4
    try:
      return "".join(program.generate(values))
    except Refusal as error:
      raise UserError(f"it refuses this conversation: {error}") from error
    except TooMuch as error:
      raise UserError(
        "it computes too much: a loop that does not end, or a text that grows without bound"
      ) from error
    except RecursionError as error:
      raise UserError("it fails: a macro that calls itself without end") from error
    except Exception as error:  # whatever a stranger's template does
      why = " ".join(str(error).split())[:200]
      raise UserError(f"it fails ({type(error).__name__}: {why})") from error

  # -- Bounds --------------------------------------------------------------------------------------

  def charge(self, size: int) -> None:
    state = self._rendering
    state.left = getattr(state, "left", WORK) - size
    if state.left < 0 or time.monotonic() > getattr(state, "until", float("inf")):
      raise TooMuch

  def charged(self, value: Any) -> Any:
    self.charge(_size(value))
    return value

  def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902, N805
    __self.charge(getattr(__self._rendering, "step", _STEP))
    owner = getattr(__obj, "__self__", None)
    if isinstance(owner, str) and __obj.__name__ in ("replace", "join"):
      check = _size_of_replaced if __obj.__name__ == "replace" else _size_of_joined
      __self.charge(check(owner, *args))
    return __self.charged(super().call(__context, __obj, *args, **kwargs))

  def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
    if operator == "**":
      raise TooMuch
    if operator == "*":
      if not all(isinstance(x, (int, float)) for x in (left, right)):
        raise TooMuch
      if any(isinstance(x, int) and x.bit_length() > 256 for x in (left, right)):
        raise TooMuch
    if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
      raise TooMuch
    if operator != "*":
      self.charge(_size(left) + _size(right))
    return super().call_binop(context, operator, left, right)

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    if isinstance(obj, str) and attr not in _STRING_METHODS:
      return False
    return super().is_safe_attribute(obj, attr, value)

  def wrap_str_format(self, value: Any) -> None:
    return None  # str.format is none of the string methods above

  # -- Filters -------------------------------------------------------------------------------------

  def _checked(self, function):
    @functools.wraps(function)
    def run(*args, **kwargs):
      self.charge(_STEP)
      return self.charged(function(*args, **kwargs))

    return run

  def _each(self, values: Iterable) -> list:
    """What a loop runs over, charged before it runs."""
    step = getattr(self._rendering, "step", _STEP)
    found = []
    for value in values:
      self.charge(step)
      found.append(value)
    return found

  def _concat(self, values: list) -> str:
    self.charge(_size(values))
    return "".join(map(str, values))

  def _join(self, values: Iterable, d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
      values = [self.getattr(value, attribute) for value in values]
    texts = list(map(str, values))
    self.charge(_size_of_joined(d, texts))
    return str(d).join(texts)

  def _replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
    self.charge(_size_of_replaced(str(value), old, new))
    return str(value).replace(str(old), str(new), -1 if count is None else count)

  def _indent(self, value: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    text = str(value)
    margin = width if isinstance(width, str) else " " * min(int(width), 256)
    self.charge(len(text) + (text.count("\n") + 1) * len(margin))
    lines = text.split("\n")
    lines = [
      margin + line if (n or first) and (line or blank) else line for n, line in enumerate(lines)
    ]
    return "\n".join(lines)

  def _json(
    self, value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
  ) -> str:
    self.charge(8 * _size(value))
    if indent is not None and int(indent) > 16:
      raise TooMuch
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# Filters that only the tree below names: no template can write them.
_CONCAT, _EACH, _BUILT = "~", "for", "[]"


class _Bounded(NodeTransformer):
  """A template whose loops, concatenations and lists are charged."""

  def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
    self.generic_visit(node)
    node.iter = _filter(_EACH, node.iter)
    return node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
    self.generic_visit(node)
    return _filter(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

  def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
    self.generic_visit(node)
    return _filter(_BUILT, node)

  def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:  # noqa: N802
    self.generic_visit(node)
    return _filter(_BUILT, node)

  def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
    self.generic_visit(node)
    return _filter(_BUILT, node) if node.ctx == "load" else node


def _filter(name: str, node: Any) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
  """{% generation %}, with which some templates mark what the assistant writes, is left away: the
  spans come from the turns themselves.
  """

  tags = {"generation"}

  def parse(self, parser) -> list[nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: Any = "") -> None:
  raise Refusal(" ".join(str(message).split())[:200])


def _size(value: Any) -> int:
  """Characters and items in a value, each as often as it would be printed; stops past WORK."""
  total, left = 0, [value]
  while left and total <= WORK:
    one = left.pop()
    total += _ITEM + (len(one) if isinstance(one, str) else 0)
    if isinstance(one, Mapping):
      left += itertools.chain(one.keys(), one.values())
    elif isinstance(one, (list, tuple, set, frozenset)):
      left += one
  return total


def _size_of_replaced(text: str, old: Any = "", new: Any = "", count: Any = -1) -> int:
  old, new = str(old), str(new)
  return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _size_of_joined(separator: Any, values: Any = ()) -> int:
  values = list(values)
  return _size(values) + len(values) * len(str(separator))
