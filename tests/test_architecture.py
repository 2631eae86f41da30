"""Imports point downwards only, floor by floor; models and data do not know each other; mesh axes
are named in one place.
"""

import ast
import functools
import pathlib
import re
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "mmjax"
FLOORS = [
  (
    "printing",
    "ranges",
    "keys",
    "errors",
    "regexes",
    "kinds",
    "special_tokens",
    "contradictions",
    "config",
    "describe",
    "reference",
    "files",
    "remote",
    "ownership",
  ),
  ("parallel",),
  ("models", "data"),
  ("objectives",),
  ("state",),
  ("evaluation",),
  ("training", "inference", "interop"),
  ("plan", "starter"),
  ("cli", "arguments"),
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


@functools.cache
def nodes(path):
  """Every node of a file's syntax tree. Python before 3.11.5 counts wrongly where something else
  parses in between (gh-106905): then once more.
  """
  try:
    tree = ast.parse(path.read_text())
  except SystemError:
    tree = ast.parse(path.read_text())
  return tuple(ast.walk(tree))


def imports(path):
  """Names of the parts of mmjax that a file imports."""
  for node in nodes(path):
    if isinstance(node, ast.Import):
      yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mmjax."))
    elif isinstance(node, ast.ImportFrom) and node.module == "mmjax":
      yield from (a.name for a in node.names if a.name in FLOOR)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmjax."):
      yield node.module.split(".")[1]


def test_imports_point_downwards():
  wrong = []
  for path in PACKAGE.rglob("*.py"):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
      continue
    for other in imports(path):
      sideways = (
        other != part and FLOOR[other] == FLOOR[part] and {part, other} == {"models", "data"}
      )
      if FLOOR[other] > FLOOR[part] or sideways:
        wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
  assert not wrong


def modules_imported(tree):
  """Names of the modules, or of what is in them, that a file imports anywhere but for types."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
      continue
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield from modules_imported(node)


def test_no_modules_import_each_other_in_a_circle():
  """Not even within functions."""
  paths = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
  }
  graph = {}
  for name, path in paths.items():
    found = set(modules_imported(nodes(path)[0]))
    found = {other if other in paths else other.rpartition(".")[0] for other in found}
    graph[name] = (found & paths.keys()) - {name}
  with_imports = graph.keys()
  while with_imports:  # modules that import none of those left are on no circle
    left = {name for name in with_imports if graph[name] & with_imports}
    if left == with_imports:
      break
    with_imports = left
  circle = {name for name in with_imports if any(name in graph[other] for other in with_imports)}
  assert not circle, f"among these is a circle: {sorted(circle)}"


def test_only_parallel_names_mesh_axes():
  wrong = []
  for path in PACKAGE.rglob("*.py"):
    if path.relative_to(PACKAGE).parts[0] in ("parallel", "contradictions.py", "keys.py"):
      continue
    words = {
      n.value for n in nodes(path) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    if words & {"fsdp", "replica", "context", "tensor"}:
      wrong.append(str(path.relative_to(PACKAGE)))
  assert not wrong


def test_help_loads_nothing_heavy():
  code = (
    "import sys, mmjax.cli\ntry: mmjax.cli.main(['--help'])\nexcept SystemExit: pass\n"
    "assert not {'jax', 'flax', 'numpy', 'grain', 'cv2'} & set(sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_nothing_is_unpickled():
  for path in PACKAGE.rglob("*.py"):
    names = {n.attr for n in nodes(path) if isinstance(n, ast.Attribute)}
    modules = {
      a.name for n in nodes(path) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names
    }
    assert "pickle" not in modules and "allow_pickle=True" not in path.read_text(), path
    assert not ({"loads"} & names and "marshal" in modules), path


def test_every_extra_for_users_is_named_in_a_readme():
  root = PACKAGE.parent
  extras = re.findall(r'^    "(\w+)": [\[A-Z]', (root / "setup.py").read_text(), re.MULTILINE)
  pages = [root / "README.md", *root.glob("[a-z]*/**/README.md")]
  said = "".join(page.read_text() for page in pages)
  assert {"tpu", "heic"} <= set(extras)
  assert [name for name in extras if name not in ("hf", "dev") and f"[{name}]" not in said] == []
