"""Contrastive losses over the global batch: softmax InfoNCE and pairwise sigmoid, in blocks that
travel a ring.

Both are written once, for one device and for a pod: `parallel.collectives` brings rows and columns
together tile by tile, and the backward pass computes each tile again from a few numbers a row, so
the matrix of similarities never exists.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.objectives import Forward, Losses, example_mask, objective
from mmjax.parallel.collectives import Ring, make_ring, pad_rows, per_device
from mmjax.ranges import Size

_LOW = -1e30  # logit of a pair that does not count; finite, so that differences of two stay finite


@objective(couples_examples=True, mixup="always", methods=("embedding", "temperature"))
def contrastive(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  between: tuple[str, ...] = ("image", "text"),
  loss: Literal["softmax", "sigmoid"] = "softmax",
  chunk: Size = 8,
) -> Losses:
  """Pulls the two sides of an example together and pushes different examples apart, over the global
  batch.

  With embeddings x_i, y_j [B, D] of the two modalities in `between`, s_ij = x_i . y_j and positives
  P_ij in [0, 1]:

  softmax (InfoNCE both ways; Radford et al. 2021, arXiv:2103.00020; several positives as in Khosla
  et al. 2020, arXiv:2004.11362, L_out): l_ij = scale s_ij; the loss of example i is the mean of two
  cross-entropies,
    1/2 [ log sum_j exp l_ij - sum_j P_ij l_ij / sum_j P_ij ]  (row i)
    + 1/2 [ log sum_k exp l_ki - sum_k P_ki l_ki / sum_k P_ki ].
  sigmoid (Zhai et al. 2023, arXiv:2303.15343): l_ij = scale s_ij + bias; the loss of example i is
    sum_j P_ij softplus(-l_ij) + (1 - P_ij) softplus(l_ij).

  P_ij = 1 where i = j, where `<modality>.key` uint32 [B, 2] of a modality in `between` is equal
  (the same caption, the identical picture), else 0. Mixup: where row i of a modality was mixed from
  w of itself (`<modality>.mix_weight` float32 [B]) and 1 - w of row m (`mix_row` int32 [B]), P_ij =
  w P'_ij + (1 - w) P'_mj with P' as above; likewise for columns.
  Rows with `valid` or `<modality>.present` False count neither as rows nor as columns.

  between: the two modalities. loss: softmax (as CLIP) or sigmoid (as SigLIP).
  chunk: neighbouring devices whose blocks are gathered before the ring moves on (cut to a divisor
  of the devices); more is fewer hops and more memory, and the same numbers up to rounding.
  Returns: sums over the examples, weight = how many count; "accuracy" = share of rows of the first
  modality that have a positive nearer than every other column.
  """
  first, second = between
  x, y = forward("embedding", first), forward("embedding", second)
  scale, bias = forward("temperature")
  valid = example_mask(batch, every=between)
  rows, columns = (labels_of(batch, between, side, valid) for side in between)
  loss_sum, correct = _pairwise(loss, make_ring(chunk), x, y, scale, bias, rows, columns)
  weight = valid.sum(dtype=jnp.float32)
  return {"loss": (loss_sum, weight), "accuracy": (correct, weight)}


class Labels(NamedTuple):
  """Who a row is: names uint32 [B, V, N] (its index, then two words a key) of each of the V rows it
  was mixed from, and weights float32 [B, V]; zero weights where the row does not count."""

  names: Array
  weights: Array


def labels_of(batch: dict, between: tuple, side: str, valid: Array) -> Labels:
  """Who the rows of modality `side` are, by their place and by the keys of every modality in
  `between`.
  """
  size = valid.shape[0]
  parts = [jnp.arange(size, dtype=jnp.uint32)[:, None]]
  parts += [batch[m]["key"].astype(jnp.uint32) for m in dict.fromkeys(between) if "key" in batch[m]]
  names = jnp.concatenate(parts, axis=-1)
  if "mix_weight" not in batch[side]:
    return Labels(names[:, None], valid.astype(jnp.float32)[:, None])
  weight = batch[side]["mix_weight"].astype(jnp.float32)
  both = jnp.stack([names, names[batch[side]["mix_row"]]], axis=1)
  return Labels(both, jnp.stack([weight, 1 - weight], axis=1) * valid[:, None])


# -- The two losses, with their derivatives --------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pairwise(
  loss: str,
  ring: Ring,
  x: Array,
  y: Array,
  scale: Array,
  bias: Array,
  rows: Labels,
  columns: Labels,
) -> tuple:
  """(sum of the loss, rows that have a positive nearer than any other column) of x, y float32 [B,
  D], scalars, and Labels of both.
  """
  return _forward(loss, ring, x, y, scale, bias, rows, columns)[0]


def _forward(
  loss: str,
  ring: Ring,
  x: Array,
  y: Array,
  scale: Array,
  bias: Array,
  rows: Labels,
  columns: Labels,
) -> tuple:
  if loss == "softmax":
    function = per_device(
      ring,
      functools.partial(_softmax_sums, ring),
      (False, False, True, False, False),
      (True, True, False, False, False),
    )
    total, correct, y, row_norms, column_norms = function(x, y, scale, rows, columns)
    return (total, correct), (x, y, scale, bias, rows, columns, row_norms, column_norms)
  function = per_device(
    ring,
    functools.partial(_sigmoid_sums, ring),
    (False, False, True, True, False, False),
    (True, True, False),
  )
  total, correct, y = function(x, y, scale, bias, rows, columns)
  return (total, correct), (x, y, scale, bias, rows, columns)


def _backward(loss: str, ring: Ring, saved: tuple, cotangents: tuple) -> tuple:
  cotangent = cotangents[0]  # of the loss; the accuracy has no derivative
  if loss == "softmax":
    x, y, scale, bias, rows, columns, row_norms, column_norms = saved
    function = per_device(
      ring,
      functools.partial(_softmax_gradients, ring),
      (True, False, False, True, False, False, False, False),
      (False, False, True),
    )
    dx, dy, dscale = function(cotangent, x, y, scale, rows, columns, row_norms, column_norms)
    # Adding a constant to every logit changes nothing.
    return (dx, dy, dscale, jnp.zeros_like(bias), None, None)
  function = per_device(
    ring,
    functools.partial(_sigmoid_gradients, ring),
    (True, False, False, True, True, False, False),
    (False, False, True, True),
  )
  return *function(cotangent, *saved), None, None


_pairwise.defvjp(_forward, _backward)


class Norms(NamedTuple):
  """What softmax keeps of a row: the largest logit, sum of exp(logit - largest), sum of P and of P
  * logit, [B] each.
  """

  largest: Array
  total: Array
  positive: Array
  positive_logits: Array


def _softmax_sums(
  ring: Ring, x: Array, y: Array, scale: Array, rows: Labels, columns: Labels
) -> tuple:
  size = x.shape[0]

  def tile(rows: tuple, columns: tuple, row_sums: tuple, column_sums: Norms) -> tuple:
    logits, positives = _logits(rows, columns, scale), positives_of(rows[1], columns[1])
    return (
      (
        _merge(row_sums[0], _norms(logits, positives, 1)),
        *_nearest(logits, positives, *row_sums[1:]),
      ),
      _merge(column_sums, _norms(logits, positives, 0)),
    )

  own, others = pad_rows((_where(rows, x), rows)), pad_rows((_where(columns, y), columns))
  zeros = jnp.zeros(own[0].shape[0], jnp.float32)
  start = Norms(zeros + _LOW, zeros, zeros, zeros)
  (row, nearest, rival), column, (home, _) = ring.visit(
    tile, own, others, (start, zeros + _LOW, zeros + _LOW), start
  )
  largest = ring.group_max(column.largest)
  column = column._replace(
    largest=ring.own(largest),
    total=ring.scatter_sum(column.total * jnp.exp(column.largest - largest)),
    positive=ring.scatter_sum(column.positive),
    positive_logits=ring.scatter_sum(column.positive_logits),
  )
  total = 0.5 * (_cross_entropy(row).sum() + _cross_entropy(column).sum())
  correct = jnp.where(_counts(own[1]) & (nearest > rival), 1.0, 0.0).sum()
  total, correct = ring.total((total, correct))
  row, column = jax.tree.map(lambda s: s[:size], (row, column))
  return total, correct, home[:size], row, column


def _softmax_gradients(
  ring: Ring,
  cotangent: Array,
  x: Array,
  y: Array,
  scale: Array,
  rows: Labels,
  columns: Labels,
  row_norms: Norms,
  column_norms: Norms,
) -> tuple:
  def tile(rows: tuple, columns: tuple, row_sums: tuple, dy: Array) -> tuple:
    logits, positives = _logits(rows, columns, scale), positives_of(rows[1], columns[1])
    (row_largest, row_share, row_positive), (column_largest, column_share, column_positive) = (
      rows[2],
      columns[2],
    )
    # d loss / d logits: the two softmaxes less the two target distributions.
    dlogits = (
      jnp.exp(logits - row_largest[:, None]) * row_share[:, None]
      + jnp.exp(logits - column_largest[None]) * column_share[None]
    )
    return _add_gradients(
      dlogits - positives * (row_positive[:, None] + column_positive[None]),
      scale,
      rows,
      columns,
      row_sums,
      dy,
    )

  def shares(norms: Norms) -> tuple:
    counts = norms.positive > 0
    return (
      norms.largest,
      jnp.where(counts, 0.5 * cotangent / jnp.where(counts, norms.total, 1), 0),
      jnp.where(counts, 0.5 * cotangent / jnp.where(counts, norms.positive, 1), 0),
    )

  rows = pad_rows((_where(rows, x), rows, shares(row_norms)))
  columns = pad_rows((y, columns, shares(column_norms)))
  dx, dy, dscale, _ = _gradients(ring, tile, rows, columns, x.shape[0])
  return dx, dy, dscale


def _sigmoid_sums(
  ring: Ring, x: Array, y: Array, scale: Array, bias: Array, rows: Labels, columns: Labels
) -> tuple:
  def tile(rows: tuple, columns: tuple, row_sums: tuple, column_sums: tuple) -> tuple:
    total, *nearest = row_sums
    logits, positives = _logits(rows, columns, scale, bias), positives_of(rows[1], columns[1])
    share = jnp.minimum(positives, 1)
    # A pair that does not count has logit -1e30, and adds 0 * 1e30 + 1 * 0.
    losses = share * jax.nn.softplus(-logits) + (1 - share) * jax.nn.softplus(logits)
    return (total + losses.sum(1), *_nearest(logits, positives, *nearest)), column_sums

  own, others = pad_rows((_where(rows, x), rows)), pad_rows((_where(columns, y), columns))
  zeros = jnp.zeros(own[0].shape[0], jnp.float32)
  (total, nearest, rival), _, (home, _) = ring.visit(
    tile, own, others, (zeros, zeros + _LOW, zeros + _LOW), ()
  )
  correct = jnp.where(_counts(own[1]) & (nearest > rival), 1.0, 0.0).sum()
  return *ring.total((total.sum(), correct)), home[: x.shape[0]]


def _sigmoid_gradients(
  ring: Ring,
  cotangent: Array,
  x: Array,
  y: Array,
  scale: Array,
  bias: Array,
  rows: Labels,
  columns: Labels,
) -> tuple:
  def tile(rows: tuple, columns: tuple, row_sums: tuple, dy: Array) -> tuple:
    logits, positives = _logits(rows, columns, scale, bias), positives_of(rows[1], columns[1])
    return _add_gradients(
      cotangent * (jax.nn.sigmoid(logits) - jnp.minimum(positives, 1)),
      scale,
      rows,
      columns,
      row_sums,
      dy,
    )

  rows, columns = pad_rows((_where(rows, x), rows)), pad_rows((y, columns))
  return _gradients(ring, tile, rows, columns, x.shape[0])


def _gradients(ring: Ring, tile: Any, rows: tuple, columns: tuple, size: int) -> tuple:
  """(dx, dy, dscale, dbias) of `size` rows, from a tile that calls `_add_gradients`."""
  zeros = jnp.zeros(rows[0].shape[0], jnp.float32)
  (dx, dscale, dbias), dy, _ = ring.visit(
    tile, rows, columns, (jnp.zeros_like(rows[0]), zeros, zeros), jnp.zeros_like(columns[0])
  )
  return dx[:size], ring.scatter_sum(dy)[:size], *ring.total((dscale.sum(), dbias.sum()))


def _add_gradients(
  gradient: Array, scale: Array, rows: tuple, columns: tuple, row_sums: tuple, dy: Array
) -> tuple:
  """Adds what d loss / d logits [b, c] of one tile gives to dx, dscale and dbias (by row), and
  dy.
  """
  dx, dscale, dbias = row_sums
  along = _matmul(gradient, columns[0])
  return (
    (dx + scale * along, dscale + (along * rows[0]).sum(1), dbias + gradient.sum(1)),
    dy + scale * _matmul(gradient.T, rows[0]),
  )


# -- One tile --------------------------------------------------------------------------------------


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _counts(labels: Labels) -> Array:
  return labels.weights.sum(1) > 0


def _where(labels: Labels, x: Array) -> Array:
  """x in float32, zero in rows that do not count (whatever was there, also NaN)."""
  return jnp.where(_counts(labels)[:, None], x.astype(jnp.float32), 0)


def _logits(rows: tuple, columns: tuple, scale: Array, bias: Array | float = 0.0) -> Array:
  """[b, c]; _LOW for pairs that do not count."""
  counts = _counts(rows[1])[:, None] & _counts(columns[1])[None]
  return jnp.where(counts, scale * _matmul(rows[0], columns[0].T) + bias, _LOW)


def positives_of(rows: Labels, columns: Labels) -> Array:
  """P float32 [b, c]; see `contrastive`."""
  total: Any = 0.0
  for u in range(rows.names.shape[1]):
    for v in range(columns.names.shape[1]):

      def word(n, u=u, v=v):
        return rows.names[:, u, n, None] == columns.names[None, :, v, n]

      same = word(0)
      for n in range(1, rows.names.shape[2], 2):
        same |= word(n) & word(n + 1)
      total += jnp.where(same, rows.weights[:, u, None] * columns.weights[None, :, v], 0)
  return total


def _nearest(logits: Array, positives: Array, nearest: Array, rival: Array) -> tuple[Array, Array]:
  """The largest logits of a positive and of another column so far, [b] each. A tie of the two is no
  hit.
  """
  positive = positives > 0
  return (
    jnp.maximum(nearest, jnp.where(positive, logits, _LOW).max(1)),
    jnp.maximum(rival, jnp.where(positive, _LOW, logits).max(1)),
  )


def _norms(logits: Array, positives: Array, axis: int) -> Norms:
  largest = logits.max(axis)
  total = jnp.exp(logits - jnp.expand_dims(largest, axis)).sum(axis)
  return Norms(largest, total, positives.sum(axis), (positives * logits).sum(axis))


def _merge(a: Norms, b: Norms) -> Norms:
  largest = jnp.maximum(a.largest, b.largest)
  total = a.total * jnp.exp(a.largest - largest) + b.total * jnp.exp(b.largest - largest)
  return Norms(largest, total, a.positive + b.positive, a.positive_logits + b.positive_logits)


def _cross_entropy(norms: Norms) -> Array:
  """[B]; zero in rows without a positive, which do not count."""
  counts = norms.positive > 0
  positive, total = jnp.where(counts, norms.positive, 1), jnp.where(counts, norms.total, 1)
  return jnp.where(counts, norms.largest + jnp.log(total) - norms.positive_logits / positive, 0)
