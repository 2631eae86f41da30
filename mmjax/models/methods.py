"""The methods by which objectives, evaluators and inference ask a model for something.

METHODS is the one list of them; what each takes and gives stands in its docstring, and
`mmjax config methods` prints both as a table. A model has `methods`, the names of those that its
parts can answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmjax.config import UserError

_SPACE = "a shared space: set model.joint to True"
_CLASSIFIER = "a classifier: set data.classes (of model.name 'encoder': set model.classes)"
_FUSION = "a fusion: give model.fusion, such as dict(kind='merged_attention')"
_MASKED_TEXT = (
  "a head for masked tokens: set model.masked_text to True (of model.name 'encoder': set "
  "model.masked_tokens)"
)
_MASKED_PATCHES = "a head for masked patches: name the modality in model.masked_patches"
_DECODER = "a decoder: give model.decoder, such as dict(depth=4)"
_GENERATES = f"{_DECODER}, or set model.name to 'language_model'"
_LANGUAGE_MODEL = "a language model: set model.name to 'language_model'"
_GAN = "a generator of pictures: set model.name to 'text_to_image_gan'"

# What a model needs for a method, and what to set in its config.
METHODS: dict[str, str] = {
  "encode": "encoders: name them in model.encoders",
  "table": "a text encoder, named in model.encoders, or a language model",
  "embedding": _SPACE,
  "temperature": _SPACE,
  "discriminate": (
    "a discriminator of modalities: set model.discriminator to its hidden units, such as 64"
  ),
  "fuse": _FUSION,
  "classify": _CLASSIFIER,
  "regress": "values to predict: set data.values to how many a record has",
  "match": "a matching head: set model.match to True, beside a model.fusion",
  "masked_token_head": _MASKED_TEXT,
  "predict_masked": _MASKED_TEXT,
  "patches": _MASKED_PATCHES,
  "reconstruct": _MASKED_PATCHES,
  "decode": _DECODER,
  "decode_with_memory": _DECODER,
  "memory": _DECODER,
  "init_memory": _DECODER,
  "prefill": _GENERATES,
  "init_cache": _LANGUAGE_MODEL,
  "extend": _LANGUAGE_MODEL,
  "decode_step": _GENERATES,
  "detect_language": _DECODER,
  "next_tokens": _LANGUAGE_MODEL,
  "target_scores": _LANGUAGE_MODEL,
  "spell": "a CTC head: set model.spelling of model.name 'encoder'",
  "condition": _GAN,
  "draw": _GAN,
  "score": _GAN,
  "generate": _GAN,
}


def needed(method: str) -> str:
  """What a model needs for a method; "" for one that is not in the list."""
  return METHODS.get(method, "")


def lacking(method: str) -> UserError:
  """The error of a model that has not the part that a method needs."""
  return UserError(f"`{method}` needs {METHODS[method]}")


def check(model: Any, kind: str, asked: Iterable[str], where: str) -> None:
  """Raises UserError: `model`, of the kind `kind`, cannot answer a method that `where` asks for.
  Of a model without a list `methods` any method will do that it has.
  """
  for method in asked:
    known = getattr(model, "methods", None)
    if method in known if known is not None else hasattr(model, method):
      continue
    hint = METHODS.get(method, f"a method of that name, which model.name {kind!r} has not")
    if method in METHODS and not hasattr(type(model), method):
      hint += f", of a model that can have it (model.name is {kind!r}; 'multitask' has most)"
    raise UserError(f"{where} asks the model for `{method}`, which needs {hint}")
