"""Objectives: pure functions of (forward, batch, rng) that return sums and weights; only
training/step.py divides.

An objective is a function `name(forward, batch, rng, *, settings...) -> Losses`. `forward(method,
*args)` applies a method of the model to the batch; it is memoised, so objectives share work. Its
attribute `couples_examples` says whether the loss of one example depends on the others: then
microbatches go through the exact two-pass embedding cache. `mixup` says where it is sound on
pictures that train.mixup blended: what it asks for must then follow the blend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

# "loss" and metrics: (sum, weight), float32 scalars. "opponent", where an objective names a `group`
# of config.optimizers: the loss that this group minimises; the config's `weight` is a factor of
# "loss" alone. Neither may move the other's parameters.
Losses = dict[str, tuple[jax.Array, jax.Array]]
MINIMISED = ("loss", "opponent")  # the other entries of Losses are metrics


class Forward(Protocol):
  """forward("embedding", "image") applies that method to the batch; `batch=` gives another view of
  it.

  `fixed=GROUP`: parameters of that group of config.optimizers are constants. `teacher(DIR, method,
  ...)`: the same of another checkpoint's model, a constant.
  """

  def __call__(
    self, method: str, *args: Any, batch: dict | None = None, fixed: str = "", **kwargs: Any
  ) -> Any: ...

  def teacher(self, path: str, method: str, *args: Any, batch: dict | None = None) -> Any: ...


Mixup = Literal["always", "alone", "never"]


# (settings, statistics of the training data, config.data) -> settings that are known only from that
# data. statistics: data/statistics.py; None = numbers of the same shape, to plan with.
Fit = Callable[[Mapping[str, Any], Any, Mapping[str, Any]], dict[str, Any]]


def objective(
  *,
  couples_examples: bool,
  mixup: Mixup = "never",
  fit: Fit | None = None,
  methods: tuple[str, ...] = (),
) -> Callable[[Callable[..., Losses]], Callable[..., Losses]]:
  """Marks a function as an objective. mixup: it is sound on blended pictures always, where it reads
  nothing beside them, or never. fit: gives settings that the start of a run fills in. methods: what
  it asks of every model (models/methods.py); a config whose model lacks one is refused before
  anything runs.
  """

  def mark(function: Callable[..., Losses]) -> Callable[..., Losses]:
    marked: Any = function
    marked.couples_examples, marked.mixup = couples_examples, mixup
    marked.fit, marked.methods = fit, methods
    return function

  return mark


def is_highest(logits: jax.Array, index: jax.Array) -> jax.Array:
  """bool [...]: whether entry `index` [...] of the last axis of `logits` is above all others. A tie
  is none: a model that tells nothing apart is never right."""
  here = jnp.arange(logits.shape[-1]) == index[..., None]
  return jnp.where(here, logits, -jnp.inf).max(-1) > jnp.where(here, -jnp.inf, logits).max(-1)


def example_mask(batch: dict, *, every: tuple = (), some: tuple = ()) -> jax.Array:
  """bool [B]: rows that are valid, have all modalities of `every`, and at least one of `some`
  (where it names any).
  """
  size = jax.tree.leaves(batch)[0].shape[0]

  def has(m):
    return (
      batch[m]["present"].reshape(size, -1).any(-1)
      if "present" in batch[m]
      else jnp.ones(size, bool)
    )

  rows = batch.get("valid", jnp.ones(size, bool))
  for modality in every:
    rows &= has(modality)
  return rows & jnp.stack([has(modality) for modality in some]).any(0) if some else rows
