"""How well a language model predicts held-out text: nats a token, perplexity, bits a byte."""

from __future__ import annotations

import math

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result


def likelihood(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple[str, ...] = (),
  text: str = "document",
) -> Result:
  """The likelihood of a split's targets under a language model.

  source: a data set. split: which of its splits. languages: of its texts. text: what they are:
  document, caption or question.
  Metrics: "loss" (nats a target), "perplexity", "accuracy" (share of targets that are the likeliest
  token), "bits_per_byte" (of documents: bits over the bytes in UTF-8 of the text as the tokenizer
  gives it back, less its first token where no <bos> comes before it, for that one is not
  predicted; ends of texts are paid for and no bytes), "tokens", "examples", "unreadable".
  """
  where = f"evaluation.evaluators.{context.name}"
  if not context.config.data.sequence.length:
    raise UserError(f"{where}: only a language model (data.sequence.length) has a likelihood")
  data = context.data(source, split, languages, text)
  sums, valid = context.apply("target_scores", (), data.batches(()))
  loss, correct, tokens = np.asarray(sums[valid], np.float64).sum(0)
  if not tokens:
    raise UserError(f"{where}: {source} split {split} has no target")
  result = dict(
    loss=loss / tokens,
    perplexity=math.exp(min(loss / tokens, 700)),
    accuracy=correct / tokens,
    tokens=tokens,
    examples=float(len(data)),
    unreadable=float(data.unreadable),
  )
  if text == "document":
    first: dict[int, str] = {}
    for caption in data.captions:
      first.setdefault(caption.example, caption.text)
    size = sum(_predicted_bytes(context, text) for text in first.values())
    result["bits_per_byte"] = loss / math.log(2) / size
  return Result({name: float(value) for name, value in result.items()}, {})


def _predicted_bytes(context: Context, text: str) -> int:
  """The bytes of a document that its targets are."""
  tokenizer, data = context.tokenizer(), context.config.data
  tokens = tokenizer.encode(text.lower() if data.text.lowercase else text)
  given = 0 if data.text.bos else len(tokenizer.decode(tokens[:1]).encode())
  return len(tokenizer.decode(tokens).encode()) - given
