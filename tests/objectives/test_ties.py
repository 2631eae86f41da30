"""A model that tells nothing apart, whose scores are all equal, is never right in the metrics of
training.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives.adversarial import modality_adversary
from mmjax.objectives.classification import classification
from mmjax.objectives.contrastive import contrastive
from mmjax.objectives.cross_entropy import token_cross_entropy
from mmjax.objectives.distillation import logit_distillation, similarity_distillation
from mmjax.objectives.matching import matching

ROWS, WIDTH, CLASSES = 6, 4, 3
SAME = jnp.ones((ROWS, WIDTH)) / 2  # of length one
KEYS = np.stack([np.arange(ROWS), np.zeros(ROWS)], 1).astype(np.uint32)
BATCH = dict(
  image=dict(key=KEYS),
  text=dict(key=KEYS),
  valid=np.ones(ROWS, bool),
  label=np.zeros(ROWS, np.int32),
)
OUTPUTS = dict(
  embedding=SAME,
  temperature=(jnp.float32(10), jnp.float32(0)),
  classify=jnp.zeros((ROWS, CLASSES)),
  match=jnp.zeros(ROWS),
  discriminate=jnp.zeros((ROWS, 2)),
)


class Collapsed:
  def __call__(self, method, *args, **kwargs):
    return OUTPUTS[method]

  def teacher(self, path, method, *args):
    return OUTPUTS[method]


@pytest.mark.parametrize(
  "function, metric, settings",
  [
    (contrastive, "accuracy", dict(loss="softmax")),
    (contrastive, "accuracy", dict(loss="sigmoid")),
    (classification, "accuracy", {}),
    (matching, "accuracy", {}),
    (modality_adversary, "accuracy", {}),
    (logit_distillation, "agreement", dict(teacher="T")),
    (similarity_distillation, "agreement", dict(teacher="T")),
  ],
)
def test_ties_are_not_right(function, metric, settings):
  total, weight = function(Collapsed(), BATCH, jax.random.key(0), **settings)[metric]
  assert float(total) == 0 and float(weight) > 0


def test_a_token_as_likely_as_another_is_not_right():
  _, weight, correct = token_cross_entropy(
    jnp.zeros((ROWS, WIDTH)), jnp.ones((CLASSES, WIDTH)), jnp.zeros(ROWS, jnp.int32)
  )
  assert (float(weight), float(correct)) == (ROWS, 0)
