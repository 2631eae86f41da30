"""Masked-word accuracy: how well hidden words of held-out captions are guessed, with and without what goes with them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result


def masked_words(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple = ("en",),
  context_modalities: tuple = (),
  skip: tuple = ("a", "an", "the", "of", "to", "and", "is", "on", "in", "at", "it"),
) -> Result:
  """Hides one word of each caption at a time (every one once) and counts how often all its tokens are guessed.

  source: a data set. split: which of its splits. languages: of the captions (the first of each example). context_modalities: what
  the model sees beside the caption. skip: words that are never hidden, for they are guessed from grammar alone.
  Needs data.text.words. Metrics: "accuracy" (share of hidden words whose tokens are all right), "words", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if not context.config.data.text.words:
    raise UserError(f"{where}: masked words need to know which tokens make a word. Set data.text.words=True")
  data, tokenizer = context.data(source, split, languages), context.tokenizer()
  if tokenizer.mask_id < 0:
    raise UserError(f"{where}: the tokenizer has no <mask>. Train one with `mmjax data tokenizer`")
  skipped = {w.lower() for w in skip}
  right = total = unreadable = 0
  truths: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  def batches() -> Iterator[dict]:
    for batch in data.batches(("text", *context_modalities)):
      tokens, words = batch["text"]["tokens"], batch["text"]["words"]
      readable = {
        (row, w)
        for row in np.flatnonzero(batch["valid"])
        for w in range(words[row].max() + 1)
        if tokenizer.decode(tokens[row][words[row] == w]).strip().lower() not in skipped
      }
      for w in range(words.max(initial=-1) + 1):
        hidden = (words == w) & np.array([(row, w) in readable for row in range(len(tokens))])[:, None]
        if not hidden.any():
          continue
        truths.append((hidden, tokens, batch["valid"]))
        yield {**batch, "text": {**batch["text"], "tokens": np.where(hidden, tokenizer.mask_id, tokens)}}

  guesses, _ = context.apply("fill", ("text", tuple(context_modalities)), batches())
  if not truths:
    raise UserError(f"{where}: {source} split {split} has no caption with a word to hide")
  hidden, tokens, valid = (np.concatenate(parts) for parts in zip(*truths, strict=True))
  for row in np.flatnonzero(hidden.any(1) & valid):
    total += 1
    right += bool((guesses[row] == tokens[row])[hidden[row]].all())
  unreadable = data.unreadable
  return Result({"accuracy": right / max(1, total), "words": float(total), "unreadable": float(unreadable)}, {})
