"""Objectives: pure functions of (forward, batch, rng) that return sums and weights; only training/step.py divides.

An objective is a function `name(forward, batch, rng, *, settings...) -> Losses`. `forward(method, *args)` applies a method
of the model to the batch; it is memoised, so objectives share work. Its attribute `couples_examples` says whether the
loss of one example depends on the others: then microbatches go through the exact two-pass embedding cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# "loss" and metrics: (sum, weight), float32 scalars. "opponent", where an objective names a `group` of config.optimizers: the loss
# that this group minimises; the config's `weight` is a factor of "loss" alone. Neither may move the other's parameters.
Losses = dict[str, tuple[jax.Array, jax.Array]]


class Forward(Protocol):
  """forward("embedding", "image") applies that method to the batch; `batch=` gives another view of it.

  `fixed=GROUP`: parameters of that group of config.optimizers are constants. `teacher(DIR, method, ...)`: the same of another
  checkpoint's model, a constant.
  """

  def __call__(self, method: str, *args: Any, batch: dict | None = None, fixed: str = "", **kwargs: Any) -> Any: ...

  def teacher(self, path: str, method: str, *args: Any, batch: dict | None = None) -> Any: ...


def objective(*, couples_examples: bool) -> Callable[[Callable[..., Losses]], Callable[..., Losses]]:
  """Marks a function as an objective."""
  def mark(function: Callable[..., Losses]) -> Callable[..., Losses]:
    function.couples_examples = couples_examples
    return function

  return mark


def counted(batch: dict, *, every: tuple = (), some: tuple = ()) -> jax.Array:
  """bool [B]: rows that are valid, have all modalities of `every`, and at least one of `some` (where it names any)."""
  size = jax.tree.leaves(batch)[0].shape[0]
  has = lambda m: batch[m]["present"].reshape(size, -1).any(-1) if "present" in batch[m] else jnp.ones(size, bool)
  rows = batch.get("valid", jnp.ones(size, bool))
  for modality in every:
    rows &= has(modality)
  return rows & jnp.stack([has(modality) for modality in some]).any(0) if some else rows
