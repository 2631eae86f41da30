"""A classifier of classes that have an order: one score a row, and ascending thresholds."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.layers import Dense, with_axes

Array = jax.Array


class OrdinalHead(nn.Module):
  """A cumulative link model with the logistic link (McCullagh 1980, "Regression models for ordinal
  data"): P(class > k) = sigmoid(score - threshold_k).

  Call: x [B, D] -> float32 log-probabilities [B, classes]. The thresholds are the first one and
  positive steps, so that every class has a probability.
  """

  classes: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = Dense((1,), ("embed", None), jnp.float32, nn.initializers.lecun_normal(), name="score")
    score = dense(x)
    # With steps of 1, classes 1 to 3 of 4 are about equally likely at score 0.
    first = self.param("first", with_axes(nn.initializers.constant(-1.0), ()), (), jnp.float32)
    steps = jax.nn.softplus(
      self.param(
        "steps",
        with_axes(nn.initializers.constant(0.54), (None,)),
        (self.classes - 2,),
        jnp.float32,
      )
    )
    thresholds = first + jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)])
    above = jax.nn.log_sigmoid(score - thresholds)  # [B, classes - 1]: log P(class > k)
    up_to = jax.nn.log_sigmoid(thresholds - score)
    # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - exp(v - u)), in logarithms
    between = above[:, :-1] + up_to[:, 1:] + jnp.log(-jnp.expm1(-steps))
    return jnp.concatenate([up_to[:, :1], between, above[:, -1:]], axis=1)
