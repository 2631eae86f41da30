"""GRPO and its form without biases against their formulas over whole logits in PyTorch, with
gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives.grpo import grpo

torch = pytest.importorskip("torch")

B, L, D, V, CAP, MOST = 6, 12, 6, 17, 5.0, 7


def batch(old):
  """Answers of several lengths after prompts of several lengths; the last row does not count."""
  rng = np.random.default_rng(0)
  begin, size = rng.integers(1, 5, B), np.array([7, 1, 3, 7, 2, 4])
  place = np.arange(L) - begin[:, None]
  here = (place >= 0) & (place < size[:, None])
  rollout = dict(
    advantage=rng.normal(size=B).astype(np.float32),
    reward=rng.random(B).astype(np.float32),
    exact=rng.random(B) < 0.5,
    formed=rng.random(B) < 0.5,
    tied=np.arange(B) < 3,
  )
  if old:
    rollout["old"] = rng.normal(-2.8, 0.4, (B, L)).astype(np.float32)
  return dict(
    sequence=dict(
      tokens=rng.integers(0, V, (B, L)).astype(np.int32),
      segment_ids=((place < 0) | here).astype(np.int32),
      loss_mask=here,
    ),
    rollout=rollout,
    valid=np.arange(B) < B - 1,
  )


def parameters(seed):
  rng = np.random.default_rng(seed)
  hidden, table = rng.normal(size=(B, L, D)), rng.normal(size=(V, D))
  return 0.6 * hidden.astype(np.float32), 0.6 * table.astype(np.float32)


class Answering:
  """A `forward` of a model, and a teacher, that give these hidden states, table and cap."""

  def __init__(self, own, teacher):
    self.own, self.others = own, teacher

  def __call__(self, method):
    return self.own

  def teacher(self, path, method):
    assert path == "start"
    return self.others


def wanted(given, own, other, temperature=1.0, clip=0.2, beta=0.0, normalise=True, **_):
  """(loss, {metric}) token by token, as equations 3 and 4 are written."""
  s, rollout, losses, of_tokens = given["sequence"], given["rollout"], [], []

  def log_p(hidden, table, row, place):
    logits = CAP * torch.tanh(table @ hidden[row, place - 1] / CAP) / temperature
    return logits.log_softmax(0)[int(s["tokens"][row, place])]

  for row in np.flatnonzero(given["valid"]):
    terms, a = [], float(rollout["advantage"][row])
    for place in np.flatnonzero(s["loss_mask"][row]):
      p = log_p(*own, row, place)
      old = torch.tensor(rollout["old"][row, place - 1]) if "old" in rollout else p.detach()
      ratio = (p - old).exp()
      free, bound = ratio * a, ratio.clamp(1 - clip, 1 + clip) * a
      gap = log_p(*other, row, place) - p
      kl = gap.exp() - gap - 1
      terms.append(torch.minimum(free, bound) - beta * kl)
      of_tokens.append([-p.item(), kl.item(), float(bound < free)])
    losses.append(-sum(terms) / (len(terms) if normalise else MOST))
  return torch.stack(losses).mean(), np.mean(of_tokens, axis=0)


@pytest.mark.parametrize(
  "old, settings",
  [
    (False, {}),
    (False, dict(normalise=False, temperature=0.7)),
    (True, dict(clip=0.1)),
    (True, dict(clip=0.3, normalise=False, temperature=1.4, beta=0.3)),
    (False, dict(beta=0.2)),
  ],
)
def test_the_loss_and_its_gradient_equal_the_formula(old, settings):
  given, own, other = batch(old), parameters(1), parameters(2)
  if settings.get("beta"):
    settings = dict(settings, teacher="start")

  def loss(hidden, table):
    forward = Answering((hidden, table, CAP), (*map(jnp.asarray, other), CAP))
    found = grpo(forward, given, None, max_length=MOST, **settings)
    return found["loss"][0] / found["loss"][1], found

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (value, found), slopes = run(*map(jnp.asarray, own))
  x, y = (torch.tensor(one, requires_grad=True) for one in own)
  want, (entropy, kl, clipped) = wanted(given, (x, y), tuple(map(torch.tensor, other)), **settings)
  want.backward()
  np.testing.assert_allclose(value, want.item(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(slopes[0], x.grad.numpy(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(slopes[1], y.grad.numpy(), rtol=1e-4, atol=1e-6)
  assert (np.asarray(slopes[0])[-1] == 0).all()  # the row that is not valid
  means = {name: float(total / weight) for name, (total, weight) in found.items()}
  assert found["loss"][1] == found["reward"][1] == B - 1
  assert means["reward"] == pytest.approx(given["rollout"]["reward"][:-1].mean(), rel=1e-5)
  assert means["tied"] == pytest.approx(3 / 5) and means["tokens"] == pytest.approx(20 / 5)
  assert means["entropy"] == pytest.approx(entropy, rel=1e-4)
  assert ("kl" in means) == ("beta" in settings) and ("clipped" in means) == old
  assert "kl" not in means or means["kl"] == pytest.approx(kl, rel=1e-4)
  assert not old or (means["clipped"] == pytest.approx(clipped) and 0 < clipped < 1)
