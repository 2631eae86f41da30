"""BERT as an encoder: padding and absent rows change nothing, the table is the embeddings; see
tests/interop for transformers.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.models import make_model

ROWS, LENGTH, VOCAB = 6, 7, 20


def make(entry, **model):
  c = configs.base()
  c.data.text.update(vocab_size=VOCAB, length=LENGTH)
  c.precision.compute = "float32"
  c.model = dict(
    name="encoder", width=16, encoders=dict(text=dict(depth=1, heads=2, **entry)), **model
  )
  return make_model(configs.resolve(c))


def inputs(seed):
  rng = np.random.default_rng(seed)
  return dict(
    tokens=rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32),
    mask=np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, 1)),
    types=rng.integers(0, 2, (ROWS, LENGTH), dtype=np.int32),
    present=rng.random(ROWS) < 0.7,
  )


@functools.cache
def built(pooling):
  model = make(dict(kind="bert", pooling=pooling))
  variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), dict(text=inputs(0))))
  return variables, jax.jit(
    lambda batch: model.apply(variables, "text", dict(text=batch), method="encode")
  )


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_order_padding_and_absent_rows(pooling, seed):
  _, encode = built(pooling)
  batch = inputs(seed)
  real = batch["mask"] & batch["present"][:, None]
  out = encode(batch)
  np.testing.assert_array_equal(out.mask, real)
  assert not np.any(out.pooled[~batch["present"]])
  order = np.random.default_rng(seed).permutation(ROWS)
  np.testing.assert_allclose(
    encode({key: x[order] for key, x in batch.items()}).pooled, out.pooled[order], atol=1e-5
  )
  noise = inputs(seed + 1)
  other = encode(
    {
      **batch,
      "tokens": np.where(real, batch["tokens"], noise["tokens"]),
      "types": np.where(real, batch["types"], noise["types"]),
    }
  )
  np.testing.assert_allclose(other.pooled, out.pooled, atol=1e-6)
  np.testing.assert_allclose(
    np.asarray(other.tokens)[real], np.asarray(out.tokens)[real], atol=1e-5
  )


@pytest.mark.parametrize("kind", ["bert", "transformer"])
def test_masked_tokens_are_read_out_through_the_embeddings(kind):
  model = make(dict(kind=kind), masked_tokens=True, classes=3)
  batch = dict(text=inputs(0))
  variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch))
  read = jax.jit(
    lambda v: (
      model.apply(v, "text", batch, method="masked_token_head"),
      model.apply(v, ("text",), batch, method="classify"),
    )
  )
  (hidden, table, bias), logits = read(variables)
  assert hidden.shape == (ROWS, LENGTH, 16) and bias.shape == (VOCAB,)
  np.testing.assert_array_equal(table, variables["params"]["text"]["embedding"])
  assert logits.shape == (ROWS, 3)
  assert [float(x) for x in model.apply(variables, method="temperature")] == [1, 0]


def test_a_model_of_one_encoder_takes_one():
  with pytest.raises(UserError, match="exactly one encoder"):
    c = configs.base()
    c.data.text.tokenizer = "any"
    c.model = dict(
      name="encoder",
      width=16,
      encoders=dict(text=dict(kind="bert", heads=2), image=dict(kind="vit", heads=2)),
    )
    make_model(configs.resolve(c))
