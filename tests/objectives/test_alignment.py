"""CTC against PyTorch's and optax's, value and gradients; and what it may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.objectives.alignment import ctc
from mmjax.objectives.captioning import captioning

WIDTH, VOCABULARY = 6, 9


def arguments(rows, times, length, seed):
  rng = np.random.default_rng(seed)
  count, heard = rng.integers(0, length + 1, rows), rng.integers(1, times + 1, rows)
  # Few: equal neighbours.
  labels = rng.integers(1, 4 if seed % 2 else VOCABULARY, (rows, length)).astype(np.int32)
  frames, table = (
    rng.normal(size=(rows, times, WIDTH)).astype(np.float32),
    rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
  )
  return (
    frames,
    np.arange(times) < heard[:, None],
    table,
    labels,
    np.arange(length) < count[:, None],
  )


def by_torch(frames, real, table, labels, spoken):
  frames, table = torch.tensor(frames, requires_grad=True), torch.tensor(table, requires_grad=True)
  chances = torch.log_softmax(frames @ table.T, -1).transpose(0, 1)
  losses = torch.nn.functional.ctc_loss(
    chances,
    torch.tensor(labels).long(),
    torch.tensor(real.sum(1)),
    torch.tensor(spoken.sum(1)),
    reduction="none",
  )
  counts = torch.isfinite(losses) & torch.tensor(spoken.any(1))
  total = losses[counts].sum()
  if counts.any():
    total.backward()

  def gradient(x):
    return np.zeros_like(x.detach().numpy()) if x.grad is None else x.grad.numpy()

  return total.item(), counts.numpy(), (gradient(frames), gradient(table))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_value_and_gradients_equal_pytorch(seed):
  frames, real, table, labels, spoken = arguments(5, 12, 5, seed)
  loss, counts = ctc(frames, real, table, labels, spoken)
  gradients = jax.grad(lambda *a: ctc(a[0], real, a[1], labels, spoken)[0], (0, 1))(
    jnp.asarray(frames), jnp.asarray(table)
  )
  want, rows, wanted = by_torch(frames, real, table, labels, spoken)
  np.testing.assert_array_equal(counts, rows)
  assert float(loss) == pytest.approx(want, rel=1e-4, abs=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, wanted
  )


@pytest.mark.parametrize("blank", (0, 8))
def test_value_and_gradients_equal_optax(blank):
  frames, real, table, labels, spoken = arguments(16, 12, 5, 3)
  labels = labels if blank == 0 else labels - 1  # the labels are all but the blank

  def ours(frames, table):
    return ctc(frames, real, table, labels, spoken, blank=blank)

  counts = ours(frames, table)[1]
  assert 4 < counts.sum() < 16

  def theirs(frames, table):
    losses = optax.ctc_loss(frames @ table.T, 1.0 - real, labels, 1.0 - spoken, blank_id=blank)
    return jnp.where(counts, losses, 0).sum()

  got = jax.value_and_grad(lambda *a: ours(*a)[0], (0, 1))(frames, table)
  want = jax.value_and_grad(theirs, (0, 1))(frames, table)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_what_is_padding_changes_nothing():
  frames, real, table, labels, spoken = arguments(5, 12, 5, 1)
  noise = np.random.default_rng(0).normal(size=frames.shape).astype(np.float32)
  other = np.where(real[..., None], frames, noise), real, table, np.where(spoken, labels, 7), spoken

  def run(*a):
    return jax.value_and_grad(lambda x, *rest: ctc(x, *rest)[0])(jnp.asarray(a[0]), *a[1:])

  (loss, gradient), (same, another) = run(frames, real, table, labels, spoken), run(*other)
  assert float(loss) == pytest.approx(float(same), rel=1e-6)
  np.testing.assert_allclose(gradient, another, atol=1e-6)
  assert not np.asarray(gradient)[~real].any()


def test_captioning_adds_it_for_texts_without_their_end():
  frames, real, table, labels, _ = arguments(2, 12, 4, 0)
  real[:] = True
  tokens = np.array([[5, 6, 2, 0], [7, 2, 0, 0]], np.int32)  # <eos> is 2, <pad> 0
  hidden = np.random.default_rng(1).normal(size=(2, 4, WIDTH)).astype(np.float32)
  batch = {
    "text": dict(tokens=tokens, mask=tokens != 0),
    "audio": dict(waveform=np.zeros((2, 3))),
    "valid": np.array([True, True]),
  }
  answers = {"decode": (hidden, table), "decode_with_memory": (hidden, table, frames, real)}

  def told(**settings):
    return captioning(
      lambda method, *_: answers[method], batch, None, source=("audio",), **settings
    )

  plain, both = told(), told(ctc=0.5, eos_id=2, blank=0)
  alone, rows = ctc(frames, real, table, tokens, np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool))
  assert rows.all() and float(both["loss"][0]) == pytest.approx(
    float(plain["loss"][0] + 0.5 * alone), rel=1e-6
  )
  assert (
    both["loss"][1] == plain["loss"][1] == 5
    and both["ctc"][1] == 3
    and float(both["ctc"][0]) == pytest.approx(float(alone))
  )
  with pytest.raises(UserError, match="eos_id is -1 and blank -1"):
    told(ctc=0.5)
  with pytest.raises(UserError, match="`source` names none"):
    captioning(None, batch, None, source=(), ctc=0.5)
  batch["valid"] = np.array([True, False])
  alone, _ = ctc(frames[:1], real[:1], table, tokens[:1], np.array([[1, 1, 0, 0]], bool))
  assert float(told(ctc=1.0, eos_id=2, blank=0)["ctc"][0]) == pytest.approx(float(alone), rel=1e-6)
