"""The loss of held-out data: the run's own objectives, as in evaluation."""

from __future__ import annotations

from mmjax.config import UserError
from mmjax.evaluation import Context, Result


def loss(
  context: Context,
  *,
  source: str,
  split: str = "validation",
  languages: tuple[str, ...] = (),
  text: str = "caption",
  objectives: tuple[str, ...] = (),
) -> Result:
  """The objectives on a split, without dropout, augmentation or updates, each row once.

  source: a data set. split: which of its splits. languages: of the texts; a row has its first
  caption. text: what the text of a row is, "caption" or "question". objectives: names of
  config.objectives; () = all without an opponent.
  Metrics: "loss", weighted as in training; "OBJECTIVE/loss" and what else each gives;
  "unreadable". Objectives that compare the rows of a batch, such as contrastive ones, do so in
  batches of evaluation.batch_size. Masked tokens are hidden by the same random numbers each time.
  """
  entries = context.config.objectives
  where = f"evaluation.evaluators.{context.name}.objectives"
  names = tuple(objectives) or tuple(n for n, entry in entries.items() if not entry.get("group"))
  for name in names:
    if name not in entries:
      raise UserError(f"{where} names {name!r}, but objectives has {', '.join(entries) or 'none'}")
    if entries[name].kind == "preference":
      raise UserError(
        f"{where}: {name} compares with a reference, which is known of the training data alone. "
        "Name other objectives, or judge held-out answers with the evaluator 'preference'"
      )
    if entries[name].kind == "grpo":
      raise UserError(
        f"{where}: {name} rewards answers that the model draws while it trains. Judge held-out "
        "ones with the evaluator 'answers' or 'dialogue'"
      )
  if not names:
    raise UserError(f"{where}: this config has no objective to evaluate")
  data = context.data(source, split, languages, text)
  found = context.losses(data.batches(context.modalities), names)
  total = sum(entries[name].weight * found[name]["loss"] for name in names)
  metrics = {"loss": total}
  metrics |= {f"{name}/{key}": value for name in names for key, value in found[name].items()}
  return Result({**metrics, "unreadable": float(data.unreadable)}, {})
