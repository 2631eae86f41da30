"""English that every Python has: the help topics of its reference (`pydoc_data.topics`, PSF
licence), a document each.

The text differs a little from one version of Python to the next; the data set's version names it.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.builders import find_version, write_dataset
from mmjax.data.media import bytes_key

LONGEST = 2000  # characters of a document, about: longer topics are cut between paragraphs


def build(data_dir: str | os.PathLike, log: Callable[[str], None] = printing.log) -> Path:
  """Splits train, validation and test by a hash of the text. Returns the folder. Raises
  UserError: this Python lacks its help topics.
  """
  if built := find_version(Path(data_dir), "python_topics"):
    return built
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise UserError(
      "this Python has no pydoc_data.topics, as some distributions leave it out. Use another Python"
    ) from error
  splits: dict[str, list] = {"train": [], "validation": [], "test": []}
  known: set[str] = set()
  for name in sorted(topics):
    for number, text in enumerate(documents(topics[name], known)):
      digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
      share = int.from_bytes(digest, "big") % 20
      split = "test" if share < 2 else "validation" if share < 4 else "train"
      record = dict(
        id=f"{name}-{number}", captions={"en": [text]}, image_key=bytes_key(text.encode())
      )
      splits[split].append(record)
  version = "{}.{}.0".format(*sys.version_info[:2])
  return write_dataset(
    "python_topics",
    data_dir,
    splits,
    fields=(),
    version=version,
    card="The help topics of the Python language reference, in documents of a few paragraphs.",
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
