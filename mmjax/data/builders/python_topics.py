"""English that every Python has: the help topics of its reference (`pydoc_data.topics`) and the
docstrings of its standard library (both PSF licence).

  train, validation, test  the topics, by a hash of the text
  docstrings               more to train on: no paragraph of it is in the topics

The text differs a little from one version of Python to the next; the data set's version names it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import find_version, write_dataset
from mmjax.data.media import bytes_key

LONGEST = 2000  # characters of a document, about: longer topics are cut between paragraphs
LEFT_OUT = {  # folders of the standard library: not its own text, or not on every machine
  *("site-packages", "dist-packages", "ensurepip", "test", "tests", "idlelib", "lib2to3"),
  *("pydoc_data", "turtledemo", "__pycache__"),
}


def build(data_dir: str | os.PathLike, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/python_topics/VERSION in under a minute, or finds it there. Returns the folder.
  Raises UserError: this Python lacks its help topics.
  """
  version = "{}.{}.1".format(*sys.version_info[:2])
  built = find_version(Path(data_dir), "python_topics")
  if built and built.name == version:
    return built
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise UserError(
      "this Python has no pydoc_data.topics, as some distributions leave it out. Use another Python"
    ) from error
  splits: dict[str, list] = {"train": [], "validation": [], "test": [], "docstrings": []}
  known: set[str] = set()
  for name in sorted(topics):
    for number, text in enumerate(documents(topics[name], known)):
      digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
      share = int.from_bytes(digest, "big") % 20
      split = "test" if share < 2 else "validation" if share < 4 else "train"
      splits[split].append(_record(f"{name}-{number}", text))
  for name, module in docstrings(Path(sysconfig.get_paths()["stdlib"])):
    for number, text in enumerate(documents(module, known)):
      splits["docstrings"].append(_record(f"{name}-{number}", text))
  return write_dataset(
    "python_topics",
    data_dir,
    splits,
    fields=(),
    version=version,
    card="The help topics of the Python language reference, and the docstrings of the standard "
    "library, in documents of a few paragraphs.",
    licence="PSF-2.0",
    homepage="https://docs.python.org/3/reference/",
  )


def documents(topic: str, known: set[str]) -> list[str]:
  """A topic as texts of up to LONGEST characters, cut between paragraphs, in the form NFKC with
  single spaces: what a tokenizer of this project gives back letter by letter. Paragraphs that are
  `known` are left out, and its own become so: topics repeat each other, and a split must not hold
  what another has.
  """
  found: list[list[str]] = [[]]
  size = 0
  for part in re.split(r"\n\s*\n", unicodedata.normalize("NFKC", topic)):
    paragraph = " ".join(part.split())
    if not paragraph or paragraph in known:
      continue
    known.add(paragraph)
    if size and size + len(paragraph) > LONGEST:
      found.append([])
      size = 0
    found[-1].append(paragraph)
    size += len(paragraph) + 1
  return [" ".join(parts) for parts in found if parts]


def docstrings(library: Path) -> Iterator[tuple[str, str]]:
  """(path of a module in the library, its docstrings as paragraphs), in the order of the paths.
  Modules are read, not run; one that is no Python is left out.
  """
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for file in sorted(library.rglob("*.py")):
    name = file.relative_to(library)
    if LEFT_OUT.intersection(name.parts) or name.parts[0].startswith("config-"):
      continue
    try:
      with warnings.catch_warnings(action="ignore"):  # of escapes in strings
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
      continue
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    if any(texts):
      yield name.as_posix(), "\n\n".join(text for text in texts if text)


def _record(name: str, text: str) -> dict:
  return dict(id=name, captions={"en": [text]}, image_key=bytes_key(text.encode()))
