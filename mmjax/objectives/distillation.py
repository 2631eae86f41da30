"""Distillation: learning the outputs of another checkpoint's model, `teacher="DIR"` (a run, step or
import folder).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.objectives import Forward, Losses, example_mask, is_highest, objective
from mmjax.ranges import Positive

Array = jax.Array


@objective(couples_examples=False, mixup="always", methods=("embedding",))
def embedding_distillation(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  teacher: str,
  modalities: tuple[str, ...] = ("image",),
) -> Losses:
  """1 - cosine of one's own embedding and the teacher's, of each of the modalities (the feature
  distillation of CLIP-KD, Yang et al. 2024, arXiv:2307.12732, section 3.2, up to a factor:
  embeddings have length one).

  teacher: a checkpoint. modalities: whose embeddings are learned.
  A row counts for each of the modalities that it has. Both models have the same width. Returns
  "cosine", the mean cosine.
  """
  total = weight = jnp.zeros((), jnp.float32)
  for modality in modalities:
    mine, theirs = forward("embedding", modality), forward.teacher(teacher, "embedding", modality)
    if mine.shape != theirs.shape:
      raise UserError(
        f"embedding_distillation: {modality} embeddings are {list(mine.shape)} here and "
        f"{list(theirs.shape)} in {teacher}. Set model.width to the teacher's, or use "
        "similarity_distillation"
      )
    rows = _times(example_mask(batch, every=(modality,)), mine)
    total += jnp.where(rows, (mine * theirs).sum(-1), 0).sum()
    weight += rows.sum(dtype=jnp.float32)
  return {"loss": (weight - total, weight), "cosine": (total, weight)}


@objective(couples_examples=True, mixup="always", methods=("embedding",))
def similarity_distillation(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  teacher: str,
  between: tuple[str, ...] = ("image", "text"),
) -> Losses:
  """Which rows of the other modality each row is near to, as the teacher sees it; the widths may
  differ.

  The mean, over rows of the global batch and both directions, of KL(p || q): p and q are the
  softmax over the other modality's rows of scale * cosine, with the teacher's scale and one's own
  (contrastive relational distillation of CLIP-KD, section 3.1).
  teacher: a checkpoint. between: the two modalities.
  Rows that are not valid or lack one of the two do not count, and are
  nobody's neighbour.
  Returns "agreement": share of rows whose nearest neighbour is the teacher's.
  """
  own, theirs = (
    _similarities(ask, between) for ask in (forward, lambda *args: forward.teacher(teacher, *args))
  )
  valid = _times(example_mask(batch, every=between), own)
  total = correct = jnp.zeros((), jnp.float32)
  for mine, aim in ((own, theirs), (own.T, theirs.T)):
    mine, aim = (jnp.where(valid[None], x, -1e30) for x in (mine, aim))
    total += jnp.where(valid, divergence(aim, mine), 0).sum()
    correct += jnp.where(valid, is_highest(mine, jnp.argmax(aim, -1)), 0).sum(dtype=jnp.float32)
  weight = 2 * valid.sum(dtype=jnp.float32)
  return {"loss": (total, weight), "agreement": (correct, weight)}


@objective(couples_examples=False, mixup="always", methods=("classify",))
def logit_distillation(
  forward: Forward,
  batch: dict,
  rng: Array,
  *,
  teacher: str,
  modalities: tuple[str, ...] = ("image",),
  temperature: Positive = 2.0,
) -> Losses:
  """T^2 KL(softmax(teacher / T) || softmax(own / T)) of the logits of a classifier (Hinton et al.
  2015, arXiv:1503.02531, section 2).

  T^2 keeps the gradient's size whatever the temperature T, so that a `classification` objective
  beside it weighs the same. No labels are needed. Both models have the same classes. Rows with
  `valid` False, or without any of the modalities, do not count.
  teacher: a checkpoint. modalities: what is classified. temperature: T, by which logits
  are divided.
  Returns "agreement": share of rows whose likeliest class is the teacher's.
  """
  modalities = tuple(modalities)
  mine = forward("classify", modalities).astype(jnp.float32)
  theirs = forward.teacher(teacher, "classify", modalities).astype(jnp.float32)
  if mine.shape != theirs.shape:
    raise UserError(
      f"logit_distillation: {mine.shape[-1]} classes here and {theirs.shape[-1]} in {teacher}. "
      "Set data.classes to the teacher's"
    )
  rows = _times(example_mask(batch, some=modalities), mine)
  losses = temperature**2 * divergence(theirs / temperature, mine / temperature)
  same = is_highest(mine, jnp.argmax(theirs, -1))

  def total(x):
    return jnp.where(rows, x, 0).sum(dtype=jnp.float32)

  weight = rows.sum(dtype=jnp.float32)
  return {"loss": (total(losses), weight), "agreement": (total(same), weight)}


def divergence(aim: Array, logits: Array) -> Array:
  """KL(softmax(aim) || softmax(logits)) over the last axis: [..., C] twice -> [...], in nats."""
  aim, logits = jax.nn.log_softmax(aim, axis=-1), jax.nn.log_softmax(logits, axis=-1)
  return (jnp.exp(aim) * (aim - logits)).sum(-1)


def _similarities(ask, between: tuple) -> Array:
  """scale * cosine of every row of the first with every row of the second, [B, B]."""
  first, second = (ask("embedding", modality) for modality in between)
  if len(first) != len(second):
    raise UserError(
      f"similarity_distillation compares one {between[0]} with one {between[1]}, but the batch "
      f"has {len(first)} and {len(second)}: set data.text.per_example to 1"
    )
  return ask("temperature")[0] * jnp.matmul(first, second.T, precision="highest")


def _times(rows: Array, like: Array) -> Array:
  """bool [B] for outputs of B * K rows."""
  return jnp.repeat(rows, len(like) // len(rows))
