"""The n-grams that language models are compared with are distributions, and learn."""

import pytest

from tests.bench.ngram import END, KneserNey, gzip_bits_per_byte

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog sat"]


def test_probabilities_of_every_context_add_up_to_one():
  model = KneserNey(TEXTS, order=4)
  for context in [b"", b"t", b"the", b"sat", b"xyz", b"t x"]:
    padded = (tuple(context) + (END,) * 3)[:3] if len(context) < 3 else tuple(context)
    for known in (padded, tuple(context)):
      total = sum(model.probability(known, byte) for byte in range(END + 1))
      assert total == pytest.approx(1, abs=1e-9)


def test_longer_contexts_predict_better_and_known_texts_best():
  new = ["the cat sat on the log"]
  bits = [KneserNey(TEXTS, order).bits_per_byte(new) for order in (1, 2, 4)]
  assert bits[0] > bits[1] > bits[2] and bits[2] < gzip_bits_per_byte(new)
  assert KneserNey(TEXTS, 4).bits_per_byte(TEXTS) < bits[2]
