"""DPO, IPO and KTO against their formulas over whole logits in PyTorch, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives.cross_entropy import log_probs
from mmjax.objectives.language_modelling import language_modelling
from mmjax.objectives.preference import preference

torch = pytest.importorskip("torch")

B, L, D, V, CAP = 3, 24, 6, 17, 5.0


def batch():
  """Rows of two pairs (the second of row 1 with one answer alone), answers of several lengths, and
  a row that does not count.
  """
  rng = np.random.default_rng(0)
  segments, loss_mask = np.zeros((B, L), np.int32), np.zeros((B, L), bool)
  answers = np.zeros((B, 4, 3), np.int32)
  for row in range(B):
    at = 0
    for number in range(2):
      for side in range(3):
        if (row, number, side) == (1, 1, 0):
          continue
        size, prompt = int(rng.integers(3, 5)), int(rng.integers(1, 3))
        segment = 3 * number + side + 1
        segments[row, at : at + size] = segment
        loss_mask[row, at + prompt : at + size] = True
        answers[row, number, side] = segment
        at += size
  return dict(
    sequence=dict(
      tokens=rng.integers(0, V, (B, L)).astype(np.int32), segment_ids=segments, loss_mask=loss_mask
    ),
    preference=dict(answers=answers, reference=rng.normal(-6, 1, answers.shape).astype(np.float32)),
    valid=np.array([True, True, False]),
  )


def parameters():
  rng = np.random.default_rng(1)
  return (rng.normal(size=(B, L, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32))


def answering(*next_tokens):
  """A `forward` of a model that gives these hidden states, table and cap."""
  return lambda method: next_tokens


def sums(hidden, table, given):
  """{(row, pair, side): (log-probability, tokens)} of each answer of rows that count, in torch."""
  s, found = given["sequence"], {}
  logits = CAP * torch.tanh(hidden @ table.T / CAP)
  chances = logits.log_softmax(-1)
  for (row, pair, side), segment in np.ndenumerate(given["preference"]["answers"]):
    if segment and given["valid"][row]:
      places = np.flatnonzero((s["segment_ids"][row] == segment) & s["loss_mask"][row])
      terms = [chances[row, place - 1, int(s["tokens"][row, place])] for place in places]
      found[row, pair, side] = torch.stack(terms).sum(), len(terms)
  return found


def wanted(form, beta, hidden, table, given, settings):
  found, r = sums(hidden, table, given), {}
  for place, (total, tokens) in found.items():
    r[place] = total - float(given["preference"]["reference"][place])
    if settings.get("length_normalised"):
      r[place] = r[place] / tokens
  pairs = [place[:2] for place in r if place[2] == 0 and (*place[:2], 1) in r]
  h = torch.stack([r[*pair, 0] - r[*pair, 1] for pair in pairs])
  if form == "dpo":
    e = settings.get("label_smoothing", 0.0)
    log_sigmoid = torch.nn.functional.logsigmoid
    loss = -(1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h)
  elif form == "ipo":
    loss = (h - 1 / (2 * beta)) ** 2
  else:
    z = torch.stack([x for place, x in r.items() if place[2] == 2]).mean().clamp(min=0).detach()
    good = [1 - torch.sigmoid(beta * (x - z)) for place, x in r.items() if place[2] == 0]
    bad = [1 - torch.sigmoid(beta * (z - x)) for place, x in r.items() if place[2] == 1]
    one, other = settings.get("desirable", 1.0), settings.get("undesirable", 1.0)
    loss = torch.stack([one * x for x in good] + [other * x for x in bad])
  return loss.mean(), h.detach().numpy()


@pytest.mark.parametrize(
  "form, beta, settings",
  [
    ("dpo", 0.1, {}),
    ("dpo", 0.5, dict(label_smoothing=0.2)),
    ("dpo", 0.5, dict(length_normalised=True)),
    ("ipo", 0.3, {}),
    ("ipo", 0.3, dict(length_normalised=True)),
    ("kto", 0.2, {}),
    ("kto", 0.2, dict(desirable=1.5, undesirable=0.5)),
  ],
)
def test_each_form_and_its_gradient_equal_the_dense_formula(form, beta, settings):
  given, both = batch(), parameters()
  if form == "kto":
    given["preference"]["reference"][..., 2] -= 3  # z is above 0

  def loss(hidden, table):
    forward = answering(hidden, table, CAP)
    found = preference(forward, given, None, form=form, beta=beta, **settings)
    return found["loss"][0] / found["loss"][1], found

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (value, found), slopes = run(*map(jnp.asarray, both))
  x, y = (torch.tensor(one, requires_grad=True) for one in both)
  want, h = wanted(form, beta, x, y, given, settings)
  want.backward()
  np.testing.assert_allclose(value, want.item(), rtol=1e-5)
  np.testing.assert_allclose(slopes[0], x.grad.numpy(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(slopes[1], y.grad.numpy(), rtol=1e-4, atol=1e-6)
  assert (np.asarray(slopes[0])[2] == 0).all()  # the row that is not valid
  means = {name: float(total / weight) for name, (total, weight) in found.items()}
  assert found["loss"][1] == (7 if form == "kto" else 3) and found["accuracy"][1] == 3
  np.testing.assert_allclose(means["margin"], beta * h.mean(), rtol=1e-5)
  assert means["accuracy"] == pytest.approx((h > 0).mean())
  assert form != "kto" or means["kl"] > 0


def test_equal_log_probabilities_are_not_right_and_lose_as_much_as_a_guess():
  """As at the first step, where the model is its own reference."""
  given, (hidden, table) = batch(), parameters()
  forward = answering(0 * hidden, table, 0.0)
  tokens = np.zeros(given["preference"]["answers"].shape)
  for place, segment in np.ndenumerate(given["preference"]["answers"]):
    here = given["sequence"]["segment_ids"][place[0]] == segment
    tokens[place] = (here & given["sequence"]["loss_mask"][place[0]]).sum()
  given["preference"]["reference"] = (-np.log(V) * tokens).astype(np.float32)
  found = preference(forward, given, None)
  assert found["accuracy"] == (0, 3)
  np.testing.assert_allclose(found["loss"][0], 3 * np.log(2), rtol=1e-5)


def test_log_probabilities_in_chunks_have_gradients_of_their_own():
  rng = np.random.default_rng(2)
  hidden, table = rng.normal(size=(31, D)).astype(np.float32), parameters()[1]
  targets = np.where(rng.random(31) < 0.2, -1, rng.integers(0, V, 31)).astype(np.int32)
  factors = jnp.asarray(rng.normal(size=31).astype(np.float32))

  def dense(hidden, table):
    chances = jax.nn.log_softmax(jnp.matmul(hidden, table.T, precision="highest"))
    return jnp.where(targets >= 0, chances[jnp.arange(31), targets], 0)

  def total(function):
    return lambda *both: (factors * jnp.square(function(*both))).sum()

  def chunked(hidden, table):
    return log_probs(hidden, table, targets, chunk=4)

  got = jax.jit(jax.value_and_grad(total(chunked), (0, 1)))(hidden, table)
  want = jax.value_and_grad(total(dense), (0, 1))(hidden, table)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_a_language_model_beside_it_learns_preferred_answers_alone():
  given, (hidden, table) = batch(), parameters()
  forward = answering(hidden, table, CAP)
  found = language_modelling(forward, given, None)["loss"]
  both = sums(torch.tensor(hidden), torch.tensor(table), given)
  chosen = [one for place, one in both.items() if place[2] == 0]
  np.testing.assert_allclose(found[0], -sum(float(total) for total, _ in chosen), rtol=1e-5)
  assert found[1] == sum(tokens for _, tokens in chosen)
