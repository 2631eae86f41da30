"""How well texts agree with their references: word error rate, BLEU, ROUGE-L, CIDEr-D. No Java, no
downloads.

All but the first take words, not strings: `references` has for each text one or more lists of
words, `texts` one list.
`words` is the way to cut captions that every evaluator uses; CIDEr's weights come from the
references of the same call.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation.metrics.english import normalise

Words = Sequence[str]


def words(text: str) -> list[str]:
  """Lower-case words and numbers, without punctuation; an apostrophe inside a word stays."""
  return re.findall(r"\w+(?:'\w+)*", text.lower())


def word_error_rate(
  references: Sequence[str], texts: Sequence[str], *, english: bool = True
) -> float:
  """(substitutions + deletions + insertions) / words of the references, over all texts together
  (jiwer).

  english: both sides first go through `english.normalise`; else they are split at spaces as they
  are.
  Raises UserError: the counts differ, or the references have no word.
  """
  import jiwer

  _check(references, texts)
  if english:
    references, texts = [normalise(t) for t in references], [normalise(t) for t in texts]
  if not any(reference.split() for reference in references):
    raise UserError("word error rate: the references have no words to compare with")
  edits = sum(
    len(text.split())
    for reference, text in zip(references, texts, strict=True)
    if not reference.split()
  )
  pairs = [
    (reference, text)
    for reference, text in zip(references, texts, strict=True)
    if reference.split()
  ]
  found = jiwer.process_words([r for r, _ in pairs], [t for _, t in pairs])
  edits += found.substitutions + found.deletions + found.insertions
  return edits / sum(len(reference.split()) for reference, _ in pairs)


def character_error_rate(references: Sequence[str], texts: Sequence[str]) -> float:
  """(substitutions + deletions + insertions) / characters of the references, over all texts
  together (jiwer), both sides through `english.normalise`. Raises UserError as `word_error_rate`.
  """
  import jiwer

  _check(references, texts)
  references, texts = [normalise(t) for t in references], [normalise(t) for t in texts]
  if not any(references):
    raise UserError("character error rate: the references have no characters to compare with")
  edits = sum(len(text) for reference, text in zip(references, texts, strict=True) if not reference)
  pairs = [(r, t) for r, t in zip(references, texts, strict=True) if r]
  found = jiwer.process_characters([r for r, _ in pairs], [t for _, t in pairs])
  edits += found.substitutions + found.deletions + found.insertions
  return edits / sum(len(reference) for reference, _ in pairs)


def word_confusions(
  references: Sequence[str], texts: Sequence[str], *, most: int = 20
) -> list[tuple[str, str, int]]:
  """The commonest (words of a reference, what is said for them, how often): "" for words that are
  left out or put in. By the alignment of `word_error_rate` (jiwer).
  """
  import jiwer

  references, texts = [normalise(t) for t in references], [normalise(t) for t in texts]
  pairs = [(r, t) for r, t in zip(references, texts, strict=True) if r.split()]
  if not pairs:
    return []
  found = jiwer.process_words([r for r, _ in pairs], [t for _, t in pairs])
  counts: Counter = Counter()
  for reference, text, chunks in zip(
    found.references, found.hypotheses, found.alignments, strict=True
  ):
    for chunk in chunks:
      if chunk.type != "equal":
        meant = " ".join(reference[chunk.ref_start_idx : chunk.ref_end_idx])
        said = " ".join(text[chunk.hyp_start_idx : chunk.hyp_end_idx])
        counts[meant, said] += 1
  ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return [(meant, said, count) for (meant, said), count in ranked[:most]]


def bleu(
  references: Sequence[Sequence[Words]], texts: Sequence[Words], *, order: int = 4
) -> list[float]:
  """[BLEU-1, ..., BLEU-order] of the corpus (Papineni et al. 2002): clipped n-gram precision,
  geometric mean, brevity penalty against the reference of the closest length (the shorter of two).
  Raises UserError: nothing to compare.
  """
  _check(references, texts)
  matches, total, length, wanted = np.zeros(order), np.zeros(order), 0, 0
  for refs, text in zip(references, texts, strict=True):
    most: Counter = Counter()
    for reference in refs:
      most |= _ngrams(reference, order)
    for ngram, count in _ngrams(text, order).items():
      matches[len(ngram) - 1] += min(count, most[ngram])
      total[len(ngram) - 1] += count
    length += len(text)
    wanted += min((abs(len(r) - len(text)), len(r)) for r in refs)[1]
  if not length:
    return [0.0] * order
  precision = matches / np.maximum(total, 1)
  brevity = min(0.0, 1 - wanted / length)
  with np.errstate(divide="ignore"):
    means = np.cumsum(np.log(precision)) / np.arange(1, order + 1)
  return np.exp(means + brevity).tolist()


def rouge_l(
  references: Sequence[Sequence[Words]], texts: Sequence[Words], *, beta: float = 1.2
) -> float:
  """Mean F-measure of the longest common subsequence, with the best precision and the best recall
  over the references (Lin 2004, section 3; beta as in the COCO captions evaluation). Raises
  UserError: nothing to compare.
  """
  _check(references, texts)
  scores = []
  for refs, text in zip(references, texts, strict=True):
    common = [_common(reference, text) for reference in refs]
    precision = max(common) / max(1, len(text))
    recall = max(c / max(1, len(r)) for c, r in zip(common, refs, strict=True))
    scores.append(
      (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
      if precision and recall
      else 0.0
    )
  return float(np.mean(scores))


def cider_d(
  references: Sequence[Sequence[Words]],
  texts: Sequence[Words],
  *,
  order: int = 4,
  sigma: float = 6.0,
) -> float:
  """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, equation 6 and section 6): mean over texts,
  times 10.

  tf-idf similarity of n-grams, n = 1..order, with counts clipped and a Gaussian penalty on the
  difference in length (in pairs of words, as the COCO captions evaluation has it). Document
  frequencies are those of `references`; a single text has score 0.
  """
  _check(references, texts)
  frequency = Counter(
    ngram for refs in references for ngram in set().union(*(_ngrams(r, order) for r in refs))
  )
  everything = math.log(len(references))

  def weigh(text: Words) -> tuple[list[dict], list[float]]:
    vectors: list[dict] = [{} for _ in range(order)]
    for ngram, count in _ngrams(text, order).items():
      vectors[len(ngram) - 1][ngram] = count * (everything - math.log(max(1, frequency[ngram])))
    return vectors, [math.sqrt(sum(w * w for w in v.values())) for v in vectors]

  scores = []
  for refs, text in zip(references, texts, strict=True):
    vectors, norms = weigh(text)
    total = 0.0
    for reference in refs:
      others, other_norms = weigh(reference)
      penalty = math.exp(
        -((max(0, len(text) - 1) - max(0, len(reference) - 1)) ** 2) / (2 * sigma**2)
      )
      for mine, theirs, norm in zip(
        vectors, others, (a * b for a, b in zip(norms, other_norms, strict=True)), strict=True
      ):
        product = sum(
          min(weight, theirs[ngram]) * theirs[ngram]
          for ngram, weight in mine.items()
          if ngram in theirs
        )
        total += penalty * (product / norm if norm else product)
    scores.append(10 * total / order / len(refs))
  return float(np.mean(scores))


def _check(references: Sequence, texts: Sequence) -> None:
  if not len(texts) or len(references) != len(texts):
    raise UserError(
      f"{len(texts)} texts cannot be compared with the references of {len(references)}; there "
      "must be one each, and at least one"
    )
  if any(not len(refs) and not isinstance(refs, str) for refs in references):
    raise UserError("a text has no reference to compare it with; give each at least one")


def _ngrams(text: Words, order: int) -> Counter:
  return Counter(
    tuple(text[i : i + n]) for n in range(1, order + 1) for i in range(len(text) - n + 1)
  )


def _common(a: Words, b: Words) -> int:
  """Length of the longest common subsequence."""
  row = [0] * (len(b) + 1)
  for x in a:
    corner = 0
    for j, y in enumerate(b, 1):
      corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
  return row[-1]
