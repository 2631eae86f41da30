"""Reads and writes safetensors files: one, or several with an index. Nothing is ever unpickled.

A folder may come from a stranger: only regular files are opened, and none is parsed that is larger
than such files are.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.config import UserError
from mmjax.files import open_file, read_file

DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
LARGEST_JSON = 2**24  # bytes, also of a header; Python makes up to some 20 times as many of them
_DAMAGED = (ValueError, RecursionError)  # of texts that are no JSON


def read_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: array} of a folder's model.safetensors, or of the files of its
  model.safetensors.index.json; memory-mapped.

  Raises UserError: neither is there, or a file is damaged.
  """
  folder = Path(folder)
  if (single := folder / "model.safetensors").exists():
    return read(single)
  index = folder / "model.safetensors.index.json"
  if not index.exists():
    old = (
      ", only files that hold pickled code, which mmjax does not open: save it as safetensors"
      if list(folder.glob("*.bin"))
      else ""
    )
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json{old}")
  shards = read_json(index).get("weight_map", {})
  tensors: dict[str, np.ndarray] = {}
  for name in sorted(set(shards.values())):
    if Path(name).name != name or not (folder / name).exists():
      raise UserError(f"{index} names {name!r}, which is not beside it. Copy the whole folder")
    tensors.update(read(folder / name))
  if missing := sorted(set(shards) - set(tensors)):
    raise UserError(f"{index} promises tensors that its files lack: {', '.join(missing)}")
  return tensors


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: read-only array} of one file. Raises UserError: it is cut short, or no safetensors
  file.
  """
  path = Path(path)
  try:
    with open_file(path) as file:
      size = os.fstat(file.fileno()).st_size
      (length,) = struct.unpack("<Q", file.read(8))
      if length > size - 8:
        raise ValueError("its header is longer than the file")
      if length > LARGEST_JSON:
        raise ValueError(f"its header has more than {LARGEST_JSON / 2**20:.0f} MiB")
      header = json.loads(file.read(length))
      data = np.empty(0, np.uint8)
      if size > 8 + length:
        data = np.memmap(file, np.uint8, mode="r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
      if name != "__metadata__":
        if entry["dtype"] not in DTYPES:
          raise UserError(
            f"{path}: tensor {name} holds {entry['dtype']}, which is not supported. Save it in "
            "float32, float16 or bfloat16"
          )
        start, end = entry["data_offsets"]
        if end > len(data):
          raise ValueError(f"tensor {name} lies beyond its end")
        tensors[name] = data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  except (*_DAMAGED, AttributeError, KeyError, TypeError, struct.error) as error:
    raise UserError(f"{path}: no whole safetensors file ({error}). Copy it again") from error


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one file that PyTorch programs read."""
  from safetensors.numpy import save_file

  save_file(
    {name: np.array(x, order="C") for name, x in tensors.items()}, path, metadata={"format": "pt"}
  )


def read_json(path: str | os.PathLike) -> dict:
  """A JSON object. Raises UserError: there is none."""
  return _read_json(path, lambda value: isinstance(value, dict), "it holds no object")


def read_json_list(path: str | os.PathLike) -> list[dict]:
  """A JSON array of objects. Raises UserError: there is none."""
  return _read_json(
    path,
    lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value),
    "it holds no array of objects",
  )


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
  """The bytes of a regular file. Raises UserError: there is none, or it has more than `most`."""
  try:
    return read_file(path, most)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_json(path: str | os.PathLike, fits: Callable[[Any], bool], otherwise: str) -> Any:
  content = read_bytes(path, LARGEST_JSON)
  try:
    value = json.loads(content)
    if not fits(value):
      raise ValueError(otherwise)
    return value
  except _DAMAGED as error:
    raise UserError(f"{path}: no readable JSON ({error})") from error
