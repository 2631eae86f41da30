"""Adversarial alignment: encoders whose embeddings do not tell which modality they come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, example_mask, is_highest, objective

Array = jax.Array


@objective(couples_examples=False, mixup="always", methods=("embedding", "discriminate"))
def modality_adversary(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  between: tuple[str, ...] = ("image", "text"),
  group: str = "adversary",
) -> Losses:
  """The minimax game of Ganin and Lempitsky 2015 (arXiv:1409.7495, equation 1) over modalities in
  the place of domains.

  The model's discriminator (model.discriminator, parameters discriminator/...) names the modality
  of each embedding; its cross- entropy in nats is "opponent", which moves nothing but the group's
  parameters. "loss" is minus the same cross-entropy and moves the encoders: times the config's
  `weight`, their gradient is that of a gradient reversal layer of this strength. Both updates are
  made in the same step, each by its own optimizer: c.optimizers.adversary = dict(name="adamw",
  params=r"discriminator/.*").

  between: the modalities. group: that of the discriminator.
  Rows count for each of the modalities that they have. Returns "accuracy" of the discriminator;
  aligned spaces bring it down to 1 / modalities.
  """
  between = tuple(between)
  fool = opponent = correct = weight = jnp.zeros((), jnp.float32)
  for number, modality in enumerate(between):
    x = forward("embedding", modality)
    valid = example_mask(batch, every=(modality,))
    rows = jnp.repeat(valid, len(x) // len(valid))

    def total(values, rows=rows):
      return jnp.where(rows, values, 0).sum(dtype=jnp.float32)

    judged = forward("discriminate", jax.lax.stop_gradient(x), between)
    opponent -= total(jax.nn.log_softmax(judged)[:, number])
    correct += total(is_highest(judged, jnp.full(len(judged), number)))
    fool += total(jax.nn.log_softmax(forward("discriminate", x, between, fixed=group))[:, number])
    weight += total(1.0)
  return {"loss": (fool, weight), "opponent": (opponent, weight), "accuracy": (correct, weight)}
