"""What all processes of a run must have in common before its first step: config, data and code.

Processes that differ in one of them would train together to no purpose: each computes its part of a
step of another run.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

import mmjax
from mmjax import config as configs
from mmjax.config import ConfigError
from mmjax.data.pipeline import Pipeline
from mmjax.parallel import multihost

# Keys that may differ: where a host keeps its data and how it reads it, and what one process alone
# writes.
LOCAL = (
  "data.dir",
  "data.workers",
  "data.threads",
  "data.prefetch",
  "data.sources.*.path",
  "log.tensorboard",
  "log.wandb",
  "train.hang_seconds",
)
_LIBRARIES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "grain",
  "array_record",
  "pillow",
  "opencv-python-headless",
  "simplejpeg",
  "soundfile",
  "soxr",
  "av",
  "sentencepiece",
  "tokenizers",
)
_NAMED = 3  # differences in the message


def facts(
  config: FrozenConfigDict, pipeline: Pipeline, evaluated: Mapping[str, str]
) -> dict[str, str]:
  """{what: value} of this process. evaluated: {evaluator: fingerprint of its data}."""
  keys = {
    path: repr(value)
    for path, value in configs.flatten(config)
    if not any(fnmatch.fnmatchcase(path, pattern) for pattern in LOCAL)
  }
  fingerprint = dict(pipeline.fingerprint())
  sources = zip(config.data.sources, fingerprint.pop("sources"), strict=True)
  data = {f"the data of data.sources.{name}": mark for name, mark in sources}
  data |= {
    f"the data ({name})": json.dumps(value, sort_keys=True) for name, value in fingerprint.items()
  }
  data |= {f"the data of evaluation.evaluators.{name}": mark for name, mark in evaluated.items()}
  return keys | data | code(config)


def code(config: FrozenConfigDict) -> dict[str, str]:
  """{what: version or digest}: this package, the libraries that make numbers, and modules of the
  user's own kinds."""
  found = {"the code of mmjax": _digest(Path(mmjax.__file__).parent)}
  found["the version of Python"] = ".".join(platform.python_version_tuple()[:2])
  for library in _LIBRARIES:
    found[f"the version of {library}"] = _version(library)
  for _, value in configs.flatten(config):
    module = value.partition(":")[0] if isinstance(value, str) and ":" in value else ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file and not module.startswith("mmjax."):
      found[f"the code of {module}"] = _digest(Path(file))
  return found


def check(mine: Mapping[str, str]) -> None:
  """Every process calls it with its facts. Raises ConfigError in all of them, naming what differs
  and where, if any differ."""
  text = json.dumps(mine, sort_keys=True)
  digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
  if len(set(multihost.gather_texts(digest))) == 1:
    return
  texts = multihost.gather_texts(json.dumps([socket.gethostname(), mine]))
  told = [json.loads(text) for text in texts]
  # In the order of `facts`: keys, data, code.
  names = dict.fromkeys(name for _, one in told for name in one)
  lines = [line for name in names if (line := _difference(name, told))]
  more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
  raise ConfigError(
    f"the {len(told)} processes of this run differ: {'; '.join(lines[:_NAMED])}{more}. "
    "Give all the same command, data and code"
  )


def _difference(name: str, told: list[tuple[str, dict[str, str]]]) -> str:
  """'optimizer.lr is 0.1 on process 0 (host a), 0.2 on process 1 (host b)'; '' where all agree."""
  processes: dict[str, list[int]] = {}
  for process, (_, one) in enumerate(told):
    processes.setdefault(one.get(name, "not there"), []).append(process)
  if len(processes) == 1:
    return ""
  return f"{name} is " + ", ".join(
    f"{value} on {_who(where, told)}" for value, where in list(processes.items())[:_NAMED]
  )


def _who(processes: list[int], told: list[tuple[str, Any]]) -> str:
  first = f"process {processes[0]} (host {told[processes[0]][0]})"
  return first if len(processes) == 1 else f"{first} and {len(processes) - 1} more"


def _version(library: str) -> str:
  try:
    return importlib.metadata.version(library)
  except importlib.metadata.PackageNotFoundError:
    return "none"


@functools.cache
def _digest(path: Path) -> str:
  """Of a file, or of all Python files under a folder."""
  digest = hashlib.blake2b(digest_size=8)
  for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
    digest.update(f"{file.relative_to(path.parent)}\0".encode() + file.read_bytes() + b"\0")
  return digest.hexdigest()
