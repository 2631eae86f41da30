"""Kinds: the functions that entries of a config name, and their settings.

A *kind* (an encoder, an objective, an optimizer, ...) is a function whose keyword-only parameters
are its settings: their annotations are the types, their defaults the defaults, the docstring the
documentation. `KINDS` has one line for each; `kind="my_package.my_file:my_function"` uses one
of your own without a line here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.errors import ConfigError, nearest
from mmjax.printing import shorten

FUNCTION = r"[\w.]+:\w+"

# One line a kind: group -> name -> "module:function". The function's keyword-only parameters are
# the settings.
KINDS: dict[str, dict[str, str]] = {
  "model": {
    "dual_encoder": "mmjax.models.dual_encoder:dual_encoder",
    "fusion_encoder": "mmjax.models.multimodal:fusion_encoder",
    "captioner": "mmjax.models.multimodal:captioner",
    "multitask": "mmjax.models.multimodal:multitask",
    "encoder": "mmjax.models.single_encoder:encoder",
    "text_to_image_gan": "mmjax.models.gan:text_to_image_gan",
    "language_model": "mmjax.models.language_model:language_model",
  },
  "fusion": {
    "concat": "mmjax.models.fusion:concat",
    "weighted_sum": "mmjax.models.fusion:weighted_sum",
    "gated": "mmjax.models.fusion:gated",
    "average": "mmjax.models.fusion:average",
    "cross_attention": "mmjax.models.fusion:cross_attention",
    "merged_attention": "mmjax.models.fusion:merged_attention",
    "perceiver": "mmjax.models.fusion:perceiver",
    "decision": "mmjax.models.fusion:decision",
  },
  "encoder": {
    "vit": "mmjax.models.encoders.image:vit",
    "naflex": "mmjax.models.encoders.naflex:naflex",
    "resnet": "mmjax.models.encoders.resnet:resnet",
    "swin": "mmjax.models.encoders.swin:swin",
    "transformer": "mmjax.models.encoders.text:transformer",
    "bert": "mmjax.models.encoders.bert:bert",
    "whisper": "mmjax.models.encoders.audio:whisper",
    "ast": "mmjax.models.encoders.audio:ast",
    "htsat": "mmjax.models.encoders.htsat:htsat",
    "wav2vec2": "mmjax.models.encoders.wav2vec2:wav2vec2",
    "hubert": "mmjax.models.encoders.wav2vec2:wav2vec2",
    "frames": "mmjax.models.encoders.video:frames",
    "tubelets": "mmjax.models.encoders.video:tubelets",
    "series": "mmjax.models.encoders.series:series",
  },
  "decoder": {"decoder": "mmjax.models.decoder:decoder"},
  "connector": {
    "mlp": "mmjax.models.connectors:mlp",
    "resampler": "mmjax.models.connectors:resampler",
  },
  "objective": {
    "contrastive": "mmjax.objectives.contrastive:contrastive",
    "matching": "mmjax.objectives.matching:matching",
    "classification": "mmjax.objectives.classification:classification",
    "ordinal": "mmjax.objectives.ordinal:ordinal",
    "regression": "mmjax.objectives.regression:regression",
    "masked_tokens": "mmjax.objectives.masked:masked_tokens",
    "masked_patches": "mmjax.objectives.masked:masked_patches",
    "captioning": "mmjax.objectives.captioning:captioning",
    "autoregressive": "mmjax.objectives.captioning:autoregressive",
    "language_modelling": "mmjax.objectives.language_modelling:language_modelling",
    "preference": "mmjax.objectives.preference:preference",
    "grpo": "mmjax.objectives.grpo:grpo",
    "embedding_distillation": "mmjax.objectives.distillation:embedding_distillation",
    "similarity_distillation": "mmjax.objectives.distillation:similarity_distillation",
    "logit_distillation": "mmjax.objectives.distillation:logit_distillation",
    "modality_adversary": "mmjax.objectives.adversarial:modality_adversary",
    "gan": "mmjax.objectives.gan:gan",
  },
  "optimizer": {
    "adamw": "mmjax.state.optimizer:adamw",
    "adafactor": "mmjax.state.optimizer:adafactor",
    "lion": "mmjax.state.optimizer:lion",
    "muon": "mmjax.state.muon:muon",
  },
  "schedule": {
    "cosine": "mmjax.state.schedule:cosine",
    "rsqrt": "mmjax.state.schedule:rsqrt",
    "cooldown": "mmjax.state.schedule:cooldown",
    "constant": "mmjax.state.schedule:constant",
    "exponential": "mmjax.state.schedule:exponential",
  },
  "evaluator": {
    "retrieval": "mmjax.evaluation.retrieval:retrieval",
    "zero_shot": "mmjax.evaluation.zero_shot:zero_shot",
    "loss": "mmjax.evaluation.loss:loss",
    "linear_probe": "mmjax.evaluation.linear_probe:linear_probe",
    "classification": "mmjax.evaluation.classification:classification",
    "regression": "mmjax.evaluation.regression:regression",
    "captions": "mmjax.evaluation.captions:captions",
    "masked_words": "mmjax.evaluation.masked:masked_words",
    "multiple_choice": "mmjax.evaluation.choices:multiple_choice",
    "generated": "mmjax.evaluation.generated:generated",
    "likelihood": "mmjax.evaluation.likelihood:likelihood",
    "preference": "mmjax.evaluation.preference:preference",
    "answers": "mmjax.evaluation.answers:answers",
    "dialogue": "mmjax.evaluation.dialogue:dialogue",
  },
}
# Functions of this package that settings of kinds name: a checkpoint's config may name these
# besides KINDS.
FUNCTIONS = (
  "mmjax.data.builders.clip_questions:check_answer",
  "mmjax.data.builders.clip_questions:check_caption",
  "mmjax.data.builders.emoji_scenes:check_answer",
  "mmjax.data.builders.emoji_scenes:check_caption",
  "mmjax.data.builders.moving_emoji:check_caption",
  "mmjax.data.builders.moving_emoji:choices",
)
# Where kinds stand in a config: path pattern -> (group, the key that names the kind; not needed for
# one named as its group).
# An entry that is a setting of another kind (model.fusion) may be None: that model then has none.
ENTRIES = {
  "model": ("model", "name"),
  "model.fusion": ("fusion", "kind"),
  "model.encoders.*": ("encoder", "kind"),
  "model.decoder": ("decoder", "kind"),
  "model.connectors.*": ("connector", "kind"),
  "objectives.*": ("objective", "kind"),
  "optimizer": ("optimizer", "name"),
  "optimizers.*": ("optimizer", "name"),
  "schedule": ("schedule", "name"),
  "evaluation.evaluators.*": ("evaluator", "kind"),
}
# Such collections that are settings of a kind, which other kinds lack.
COLLECTIONS_OF_KINDS = ("model.connectors",)


def kind_function(entry: Mapping, group: str | None = None) -> Callable:
  """The function of an entry's `kind` (or `name`), e.g. `contrastive` for dict(kind="contrastive",
  ...).
  """
  name = entry.get("kind") or entry.get("name")
  groups = [group] if group else list(KINDS)
  for g in groups:
    if name in KINDS[g]:
      return load_function(KINDS[g][name])
  if name and ":" in name:
    return load_function(name)
  known = [kind for g in groups for kind in KINDS[g]]
  raise ConfigError(f"unknown kind {name!r}{nearest(str(name), known)}")


def kind_settings(function: Callable) -> dict[str, inspect.Parameter]:
  """The keyword-only parameters of a kind's function, annotations evaluated."""
  try:
    parameters = inspect.signature(function, eval_str=True).parameters
  except Exception as error:  # annotations of a user's function are code, too
    raise ConfigError(
      f"the settings of {function!r:.80} cannot be read: {what_happened(error)}"
    ) from error
  return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def load_function(target: str, what: str = "kind") -> Callable:
  """The function "module:function"; the module may also be a file in the current folder.

  what: names the setting in the error. Raises ConfigError: there is none, or `target` is not
  written so.
  """
  if not re.fullmatch(FUNCTION, target):
    raise ConfigError(f"{what} {target!r}: write module:function")
  module, _, name = target.partition(":")
  if "" not in sys.path and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # a command has only its own folder there
  try:
    function = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ConfigError(f"{what} {target!r}: {error}") from error
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise ConfigError(f"{what} {target!r}: {module}: {what_happened(error)}") from error
  if not callable(function):
    raise ConfigError(f"{what} {target!r} is no function, but {function!r:.80}")
  return function


def what_happened(error: BaseException) -> str:
  if isinstance(error, SystemExit):
    return f"it called sys.exit({error.code!r:.80}) while it was read"
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f"{shorten(error.filename)}: {error.strerror}"
  return f"{type(error).__name__}: {error!s:.600}"


def entry_at(tree: dict, keys: list[str]) -> Any:
  """What stands at a path of a config; None where nothing does."""
  node: Any = tree
  for key in keys:
    node = node.get(key) if isinstance(node, dict) else None
  return node
