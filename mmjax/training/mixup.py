"""Blends of pictures within a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.parallel import rules

Array = jax.Array


def mixup(batch: dict, alpha: float, rng: Array) -> dict:
  """Mixes the pixels of each row with those of the row before it (Zhang et al. 2018,
  arXiv:1710.09412), w ~ Beta(alpha, alpha).

  Pixels uint8 stay uint8 (rounded). Adds `image.mix_weight` float32 [B], the share of the row
  itself, `image.mix_row` int32 [B], the row of the rest, and `image.mix_label`, that row's label,
  where there are labels: objectives make soft targets of them. A row that counts is never mixed
  with one that does not.
  """

  def before(x: Array) -> Array:
    return jnp.roll(x, 1, axis=0)

  image = batch["image"]
  pixels, size = image["pixels"], image["pixels"].shape[0]
  real = batch.get("valid", jnp.ones(size, bool))
  if "present" in image:
    real &= image["present"].reshape(size, -1).all(-1)
  weight = jnp.where(before(real), jax.random.beta(rng, alpha, alpha, (size,), jnp.float32), 1)
  share = weight.reshape(-1, *(1,) * (pixels.ndim - 1))
  mixed = jnp.round(share * pixels + (1 - share) * before(pixels)).astype(pixels.dtype)
  mixed = rules.constrain_batch(mixed)
  row = before(jnp.arange(size, dtype=jnp.int32))
  mix = {"pixels": mixed, "mix_weight": weight, "mix_row": row}
  if "label" in batch:
    mix["mix_label"] = before(batch["label"])  # a microbatch does not hold the row itself
  return {**batch, "image": {**image, **mix}}
