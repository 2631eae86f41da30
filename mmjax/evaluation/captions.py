"""Texts that the model writes: captions of pictures and clips, transcripts of speech, against the
references.
"""

from __future__ import annotations

import collections

import numpy as np

from mmjax.config import UserError
from mmjax.data.text import normalise_caption
from mmjax.data.tokenizers import decode
from mmjax.evaluation import Context, Result, sample_evenly
from mmjax.evaluation.metrics import text as metrics
from mmjax.kinds import load_function
from mmjax.ranges import Count, Few, Finite, FunctionName


def captions(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple[str, ...] = (),
  modalities: tuple[str, ...] = ("image",),
  max_length: Count = 0,
  beams: Few = 1,
  length_penalty: Finite = 1.0,
  check: FunctionName = "",
  by: str = "",
  examples: Count = 12,
) -> Result:
  """What the decoder writes about each example, against its captions.

  source: a data set. split: which of its splits. languages: captions of these are the references
  (() = those that data.sources reads of it, else all).
  modalities: what the decoder reads. max_length: tokens at most; 0 = data.text.length, of a
  language model data.sequence.length. beams, length_penalty: of beam search; 1 = greedy. check:
  "module:function(facts, text) -> bool, or {name: bool}" that says whether a text is right about
  what the record knows of itself.
  by: a name in the records' facts ("voice"): word error rate, exactness and checks are also given
  for each of its values.
  examples: how many the report shows.
  Metrics: "bleu@4", "rouge_l", "cider_d" (each as in the COCO captions evaluation, on lower-case
  words), "exact" (share that is one of the references), "word_error_rate" and
  "character_error_rate" where each example has one reference, "right" (and "right/NAME") with
  `check`, "examples", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  data = context.data(source, split, languages)
  judge = load_function(check, f"{where}.check") if check else None
  settings = (
    tuple(modalities),
    max_length or context.config.data.sequence.length or context.config.data.text.length,
    beams,
    length_penalty,
  )
  tokens, valid = context.apply("generate_text", settings, data.prompts(modalities))
  references: dict[int, list[str]] = collections.defaultdict(list)
  for caption in data.captions:
    references[caption.example].append(caption.text)
  kept = [i for i in range(len(data)) if valid[i] and references[i]]
  if not kept:
    raise UserError(
      f"{where}: {source} split {split} has no readable example with a caption in "
      f"{', '.join(languages) or 'any language'}"
    )
  tokenizer = context.tokenizer()
  end = (context.config.model.get("decoder") or {}).get("eos_id", tokenizer.eos_id)
  texts = [decode(tokenizer, tokens[i], end) for i in kept]
  expected = [references[i] for i in kept]
  split_words = [metrics.words(text) for text in texts]
  split_references = [[metrics.words(r) for r in rs] for rs in expected]
  result = {
    "bleu@4": metrics.bleu(split_references, split_words)[-1],
    "rouge_l": metrics.rouge_l(split_references, split_words),
    "cider_d": metrics.cider_d(split_references, split_words),
  }
  groups = {"": np.arange(len(kept))}
  if by:
    values = np.array([str(data.facts[i].get(by, "")) for i in kept])
    groups.update({f"{value}/": np.flatnonzero(values == value) for value in np.unique(values)})
  exact = np.array(
    [
      normalise_caption(t) in map(normalise_caption, rs)
      for t, rs in zip(texts, expected, strict=True)
    ]
  )
  verdicts = (
    [_verdict(judge(data.facts[i], t)) for i, t in zip(kept, texts, strict=True)] if judge else []
  )
  for prefix, rows in groups.items():
    result[f"{prefix}exact"] = float(exact[rows].mean())
    if all(len(rs) == 1 for rs in expected):
      pairs = [expected[i][0] for i in rows], [texts[i] for i in rows]
      result[f"{prefix}word_error_rate"] = metrics.word_error_rate(*pairs)
      result[f"{prefix}character_error_rate"] = metrics.character_error_rate(*pairs)
    if verdicts:
      for name in verdicts[0]:
        result[f"{prefix}{name}"] = float(np.mean([verdicts[i][name] for i in rows]))
  result.update(examples=float(len(kept)), unreadable=float((~valid[: len(data)]).sum()))
  correct = np.array([v["right"] for v in verdicts]) if verdicts else exact
  figures: dict = {}
  if all(len(rs) == 1 for rs in expected) and any(metrics.words(rs[0]) for rs in expected):
    confused = metrics.word_confusions([rs[0] for rs in expected], texts)
    figures["words"] = dict(kind="word_confusions", rows=confused)
  shown = [
    dict(
      text=texts[i],
      expected=expected[i][:3],
      correct=bool(correct[i]),
      **inputs_of(data, kept[i], modalities),
    )
    for i in sample_evenly(len(kept), examples)
  ]
  return Result(result, {"texts": dict(kind="texts", rows=shown), **figures})


def _verdict(answer: bool | dict[str, bool]) -> dict[str, bool]:
  """{"right": all right, "right/NAME": that part}."""
  if isinstance(answer, dict):
    return {
      "right": all(answer.values()),
      **{f"right/{name}": bool(value) for name, value in answer.items()},
    }
  return {"right": bool(answer)}


def inputs_of(data, example: int, modalities: tuple) -> dict:
  """A picture of what the model saw, where it saw one."""
  if "image" in modalities:
    return dict(picture=data.picture(example))
  if "video" in modalities:
    return dict(picture=data.film(example))
  return {}
