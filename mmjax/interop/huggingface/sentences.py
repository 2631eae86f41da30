"""Folders of sentence-transformers: what modules.json puts around a text encoder, whatever its
family, both ways.

The encoder is that of `Transformer`, a folder of transformers; then come `Pooling`, any number of
`Dense`, and `Normalize`. Embeddings have length one here in any case: cosines are equal with
`Normalize` or without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmjax.config import UserError
from mmjax.interop import safetensors
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.mapping import Rule

MODULES = "modules.json"
PREFIX = (
  "sentence_transformers."  # of the names that tensors of dense layers have among the encoder's
)
# theirs -> (ours, the key of older files), in the order in which they stand side by side
POOLINGS = {
  "cls": ("class", "pooling_mode_cls_token"),
  "max": ("max", "pooling_mode_max_tokens"),
  "mean": ("mean", "pooling_mode_mean_tokens"),
  "mean_sqrt_len_tokens": ("mean_sqrt", "pooling_mode_mean_sqrt_len_tokens"),
  "weightedmean": ("weighted_mean", "pooling_mode_weightedmean_tokens"),
  "lasttoken": ("last", "pooling_mode_lasttoken"),
}
ACTIVATIONS = {
  "torch.nn.modules.linear.Identity": "identity",
  "torch.nn.modules.activation.Tanh": "tanh",
  "torch.nn.modules.activation.ReLU": "relu",
  "torch.nn.modules.activation.GELU": "gelu",
  "torch.nn.modules.activation.Sigmoid": "sigmoid",
  "torch.nn.modules.activation.SiLU": "silu",
}


class Sentences(NamedTuple):
  """encoder: the folder of the text encoder. model: settings of `model`. tensors: of the dense
  layers. length: tokens at most, 0 = not
  said. lowercase: texts are lower-cased. notes: what is left out."""

  encoder: Path
  model: dict[str, Any]
  tensors: dict[str, np.ndarray]
  length: int
  lowercase: bool
  notes: list[str]


def read(folder: Path) -> Sentences | None:
  """What a folder of sentence-transformers says beside its encoder; None for another folder.

  Raises UserError: modules of other kinds or in another order, settings that are not here, weights
  that are not safetensors.
  """
  if not (folder / MODULES).exists():
    return None
  modules = _modules(folder / MODULES)
  kinds = [kind for kind, _ in modules]
  plain = [kind for kind in kinds if kind not in ("Dropout", "Normalize")]
  if (
    plain[:2] != ["Transformer", "Pooling"]
    or set(plain[2:]) > {"Dense"}
    or "Normalize" in kinds[:-1]
  ):
    raise UserError(
      f"{folder / MODULES} has the modules {', '.join(kinds)}, but only Transformer, Pooling, any "
      "number of Dense, then Normalize are supported"
    )
  encoder = modules[0][1]
  length, lowercase = _transformer(encoder)
  dense, tensors = [], {}
  for i, path in enumerate(path for kind, path in modules if kind == "Dense"):
    dense.append(_dense(path))
    tensors.update({f"{PREFIX}{i}.{name}": x for name, x in safetensors.read_folder(path).items()})
  if len({bias for _, _, bias in dense}) > 1:
    raise UserError(f"{folder}: some of its Dense have a bias and some none: that is not supported")
  model = dict(
    sentence_pooling=_pooling(modules[kinds.index("Pooling")][1]),
    dense=tuple(width for width, _, _ in dense),
    dense_activations=tuple(name for _, name, _ in dense),
    dense_bias=dense[0][2] if dense else True,
  )
  return Sentences(encoder, model, tensors, length, lowercase, _notes(folder, "Normalize" in kinds))


def _modules(path: Path) -> list[tuple[str, Path]]:
  """[(kind, its folder)] of a modules.json. Raises UserError."""
  found = []
  for entry in safetensors.read_json_list(path):
    inside = Path(str(entry.get("path", "")))
    if inside.is_absolute() or ".." in inside.parts:
      raise UserError(f"{path} names the folder {str(inside)!r}, which is not beside it")
    package, _, kind = str(entry.get("type")).rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
      raise UserError(
        f"{path}: the module {str(entry.get('type'))!r} is code of its own, which is not run "
        "here: only modules of sentence_transformers are supported"
      )
    found.append((kind, path.parent / inside))
  return found


def _settings(path: Path, needed: bool = True) -> dict[str, Any]:
  return safetensors.read_json(path) if needed or path.exists() else {}


def _transformer(folder: Path) -> tuple[int, bool]:
  """(tokens at most, whether texts are lower-cased) of the encoder's module. Raises UserError: it
  is used in another way.
  """
  path = next(
    iter(sorted(folder.glob("sentence_*_config.json"))), folder / "sentence_bert_config.json"
  )
  facts = _settings(path, needed=False)
  task = facts.get("transformer_task", "feature-extraction")
  if task != "feature-extraction":
    raise UserError(
      f"{path}: transformer_task is {task!r}, but only 'feature-extraction' is supported"
    )
  for key in (
    "model_args",
    "model_kwargs",
    "config_args",
    "config_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "processing_kwargs",
  ):
    if changes := {
      name: value for name, value in (facts.get(key) or {}).items() if name != "trust_remote_code"
    }:
      raise UserError(
        f"{path}: {key} changes the model or its tokenizer ({', '.join(changes)}), which is not "
        "supported"
      )
  return facts.get("max_seq_length") or 0, bool(facts.get("do_lower_case", False))


def _pooling(folder: Path) -> tuple[str, ...]:
  """Our names of what is pooled. Raises UserError: an unknown kind."""
  facts = _settings(folder / "config.json")
  stated = facts.get("pooling_mode")
  if stated is None:
    stated = [theirs for theirs, (_, key) in POOLINGS.items() if facts.get(key)] or ["mean"]
  stated = [stated] if isinstance(stated, str) else list(stated)
  if unknown := [kind for kind in stated if kind not in POOLINGS]:
    raise UserError(
      f"{folder / 'config.json'}: pooling_mode {unknown[0]!r} is not supported; there are: "
      f"{', '.join(POOLINGS)}"
    )
  return tuple(POOLINGS[kind][0] for kind in stated)


def _dense(folder: Path) -> tuple[int, str, bool]:
  """(channels, activation, whether it has a bias) of a Dense. Raises UserError: settings that are
  not here.
  """
  path = folder / "config.json"
  facts = _settings(path)
  activation = facts.get("activation_function", "torch.nn.modules.activation.Tanh")
  if activation not in ACTIVATIONS:
    raise UserError(
      f"{path}: activation_function {activation!r} is not supported; there are: "
      f"{', '.join(ACTIVATIONS)}"
    )
  usual = dict(
    use_residual=False,
    module_input_name="sentence_embedding",
    module_output_name="sentence_embedding",
  )
  for key, value in usual.items():
    if facts.get(key) not in (None, value):
      raise UserError(f"{path}: {key} is {facts[key]!r}, but only {value!r} is supported")
  return int(facts["out_features"]), ACTIVATIONS[activation], bool(facts.get("bias", True))


def _notes(folder: Path, normalised: bool) -> list[str]:
  """Lines about what users of sentence-transformers get and users of the import do not. Raises
  UserError: a similarity that needs the lengths of vectors."""
  facts = _settings(folder / "config_sentence_transformers.json", needed=False)
  similarity = facts.get("similarity_fn_name") or "cosine"
  if similarity != "cosine" and not normalised:
    raise UserError(
      f"{folder}: it compares texts by {similarity!r} of vectors that are not of length one, but "
      "embeddings have length one here, so that ranks would differ"
    )
  name = facts.get("default_prompt_name")
  prompt = (facts.get("prompts") or {}).get(name)
  return (
    [
      f"its default prompt {name!r} ({prompt!r}) is not kept: put it before the texts that are to "
      "have it"
    ]
    if prompt
    else []
  )


def text_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors less those of poolers and heads, which sentence-transformers does not use."""
  return {name: x for name, x in tensors.items() if not name.startswith(("pooler.", *single.HEADS))}


def add(model: dict[str, Any], sentences: Sentences) -> None:
  """Puts what stands around the encoder into the settings of a model. Raises UserError: it is no
  text encoder.
  """
  if tuple(model["encoders"]) != ("text",) or model["name"] != "encoder":
    raise UserError(
      "sentence-transformers stands around a model that is no text encoder: that is not supported"
    )
  kinds, dense = sentences.model["sentence_pooling"], sentences.model["dense"]
  model.update(sentences.model, width=dense[-1] if dense else model["width"] * len(kinds))


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of the dense layers."""
  model = config["model"]
  return [
    rule
    for i in range(len(model.get("dense", ())))
    for rule in mapping.linear(f"dense_layer_{i}", f"{PREFIX}{i}.linear", bias=model["dense_bias"])
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a model with a sentence pooling must have."""
  model = config["model"]
  if not model.get("sentence_pooling"):
    return []
  return [
    ("model.classes", model["classes"], (0,)),
    ("model.masked_tokens", model["masked_tokens"], (False,)),
    ("model.projection", model["projection"], (False,)),
    ("model.encoders", tuple(model["encoders"]), (("text",),)),
    ("model.encoders.text.pooling", model["encoders"]["text"].get("pooling"), ("mean", "class")),
  ]


def _pooling_facts(kinds: Sequence[str]) -> dict[str, Any]:
  """As all releases read it, where the order of the kinds is theirs."""
  theirs = [theirs for theirs, (ours, _) in POOLINGS.items() if ours in kinds]
  if [POOLINGS[name][0] for name in theirs] != list(kinds):
    return dict(
      pooling_mode=[
        next(theirs for theirs, (ours, _) in POOLINGS.items() if ours == kind) for kind in kinds
      ]
    )
  return {key: ours in kinds for ours, key in POOLINGS.values()}


def files(config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  """{name: a JSON value, or tensors} of the files around the encoder; takes the dense layers'
  tensors out of `tensors`.
  """
  model, text = config["model"], config["data"]["text"]
  out: dict[str, Any] = {
    "sentence_bert_config.json": dict(
      max_seq_length=text["length"], do_lower_case=text["lowercase"]
    ),
    "config_sentence_transformers.json": dict(
      prompts={}, default_prompt_name=None, similarity_fn_name="cosine"
    ),
    "1_Pooling/config.json": dict(
      word_embedding_dimension=model["encoders"]["text"]["width"],
      **_pooling_facts(model["sentence_pooling"]),
    ),
  }
  kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
  width = model["encoders"]["text"]["width"] * len(model["sentence_pooling"])
  names = {ours: name for name, ours in ACTIVATIONS.items()}
  for i, (channels, activation) in enumerate(
    zip(model["dense"], model["dense_activations"], strict=True)
  ):
    folder, prefix = f"{i + 2}_Dense", f"{PREFIX}{i}."
    kinds.append(("Dense", folder))
    out[f"{folder}/config.json"] = dict(
      in_features=width,
      out_features=channels,
      bias=model["dense_bias"],
      activation_function=names[activation],
    )
    own = [name for name in tensors if name.startswith(prefix)]
    out[f"{folder}/model.safetensors"] = {
      name.removeprefix(prefix): tensors.pop(name) for name in own
    }
    width = channels
  kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
  out[MODULES] = [
    dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
    for i, (kind, path) in enumerate(kinds)
  ]
  return out
