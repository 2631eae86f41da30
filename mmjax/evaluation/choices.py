"""Multiple choice without training on it: which of an example's own candidate texts is nearest to
it?
"""

from __future__ import annotations

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result
from mmjax.evaluation.zero_shot import confusion
from mmjax.kinds import load_function
from mmjax.ranges import FunctionName


def multiple_choice(
  context: Context,
  *,
  source: str,
  split: str = "test",
  modality: str = "video",
  choices: FunctionName = "choices",
  by: str = "",
) -> Result:
  """Accuracy of picking the right text among candidates, by the cosine of embeddings (as in EgoMCQ,
  Lin et al. 2022, arXiv:2206.01670, section 4, with the candidates of an example that differ in one
  thing alone).

  source: a data set. split: which of its splits. modality: what the texts are about. choices:
  "module:function(facts) -> (texts, the number of the right one)", or a name in the records' facts
  of such a pair. by: a name in the facts: accuracy also for each of its values. Metrics:
  "accuracy", "chance", "examples", "unreadable". Ties are pessimistic.
  """
  where = f"evaluation.evaluators.{context.name}"
  data = context.data(source, split, ())
  media = context.media(data, modality)
  make = _maker(where, choices)
  asked = [(i, *make(data.facts[i])) for i in range(len(data)) if media.valid[i] and data.facts[i]]
  if not asked:
    raise UserError(f"{where}: {source} split {split} has no readable example with choices")
  texts = sorted({text for _, candidates, _ in asked for text in candidates})
  number = {text: n for n, text in enumerate(texts)}
  vectors = context.texts(data, texts)
  picked = []
  for example, candidates, correct in asked:
    similarity = vectors[[number[text] for text in candidates]] @ media.vectors[example]
    others = np.delete(similarity, correct)
    picked.append(
      correct
      if similarity[correct] > others.max() + 1e-6
      else int(np.argmax(np.where(np.arange(len(candidates)) == correct, -np.inf, similarity)))
    )
  truth = np.array([correct for _, _, correct in asked])
  guess = np.array(picked)
  metrics = {
    "accuracy": float(np.mean(guess == truth)),
    "chance": float(np.mean([1 / len(c) for _, c, _ in asked])),
  }
  if by:
    values = np.array([str(data.facts[i].get(by, "")) for i, _, _ in asked])
    metrics.update(
      {f"{v}/accuracy": float(np.mean((guess == truth)[values == v])) for v in np.unique(values)}
    )
  metrics.update(examples=float(len(asked)), unreadable=float((~media.valid).sum()))
  count = max(len(candidates) for _, candidates, _ in asked)
  names = (
    list(data.label_names) if len(data.label_names) == count else [str(n) for n in range(count)]
  )
  return Result(metrics, {"confusion": confusion(truth, guess, names)})


def _maker(where: str, choices: str):
  if ":" not in choices:
    return lambda facts: facts[choices]
  return load_function(choices, f"{where}.choices")
