"""What the families of single encoders (BERT, ViT, ResNet, Swin) share: heads, prefixes of names,
settings of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping
from mmjax.interop.huggingface.clip import ACTIVATIONS, square
from mmjax.interop.huggingface.mapping import Rule

IMAGENET = dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
# Names that never carry the encoder's prefix.
HEADS = (
  "classifier.",
  "cls.",
  "visual_projection.",
  "text_projection.",
  "audio_projection.",
  "lm_head.",
  "pre_classifier.",
  "projector.",
  "vocab_",
)
RENAMED = {  # what files of long ago call a tensor -> its present name
  r"LayerNorm\.gamma$": "LayerNorm.weight",
  r"LayerNorm\.beta$": "LayerNorm.bias",
  r"\.weight_g$": ".parametrizations.weight.original0",
  r"\.weight_v$": ".parametrizations.weight.original1",
}
ARCHITECTURES = (
  "Model",
  "WithProjection",
  "ForMaskedLM",
  "ForPreTraining",
  "ForSequenceClassification",
  "ForImageClassification",
  "ForAudioClassification",
  "ForConditionalGeneration",
  "ForCTC",
)


def model(
  tensors: Mapping[str, np.ndarray], encoders: Mapping[str, Any], width: int, **heads: Any
) -> dict[str, Any]:
  """Settings of `model` for one encoder, with the classifier that a file holds."""
  weight = next(
    (
      x
      for name, x in tensors.items()
      if re.fullmatch(r"classifier(\.\d|\.out_proj)?\.weight", name)
    ),
    None,
  )
  return dict(
    name="encoder",
    width=width,
    classes=0 if weight is None else int(weight.shape[0]),
    encoders=dict(encoders),
    **heads,
  )


def projected(
  tensors: Mapping[str, np.ndarray],
  weight: str,
  encoders: Mapping[str, Any],
  width: int,
  **more: Any,
) -> dict[str, Any]:
  """Settings of `model` for one encoder of `width` channels, with the projection whose weight a
  file may hold.
  """
  found = tensors.get(weight)
  settings = {} if found is None else dict(projection=True, **more)
  return dict(
    name="encoder",
    width=width if found is None else int(found.shape[0]),
    classes=0,
    encoders=dict(encoders),
    **settings,
  )


def headless(
  config: Mapping[str, Any],
  projection: bool = True,
  projection_bias: bool = False,
  functions: tuple[str, ...] = ("none",),
) -> list[tuple[str, Any, tuple]]:
  """What a tower alone must have: no head but, at most, a projection, of two layers with one of
  `functions` between them.
  """
  model = config["model"]
  return [
    ("model.classes", model["classes"], (0,)),
    ("model.masked_tokens", model["masked_tokens"], (False,)),
    ("model.projection", model["projection"], (True, False) if projection else (False,)),
    (
      "model.projection_bias",
      model["projection_bias"],
      (projection_bias,) if model["projection"] else (True, False),
    ),
    (
      "model.projection_function",
      model["projection_function"],
      functions if model["projection"] else (model["projection_function"],),
    ),
  ]


def check_architecture(
  facts: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  endings: tuple[str, ...] = ARCHITECTURES,
) -> None:
  """Raises UserError: the model has a head of another kind, which the names of its weights need not
  show.

  A file of BertForTokenClassification names its weights as one of BertForSequenceClassification
  does.
  """
  names = facts.get("architectures") or []
  for name in names:
    if not name.endswith(endings):
      raise UserError(
        f"architectures is {name!r}, but only those are supported that end in {', '.join(endings)}"
      )
  if not names and any(re.match(r"classifier\.", name) for name in tensors):
    raise UserError(
      "architectures is not stated, so that it is unknown what the classifier of its weights "
      "classifies: texts, tokens or choices. Name the architecture, such as "
      "['BertForSequenceClassification']"
    )


def scores(facts: Mapping[str, Any], classes: int) -> str:
  """model.probabilities of a classifier, as the pipelines of transformers have it; with one label,
  as a CrossEncoder of sentence-transformers states it. Raises UserError: an activation, or a number
  of labels, that is not that."""
  names = facts.get("id2label")
  if names is not None and len(names) != classes:
    raise UserError(
      f"id2label names {len(names)} classes, but the classifier of its weights has {classes}"
    )
  stated = (facts.get("sentence_transformers") or {}).get("activation_fn") or facts.get(
    "sbert_ce_default_activation_function"
  )
  if classes == 1 and stated:
    kind = {"Sigmoid": "sigmoid", "Identity": "none"}.get(stated.rsplit(".", 1)[-1])
    if not kind:
      raise UserError(
        f"the activation of its scores is {stated!r}, but only Sigmoid and Identity are supported"
      )
    return kind
  problem = facts.get("problem_type")
  if problem == "regression":
    return "none"
  return "sigmoid" if classes == 1 or problem == "multi_label_classification" else "softmax"


def class_names(facts: Mapping[str, Any], classes: int) -> list[str]:
  """The names of a classifier's outputs; [] where a config.json has none of its own. Raises
  UserError: they are not numbered from 0.
  """
  names = {str(number): str(name) for number, name in (facts.get("id2label") or {}).items()}
  if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
    return []
  if set(names) != set(map(str, range(classes))):
    raise UserError(
      f"id2label has the numbers {', '.join(names)}, but classes are numbered from 0 to "
      f"{classes - 1}"
    )
  return [names[str(number)] for number in range(classes)]


def label_facts(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
  """What config.json says of a classifier's outputs; names: those that there are, the rest are
  LABEL_i.
  """
  model = config["model"]
  names = [*names, *(f"LABEL_{i}" for i in range(len(names), model["classes"]))]
  kind = "sigmoid" if config["data"]["label"] == "labels" else model.get("probabilities", "softmax")
  problem = {
    "none": "regression",
    "sigmoid": "multi_label_classification" if len(names) > 1 else None,
    "softmax": "single_label_classification",
  }[kind]
  return dict(
    id2label={str(i): name for i, name in enumerate(names)},
    label2id={name: i for i, name in enumerate(names)},
    **(dict(problem_type=problem) if problem else {}),
  )


def classifier(config: Mapping[str, Any], theirs: str = "classifier") -> list[Rule]:
  return mapping.linear("classifier", theirs) if config["model"]["classes"] else []


def without_prefix(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """Tensors under the names that the bare encoder has, and those of norms under their present
  ones.
  """

  def rename(name: str) -> str:
    for old, new in RENAMED.items():
      name = re.sub(old, new, name)
    return name

  return {rename(name.removeprefix(prefix)): x for name, x in tensors.items()}


def with_prefix(
  tensors: Mapping[str, np.ndarray], prefix: str, headed: bool = False
) -> dict[str, np.ndarray]:
  """Tensors as a transformers model saves them: an encoder beside a head has a prefix; batch norms
  count their batches. headed: there is a head, even if none of the tensors is its own.
  """
  mean = "running_mean"
  counts = {
    name.replace(mean, "num_batches_tracked"): np.zeros((), np.int64)
    for name in tensors
    if name.endswith(mean)
  }
  tensors = {**tensors, **counts}
  if not headed and not any(name.startswith(HEADS) for name in tensors):
    return tensors
  return {name if name.startswith(HEADS) else prefix + name: x for name, x in tensors.items()}


def activation(
  facts: Mapping[str, Any], known: Mapping[str, str] = ACTIVATIONS, key: str = "hidden_act"
) -> str:
  """Our name of facts[key]. Raises UserError: it is not among those that are `known`."""
  if facts[key] not in known:
    raise UserError(f"{key} {facts[key]!r} is not supported; there are: {', '.join(known)}")
  return known[facts[key]]


def activation_name(ours: str) -> str:
  return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[ours]


def only(facts: Mapping[str, Any], **allowed: Any) -> None:
  """Raises UserError unless the facts of a config.json have the one value that is supported
  here.
  """
  for key, value in allowed.items():
    if facts[key] != value:
      raise UserError(f"{key} is {facts[key]!r}, but only {value!r} is supported")


def tied(
  facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray], copies: Mapping[str, str]
) -> None:
  """Raises UserError unless the tensors that a file may hold beside those that they are copies of,
  {copy: original}, are equal.
  """
  only(facts, tie_word_embeddings=True)
  for copy, original in copies.items():
    if (
      copy in tensors
      and original in tensors
      and not np.array_equal(tensors[copy], tensors[original])
    ):
      raise UserError(
        f"{copy} differs from {original}, but tokens are predicted through the embeddings here"
      )


def image_size(facts: Mapping[str, Any]) -> int:
  return square(facts["image_size"], "image_size")


def labels(config: Mapping[str, Any]) -> dict[str, Any]:
  """The names of a classifier's outputs, which say how many there are: {} without one."""
  names = [f"LABEL_{i}" for i in range(config["model"].get("classes", 0))]
  return (
    dict(
      id2label={str(i): name for i, name in enumerate(names)},
      label2id={name: i for i, name in enumerate(names)},
    )
    if names
    else {}
  )
