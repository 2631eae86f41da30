"""Generation against search by hand: every text that there is, scored one by one."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmjax.config import UserError
from mmjax.inference.engine import Decoding, generate, penalise, restrict, tokens_in
from mmjax.inference.engine import score as score_texts

VOCABULARY, LENGTH, EOS = 4, 4, 2
RULES = (
  np.random.default_rng(1)
  .normal(size=(5, LENGTH + 2, VOCABULARY, VOCABULARY, VOCABULARY))
  .astype(np.float32)
  * 1.5
)


def step(token, place, state, constants):
  """Row i's next token depends on the last two tokens and the place, by a table of its own."""
  before, row = state["before"][0], constants["row"][0]
  return jnp.asarray(RULES)[row, place, before, token], {"before": token[None]}


def run(rows, length=LENGTH, prompt=(1,), rng=None, ids=None, rules=None, **settings):
  row = jnp.asarray(rows, jnp.int32)[None]
  prompt = jnp.broadcast_to(jnp.asarray(prompt), (len(rows), np.shape(prompt)[-1]))

  @jax.jit
  def call(constants):
    logits, state = None, {"before": jnp.zeros_like(row)}
    for i, token in enumerate(prompt.T):
      logits, state = step(token, i, state, constants)
    return generate(
      step,
      logits,
      state,
      constants,
      places=jnp.full(len(rows), prompt.shape[1]),
      max_length=length,
      eos_id=EOS,
      pad_id=0,
      decoding=Decoding(**settings),
      rules=rules,
      prompt=prompt,
      rng=rng,
      ids=ids,
    )

  return map(np.asarray, call({"row": row}))


def score(row, text, prompt=(1,)):
  """Sum of log-probabilities of a text."""
  read, total = [0, *prompt], 0.0
  for i, token in enumerate(text):
    chances = jax.nn.log_softmax(RULES[row, len(prompt) - 1 + i, read[-2], read[-1]])
    total += float(chances[token])
    read.append(token)
  return total


def texts(length=LENGTH):
  """Every text: ended by <eos>, or cut off."""
  words = [t for t in range(VOCABULARY) if t != EOS]
  for n in range(length):
    yield from ((*body, EOS) for body in itertools.product(words, repeat=n))
  yield from itertools.product(words, repeat=length)


def padded(text, length=LENGTH):
  return [*text, *[0] * (length - len(text))]


def test_greedy_takes_the_likeliest_token_each_time_and_stops():
  tokens, scores = run(range(5))
  for row in range(5):
    read, text = [0, 1], []
    while len(text) < LENGTH and EOS not in text:
      text.append(int(np.argmax(RULES[row, len(text), read[-2], read[-1]])))
      read.append(text[-1])
    assert tokens[row].tolist() == padded(text)
    assert scores[row] == pytest.approx(score(row, text), abs=1e-5)
  assert any(EOS in row[:-1] for row in tokens.tolist())  # some ended early


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_a_wide_beam_finds_the_best_text_of_all(penalty):
  tokens, scores = run(range(5), method="beam", beams=81, length_penalty=penalty)
  for row in range(5):
    best = max(texts(), key=lambda text: score(row, text) / len(text) ** penalty)
    assert tokens[row].tolist() == padded(best)
    assert scores[row] == pytest.approx(score(row, best) / len(best) ** penalty, abs=1e-5)


@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(method="beam", beams=2),
    dict(method="sample", rng=jax.random.key(3), temperature=2.0),
  ],
  ids=["greedy", "beam", "sample"],
)
def test_rows_do_not_depend_on_their_batch(settings):
  tokens, scores = run(range(5), **settings)
  for row in (0, 3):
    more = dict(ids=np.array([row])) if "rng" in settings else {}
    alone, score_alone = run([row], **settings, **more)
    np.testing.assert_array_equal(alone[0], tokens[row])
    assert score_alone[0] == scores[row]


def test_one_beam_is_greedy_and_a_prompt_is_read_first():
  np.testing.assert_array_equal(
    next(run(range(5), method="beam", beams=1, length_penalty=0.0)), next(run(range(5)))
  )
  prompt = (1, 3)
  tokens, scores = run(range(5), prompt=prompt, method="beam", beams=81)
  for row in range(5):
    best = max(texts(), key=lambda text: score(row, text, (1, 3)) / len(text))
    assert tokens[row].tolist() == padded(best)


def test_samples_follow_the_distribution():
  count = 3000
  tokens, scores = run(
    [2] * count, length=1, method="sample", rng=jax.random.key(0), temperature=1.5
  )
  chances = np.asarray(jax.nn.softmax(RULES[2, 0, 0, 1] / 1.5))
  np.testing.assert_allclose(
    np.bincount(tokens[:, 0], minlength=VOCABULARY) / count, chances, atol=0.03
  )
  assert scores[0] == pytest.approx(score(2, tokens[0].tolist()), abs=1e-5)
  top, _ = run([2] * 200, length=1, method="sample", rng=jax.random.key(0), top_k=1)
  assert set(top[:, 0]) == {int(chances.argmax())}


def test_a_repetition_penalty_is_that_of_transformers():
  from transformers import RepetitionPenaltyLogitsProcessor

  random = np.random.default_rng(0)
  logits = random.normal(size=(3, 9)).astype(np.float32)
  tokens = random.integers(0, 9, (3, 4))
  theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(tokens), torch.tensor(logits))
  known = tokens_in(jnp.asarray(tokens), 9)
  np.testing.assert_allclose(penalise(logits, known, 1.7), theirs, rtol=1e-6)
  more = np.concatenate([tokens, np.full((3, 2), -1)], 1)  # no tokens
  np.testing.assert_array_equal(tokens_in(jnp.asarray(more), 9), known)


def test_a_penalty_counts_the_prompt_and_the_text_so_far():
  plain, penalised = (next(run(range(5), repetition_penalty=p)) for p in (1.0, 3.0))
  assert (plain != penalised).any()
  for row in range(5):
    read, text = [0, 1], []
    while len(text) < LENGTH and EOS not in text:
      logits = RULES[row, len(text), read[-2], read[-1]].copy()
      for token in {1, *text}:
        logits[token] *= 1 / 3 if logits[token] > 0 else 3
      text.append(int(np.argmax(logits)))
      read.append(text[-1])
    assert penalised[row].tolist() == padded(text)


def test_rules_see_what_was_generated():
  def never_twice(logits, tokens, count):
    last = jnp.where(count > 0, tokens[:, jnp.maximum(count - 1, 0)], -1)
    return jnp.where(jnp.arange(VOCABULARY) == last[:, None], -1e30, logits)

  for settings in (dict(), dict(method="beam", beams=3)):
    for row in next(run(range(5), rules=never_twice, **settings)).tolist():
      text = row[: row.index(EOS)] if EOS in row else row
      assert all(a != b for a, b in itertools.pairwise(text))


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
  from transformers import MinPLogitsWarper

  logits = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32) * 2
  theirs = MinPLogitsWarper(0.2)(None, torch.tensor(logits)).numpy()
  np.testing.assert_array_equal(np.asarray(restrict(logits, 0, 1.0, 0.2)) > -1e20, theirs > -1e20)


def test_the_score_of_a_continuation_is_its_log_likelihood():
  random = np.random.default_rng(0)
  hidden, table = random.normal(size=(2, 5, 8)), random.normal(size=(11, 8))
  targets = np.array([[-1, -1, 3, 4, 10], [-1, 0, 7, -1, -1]])
  gains = np.asarray(jax.nn.log_softmax(hidden @ table.T))
  want = [gains[0, [2, 3, 4], [3, 4, 10]].sum(), gains[1, [1, 2], [0, 7]].sum()]
  found = score_texts(jnp.float32(hidden), jnp.float32(table), jnp.asarray(targets))
  np.testing.assert_allclose(found, want, rtol=1e-4)


def test_the_nucleus_is_the_smallest_set_of_enough_probability():
  logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]))

  def kept(k, p):
    return (np.asarray(restrict(logits, k, p)) > -1e20).tolist()

  assert kept(0, 0.7) == [[False, True, False, True], [True, True, True, False]]
  assert kept(0, 0.76)[0] == [False, True, True, True] and kept(3, 1.0)[0] == [
    False,
    True,
    True,
    True,
  ]
  assert kept(1, 0.99)[0] == [False, True, False, False] and kept(0, 1.0) == [[True] * 4] * 2


@pytest.mark.parametrize(
  "settings",
  [
    dict(method="best"),
    dict(method="sample"),
    dict(temperature=0.0),
    dict(beams=0),
    dict(min_p=1.0),
  ],
  ids=str,
)
def test_wrong_settings_are_refused(settings):
  with pytest.raises(UserError):
    run([0], **settings)
