"""The one place that talks to Orbax: writing a folder of items in the background, reading arrays
strictly, disk errors.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FrozenConfigDict

from mmjax import files
from mmjax.config import UserError
from mmjax.state import manifest
from mmjax.state.paths import by_name, map_named

TEMPORARY, DELETED = ".orbax-checkpoint-tmp", ".deleted"
# Seconds; Orbax's 20 minutes go by the wall clock, which may jump. The watchdog bounds a save.
_PATIENCE = 30 * 24 * 3600


class Writer(ocp.AsyncCheckpointer):
  """Writes one folder at a time in the background, with the manifest as its last file before the
  final rename.

  At a URL there is no rename: the folder is written in its place, and counts from when it has its
  manifest.
  check: called before a folder is sealed; what it raises, the save raises. copies: host arrays are
  copied first, for they may change while they are written.
  """

  def __init__(
    self, place: epath.Path, check: Callable[[], None] | None = None, copies: bool = True
  ):
    _prepare(place)
    self._check = check
    mode = (
      ocp.options.AtomicityMode.COMMIT_FILE
      if files.is_url(place)
      else ocp.options.AtomicityMode.AUTO
    )
    atomicity = ocp.options.AtomicityOptions(mode=mode)

    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    uncopied = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    kinds = {} if copies else dict(type_handler_registry=uncopied)

    def arrays():
      return ocp.PyTreeCheckpointHandler(use_compression=False, **kinds)

    handlers = dict(
      params=arrays(),
      rest=arrays(),
      model_state=arrays(),
      data=ocp.JsonCheckpointHandler(),
      config=ocp.JsonCheckpointHandler(),
      assets=ocp.JsonCheckpointHandler(),
    )
    super().__init__(
      ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(atomicity_options=atomicity), **handlers
      ),
      atomicity_options=atomicity,
      async_options=ocp.options.AsyncOptions(
        timeout_secs=_PATIENCE, post_finalization_callback=self._seal
      ),
      checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
    )

  def start(self, folder: epath.Path, items: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    self._facts = facts
    arguments = {
      name: (
        ocp.args.PyTreeSave(nested(item))
        if name in ("params", "rest", "model_state")
        else ocp.args.JsonSave(item)
      )
      for name, item in items.items()
    }
    self.save(folder, args=ocp.args.Composite(**arguments), force=True)

  def get_temporary_path(self, directory):
    self._temporary = super().get_temporary_path(directory)
    return self._temporary

  def _seal(self) -> None:
    if self._check:
      self._check()
    manifest.write(self._temporary.get(), **self._facts)


def read_arrays(folder: epath.Path, spec: Any, only: str = "") -> Any:
  """The arrays of an item, as `spec` says (then strict), or as nested NumPy arrays; `only` the
  names with that prefix.
  """
  stored = {name: leaf for name, leaf in stored_leaves(folder).items() if name.startswith(only)}
  if spec is not None:
    check_same(folder, stored, by_name(spec))
  wanted = stored if spec is None else by_name(spec)
  restore_args = {
    name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    if getattr(leaf, "sharding", None) is not None
    else ocp.RestoreArgs(restore_type=np.ndarray)
    for name, leaf in wanted.items()
  }
  item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
  _prepare(folder)
  if spec is None:
    _check_memory(folder, stored)
  with damage(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=nest(item), restore_args=nest(restore_args), partial_restore=bool(only)
      ),
    )
  if spec is None:
    return tree
  values = by_name(tree)
  return map_named(lambda name, _: values[name], spec)


def stored_leaves(folder: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """{name: shape and dtype} of an item, without reading the values."""
  _prepare(folder)
  with damage(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(folder).item_metadata.tree
    return {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in by_name(tree).items()
    }


def _check_memory(folder: epath.Path, stored: Mapping[str, Any]) -> None:
  """Raises UserError where a few bytes on disk claim arrays that this machine cannot hold."""
  needed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in stored.values())
  available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if needed > available:
    raise UserError(
      f"{folder}: its arrays take {needed / 2**30:.1f} GiB, this machine has "
      f"{available / 2**30:.1f} GiB"
    )


@contextlib.contextmanager
def damage(folder: str | os.PathLike) -> Iterator[None]:
  """Turns whatever a damaged or forged item makes its reader raise into one line."""
  try:
    with files.store_errors(folder, f"{folder} cannot be read"):
      yield
  except (UserError, MemoryError):
    raise
  except Exception as error:
    reason = next(iter(str(error).splitlines()), "")[:200]
    raise UserError(
      f"{folder}: damaged, or no checkpoint of mmjax ({type(error).__name__}: {reason}). "
      "Restore it from a copy"
    ) from error


def check_same(
  folder: str | os.PathLike, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises UserError unless names, shapes and dtypes agree: nothing is dropped, filled in or cast
  silently.
  """

  def describe(leaf):
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

  problems = [f"{name} is missing" for name in wanted if name not in stored]
  problems += [f"{name} is not in this model" for name in stored if name not in wanted]
  problems += [
    f"{name} is {describe(stored[name])}, here {describe(leaf)}"
    for name, leaf in wanted.items()
    if name in stored and describe(stored[name]) != describe(leaf)
  ]
  if problems:
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    raise UserError(
      f"{folder}: checkpoint of another model: {'; '.join(problems[:4])}{more}. Use the config "
      "that wrote it, or start from it with init.from and init.map"
    )


def from_main(values: list[int]) -> list[int]:
  """The list that process 0 has, in every process."""
  if jax.process_count() == 1:
    return values
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
  padded = np.array(values if jax.process_index() == 0 else [0] * count, np.int32)
  return [int(v) for v in multihost_utils.broadcast_one_to_all(padded)] if count else []


def delete(path: epath.Path, *, patience: float = 0.0) -> None:
  """Deletes a folder; a checkpoint is renamed first (at a URL: loses its manifest), so that a kill
  never leaves half of one.

  patience: seconds to try for, while what is left of a failed save may still add files. What cannot
  be deleted stays: the next save tries again.
  """
  end = time.monotonic() + patience
  with contextlib.suppress(Exception):
    if files.is_url(path):
      (path / manifest.NAME).unlink(missing_ok=True)
    elif path.name.isascii() and path.name.isdecimal():
      path = path.rename(path.parent / (path.name + DELETED))
  while _exists(path):
    with contextlib.suppress(Exception):
      path.rmtree()
    if time.monotonic() >= end:
      return
    time.sleep(0.05)


def _exists(path: epath.Path) -> bool:
  """Whether a path exists; a store that does not answer has nothing that can be deleted."""
  try:
    return path.exists()
  except Exception:
    return False


def nested(tree: Any) -> dict:
  """Any tree as nested dicts, under the names of its leaves."""
  return nest(by_name(tree))


def nest(flat: Mapping[str, Any]) -> dict:
  return flax.traverse_util.unflatten_dict(dict(flat), sep="/")


def read_json(folder: epath.Path) -> dict:
  """The dict of a JSON item. Raises UserError: it is damaged."""
  with damage(folder):
    content = json.loads((folder / "metadata").read_text(encoding="utf-8"))
    if not isinstance(content, dict):
      raise TypeError(f"{type(content).__name__} in the place of a dict")
    return content


def config_dict(config: FrozenConfigDict | Mapping | str | None) -> dict:
  if isinstance(config, str):
    return json.loads(config)
  return (
    config.to_dict() if isinstance(config, (ConfigDict, FrozenConfigDict)) else dict(config or {})
  )


def encode(assets: Mapping[str, bytes] | None) -> dict[str, str]:
  return {name: base64.b64encode(content).decode() for name, content in (assets or {}).items()}


def _prepare(folder: epath.Path) -> None:
  """Makes Orbax quiet, and able to write and read `folder`.

  Orbax 0.12 has TensorStore's drivers for this machine's disk and gs://, not the one for s3://. The
  one function in which it names a driver gets it here: what it would say of gs://, said of s3://.
  """
  _quiet()
  if not str(folder).startswith("s3://"):
    return
  from orbax.checkpoint._src.serialization import tensorstore_utils

  build = tensorstore_utils.build_kvstore_tspec
  if not isinstance(build, functools.partial):
    tensorstore_utils.build_kvstore_tspec = functools.partial(_kvstore, build)


def _kvstore(build: Callable[..., dict], directory: str, *args: Any, **settings: Any) -> dict:
  """`build(directory, ...)`, Orbax's TensorStore spec, also of s3://."""
  if not str(directory).startswith("s3:"):
    return build(directory, *args, **settings)
  return _as_s3(build(re.sub("^s3:/*", "gs://", str(directory)), *args, **settings))


def _as_s3(spec: Any) -> Any:
  """A TensorStore spec with s3 in the place of gcs.

  TensorStore finds credentials as AWS's tools do (loudly: those of the environment are named here,
  so that it looks no further), but does not look at the variables that name another store than
  AWS's.
  """
  if isinstance(spec, list):
    return [_as_s3(part) for part in spec]
  if not isinstance(spec, dict):
    return spec
  if not str(spec.get("driver")).startswith("gcs"):
    return {name: _as_s3(part) for name, part in spec.items()}
  endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
  region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
  facts = dict(driver="s3") | (
    dict(endpoint=endpoint.rstrip("/"), aws_region=region) if endpoint else {}
  )
  return (
    spec
    | facts
    | (
      dict(aws_credentials=dict(type="environment")) if os.environ.get("AWS_ACCESS_KEY_ID") else {}
    )
  )


def _quiet() -> None:
  """Orbax logs tracebacks for every failed file and leaves tasks of a failed save behind; users get
  our one line instead.
  """
  for name in ("absl", "asyncio"):
    logger = logging.getLogger(name)
    if _not_orbax not in logger.filters:
      logger.addFilter(_not_orbax)
  if getattr(sys.unraisablehook, "func", None) is not _not_closed_loop:
    sys.unraisablehook = functools.partial(_not_closed_loop, sys.unraisablehook)


def _not_orbax(record: logging.LogRecord) -> bool:
  message = record.getMessage()
  return not ("orbax" in record.pathname or "orbax" in message or "OCDBT" in message)


def _not_closed_loop(show: Callable[[Any], None], problem: Any) -> None:
  """TensorStore reports results of a failed save to an event loop that Orbax has closed."""
  if not (
    isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"
  ):
    show(problem)
