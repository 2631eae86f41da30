"""Masked modelling: what is hidden, by counting; the losses against plain formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.objectives.masked import hide_patches, hide_tokens, masked_patches, masked_tokens

SPECIAL, VOCABULARY = (0, 1, 2, 3, 4), 40


def texts(rows, length, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32), np.arange(
    length
  ) < rng.integers(1, length + 1, (rows, 1))


def near(share, want, count):
  """Within five standard deviations of a binomial share."""
  assert abs(share - want) < 5 * (want * (1 - want) / count) ** 0.5, (share, want, count)


def test_fifteen_of_a_hundred_tokens_are_hidden_eighty_ten_ten():
  tokens, mask = texts(2000, 32)
  hidden, targets = jax.jit(
    lambda t, m: hide_tokens(
      t, m, None, jax.random.key(1), rate=0.15, special=SPECIAL, vocabulary=VOCABULARY
    )
  )(tokens, mask)
  hidden, targets = np.asarray(hidden), np.asarray(targets)
  open_, chosen = mask & (tokens >= 5), targets >= 0
  assert (
    not np.any(chosen & ~open_)
    and np.array_equal(hidden[~chosen], tokens[~chosen])
    and np.array_equal(targets[chosen], tokens[chosen])
  )
  near(chosen.sum() / open_.sum(), 0.15, open_.sum())
  count, masked, same = chosen.sum(), (hidden == 4) & chosen, (hidden == tokens) & chosen
  near(masked.sum() / count, 0.8, count)
  near(same.sum() / count, 0.1 + 0.1 / 35, count)  # a random token may be the same
  random = hidden[chosen & ~masked & ~same]
  assert random.min() >= 5 and set(random) == set(range(5, VOCABULARY))
  near(len(random) / count, 0.1 * 34 / 35, count)


@pytest.mark.parametrize(
  "special", [(0, 10, 11, 12, 39), (11, -1, 11, 11, 39)], ids=["apart", "one for three"]
)
def test_special_ids_of_other_tokenizers_are_never_drawn(special):
  tokens, mask = texts(500, 32)
  hidden, targets = hide_tokens(
    tokens, mask, None, jax.random.key(0), rate=0.5, special=special, vocabulary=VOCABULARY
  )
  chosen = np.asarray(targets) >= 0
  drawn = np.asarray(hidden)[chosen & (np.asarray(hidden) != tokens) & (np.asarray(hidden) != 39)]
  assert (
    set(drawn) == set(range(VOCABULARY)) - set(special)
    and not np.isin(tokens[chosen], special).any()
  )


@pytest.mark.parametrize("special", [(), (0, 1, 2, 3, -1), (0, 1, 2, 3, VOCABULARY), (4,)], ids=str)
def test_special_ids_without_a_mask_are_refused(special):
  tokens, mask = texts(2, 4)
  with pytest.raises(UserError, match="masked_tokens.special is"):
    hide_tokens(
      tokens, mask, None, jax.random.key(0), rate=0.5, special=special, vocabulary=VOCABULARY
    )


def test_whole_words_are_hidden_together():
  tokens, mask = texts(500, 32)
  tokens = np.maximum(tokens, 5)
  rng = np.random.default_rng(2)
  # The first tokens may be no word.
  words = np.cumsum(rng.random(tokens.shape) < 0.5, -1).astype(np.int32) - 1
  words = np.minimum(words, 31)
  _, targets = hide_tokens(
    tokens, mask, words, jax.random.key(3), rate=0.15, special=SPECIAL, vocabulary=VOCABULARY
  )
  chosen = np.asarray(targets) >= 0
  assert not np.any(chosen & ((words < 0) | ~mask))
  seen = hidden = 0
  for row in range(len(tokens)):
    for word in np.unique(words[row][mask[row] & (words[row] >= 0)]):
      among = chosen[row][(words[row] == word) & mask[row]]
      assert among.all() or not among.any()
      seen, hidden = seen + 1, hidden + among.all()
  near(hidden / seen, 0.15, seen)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.sampled_from([0.25, 0.6, 1.0]))
def test_patches_are_hidden_exactly(seed, ratio):
  real = np.random.default_rng(seed).random((6, 9)) < 0.7
  hidden = np.asarray(hide_patches(jnp.asarray(real), jax.random.key(seed), ratio))
  assert not np.any(hidden & ~real)
  np.testing.assert_array_equal(hidden.sum(1), np.round(ratio * real.sum(1)))


def test_the_token_loss_counts_hidden_tokens_of_rows_that_count():
  tokens, mask = texts(6, 8, seed=4)
  rng = np.random.default_rng(5)
  batch = dict(
    text=dict(tokens=tokens, mask=mask, present=np.arange(6) != 1),
    image=dict(pixels=np.zeros((6, 2, 2, 3))),
    valid=np.arange(6) != 3,
  )
  table, bias = (
    rng.normal(size=(VOCABULARY, 4)).astype(np.float32),
    rng.normal(size=VOCABULARY).astype(np.float32),
  )
  states, asked = jnp.asarray(rng.normal(size=(6, 8, 4)).astype(np.float32)), {}

  def forward(method, *args, batch=None, **kwargs):
    asked[method] = (args, kwargs, batch)
    return (
      jnp.asarray(table) if method == "table" else (states, jnp.asarray(table), jnp.asarray(bias))
    )

  losses = masked_tokens(
    forward, batch, jax.random.key(0), context=("image",), rate=0.6, special=SPECIAL
  )
  args, kwargs, view = asked["masked_token_head"]
  assert args == ("text",) and kwargs == {"context": ("image",)} and view["image"] is batch["image"]
  _, targets = hide_tokens(
    jnp.asarray(tokens),
    jnp.asarray(mask & (batch["valid"] & batch["text"]["present"])[:, None]),
    None,
    jax.random.key(0),
    rate=0.6,
    special=SPECIAL,
    vocabulary=VOCABULARY,
  )
  targets = np.asarray(targets)
  assert not np.any(targets[[1, 3]] >= 0) and np.any(np.asarray(view["text"]["tokens"]) != tokens)
  logits = np.asarray(states) @ table.T + bias
  log_shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = targets >= 0
  want = -np.take_along_axis(log_shares, np.maximum(targets, 0)[..., None], -1)[..., 0][
    chosen
  ].sum()
  np.testing.assert_allclose(losses["loss"], (want, chosen.sum()), rtol=1e-5)
  np.testing.assert_allclose(
    losses["accuracy"], ((logits.argmax(-1) == targets)[chosen].sum(), chosen.sum())
  )


def test_the_patch_loss_is_the_error_of_normalised_hidden_patches():
  rng = np.random.default_rng(0)
  values, predicted = (
    rng.normal(2, 3, (4, 6, 5)).astype(np.float32),
    rng.normal(size=(4, 6, 5)).astype(np.float32),
  )
  real = np.arange(6) < np.array([[6], [4], [0], [6]])
  batch, views = (
    dict(image=dict(pixels=np.zeros((4, 1)), present=np.ones(4, bool)), valid=np.arange(4) != 3),
    [],
  )

  def forward(method, modality, batch=None, context=()):
    views.append(batch)
    return (
      (jnp.asarray(values), jnp.asarray(real)) if method == "patches" else jnp.asarray(predicted)
    )

  losses = masked_patches(forward, batch, jax.random.key(0), ratio=0.5)
  hidden = np.asarray(views[-1]["image"]["patch_mask"])
  assert list(hidden.sum(1)) == [3, 2, 0, 0]
  target = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-6)
  error = np.square(predicted - target).mean(-1)[hidden].sum()
  np.testing.assert_allclose(losses["loss"], (error, 5), rtol=1e-5)
  np.testing.assert_allclose(losses["explained"], (5 - error, 5), rtol=1e-4)
