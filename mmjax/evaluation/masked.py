"""Masked-word accuracy: how well hidden words of held-out captions are guessed, with and without
what goes with them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmjax.config import UserError
from mmjax.data.text import TextTransform
from mmjax.evaluation import Context, Result


def masked_words(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple[str, ...] = (),
  context_modalities: tuple[str, ...] = (),
  skip: tuple[str, ...] = ("a", "an", "the", "of", "to", "and", "is", "on", "in", "at", "it"),
) -> Result:
  """Hides one word of each caption at a time (every one once) and counts how often all its tokens
  are guessed.

  source: a data set. split: which of its splits. languages: of the captions, () = those that
  data.sources reads of it, else all (the first of each
  example). context_modalities: what the model sees beside the caption. skip: words that are never
  hidden, for they are guessed from grammar alone.
  Needs data.text.words. Metrics: "accuracy" (share of hidden words whose tokens are all right),
  "words", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if not context.config.data.text.words:
    raise UserError(
      f"{where}: masked words need to know which tokens make a word. Set data.text.words=True"
    )
  data, tokenizer = context.data(source, split, languages), context.tokenizer()
  if tokenizer.mask_id < 0:
    raise UserError(f"{where}: the tokenizer has no <mask>. Train one with `mmjax data tokenizer`")
  skipped = {w.lower() for w in skip}
  transform = TextTransform(context.config.data.text, tokenizer)
  most = int(transform([caption.text for caption in data.captions])["words"].max(initial=-1)) + 1

  def batches() -> Iterator[dict]:
    """Each batch as often as a caption can have words (the same on every process), word w of its
    rows hidden the w-th time.
    """
    for batch in data.batches(("text", *context_modalities)):
      tokens, words = batch["text"]["tokens"], batch["text"]["words"]
      for w in range(most):
        hidden = words == w
        for row in np.flatnonzero(hidden.any(1)):
          hidden[row] &= tokenizer.decode(tokens[row][hidden[row]]).strip().lower() not in skipped
        text = {**batch["text"], "tokens": np.where(hidden, tokenizer.mask_id, tokens)}
        yield {**batch, "text": text, "hidden": hidden, "truth": tokens}

  guesses, valid, hidden, truth = context.apply(
    "predict_masked", ("text", tuple(context_modalities)), batches(), also=("hidden", "truth")
  )
  asked = valid & hidden.any(-1)
  if not asked.any():
    raise UserError(f"{where}: {source} split {split} has no caption with a word to hide")
  correct = ((guesses == truth) | ~hidden).all(1)[asked]
  return Result(
    {
      "accuracy": float(correct.mean()),
      "words": float(asked.sum()),
      "unreadable": float(data.unreadable),
    },
    {},
  )
