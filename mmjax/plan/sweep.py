"""`mmjax plan --sweep`: the same step on other meshes, with other remat policies, microbatches and
unrolled layers, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.parallel.mesh import layouts
from mmjax.plan import CACHE, key_of, plan, settings_of, stacks_of, topology, with_remat

REMATS = ("none", "dense_attention", "dense", "projections", "full")
MICROBATCHES = (1, 2, 4)
TRIPS = (1, 2, 3)  # of an unrolled loop over layers


def sweep(
  config: FrozenConfigDict,
  name: str,
  *,
  remats: Sequence[str] = REMATS,
  microbatches: Sequence[int] = MICROBATCHES,
  cache: str | None = CACHE,
  log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
  """The config as it is, and every mesh of `parallel.mesh.layouts` x remat x microbatches, the
  fastest that fits first; of that one also with the loops over its layers unrolled.

  More microbatches are tried only where fewer do not fit, and less unrolling only where more does
  not: they save memory and never time. A row: the settings, "overrides" to get them, "fits",
  "peak", "seconds", "waiting_seconds", "mfu", or "error" where a combination is impossible.
  """
  target = topology.parse(name)

  def run(overrides: Sequence[str]) -> dict[str, Any]:
    try:
      chosen = configs.resolve(config, overrides)
      result = plan(chosen, name, cache=cache, remedies=False, log=log)
    except (ConfigError, UserError) as error:
      return dict(overrides=list(overrides), fits=False, error=str(error))
    step = result.get("step") or {}
    return dict(
      settings_of(chosen),
      mesh=result["config"]["mesh"],
      overrides=list(overrides),
      fits=result["fits"],
      peak=result["memory"].get("peak"),
      seconds=step.get("seconds"),
      waiting_seconds=step.get("waiting_seconds"),
      mfu=step.get("mfu"),
      warnings=len(result["warnings"]),
    )

  rows = [run(())]
  for layout in layouts(target.device_count, target.slices):
    for policy in remats:
      for parts in microbatches:
        rows.append(run([*layout, *with_remat(config, policy), f"train.microbatches={parts}"]))
        if rows[-1]["fits"] or "error" in rows[-1]:
          break
  best = min(rows, key=_rank)
  if best["fits"]:
    for unrolled in _unrolled(configs.resolve(config, best["overrides"])):
      rows.append(run([*best["overrides"], *unrolled]))
      if rows[-1]["fits"]:
        break
  return sorted(rows, key=_rank)


def _unrolled(config: FrozenConfigDict) -> list[list[str]]:
  """Overrides that unroll the loops over layers, wholly first; none where they are unrolled."""
  stacks = {
    path: entry
    for path, entry in stacks_of(config).items()
    if entry.get("depth", 1) > 1 and not entry.get("scan_unroll")
  }
  return [
    [
      f"{key_of(path, 'scan_unroll')}={-(-entry['depth'] // trips)}"
      for path, entry in stacks.items()
    ]
    for trips in TRIPS
    if stacks
  ]


def _rank(row: dict[str, Any]) -> tuple[bool, float, float]:
  seconds = (row.get("seconds") or float("inf")) + (row.get("waiting_seconds") or 0.0)
  return (not row["fits"], seconds, row.get("peak") or float("inf"))
