"""Memory of a step that the compiler refuses or that holds too much: by how much it does not fit,
and what is whole on every chip.
"""

from __future__ import annotations

import re
from typing import Any

import jax

from mmjax.training.memory import local_bytes
from mmjax.training.program import Program

LARGE = 64 * 2**20  # bytes from which a parameter that every chip holds whole deserves a line
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> dict[str, Any] | None:
  """{"used", "limit", "over", "largest": [{"bytes", "shape", "source"}]} of a refusal; None for
  other errors.
  """
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  # Either of two passes of the compiler refuses, each in its own words.
  m = re.search(rf"Used {_SIZE} of {_SIZE}", message) or re.search(
    rf"\({_SIZE}\) exceeds available \w+ \({_SIZE}\)", message
  )
  used, limit = (_bytes(m[1], m[2]), _bytes(m[3], m[4])) if m else (None, None)
  over = used - limit if used is not None and limit is not None else None
  if m := re.search(rf"Exceeded \w+ capacity by {_SIZE}", message):
    over = _bytes(m[1], m[2])
  largest = []
  for block in re.split(r"\n\s*\d+\. Size: ", message)[1:8]:
    size = re.match(r"([\d.]+)([KMGT]?)", block)
    shape, source = (
      re.search(r"Shape: (\w+\[[\d,]*\])", block),
      re.search(r'op_name="([^"]*)"', block),
    )
    if size:
      largest.append(
        dict(
          bytes=_bytes(size[1], size[2]),
          shape=shape[1] if shape else "",
          source=source[1] if source else "",
        )
      )
  return dict(used=used, limit=limit, over=over, largest=largest)


def replicated(step: Program) -> list[str]:
  """Large state that every device holds whole although the config splits parameters: one line
  each.
  """
  if step.config.sharding == "replicated" or step.mesh.size == 1:
    return []
  lines = []
  for part, tree in (
    ("parameter", step.params_spec),
    ("optimizer state", step.state_spec.opt_states),
  ):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if leaf.sharding.is_fully_replicated and local_bytes(leaf) >= LARGE:
        lines.append(
          f"{part} {jax.tree_util.keystr(path, simple=True, separator='/')} "
          f"{leaf.dtype}{list(leaf.shape)} ({local_bytes(leaf) / 2**20:.0f} MiB) is whole on "
          "every chip: no axis of it is divisible by the mesh"
        )
  return lines


def _bytes(number: str, unit: str) -> float:
  return float(number) * _UNITS[unit]
