"""A generative adversarial network: the generator's loss, and its opponent's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.objectives import Forward, Losses, example_mask, objective
from mmjax.ranges import NonNegative, Share, Size

Array = jax.Array


@objective(couples_examples=True, methods=("condition", "draw", "score"))
def gan(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  group: str = "discriminator",
  noise: Size = 16,
  r1: NonNegative = 1.0,
  r1_rows: Size = 4,
  shift: Share = 0.125,
  contrast: NonNegative = 1.0,
  reconstruction: NonNegative = 0.0,
) -> Losses:
  """Non-saturating losses (Goodfellow et al. 2014, arXiv:1406.2661, section 3) of a
  text-conditional generator and its discriminator.

  D(picture, text) is a logit. "loss", the generator's: softplus(-D(fake, text)) + contrast * the
  cross-entropy in nats of the text that a drawn picture is of, among those of the batch, by softmax
  over D(fake, .) + reconstruction * |fake - real| (the mean over pixels in [-1, 1]; pix2pix, Isola
  et al. 2017, arXiv:1611.07004).
  "opponent", the loss of the parameters of `group`: softplus(-D(real, text)) + softplus(D(fake,
  text)) + contrast * the same cross-entropy of real pictures (XMC-GAN, Zhang et al. 2021,
  arXiv:2101.04702, section 4) + r1 / 2 * |dD(real, text) / d real|^2 (R1, Mescheder et al. 2018,
  arXiv:1801.04406, eq. 9). Each moves parameters of its own side only; the text encoder learns from
  the side whose optimizer has it.

  group: of config.optimizers, which minimises "opponent". contrast, reconstruction: factors of
  these parts of the losses. r1: factor of the gradient's penalty. r1_rows: it is taken on every
  r1_rows-th row of the batch. noise: dimensions of the generator's, as model.noise.
  shift: real and drawn pictures are both moved by up to this share of the side before D sees them
  (DiffAugment, Zhao et al. 2020, arXiv:2006.10738), white uncovered.

  Rows that are not valid or lack one of the two do not count; equal texts are never told apart.
  Returns "real", "fake": mean of D; "r1": the mean squared gradient; "accuracy" of D on real and
  drawn pictures; "match_real", "match_fake": share whose own text (or an equal one) has the highest
  D.
  """
  keys = dict(zip(("noise", "real", "fake"), jax.random.split(rng, 3), strict=True))
  valid = example_mask(batch, every=("image", "text"))
  same = (batch["text"]["key"][:, None] == batch["text"]["key"]).all(-1)
  real = batch["image"]["pixels"].astype(jnp.float32) / 127.5 - 1
  sides = (1, 2, 3)

  def total(x, rows=valid):
    return jnp.where(rows, x, 0).sum(dtype=jnp.float32)

  weight = total(1.0)

  def discriminate(scores: Array) -> tuple[Array, Array, Array]:
    """(D of a picture with its own text, cross-entropy of that text, whether it is the likeliest),
    [B] each, of D [B, B].
    """
    own = jnp.diagonal(scores)
    others = jnp.where(valid & ~same, scores, -1e30)
    return (
      own,
      jax.nn.logsumexp(jnp.concatenate([own[:, None], others], axis=1), axis=1) - own,
      own > others.max(1),
    )

  # The generator, against a discriminator that stays as it is.
  text = forward("condition", fixed=group)
  fake = forward("draw", text, jax.random.normal(keys["noise"], (len(text), noise)))
  own, entropy, found_fake = discriminate(
    forward("score", move(fake, shift, keys["fake"]), text, fixed=group)
  )
  loss = (
    jax.nn.softplus(-own) + contrast * entropy + reconstruction * jnp.abs(fake - real).mean(sides)
  )

  # The discriminator, against a generator that stays as it is.
  text, fake = forward("condition", fixed="main"), jax.lax.stop_gradient(fake)
  augmented = move(real, shift, keys["real"])
  on_real, entropy, found_real = discriminate(forward("score", augmented, text))
  on_fake = jnp.diagonal(forward("score", move(fake, shift, keys["fake"]), text))
  opponent = total(jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake) + contrast * entropy)
  metrics = {
    "real": (total(on_real), weight),
    "fake": (total(on_fake), weight),
    "accuracy": (total((on_real > 0) + (on_fake < 0).astype(jnp.float32)), 2 * weight),
    "match_real": (total(found_real), weight),
    "match_fake": (total(found_fake), weight),
  }
  if r1:
    some = slice(None, None, r1_rows)
    fixed_text = jax.lax.stop_gradient(text[some])
    slopes = jax.grad(lambda x: jnp.trace(forward("score", x, fixed_text)))(augmented[some])
    squares, count = total(jnp.square(slopes).sum(sides), valid[some]), total(1.0, valid[some])
    # As a part of the mean over all rows it is the mean over those that it is taken on.
    opponent += r1 / 2 * squares * weight / jnp.maximum(count, 1)
    metrics["r1"] = (squares, count)
  return {"loss": (total(loss), weight), "opponent": (opponent, weight), **metrics}


def move(pictures: Array, share: float, rng: Array) -> Array:
  """Pictures [B, H, W, 3] in [-1, 1], each moved by up to `share` of its sides both ways; white
  comes in. Differentiable.
  """
  if not share:
    return pictures
  for axis, key in zip((1, 2), jax.random.split(rng), strict=True):
    size = pictures.shape[axis]
    limit = round(share * size)
    by = jax.random.randint(key, (len(pictures),), -limit, limit + 1)
    at = jnp.arange(size)
    take = (at[None, :, None] - by[:, None, None] == at).astype(pictures.dtype)  # [B, to, from]
    pictures = (
      jnp.einsum("bts,bshc->bthc" if axis == 1 else "bts,bhsc->bhtc", take, pictures - 1) + 1
    )
  return pictures
