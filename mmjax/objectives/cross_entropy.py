"""Cross-entropy over a vocabulary in chunks of rows: the matrix of logits [N, V] never exists at
once.

Where a gradient is wanted, each chunk's share of it is computed as soon as its logits are there, so
that a logit is computed once and forgotten (Liger, Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmjax.parallel.mesh import ROW_AXES

Array = jax.Array

LOGITS = 2**23  # of a device's chunk where the caller names no size: 32 MiB in float32
LEAST = 256  # rows of a chunk, below which reading the table costs more than the product


def token_cross_entropy(
  hidden: Array,
  table: Array,
  targets: Array,
  *,
  bias: Array | None = None,
  label_smoothing: float = 0.0,
  chunk: int = 0,
) -> tuple[Array, Array, Array]:
  """(sum of the loss, rows that count, rows whose target has the highest logit, alone), float32
  scalars.

  hidden [N, D], table [V, D], targets int32 [N] (-1 = the row does not count, whatever it holds),
  bias [V] or None.
  logits = hidden table^T + bias; the loss of a row is -sum_v q_v log softmax(logits)_v in nats,
  with q = (1 - e) onehot(target) + e / V for label smoothing e (Szegedy et al. 2016,
  arXiv:1512.00567, section 7). Products in the dtype of `hidden`, sums in float32.
  chunk: rows of a device whose logits are held at once; 0 = by size. Rows split over the batch and
  context axes and a table split along V stay where they are. Only the loss has a derivative.
  """
  loss, correct = row_cross_entropy(
    hidden, table, targets, bias=bias, label_smoothing=label_smoothing, chunk=chunk
  )
  return loss, (targets >= 0).sum(dtype=jnp.float32), correct.sum(dtype=jnp.float32)


def row_cross_entropy(
  hidden: Array,
  table: Array,
  targets: Array,
  *,
  bias: Array | None = None,
  label_smoothing: float = 0.0,
  cap: float = 0.0,
  chunk: int = 0,
) -> tuple[Array, Array]:
  """(sum of the loss, bool [N]: rows whose target alone has the highest logit, False where they do
  not count). See `token_cross_entropy`. cap: logits become cap * tanh(logits / cap); 0 = none.
  """
  hidden, parts = _in_chunks(hidden, table, targets, chunk)
  loss, correct = _chunked((label_smoothing, cap), hidden, table, bias, parts)
  return loss, correct.swapaxes(0, 1).reshape(-1)[: len(targets)]


def log_probs(
  hidden: Array, table: Array, targets: Array, *, cap: float = 0.0, chunk: int = 0
) -> Array:
  """float32 [N]: log softmax(logits) of each row's target, 0 where the row does not count. See
  `row_cross_entropy`.

  Each has a derivative of its own, so that what is made of them may be anything; the logits of a
  chunk are computed again for it.
  """
  hidden, parts = _in_chunks(hidden, table, targets, chunk)
  losses = _chunked_rows((0.0, cap), hidden, table, parts)
  return -losses.swapaxes(0, 1).reshape(-1)[: len(targets)]


def _in_chunks(hidden: Array, table: Array, targets: Array, chunk: int) -> tuple[Array, Array]:
  """(hidden [C, S, n, D], targets [C, S, n]) of hidden [N, D] and targets [N], filled up with rows
  that do not count.
  """
  rows = len(targets)
  plan = _plan(rows, table.shape[0], chunk)
  missing = plan.total - rows
  hidden = jnp.where((targets >= 0)[:, None], hidden, 0)
  hidden = jnp.pad(hidden, ((0, missing), (0, 0)))
  targets = jnp.pad(targets, (0, missing), constant_values=-1)
  return _split(hidden, plan), _split(targets, plan)


class _Plan(NamedTuple):
  """Rows as [chunks, shards, size]: each trip of the loop takes `size` rows of every device that
  has some.
  """

  chunks: int
  shards: int
  size: int

  @property
  def total(self) -> int:
    return self.chunks * self.shards * self.size


def _plan(rows: int, vocabulary: int, chunk: int) -> _Plan:
  """Few rows of padding: the chunks are made a little smaller until they divide a device's rows,
  where some number does.
  """
  shards = _shards()
  each = math.ceil(rows / shards)
  most = min(each, chunk or max(LEAST, LOGITS // vocabulary))
  least = math.ceil(each / most)
  chunks = next((n for n in range(least, 2 * least) if each % n == 0), least)
  return _Plan(chunks, shards, math.ceil(each / chunks))


def _shards() -> int:
  """Pieces that the current mesh cuts the tokens of a batch into; 1 without one, and where the
  caller has cut it already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty or mesh.manual_axes else math.prod(mesh.shape[axis] for axis in ROW_AXES)


def _split(x: Array, plan: _Plan) -> Array:
  """[N, ...] -> [chunks, shards, size, ...]; a device's rows stay its own."""
  return _over_devices(x.reshape(plan.shards, plan.chunks, plan.size, *x.shape[1:]), 0).swapaxes(
    0, 1
  )


def _over_devices(x: Array, axis: int) -> Array:
  """`x` with `axis` split over the batch and context axes of the mesh, the others as XLA likes."""
  if _shards() == 1:
    return x
  spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
  spec[axis] = ROW_AXES
  return jax.lax.with_sharding_constraint(x, P(*spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
  how: tuple[float, float], hidden: Array, table: Array, bias: Array | None, targets: Array
) -> tuple[Array, Array]:
  """how: (label smoothing, cap). hidden [C, S, n, D], targets [C, S, n] -> (loss sum, correct [C,
  S, n]).
  """
  cast = table.astype(hidden.dtype)

  def body(total: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
    found = _losses(how, part[0], cast, bias, part[1])
    return total + found.loss.sum(), found.correct

  return jax.lax.scan(body, jnp.zeros((), jnp.float32), (hidden, targets))


def _forward(
  how: tuple[float, float],
  hidden: Array,
  table: Array,
  bias: Array | None,
  targets: Array,
  cotangents: Array | None = None,
) -> tuple[tuple, Any]:
  """The same, and d loss / d (hidden, table, bias). What a device adds to the table is summed over
  devices once, at the end. cotangents: [C, S, n], of the loss of each row; None = 1.
  """
  cast = table.astype(hidden.dtype)
  shards, (vocabulary, width) = hidden.shape[1], table.shape
  start = (
    jnp.zeros((), jnp.float32),
    _over_devices(jnp.zeros((shards, vocabulary, width), jnp.float32), 0),
    None if bias is None else jnp.zeros((shards, vocabulary), jnp.float32),
  )

  def body(carry: tuple, part: tuple[Array, Array, Array | None]) -> tuple[tuple, tuple]:
    total, into_table, into_bias = carry
    rows, target, cotangent = part
    found = _losses(how, rows, cast, bias, target)
    dlogits = _dlogits(how, found, target)
    if cotangent is not None:
      dlogits = dlogits * cotangent[..., None]
    into_bias = None if bias is None else into_bias + dlogits.sum(1)
    dlogits = dlogits.astype(rows.dtype)
    into_rows = _product("snv,vd->snd", dlogits, cast)
    into_table = _over_devices(into_table + _product("snv,snd->svd", dlogits, rows), 0)
    return (total + found.loss.sum(), into_table, into_bias), (
      found.correct,
      into_rows.astype(rows.dtype),
    )

  (total, into_table, into_bias), (correct, into_rows) = jax.lax.scan(
    body, start, (hidden, targets, cotangents)
  )
  gradients = (
    into_rows,
    into_table.sum(0).astype(table.dtype),
    None if bias is None or into_bias is None else into_bias.sum(0).astype(bias.dtype),
  )
  return (total, correct), gradients


def _backward(how: tuple[float, float], gradients: tuple, cotangents: tuple) -> tuple:
  def scale(x):
    return (x * cotangents[0]).astype(x.dtype)

  return *jax.tree.map(scale, gradients), None


_chunked.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_rows(how: tuple[float, float], hidden: Array, table: Array, targets: Array) -> Array:
  """The loss of each row [C, S, n], of hidden [C, S, n, D] and targets [C, S, n]."""
  cast = table.astype(hidden.dtype)

  def body(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
    return None, _losses(how, part[0], cast, None, part[1]).loss

  return jax.lax.scan(body, None, (hidden, targets))[1]


def _forward_rows(
  how: tuple[float, float], hidden: Array, table: Array, targets: Array
) -> tuple[Array, tuple]:
  return _chunked_rows(how, hidden, table, targets), (hidden, table, targets)


def _backward_rows(how: tuple[float, float], kept: tuple, cotangents: Array) -> tuple:
  hidden, table, targets = kept
  into_hidden, into_table, _ = _forward(how, hidden, table, None, targets, cotangents)[1]
  return into_hidden, into_table, None


_chunked_rows.defvjp(_forward_rows, _backward_rows)


class _Found(NamedTuple):
  """Of a chunk [S, n]: logits [S, n, V] float32, the log of their sum of exponentials, the loss,
  whether the target is highest.
  """

  logits: Array
  norm: Array
  loss: Array
  correct: Array


def _losses(
  how: tuple[float, float], hidden: Array, table: Array, bias: Array | None, targets: Array
) -> _Found:
  smoothing, cap = how
  logits = _product("snd,vd->snv", hidden, table)
  logits = logits if bias is None else logits + bias.astype(jnp.float32)
  logits = cap * jnp.tanh(logits / cap) if cap else logits
  norm = jax.nn.logsumexp(logits, axis=-1)
  is_target = _is_target(logits, targets)
  chosen = jnp.where(is_target, logits, 0).sum(-1)
  correct = chosen > jnp.where(is_target, -jnp.inf, logits).max(-1)
  loss = norm - (1 - smoothing) * chosen - (smoothing * logits.mean(-1) if smoothing else 0)
  counts = targets >= 0
  return _Found(logits, norm, jnp.where(counts, loss, 0), counts & correct)


def _dlogits(how: tuple[float, float], found: _Found, targets: Array) -> Array:
  """d loss / d logits before the cap: the softmax less the target distribution, times the cap's
  derivative; zero in rows that do not count.
  """
  smoothing, cap = how
  wanted = (
    jnp.where(_is_target(found.logits, targets), 1 - smoothing, 0)
    + smoothing / found.logits.shape[-1]
  )
  dlogits = jnp.exp(found.logits - found.norm[..., None]) - wanted
  if cap:
    dlogits = dlogits * (1 - jnp.square(found.logits / cap))
  return jnp.where((targets >= 0)[..., None], dlogits, 0)


def _is_target(logits: Array, targets: Array) -> Array:
  return (
    jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
  )


def _product(equation: str, x: Array, y: Array) -> Array:
  return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=jnp.float32)
