"""Free answers of a language model to the questions about examples: exact or not, no judge."""

from __future__ import annotations

import collections

import numpy as np

from mmjax.config import UserError
from mmjax.data.text import normalise_caption
from mmjax.data.tokenizers import decode
from mmjax.evaluation import Context, Result, sample_evenly
from mmjax.evaluation.captions import inputs_of
from mmjax.kinds import load_function
from mmjax.ranges import Count, Few, Finite, FunctionName


def answers(
  context: Context,
  *,
  source: str,
  split: str = "test",
  modalities: tuple[str, ...] = ("image",),
  max_length: Count = 8,
  beams: Few = 1,
  length_penalty: Finite = 1.0,
  check: FunctionName = "",
  examples: Count = 12,
) -> Result:
  """What a language model answers to each question of each example, against the record's answer.

  source: a data set whose records have questions. split: which of its splits. modalities: what the
  report shows beside the questions. max_length: tokens of an answer at most. beams, length_penalty:
  of beam search; 1 = greedy. check: "module:function(facts, question, answer, text) -> {name:
  bool}" that says whether a text is right, by the kind of the question, say.
  examples: how many the report shows.
  Metrics: "exact" (share of answers that are the record's, case and spaces aside), "majority" (what
  the commonest answer alone would get), with `check` "right" (share where all that it says is true)
  and "right/NAME" (of the questions where it says NAME), "questions", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if not context.config.data.sequence.length:
    raise UserError(f"{where}: only a language model (data.sequence.length) answers freely")
  judge = load_function(check, f"{where}.check") if check else None
  data = context.data(source, split, (), "question")
  settings = (tuple(modalities), max_length, beams, length_penalty)
  tokens, valid = context.apply("generate_text", settings, data.prompts(modalities))
  kept = [i for i in range(len(data.items)) if valid[i]]
  if not kept:
    raise UserError(f"{where}: {source} split {split} has no readable example with a question")
  tokenizer = context.tokenizer()
  end = (context.config.model.eos_id, *context.config.model.end_ids)
  pairs = [data.question(data.items[i]) for i in kept]
  texts = [decode(tokenizer, tokens[i], end) for i in kept]
  correct = np.array(
    [
      normalise_caption(text) == normalise_caption(answer)
      for text, (_, answer) in zip(texts, pairs, strict=True)
    ]
  )
  commonest = collections.Counter(answer for _, answer in pairs).most_common(1)[0][1]
  result = dict(
    exact=float(correct.mean()),
    majority=commonest / len(pairs),
    questions=float(len(pairs)),
    unreadable=float((~valid[: len(data.items)]).sum()),
  )
  if judge:
    verdicts: dict[str, list[bool]] = collections.defaultdict(list)
    for i, text, (question, answer) in zip(kept, texts, pairs, strict=True):
      verdict = judge(data.facts[data.items[i].record], question, answer, text)
      verdicts["right"].append(all(verdict.values()))
      for name, value in verdict.items():
        verdicts[f"right/{name}"].append(value)
    result.update({name: float(np.mean(values)) for name, values in sorted(verdicts.items())})
  shown = [
    dict(
      text=f"{pairs[i][0]} {texts[i]}",
      expected=[pairs[i][1]],
      correct=bool(correct[i]),
      **inputs_of(data, data.items[kept[i]].record, modalities),
    )
    for i in sample_evenly(len(kept), examples)
  ]
  return Result(result, {"texts": dict(kind="texts", rows=shown)})
