"""A generative adversarial network: the generator's loss, and its opponent's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, counted, objective

Array = jax.Array


@objective(couples_examples=False)
def gan(forward: Forward, batch: dict, rng: Array, *, group: str = "discriminator", noise: int = 64, r1: float = 1.0,
        r1_rows: int = 4, shift: float = 0.125, mismatched: bool = True, reconstruction: float = 0.0) -> Losses:
  """Non-saturating losses (Goodfellow et al. 2014, arXiv:1406.2661, section 3) of a text-conditional generator and its discriminator.

  "loss", the generator's: softplus(-D(fake)) + reconstruction * |fake - real| (as pix2pix, Isola et al. 2017, arXiv:1611.07004; the
  mean over pixels in [-1, 1]). "opponent", of the parameters of `group`: softplus(-D(real)) + softplus(D(fake)) + r1 / 2 * |dD / d
  real|^2 (R1, Mescheder et al. 2018, arXiv:1801.04406, eq. 9), and softplus(D(real, text of another row)) where `mismatched` (the
  matching-aware discriminator of Reed et al. 2016, arXiv:1605.05396); it shares the weight of the fakes equally.
  noise: dimensions of the generator's, as model.noise. r1_rows: the penalty is taken on every r1_rows-th row of the batch.
  shift: real and drawn pictures are both moved by up to this share of the side before D sees them (DiffAugment, Zhao et al.
  2020, arXiv:2006.10738), white uncovered.
  Rows that are not valid or lack one of the two do not count.
  Returns "real", "fake": mean of D; "r1": the mean squared gradient; "accuracy" of D on real and drawn pictures.
  """
  keys = dict(zip(("noise", "real", "fake"), jax.random.split(rng, 3), strict=True))
  valid = counted(batch, every=("image", "text"))
  real = batch["image"]["pixels"].astype(jnp.float32) / 127.5 - 1
  text = forward("condition")
  fake = forward("draw", text, jax.random.normal(keys["noise"], (len(text), noise)))
  sides = range(1, real.ndim)
  total = lambda x, rows=valid: jnp.where(rows, x, 0).sum(dtype=jnp.float32)
  weight = total(1.0)

  # The generator, against a discriminator that stays as it is.
  fooled = forward("score", move(fake, shift, keys["fake"]), text, fixed=group)
  loss = jax.nn.softplus(-fooled) + reconstruction * jnp.abs(fake - real).mean(sides)

  # The discriminator, on pictures and texts that stay as they are.
  text, fake = jax.lax.stop_gradient((text, fake))
  seen = move(real, shift, keys["real"])
  on_real, on_fake = forward("score", seen, text), forward("score", move(fake, shift, keys["fake"]), text)
  against = jax.nn.softplus(on_fake)
  if mismatched:
    other = jnp.roll(text, 1, axis=0)
    differs = valid & jnp.roll(valid, 1) & (batch["text"]["key"] != jnp.roll(batch["text"]["key"], 1, axis=0)).any(-1)
    against = jnp.where(differs, (against + jax.nn.softplus(forward("score", seen, other))) / 2, against)
  opponent = total(jax.nn.softplus(-on_real) + against)
  metrics = {"real": (total(on_real), weight), "fake": (total(on_fake), weight),
             "accuracy": (total((on_real > 0) + (on_fake < 0.0).astype(jnp.float32)), 2 * weight)}
  if r1:
    some = slice(None, None, r1_rows)
    slopes = jax.grad(lambda x: forward("score", x, text[some]).sum())(seen[some])
    squares, count = total(jnp.square(slopes).sum(sides), valid[some]), total(1.0, valid[some])
    # Written as a part of the mean over all rows: its own mean over the rows that it is taken on.
    opponent += r1 / 2 * squares * jax.lax.stop_gradient(weight / jnp.maximum(count, 1))
    metrics["r1"] = (squares, count)
  return {"loss": (total(loss), weight), "opponent": (opponent, weight), **metrics}


def move(pictures: Array, share: float, rng: Array) -> Array:
  """Pictures [B, H, W, 3] in [-1, 1], each moved by up to `share` of its sides both ways; white comes in. Differentiable."""
  if not share:
    return pictures
  for axis, key in zip((1, 2), jax.random.split(rng), strict=True):
    size = pictures.shape[axis]
    limit = round(share * size)
    by = jax.random.randint(key, (len(pictures),), -limit, limit + 1)
    at = jnp.arange(size)
    take = (at[None, :, None] - by[:, None, None] == at).astype(pictures.dtype)  # [B, to, from]
    pictures = jnp.einsum("bts,bshc->bthc" if axis == 1 else "bts,bhsc->bhtc", take, pictures - 1) + 1
  return pictures
