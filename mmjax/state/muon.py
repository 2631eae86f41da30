"""Muon: orthogonalised momentum of matrices, and Adam for everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.ranges import Decay, Depth, Epsilon, NonNegative, Positive
from mmjax.state.optimizer import Axes, StateDtype, axes_by_name
from mmjax.state.paths import map_named


def muon(
  axes: Axes,
  *,
  beta: Decay = 0.95,
  nesterov: bool = True,
  iterations: Depth = 5,
  newton_schulz: Literal["float32", "bfloat16"] = "float32",
  rms: Positive = 0.2,
  b1: Decay = 0.9,
  b2: Decay = 0.999,
  eps: Epsilon = 1e-8,
  adam_rate: NonNegative = 1.0,
  state_dtype: StateDtype = "float32",
) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024): momentum of a matrix, orthogonalised; everything else by Adam, at
  `adam_rate` times the rate.

  `matrix_axes` says which leaves are matrices: kernels, one matrix a layer, and query, key and
  value each for itself.
  An update is multiplied by `rms` * sqrt(larger side), which gives it the RMS of an Adam update
  (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that AdamW's rate and decay carry over.
  rms: factor of an update of a matrix. adam_rate: factor of the rate of all that Adam updates.
  iterations: of Newton-Schulz, which orthogonalise. newton_schulz: their precision.
  beta: decay of the momentum; nesterov: looked at one step ahead. b1, b2, eps: of Adam.
  """
  sides = {name: matrix_axes(name, leaf) for name, leaf in axes_by_name(axes).items()}

  def labels(tree):
    return map_named(lambda name, _: "matrix" if sides[name] else "other", tree)

  return optax.partition(
    {
      "matrix": scale_by_muon(
        sides,
        beta=beta,
        nesterov=nesterov,
        iterations=iterations,
        rms=rms,
        precision=newton_schulz,
        momentum_dtype=state_dtype,
      ),
      "other": optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=state_dtype), optax.scale(adam_rate)
      ),
    },
    labels,
  )


class MuonState(NamedTuple):
  count: jax.Array  # type: ignore[assignment]  # int32, updates made
  mu: Any  # momentum, like the parameters


def scale_by_muon(
  sides: Mapping[str, tuple | None],
  *,
  beta: float,
  nesterov: bool,
  iterations: int,
  rms: float,
  precision: str,
  momentum_dtype: str,
) -> optax.GradientTransformation:
  """Orthogonalised momentum of leaves [..., inputs..., ..., outputs...]; `sides` as `matrix_axes`
  gives them, by name.

  The directions are those of `optax.contrib.scale_by_muon` with these sides as its dimension
  numbers, times `rms` * sqrt(larger side). It is not used itself: it cannot iterate in another
  precision than that of the momentum, so that on TPUs float32 would be bfloat16 passes, and it
  keeps its coefficients in its state, where older checkpoints have none.
  """

  def init(params):
    return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=momentum_dtype))

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    if nesterov:
      ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
      now = optax.tree.bias_correction(updates, beta, count)
      momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
    else:
      momentum = optax.tree.bias_correction(mu, beta, count)

    def direction(name, x):
      inputs, outputs = sides[name]
      batch = tuple(i for i in range(x.ndim) if i not in inputs + outputs)
      order = batch + inputs + outputs

      def size(dims):
        return math.prod(x.shape[i] for i in dims)

      matrices = x.transpose(order).reshape(size(batch), size(inputs), size(outputs))
      matrices = orthogonalize(matrices, iterations, precision) * (
        rms * math.sqrt(max(size(inputs), size(outputs)))
      )
      return (
        matrices.reshape([x.shape[i] for i in order]).transpose(np.argsort(order)).astype(x.dtype)
      )

    return map_named(direction, momentum), MuonState(count, optax.tree.cast(mu, momentum_dtype))

  return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, iterations: int = 5, precision: str = "float32") -> jax.Array:
  """Matrices [N, R, C] with their singular values moved near 1 (0.7 to 1.2), by Jordan's quintic
  Newton-Schulz iteration.
  """
  a, b, c = 3.4445, -4.7750, 2.0315
  wide = x.shape[-2] <= x.shape[-1]
  x = x if wide else x.mT
  x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)).astype(precision)
  with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
    for _ in range(iterations):
      gram = x @ x.mT
      x = a * x + (b * gram + c * (gram @ gram)) @ x
  return (x if wide else x.mT).astype(jnp.float32)


def matrix_axes(name: str, axes: tuple) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """(input dimensions, output dimensions) of a leaf that muon takes as matrices, None for one that
  it leaves to Adam.

  Matrices are leaves called "kernel", except those that read tokens, patches or positions directly.
  "layers" and "qkv" count matrices; "heads" and "kv" are one side together: qkv [embed, qkv, heads,
  kv] is 3 matrices embed x (heads kv), out [heads, kv, embed] is (heads kv) x embed. With more than
  two sides (a convolution) the last is the output.
  """
  if name.split("/")[-1] != "kernel" or {"vocab", "patch", "position"} & set(axes):
    return None
  groups: list[list[int]] = []
  for i, axis in enumerate(axes):
    if axis in ("layers", "qkv"):
      continue
    if axis == "kv" and groups and axes[groups[-1][-1]] == "heads":
      groups[-1].append(i)
    else:
      groups.append([i])
  if len(groups) < 2:
    return None
  return tuple(i for group in groups[:-1] for i in group), tuple(groups[-1])
