"""Text metrics against the code that the field reports with: pycocoevalcap, jiwer on transformers'
normaliser.
"""

import random

import jiwer
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from mmjax.config import UserError
from mmjax.evaluation.metrics.english import normalise
from mmjax.evaluation.metrics.text import (
  bleu,
  character_error_rate,
  cider_d,
  rouge_l,
  word_confusions,
  word_error_rate,
  words,
)

VOCABULARY = "a the red blue heart star cat above below left of two".split()


def corpus(seed, size=12):
  """Texts that are their first reference with some words changed, dropped or doubled; one to four
  references.
  """
  draw = random.Random(seed)

  def sentence():
    return draw.choices(VOCABULARY, k=draw.randint(1, 12))

  references = [[sentence() for _ in range(draw.randint(1, 4))] for _ in range(size)]
  texts = [
    [
      draw.choice(VOCABULARY) if draw.random() < 0.2 else w
      for w in refs[0]
      for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))
    ]
    or ["cat"]
    for refs in references
  ]
  texts[0] = list(references[0][0])
  return references, texts


@pytest.mark.parametrize("seed", range(4))
def test_captions_score_as_pycocoevalcap_scores_them(seed):
  references, texts = corpus(seed)
  gold = {i: [" ".join(r) for r in refs] for i, refs in enumerate(references)}
  made = {i: [" ".join(t)] for i, t in enumerate(texts)}
  scorer = BleuScorer(n=4)
  for i, refs in gold.items():
    scorer += (made[i][0], refs)
  np.testing.assert_allclose(
    bleu(references, texts), scorer.compute_score(option="closest")[0], atol=1e-6
  )
  assert rouge_l(references, texts) == pytest.approx(Rouge().compute_score(gold, made)[0], abs=1e-9)
  assert cider_d(references, texts) == pytest.approx(Cider().compute_score(gold, made)[0], abs=1e-9)


def test_empty_texts_score_nothing():
  references, texts = [[["a", "cat"]], [["a", "dog"]]], [[], []]
  assert (
    bleu(references, texts) == [0, 0, 0, 0]
    and rouge_l(references, texts) == 0
    and cider_d(references, texts) == 0
  )
  for call in (
    lambda: bleu([], []),
    lambda: cider_d(references, texts[:1]),
    lambda: rouge_l([[]], [["a"]]),
    lambda: word_error_rate([""], ["a"]),
  ):
    with pytest.raises(UserError):
      call()


SENTENCES = [
  "Mr. Li's TWENTY-one <noise> cats, um, won't leave!",
  "one hundred and five",
  "two thousand three hundred stars",
  "nineteen eighty four",
  "one oh one",
  "the first, the second and the twenty first",
  "one heart above two hearts",
  "five six seven",
  "twenty twenty one",
  "three hundred thousand and two",
  "ones and twos",
  "they're (laughs) here; we'd been there",
  "Crème brûlée",
  "3.5 and 1,000 m",
  "the 2nd of may",
  "let's go, y'all",
  "ten",
  "sixes and the thirtieth",
  "hundred and then",
  "woulda, coulda, shoulda",
  "10th st",
  "cats and dogs",
  "I'm sure it's got wings",
  "a 747",
  "the year nineteen ninety-nine",
  "eleventh hour",
  "fifteen hundred",
  "a cola",
]


def test_english_is_normalised_as_whisper_does():
  theirs = EnglishTextNormalizer({"colour": "color"})
  for sentence in SENTENCES:
    assert normalise(sentence) == " ".join(theirs(sentence).split()), sentence
  assert normalise("the colour", {"colour": "color"}) == theirs("the colour")


def test_word_error_rate_is_jiwer_on_normalised_text():
  theirs = EnglishTextNormalizer({})
  references = ["a red heart above two cats", "It's the 21st star.", "um", "blue"]
  texts = ["a red hart above 2 cats cats", "it is the twenty first", "cat", ""]
  want = jiwer.process_words(
    *([theirs(t).strip() for i, t in enumerate(side) if i != 2] for side in (references, texts))
  )
  # The word said where nothing was.
  edits = want.substitutions + want.deletions + want.insertions + 1
  count = sum(len(theirs(t).split()) for t in references)
  assert word_error_rate(references, texts) == pytest.approx(edits / count)
  assert word_error_rate(["A b"], ["a b"], english=False) == 0.5
  assert words("A cat's ear, 2 of them!") == ["a", "cat's", "ear", "2", "of", "them"]


def test_character_errors_and_confusions_are_those_of_the_alignment():
  references = ["the red house", "small cats", "a big dog", "the cat"]
  texts = ["the bed house", "small hats", "a big", "the the cat"]
  assert character_error_rate(references, texts) == pytest.approx(jiwer.cer(references, texts))
  assert word_confusions([*references, "red"], [*texts, "bed"]) == [
    ("red", "bed", 2),
    ("", "the", 1),
    ("cats", "hats", 1),
    ("dog", "", 1),
  ]
  assert word_confusions(references, references) == []
