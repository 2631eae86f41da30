"""What the environment says of the other processes of a run, without importing JAX."""

from __future__ import annotations

import re
from collections.abc import Mapping

OURS = ("MMJAX_COORDINATOR", "MMJAX_PROCESSES", "MMJAX_PROCESS_ID")


def cluster_processes(environment: Mapping[str, str]) -> int:
  """How many processes the scheduler started, as far as its variables tell."""
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if re.fullmatch("[0-9]{1,9}", environment.get(name, "")):
      return int(environment[name])
  if environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
    return 2
  return len(environment.get("TPU_WORKER_HOSTNAMES", "").split(","))


def may_have_peers(environment: Mapping[str, str]) -> bool:
  """Whether this process may be one of several: `multihost.initialize` knows for sure."""
  names = (*OURS, "JAX_COORDINATOR_ADDRESS")
  return any(environment.get(name) for name in names) or cluster_processes(environment) > 1
