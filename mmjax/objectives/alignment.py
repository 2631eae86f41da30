"""Connectionist temporal classification: a text spelled by a longer sequence in order, with blanks
between, whatever the alignment.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives.cross_entropy import row_cross_entropy

Array = jax.Array
_NEVER = -1e30  # the log of 0, finite so that derivatives are


def ctc(
  frames: Array, real: Array, table: Array, labels: Array, spoken: Array, *, blank: int = 0
) -> tuple[Array, Array]:
  """(sum of the losses, bool [B]: rows that count) of the labels of each row given its frames
  (Graves et al. 2006, equations 6 to 8).

  frames [B, T, D], real bool [B, T], table [V, D], labels int32 [B, N], spoken bool [B, N]: which
  are there, a prefix. Logits are frames table^T. A row counts if it has a label, and frames for its
  labels and for a blank between equal neighbours.
  Every path takes one logit a frame, so that the logits of all V labels are needed for the norms
  alone: they are those of the cross- entropy of blanks, which never holds them at once.
  """
  twice = (labels[:, 1:] == labels[:, :-1]) & spoken[:, 1:]
  count = spoken.sum(-1)
  counts = (count > 0) & (real.sum(-1) >= count + twice.sum(-1))
  real &= counts[:, None]
  blanks = jnp.where(real, blank, -1).reshape(-1)
  loss, _ = row_cross_entropy(frames.reshape(-1, frames.shape[-1]), table, blanks)
  # Logits less that of the blank, float32 [B, T, N].
  rows = (table[labels] - table[blank]).astype(frames.dtype)
  logits = jnp.einsum(
    "btd,bnd->btn", frames, rows, precision="highest", preferred_element_type=jnp.float32
  )
  paths = _log_paths(
    jnp.where(real[:, :, None], logits, 0), real, jnp.pad(~twice, ((0, 0), (1, 0))), count
  )
  return loss - jnp.where(counts, paths, 0).sum(), counts


def _log_paths(logits: Array, real: Array, apart: Array, count: Array) -> Array:
  """[B]: the log of the sum over paths of exp(sum of logits), where a blank's is 0. apart bool [B,
  N]: a label may follow the one before it without a blank. count int32 [B]: labels of a row."""
  b, _, n = logits.shape

  def after(x):
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=_NEVER)

  def step(
    state: tuple[Array, Array], frame: tuple[Array, Array]
  ) -> tuple[tuple[Array, Array], None]:
    silent, said = state  # paths that end in the blank after k labels [B, N + 1], in label k [B, N]
    logit, here = frame
    moved = jnp.logaddexp(silent[:, :-1], jnp.where(apart, after(said), _NEVER))
    now = (
      jnp.logaddexp(silent, jnp.pad(said, ((0, 0), (1, 0)), constant_values=_NEVER)),
      jnp.logaddexp(said, moved) + logit,
    )
    return jax.tree.map(lambda new, old: jnp.where(here[:, None], new, old), now, state), None

  start = jnp.full((b, n + 1), _NEVER).at[:, 0].set(0.0), jnp.full((b, n), _NEVER)
  (silent, said), _ = jax.lax.scan(step, start, (logits.swapaxes(0, 1), real.swapaxes(0, 1)))

  def pick(x, at):
    return jnp.take_along_axis(x, at[:, None], axis=1)[:, 0]

  return jnp.logaddexp(
    pick(silent, count), jnp.where(count > 0, pick(said, jnp.maximum(count - 1, 0)), _NEVER)
  )
