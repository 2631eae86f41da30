"""What a config has to fit: the cores and memory of this machine, or its accelerators."""

from __future__ import annotations

import os
from typing import NamedTuple


class Machine(NamedTuple):
  """platform: "cpu", "gpu" or "tpu"; devices: of it; memory: bytes that a run may use, of all
  devices together or of the host; cores: of the host."""

  platform: str
  devices: int
  memory: int
  cores: int

  @property
  def accelerated(self) -> bool:
    return self.platform != "cpu"

  def __str__(self) -> str:
    memory = f"{self.memory / 2**30:.0f} GiB"
    if self.accelerated:
      return f"{self.devices} {self.platform.upper()}s with {memory}"
    return f"{self.cores} CPU core{'s' if self.cores != 1 else ''} and {memory}"


def this_machine() -> Machine:
  """The machine that this process runs on; of several hosts, all their devices."""
  import jax

  devices, cores = jax.devices(), len(os.sched_getaffinity(0)) if _has_affinity() else _cores()
  platform = devices[0].platform
  if platform == "cpu":
    return Machine("cpu", 1, free_memory(), cores)
  stats = devices[0].memory_stats() or {}
  return Machine(platform, len(devices), len(devices) * stats.get("bytes_limit", 16 << 30), cores)


def _has_affinity() -> bool:
  return hasattr(os, "sched_getaffinity")


def _cores() -> int:
  return os.cpu_count() or 1


def free_memory() -> int:
  """Bytes of this host that are free, within the limit of its container."""
  try:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (ValueError, OSError, AttributeError):
    return 4 << 30
  found = max(free, total // 2)  # pages of a file cache are free as well
  for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
    try:
      with open(limit) as file:
        found = min(found, int(file.read()))
    except (OSError, ValueError):
      continue
  return found
