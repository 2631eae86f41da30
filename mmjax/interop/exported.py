"""What `mmjax export --to safetensors` wrote, read again: model.safetensors, config.json,
preprocessing.json, which names the other files, and these.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.interop import safetensors
from mmjax.state import checkpoint, storage
from mmjax.state.paths import by_name

FACTS = "preprocessing.json"
LARGEST = 2**28  # bytes of a file beside the parameters


def is_exported(folder: str | os.PathLike) -> bool:
  """Whether a folder looks like one that `mmjax export --to safetensors` wrote."""
  return all(os.path.isfile(Path(folder) / name) for name in (FACTS, "model.safetensors"))


def read(
  folder: str | os.PathLike, allow_code: Sequence[str] = ()
) -> tuple[FrozenConfigDict, dict[str, np.ndarray], dict[str, bytes]]:
  """(config, {name: array} of parameters and batch statistics, {file name: content} of the
  tokenizer and the like). It may come from a stranger: `allow_code` as of `mmjax.load`. Raises
  UserError.
  """
  folder = Path(folder)
  names = safetensors.read_json(folder / FACTS).get("files")
  if not isinstance(names, list) or not all(map(_is_plain, names)):
    raise UserError(
      f"{folder / FACTS} does not name the files beside it: export the checkpoint again"
    )
  text = safetensors.read_bytes(folder / "config.json", safetensors.LARGEST_JSON)
  config = checkpoint.read_config(folder, text.decode(errors="replace"), allow_code)
  assets = {name: safetensors.read_bytes(folder / name, LARGEST) for name in names}
  return config, safetensors.read(folder / "model.safetensors"), assets


def divide(
  folder: str | os.PathLike, tensors: dict[str, np.ndarray], spec: Any
) -> tuple[Any, dict[str, Any]]:
  """(parameters, batch statistics) as nested dicts, of the names that a model of `spec` has. Raises
  UserError: they are those of another model.
  """
  wanted = by_name(spec)
  state = {
    name: x for name, x in tensors.items() if name not in wanted and name.startswith("batch_stats/")
  }
  params = {name: x for name, x in tensors.items() if name not in state}
  storage.check_same(folder, params, wanted)
  return storage.nest(params), storage.nest(state)


def _is_plain(name: Any) -> bool:
  """Whether a name is that of a file beside the others."""
  return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
