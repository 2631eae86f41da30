"""Folders of data sets: where they are, which versions are complete, how large their splits are."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mmjax import files, remote
from mmjax.config import UserError

_MOST = 2**40  # examples of a file
_FINISHED = ("dataset_info.json", "features.json")  # TFDS writes them last


def data_dir(config=None) -> Path:
  """The folder of the data sets: `data.dir` of the config, else $MMJAX_DATA, else ~/.cache/mmjax.

  `config`: a config, its `data` part, a path, or None. For a URL (s3://bucket/data) it is the
  folder of this machine to which data sets and tokenizers are copied when they are opened.
  Raises UserError: no folder could be called so, or a file is.
  """
  if config is not None and not isinstance(config, (str, os.PathLike)):
    config = config.get("data", config).get("dir", "")
  place = config or os.environ.get("MMJAX_DATA") or "~/.cache/mmjax"
  if files.is_url(place):
    return remote.cached(place)
  path = files.local_path(place)
  there = next(one for one in (path, *path.parents) if os.path.lexists(one))
  if not there.is_dir():
    what = "a file" if there.exists() else "a link to nothing"
    raise UserError(
      f"{path}: data sets lie in a folder, but {there} is {what}. Name a folder in data.dir, "
      "--data-dir or $MMJAX_DATA"
    )
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"{place!r:.200}: data sets cannot lie in a folder whose name is not UTF-8. Rename it, or "
      "choose another"
    ) from error
  return path


def local_data_dir(config=None) -> Path:
  """`data_dir`, to write data sets in. Raises UserError: it is a URL."""
  root = data_dir(config)
  if url := remote.origin(root):
    raise UserError(
      f"{url}: data sets are made on this machine and copied to a store then: name a local folder "
      f"with --data-dir, and copy what is made there, as with `aws s3 cp --recursive FOLDER {url}`"
    )
  return root


def find_version(data_dir: str | os.PathLike, name: str) -> Path | None:
  """The newest finished version of data set NAME under `data_dir`, or None; that of a URL is copied
  to this machine.
  """
  root = Path(data_dir) / name
  url = remote.origin(root) if name else None
  if url:
    with files.store_errors(url, f"{url} cannot be read"):
      names = list(files.sizes(url))
  else:
    names = [f"{path.parent.name}/{path.name}" for path in root.glob("*/*.json")] if name else []
  versions = finished_versions(names)
  if not versions:
    return None
  return remote.bring(root / versions[-1]) if url else root / versions[-1]


def finished_versions(names: Iterable[str]) -> list[str]:
  """The versions, oldest first, that are complete by the names VERSION/FILE of what a data set's
  folder holds.
  """
  folders = collections.defaultdict(set)
  for name in names:
    folder, _, file = name.partition("/")
    folders[folder].add(file)
  found = [
    folder
    for folder, available in folders.items()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})*", folder) and available.issuperset(_FINISHED)
  ]
  return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def is_complete(folder: Path) -> bool:
  """Whether `folder` (data_dir/NAME/VERSION) holds a finished data set; a build that was cut short
  never does.
  """
  return all((folder / name).is_file() for name in _FINISHED)


def split_sizes(folder: Path) -> dict[str, int]:
  """{split: number of examples} of the data set in `folder`. Raises UserError."""
  return {name: sum(lengths) for name, lengths in shard_lengths(folder).items()}


def shard_lengths(folder: Path) -> dict[str, list[int]]:
  """{split: examples of each of its files} of the data set in `folder`. Raises UserError: what says
  so is damaged.
  """
  info = read_info(folder)
  return {split["name"]: [int(n) for n in split["shardLengths"]] for split in info["splits"]}


def read_info(folder: Path) -> dict[str, Any]:
  """dataset_info.json of the data set in `folder`: its `name`, and `splits` with `name` and
  `shardLengths` each. Raises UserError: it is damaged.
  """

  def check(info: dict[str, Any]) -> None:
    for part in (info, *info["splits"]):
      if not re.fullmatch(r"[\w.-]+", part["name"]):
        raise ValueError(f"{part['name']!r:.80} is no name")
    if any(not 0 <= int(n) < _MOST for split in info["splits"] for n in split["shardLengths"]):
      raise ValueError("a file of so many examples")

  return _read_json(folder, "dataset_info.json", check)


def read_facts(folder: Path) -> dict[str, Any]:
  """metadata.json of the data set in `folder`, see `write_dataset`. Raises UserError: it is
  damaged, or of another program.
  """

  def check(facts: dict[str, Any]) -> None:
    for name in (
      "labels",
      "languages",
      *(n for n in ("answers", "values", "fields") if n in facts),
    ):
      if not isinstance(facts[name], list) or not all(isinstance(x, str) for x in facts[name]):
        raise ValueError(f"{name} is no list of texts")
    if not isinstance(facts["content"], str):
      raise ValueError("content is no text")

  return _read_json(folder, "metadata.json", check)


def _read_json(folder: Path, name: str, check: Callable[[dict], None]) -> dict[str, Any]:
  try:
    found = files.read_json(folder / name)
    check(found)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    raise UserError(
      f"{folder / name} is damaged, or not one of mmjax ({why:.200}). Delete {folder} and make the "
      "data set again, with `mmjax data build` or `mmjax data convert`"
    ) from error
  return found
