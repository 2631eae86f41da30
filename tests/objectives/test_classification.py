"""Classification losses against PyTorch's, with smoothing, mixup, several labels and rows that do
not count.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.objectives.classification import classification

ROWS, CLASSES = 8, 5


def make(seed, several=False, texts=0, mixup=False):
  rng = np.random.default_rng(seed)
  shape = (ROWS, texts) if texts else (ROWS,)
  label = (
    rng.random((ROWS, CLASSES)) < 0.3
    if several
    else rng.integers(-1, CLASSES, shape).astype(np.int32)
  )
  batch = dict(
    image=dict(present=rng.random(ROWS) > 0.2),
    text=dict(tokens=np.zeros((*shape, 3), np.int32)),
    valid=rng.random(ROWS) > 0.2,
    label=label,
  )
  if mixup:
    batch["image"].update(
      mix_weight=rng.random(ROWS).astype(np.float32), mix_label=np.roll(label, 1, 0)
    )
  return batch, rng.normal(size=(ROWS * max(1, texts), CLASSES)).astype(np.float32)


def run(batch, logits, **kwargs):
  losses = classification(
    lambda method, modalities: jax.numpy.asarray(logits), batch, jax.random.key(0), **kwargs
  )
  return [float(x) for key in ("loss", "accuracy") for x in losses[key]]


def reference(batch, logits, label, smoothing):
  """Rows that count, and PyTorch's loss of each of them against `label`."""
  counts = batch["valid"] & batch["image"]["present"]
  counts = np.repeat(counts, len(logits) // ROWS)
  logits = torch.from_numpy(logits)
  if label.dtype == bool:
    target = torch.from_numpy(label * (1 - smoothing) + 0.5 * smoothing)
    return counts, torch.nn.functional.binary_cross_entropy_with_logits(
      logits.double(), target, reduction="none"
    ).sum(-1).numpy()
  loss = torch.nn.functional.cross_entropy(
    logits.double(),
    torch.from_numpy(label).long(),
    ignore_index=-1,
    label_smoothing=smoothing,
    reduction="none",
  )
  return counts & (label >= 0), loss.numpy()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), several=st.booleans(), smoothing=st.sampled_from([0.0, 0.1]))
def test_losses_are_those_of_pytorch_whatever_the_order(seed, several, smoothing):
  batch, logits = make(seed, several)
  counts, each = reference(batch, logits, batch["label"], smoothing)
  correct = (
    ((logits > 0) == batch["label"]).mean(-1) if several else logits.argmax(-1) == batch["label"]
  )
  want = [each[counts].sum(), counts.sum(), correct[counts].sum(), counts.sum()]
  np.testing.assert_allclose(
    run(batch, logits, label_smoothing=smoothing), want, rtol=1e-5, atol=1e-5
  )
  order = np.random.default_rng(seed).permutation(ROWS)
  shuffled = jax.tree.map(lambda x: x[order], batch)
  np.testing.assert_allclose(
    run(shuffled, logits[order], label_smoothing=smoothing), want, rtol=1e-5, atol=1e-5
  )
  logits[~counts] = 1e4 * np.arange(CLASSES)  # rows that do not count
  np.testing.assert_allclose(
    run(batch, logits, label_smoothing=smoothing), want, rtol=1e-5, atol=1e-5
  )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), smoothing=st.sampled_from([0.0, 0.1]))
def test_class_weights_are_those_of_pytorch(seed, smoothing):
  weights = np.random.default_rng(seed).uniform(0.2, 3, CLASSES)
  batch, logits = make(seed)
  counts = batch["valid"] & batch["image"]["present"] & (batch["label"] >= 0)
  got = run(batch, logits, label_smoothing=smoothing, class_weights=tuple(weights))
  if counts.any():
    want = torch.nn.functional.cross_entropy(
      torch.from_numpy(logits[counts]).double(),
      torch.from_numpy(batch["label"][counts]).long(),
      weight=torch.from_numpy(weights),
      label_smoothing=smoothing,
    )
    np.testing.assert_allclose(got[0] / got[1], float(want), rtol=1e-5)
  batch, logits = make(seed, several=True)
  counts = batch["valid"] & batch["image"]["present"]
  want = torch.nn.functional.binary_cross_entropy_with_logits(
    torch.from_numpy(logits[counts]).double(),
    torch.from_numpy(batch["label"][counts]).double(),
    pos_weight=torch.from_numpy(weights),
    reduction="sum",
  )
  got = run(batch, logits, class_weights=tuple(weights))
  np.testing.assert_allclose(got[:2], (float(want), counts.sum()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_focal_loss_multiplies_by_what_is_missed(several):
  """The formula of the paper in float64, -(1 - p)^g log p, also where p is 1 and its gradient."""
  batch, logits = make(7, several)
  logits[0, 0] = 80.0  # p = 1 in float32
  x = logits.astype(np.float64)
  if several:
    p = 1 / (1 + np.exp(np.where(batch["label"], -x, x)))
    each = (-((1 - p) ** 2) * np.log(np.maximum(p, 1e-300))).sum(1)
    counts = batch["valid"] & batch["image"]["present"]
  else:
    shares = np.exp(x - x.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    p = shares[np.arange(ROWS), np.maximum(batch["label"], 0)]
    each = -((1 - p) ** 2) * np.log(p)
    counts = batch["valid"] & batch["image"]["present"] & (batch["label"] >= 0)
  got = run(batch, logits, focal=2.0)
  np.testing.assert_allclose(got[:2], (each[counts].sum(), counts.sum()), rtol=1e-4)

  def loss(x):
    return classification(lambda *_: x, batch, jax.random.key(0), focal=0.5)["loss"][0]

  assert np.isfinite(jax.grad(loss)(jax.numpy.asarray(logits))).all()


@pytest.mark.parametrize("several", [False, True])
def test_mixed_pictures_have_the_labels_of_both(several):
  batch, logits = make(3, several, mixup=True)
  weight = batch["image"]["mix_weight"]
  total = weights = 0
  for label, share in ((batch["label"], weight), (batch["image"]["mix_label"], 1 - weight)):
    counts, each = reference(batch, logits, label, 0.0)
    total, weights = total + (share * each)[counts].sum(), weights + share[counts].sum()
  np.testing.assert_allclose(run(batch, logits)[:2], (total, weights), rtol=1e-5)
  own, _ = reference(batch, logits, batch["label"], 0.0)
  assert run(batch, logits)[3] == own.sum()


def test_several_questions_a_row():
  batch, logits = make(5, texts=2)
  counts, each = reference(batch, logits, batch["label"].reshape(-1), 0.0)
  got = run(batch, logits, modalities=("image",))
  np.testing.assert_allclose(
    got,
    [
      each[counts].sum(),
      counts.sum(),
      (logits.argmax(-1) == batch["label"].reshape(-1))[counts].sum(),
      counts.sum(),
    ],
    rtol=1e-5,
  )
  # The text is there where the picture is not.
  with_text = run(batch, logits, modalities=("image", "text"))
  every = np.repeat(batch["valid"], 2) & (batch["label"].reshape(-1) >= 0)
  assert with_text[1] == every.sum()
