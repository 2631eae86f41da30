"""The threads of a CPU run. XLA cuts sums by their number, so a step gives the same bits only with
as many of them.

A run therefore keeps the number that it began with (cpu_threads.json in its folder), on however
many cores it goes on.
"""

from __future__ import annotations

import os

from jax._src import xla_bridge

from mmjax import files

FILE = "cpu_threads.json"


def count() -> int:
  """Threads of XLA's CPU devices in this process: NPROC, else the cores that it may use."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  given = os.environ.get("NPROC", "")
  return int(given) if given.isdecimal() and int(given) else cores


def recorded(workdir: str | os.PathLike) -> int:
  """The number that the run in `workdir` began with; 0 = no run on CPUs, or one of an older
  version.
  """
  with files.store_errors(workdir, f"{workdir} cannot be read"):
    try:
      return int(files.read_json(files.as_path(workdir) / FILE)["threads"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
      return 0


def keep(workdir: str | os.PathLike) -> str:
  """Gives this process the threads of the run in `workdir`. Call it before the first use of a
  device.

  Returns a line that says so, or why it could not; "" where nothing differs. Several simulated
  devices share a pool of their own (multihost.initialize), and other devices have no such threads:
  neither is touched.
  """
  began, here = recorded(workdir), count()
  if not began or began == here or os.environ.get("MMJAX_CPU_DEVICES", "1") != "1":
    return ""
  if os.environ.get("NPROC") or xla_bridge.backends_are_initialized():
    return (
      f"{workdir} began with {began} CPU thread(s), but this process has {here}: from here on its "
      f"numbers differ in their last bits. Start with NPROC={began} to keep them"
    )
  os.environ["NPROC"] = str(began)
  return (
    f"{workdir} keeps the {began} CPU thread(s) that it began with, so that its numbers stay the "
    f"same to the bit (NPROC={here} would use the {here} of this machine)"
  )
