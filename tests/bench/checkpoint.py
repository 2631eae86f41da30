"""How long a save blocks training, how much it slows the steps beside it, and how fast a restore is
beside the plain disk.

  python tests/bench/checkpoint.py --workdir /tmp/bench [--megabytes 1000] [--rounds 3] [--adam]
  [--cold]

The state holds that many megabytes of float32 parameters in the shapes of a stacked transformer
(--adam: two moments of each besides). `Checkpointer.save` (what blocks) is measured against the
whole save, and steps with and without one beside them: a step does eight matrix products and
changes every parameter in place. The first one beside a save gets new memory for them, since the
old is still being written; that is its extra time, besides the cores that it shares. A restore,
checksums verified, is compared with a plain sequential read of the same files into memory, the page
cache in the same state for both: warm, or with --cold dropped file by file (posix_fadvise; the
files are synced before). Huge pages for malloc as `mmjax train` has them (--hugepages none:
without).
Nothing is asserted; run it on an idle machine: a restore needs processors, a plain read hardly any.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shutil
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

CHUNK = 1 << 24


def state_of(megabytes: int, adam: bool):
  """TrainState with that many megabytes of parameters: 12 stacked layers of a transformer (4 d^2 +
  8 d^2 each) and a table.
  """
  import jax
  import jax.numpy as jnp

  from mmjax.state.train_state import TrainState

  width = 64 * round((megabytes * 1e6 / 4 / (12 * 12 + 32)) ** 0.5 / 64)
  shapes = dict.fromkeys(("query", "key", "value", "out"), (12, width, width))
  shapes |= dict(up=(12, width, 4 * width), down=(12, 4 * width, width), table=(32 * width, width))
  params = {
    name: jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(shapes.items())
  }
  moments = (jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params)) if adam else ()
  return jax.block_until_ready(
    TrainState(step=jnp.int32(1), params=params, model_state={}, opt_states={"main": moments})
  )


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def drop(folder: pathlib.Path) -> None:
  """Takes the files of a folder out of the page cache."""
  for path in files_of(folder):
    with open(path, "rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: pathlib.Path) -> tuple[int, float]:
  """(bytes, seconds) of reading every file from start to end into memory that is there already."""
  buffer, size, begin = memoryview(bytearray(CHUNK)), 0, time.perf_counter()
  for path in files_of(folder):
    with open(path, "rb", buffering=0) as file:
      while count := file.readinto(buffer):
        size += count
  return size, time.perf_counter() - begin


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--megabytes", type=int, default=1000)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--adam", action="store_true")
  parser.add_argument("--cold", action="store_true")
  parser.add_argument("--hugepages", choices=("malloc", "none"), default="malloc")
  args = parser.parse_args()
  if args.hugepages == "malloc":
    from mmjax import cli

    cli._use_huge_pages()
  import jax
  import jax.numpy as jnp

  import mmjax.config
  from mmjax.state.checkpointer import Checkpointer

  c = mmjax.config.base()
  c.checkpoint.keep = 1
  config = mmjax.config.resolve(c)
  workdir = pathlib.Path(args.workdir) / "checkpoint-bench"
  shutil.rmtree(workdir, ignore_errors=True)
  state = state_of(args.megabytes, args.adam)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
  print(
    f"{parameters / 1e9:.2f} GB of parameters, {size / 1e9:.2f} GB of state, "
    f"{jax.devices()[0].device_kind}"
  )

  work = jax.random.normal(jax.random.key(0), (1024, 1024))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train(state, work):
    for _ in range(8):
      work = jnp.tanh(work @ work / 32)
    return jax.tree.map(lambda x: x + work[0, 0].astype(x.dtype), state), work

  def step() -> float:
    nonlocal state, work
    begin = time.perf_counter()
    state, work = jax.block_until_ready(train(state, work))
    return time.perf_counter() - begin

  for _ in range(3):
    step()
  alone = statistics.median(step() for _ in range(15))
  saver = Checkpointer(str(workdir), config, steps=100)
  for turn in range(args.rounds + 1):
    begin = time.perf_counter()
    saver.save(turn + 1, state, force=True)
    blocking = time.perf_counter() - begin
    beside = []
    while saver._thread.is_alive():
      beside.append(step())
    saver.wait()
    whole = time.perf_counter() - begin
    print(
      f"save {turn}{' (first: warms up)' if not turn else ''}: blocks {blocking:.3f} s of "
      f"{whole:.2f} s = {100 * blocking / whole:.1f}%; {size / whole / 1e9:.2f} GB/s; a step "
      f"{alone:.3f} s alone, beside it the first {beside[0]:.3f} s, median of {len(beside)} "
      f"{statistics.median(beside):.3f} s (+{100 * (statistics.median(beside) / alone - 1):.0f}%)"
    )

  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  saver.save(99, state, force=True)
  saver.wait()
  del state
  folder = workdir / "checkpoints" / "99"
  for turn in range(args.rounds):
    if args.cold:
      drop(folder)
    else:
      read_all(folder)
    count, plain = read_all(folder)
    if args.cold:
      drop(folder)
    begin, processor = time.perf_counter(), time.process_time()
    restored = jax.block_until_ready(saver.restore(spec)[0])
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    del restored
    print(
      f"restore {turn}, {'cold' if args.cold else 'warm'} cache: {count / seconds / 1e9:.2f} GB/s "
      f"({seconds:.2f} s, {processor:.2f} s of processors), plain read {count / plain / 1e9:.2f} "
      f"GB/s: {count / seconds / (count / plain):.2f} of it"
    )
  saver.close()
  shutil.rmtree(workdir, ignore_errors=True)


if __name__ == "__main__":
  main()
