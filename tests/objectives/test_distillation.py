"""Logit distillation against PyTorch, on given logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.objectives.distillation import divergence, logit_distillation

torch = pytest.importorskip("torch")


class Given:
  """A `forward` that answers with these logits."""

  def __init__(self, mine, theirs):
    self.mine, self.theirs = mine, theirs

  def __call__(self, method, modalities):
    return self.mine

  def teacher(self, path, method, modalities):
    return self.theirs


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_logit_distillation_and_its_gradient_equal_torch(temperature):
  rng = np.random.default_rng(0)
  mine, theirs = (rng.normal(size=(12, 5)).astype(np.float32) * 3 for _ in range(2))
  valid = rng.integers(3, size=12) > 0
  batch = dict(image=dict(pixels=np.zeros((12, 2, 2, 3), np.uint8)), valid=jnp.asarray(valid))

  def loss(mine):
    total, weight = logit_distillation(
      Given(mine, theirs), batch, None, teacher="T", temperature=temperature
    )["loss"]
    return total / weight

  got, slope = jax.value_and_grad(loss)(jnp.asarray(mine))
  x, t = torch.tensor(mine, requires_grad=True), torch.tensor(theirs)
  rows = torch.tensor(valid)
  want = temperature**2 * torch.nn.functional.kl_div(
    (x[rows] / temperature).log_softmax(-1),
    (t[rows] / temperature).softmax(-1),
    reduction="batchmean",
  )
  want.backward()
  np.testing.assert_allclose(got, want.item(), rtol=1e-5)
  np.testing.assert_allclose(slope, x.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_several_texts_a_row_and_other_classes():
  rng = np.random.default_rng(1)
  mine, theirs = (rng.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
  batch = dict(text=dict(tokens=np.zeros((3, 2, 5), np.int32)), valid=np.array([True, False, True]))
  losses = logit_distillation(
    Given(mine, theirs), batch, None, teacher="T", modalities=("text",), temperature=1.0
  )
  rows = [0, 1, 4, 5]
  np.testing.assert_allclose(
    losses["loss"][0],
    np.asarray(divergence(jnp.asarray(theirs), jnp.asarray(mine)))[rows].sum(),
    rtol=1e-5,
  )
  assert float(losses["loss"][1]) == 4
  np.testing.assert_allclose(
    losses["agreement"][0], (mine.argmax(1) == theirs.argmax(1))[rows].sum()
  )
  with pytest.raises(UserError, match="data.classes"):
    logit_distillation(Given(mine, theirs[:, :3]), batch, None, teacher="T", modalities=("text",))
