"""`mmjax plan --sweep`: the same step on other meshes, with other remat policies and microbatches,
best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.parallel.mesh import layouts
from mmjax.plan import CACHE, plan, settings_of, topology, with_remat

REMATS = ("none", "dots_no_batch", "attention", "full")
MICROBATCHES = (1, 2, 4)


def sweep(
  config: FrozenConfigDict,
  name: str,
  *,
  remats: Sequence[str] = REMATS,
  microbatches: Sequence[int] = MICROBATCHES,
  cache: str | None = CACHE,
  log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
  """Every mesh of `parallel.mesh.layouts` x remat x microbatches, the fastest that fits first.

  More microbatches are tried only where fewer do not fit: they save memory and never time. A row:
  the settings, "overrides" to get them, "fits", "peak", "seconds", "mfu", or "error" where a
  combination is impossible.
  """
  target, rows = topology.parse(name), []
  for layout in layouts(target.device_count, target.slices):
    for policy in remats:
      for parts in microbatches:
        overrides = [*layout, *with_remat(config, policy), f"train.microbatches={parts}"]
        try:
          chosen = configs.resolve(config, overrides)
          result = plan(chosen, name, cache=cache, remedies=False, log=log)
        except (ConfigError, UserError) as error:
          rows.append(dict(overrides=overrides, fits=False, error=str(error)))
          break
        step = result.get("step") or {}
        rows.append(
          dict(
            settings_of(chosen),
            mesh=result["config"]["mesh"],
            overrides=overrides,
            fits=result["fits"],
            peak=result["memory"].get("peak"),
            seconds=step.get("seconds"),
            mfu=step.get("mfu"),
            warnings=len(result["warnings"]),
          )
        )
        if result["fits"]:
          break
  return sorted(
    rows,
    key=lambda row: (
      not row["fits"],
      row.get("seconds") or float("inf"),
      row.get("peak") or float("inf"),
    ),
  )
