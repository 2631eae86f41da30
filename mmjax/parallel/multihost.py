"""Processes: starting them, dealing rows of a batch to their devices, agreeing on flags.

JAX's multi-controller runtime does the work: every process runs the same program. Which rows a
process loads follows from the sharding of the batch alone, so a global batch is the same for any
number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import FrozenConfigDict

from mmjax.config import ConfigError, UserError
from mmjax.parallel.environment import OURS, cluster_processes
from mmjax.parallel.mesh import batch_shards
from mmjax.parallel.rules import batch_sharding
from mmjax.ranges import INT32, Range

log = logging.getLogger("mmjax")
T = TypeVar("T")
_HEARTBEAT_SECONDS = 60
_SIMULATED = 1024  # devices of a process, of which each takes four threads


def initialize(config: FrozenConfigDict | None = None, *, shared: str = "") -> None:
  """Joins the other processes of this run, if there are any. Call it before the first use of a
  device; again is harmless.

  Looked at in turn: MMJAX_COORDINATOR (host:port), MMJAX_PROCESSES, MMJAX_PROCESS_ID, as
  launch/local_multiprocess.sh sets them; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
  JAX_PROCESS_ID; SLURM, Open MPI and TPU pods, which JAX detects.
  MMJAX_COORDINATOR=auto leaves all to JAX (a TPU VM says nothing in its environment, only to those
  who ask its metadata server).
  MMJAX_CPU_DEVICES sets the number of simulated CPU devices a process; MMJAX_HEARTBEAT_SECONDS (60)
  after how long without a sign of life a process counts as dead, which ends the others. Compiled
  programs are kept in JAX_COMPILATION_CACHE_DIR, else in `shared`/compiled where there are several
  processes (only 0 writes, and all should read), else in ~/.cache/mmjax/compiled.
  shared: a folder or bucket that all processes see. Raises UserError: a variable is missing or
  wrong.
  """
  del config  # nothing of a run's numbers depends on it
  if jax.distributed.is_initialized():
    return
  environment = os.environ
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environment:
    # JAX keeps what takes 1 s to compile; evaluators take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  if devices := environment.get("MMJAX_CPU_DEVICES"):
    jax.config.update("jax_num_cpu_devices", _count("MMJAX_CPU_DEVICES", devices, most=_SIMULATED))
  options: Any = jax.config  # whose attributes are declared at run time
  if options.jax_num_cpu_devices > 1:
    # XLA's CPU devices share one pool, in which every waiting collective holds a thread. With as
    # few threads as devices (its default), two independent collectives can take all of them while a
    # device that both wait for has none: a deadlock.
    environment.setdefault("NPROC", str(4 * options.jax_num_cpu_devices))
  if environment.get("MMJAX_COORDINATOR") == "auto":
    _join()
  elif any(environment.get(name) for name in OURS):
    missing = [name for name in OURS if not environment.get(name)]
    if missing:
      raise UserError(
        f"{', '.join(missing)} not set, though {', '.join(n for n in OURS if n not in missing)} "
        "is: set all three or none; launch/local_multiprocess.sh does"
      )
    count, number = (
      _count("MMJAX_PROCESSES", environment[OURS[1]]),
      _count("MMJAX_PROCESS_ID", environment[OURS[2]], least=0),
    )
    if number >= count:
      raise UserError(
        f"MMJAX_PROCESS_ID is {number}, but MMJAX_PROCESSES is {count}: ids run from 0 to "
        f"{count - 1}"
      )
    if count > 1:
      _join(coordinator_address=environment[OURS[0]], num_processes=count, process_id=number)
  elif environment.get("JAX_COORDINATOR_ADDRESS"):
    numbers = dict(num_processes="JAX_NUM_PROCESSES", process_id="JAX_PROCESS_ID")
    _join(
      coordinator_address=environment["JAX_COORDINATOR_ADDRESS"],
      **{
        k: _count(name, environment[name], least=0)
        for k, name in numbers.items()
        if environment.get(name)
      },
    )
  elif cluster_processes(environment) > 1:
    _join()
  if not options.jax_compilation_cache_dir:
    together = shared and jax.distributed.is_initialized()
    jax.config.update(
      "jax_compilation_cache_dir",
      f"{shared}/compiled" if together else os.path.expanduser("~/.cache/mmjax/compiled"),
    )
  if options.jax_enable_compilation_cache:
    _check_cache(options.jax_compilation_cache_dir)


@functools.cache
def _check_cache(folder: str) -> None:
  """Says in one line, where JAX says it in many, that compiled programs cannot be kept; what is
  there is still read.
  """
  if "://" in folder:
    return
  try:
    os.makedirs(folder, exist_ok=True)
    why = "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
  except OSError as error:
    why = error.strerror or str(error)
  if not why:
    return
  if not os.access(folder, os.R_OK | os.X_OK) or not os.path.isdir(folder):
    jax.config.update("jax_enable_compilation_cache", False)
  warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
  log.warning(
    "compiled programs are not kept: %s cannot be written (%s). The next start compiles them "
    "again; set JAX_COMPILATION_CACHE_DIR to a folder of yours",
    folder,
    why,
  )


def tell(error: UserError) -> None:
  """Joins the peers of this process, if it has not yet, to say why it ends before their first
  `together`, which raises it in them. Without peers, and after it, it does nothing.
  """
  if jax.distributed.is_initialized():
    return

  def fail() -> None:
    raise error

  with contextlib.suppress(UserError):
    initialize()
    if jax.distributed.is_initialized():
      together(fail)


def leave(code: int) -> None:
  """Ends this process now if it has peers: the usual way out waits until all of them are there, and
  they wait for this one.
  """
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def silence_allowed() -> int:
  """Seconds without a sign of life after which JAX takes a process for dead and ends the others,
  without a word on where they were.
  """
  return _count(
    "MMJAX_HEARTBEAT_SECONDS", os.environ.get("MMJAX_HEARTBEAT_SECONDS", str(_HEARTBEAT_SECONDS))
  )


def is_main() -> bool:
  """Whether this process writes what a run writes once."""
  return jax.process_index() == 0


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Rows of a global batch that this process must load: int64, ascending. Processes that share a
  data shard get equal rows.

  Raises UserError: the mesh does not divide the batch.
  """
  if batch_size % batch_shards(mesh):
    raise UserError(
      f"a batch of {batch_size} does not divide over the {batch_shards(mesh)} devices of "
      "mesh.replica x data x fsdp. Change train.batch_size or the mesh"
    )
  spans = _local_spans(batch_sharding(mesh), batch_size)
  return np.concatenate([np.arange(start, stop) for start, stop in spans])


def to_device(batch: dict, mesh: Mesh) -> dict:
  """A batch of this process's rows (in the order of `local_rows`) as global arrays, split over the
  batch axes.

  Dtypes stay (pixels travel as uint8); entries that are not numbers (`id`) and top-level names of
  the host are dropped.
  """
  sharding = batch_sharding(mesh)
  numbers = {name: value for name, value in batch.items() if name != "id" and _is_numeric(value)}
  local = len(jax.tree.leaves(numbers)[0])
  size = local * batch_shards(mesh) // len(_local_spans(sharding, batch_shards(mesh)))
  rows = local_rows(mesh, size)

  def place(x):
    return _global_array(np.asarray(x), rows, size, sharding)

  return jax.tree.map(place, numbers)


def gather_rows(tree: Any) -> Any:
  """Every row of global arrays as NumPy arrays, on every process."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def any_process(flag: bool) -> bool:
  """Whether the flag is set on any process. Every process must call it."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(np.any(multihost_utils.process_allgather(np.asarray(bool(flag)))))


def gather_texts(text: str) -> list[str]:
  """The texts of all processes, by process. Every process must call it, and at the same place."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content)))).ravel()
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(content)] = content
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(make: Callable[[], T]) -> T:
  """`make()` in every process: what it raises as UserError in one, all raise, so that none waits
  for one that has ended.

  Every process must call it.
  """
  if jax.process_count() == 1:
    return make()
  error = None
  try:
    value = make()
  except UserError as raised:
    error = raised
  told = gather_texts(json.dumps([isinstance(error, ConfigError), str(error)] if error else []))
  wrong = {process: json.loads(text) for process, text in enumerate(told) if json.loads(text)}
  if not wrong:
    return value
  process, (usage, text) = next(iter(wrong.items()))
  others = f"; so on {len(wrong) - 1} other processes, or other faults" if len(wrong) > 1 else ""
  kind = ConfigError if usage else UserError
  raise kind(f"process {process} of {jax.process_count()}: {text}{others}") from error


def barrier(name: str) -> None:
  """Waits for every process."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _local_spans(sharding: NamedSharding, size: int) -> list[tuple[int, int]]:
  """(start, stop) of the rows of an array [size] that this process's devices hold, ascending."""
  indices = sharding.addressable_devices_indices_map((size,)).values()
  return sorted({index[0].indices(size)[:2] for index in indices if index})


def _global_array(x: np.ndarray, rows: np.ndarray, size: int, sharding: NamedSharding) -> jax.Array:
  def shard(index: Any) -> np.ndarray:
    start, stop, _ = index[0].indices(size)
    first = int(np.searchsorted(rows, start))
    return x[first : first + stop - start]

  return jax.make_array_from_callback((size, *x.shape[1:]), sharding, shard, dtype=x.dtype)


def _is_numeric(value: Any) -> bool:
  if isinstance(value, dict):
    return True
  return (
    isinstance(value, (np.ndarray, jax.Array))
    and value.dtype.kind in "biuf"
    or getattr(getattr(value, "dtype", None), "name", "") == "bfloat16"
  )


def _join(**settings: Any) -> None:
  # Without it XLA refuses collectives of several processes; other platforms ignore it.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  heartbeat = silence_allowed()
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat, **settings)
  except (RuntimeError, ValueError) as error:
    where = settings.get("coordinator_address", "the cluster's coordinator")
    raise UserError(
      f"cannot join the other processes at {where}: {str(error).splitlines()[0]}. "
      "Check that all were started with the same address and count"
    ) from error


def _count(name: str, text: str, *, least: int = 1, most: int = INT32) -> int:
  bounds = Range(least, most)
  if not text.isdecimal() or not bounds.holds(int(text[:20])):
    raise UserError(f"{name} is {text!r:.40}, but must be a whole number, {bounds}")
  return int(text)
