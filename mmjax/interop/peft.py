"""Adapters as folders of PEFT (Hugging Face): adapter_config.json and adapter_model.safetensors.

A layer of several projections here (query, key and value; the gated MLP) has factors for each of
them, as PEFT has for the layers that they are there. What PEFT calls modules_to_save is what a run
trains in full. Nothing is unpickled, and what is not read here is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.traverse_util
import numpy as np
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.inference.parameters import param_spec
from mmjax.interop import safetensors
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models.lora import OF_TABLE, adapted_by, lora_scale
from mmjax.state.adapters import trained_slices
from mmjax.state.paths import by_name

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
AT = "base_model.model."  # what names of tensors begin with
A, B = ".lora_A.weight", ".lora_B.weight"
# Keys of adapter_config.json that do not change what an adapter computes, beside those read here.
HARMLESS = (
  "auto_mapping",
  "base_model_name_or_path",
  "ensure_weight_tying",
  "exclude_modules",
  "inference_mode",
  "layers_pattern",
  "layers_to_transform",
  "megatron_core",
  "modules_to_save",
  "peft_version",
  "qalora_group_size",
  "revision",
  "target_modules",
  "task_type",
)
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias")
# Ways to begin that leave the base as it is; others, such as PiSSA, change it.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def read(
  folder: str | os.PathLike,
  config: FrozenConfigDict,
  params: Mapping[str, Any],
  rules: Sequence[Rule],
  prefix: str,
) -> tuple[FrozenConfigDict, dict[str, Any]]:
  """(config, parameters) of a model with the adapter of `folder`.

  config, params: of the model alone. rules: how its parameters are named there. prefix: what these
  names begin with there. Raises UserError: no adapter is there, it is of a kind that is not
  supported, or of another model.
  """
  folder = Path(folder)
  if not (folder / WEIGHTS).exists():
    pickled = (folder / PICKLED).exists()
    why = f", only {PICKLED}, which holds pickled code: save it as safetensors" if pickled else ""
    raise UserError(f"{folder}: no {WEIGHTS}{why}")
  stated = safetensors.read_json(folder / CONFIG)
  try:
    lora = _settings(stated)
  except UserError as error:
    raise UserError(f"{folder / CONFIG}: {error}") from error
  given = safetensors.read(folder / WEIGHTS)
  tensors = {
    name.removeprefix(AT): mapping.finite(x, name, str(folder)) for name, x in given.items()
  }
  tensors = single.without_prefix(tensors, prefix)
  modules = {name: rule.ours for rule in rules for name in _modules(rule)}
  for name in tensors:
    module = name.removesuffix(A).removesuffix(B).removesuffix(".weight").removesuffix(".bias")
    if module not in modules:
      raise UserError(
        f"{folder}: {name} belongs to no layer of this model: it is an adapter of another one"
      )
  adapted = [
    rule
    for rule in rules
    if rule.ours.endswith("/kernel") and any(name + A in tensors for name in _modules(rule))
  ]
  full = [rule for rule in rules if set(_names(rule)) & set(tensors)]
  _check_tied(config, [rule.ours for rule in full], str(folder))
  lora = config.lora.to_dict() | lora
  lora |= dict(
    params="|".join(re.escape(rule.ours) for rule in adapted),
    full=tuple(re.escape(rule.ours) for rule in full),
  )
  config = FrozenConfigDict({**config.to_dict(), "lora": lora})
  flat, spec = flax.traverse_util.flatten_dict(params, sep="/"), by_name(param_spec(config))
  for rule in adapted:
    layer = rule.ours.rpartition("/")[0]
    a, b = _factors(rule, tensors, flat[rule.ours], spec[f"{layer}/lora_a"].shape[-2:], folder)
    flat[f"{layer}/lora_a"] = a.reshape(spec[f"{layer}/lora_a"].shape)
    flat[f"{layer}/lora_b"] = b.reshape(spec[f"{layer}/lora_b"].shape)
    scale = lora_scale(config.lora.alpha, config.lora.rank, config.lora.rslora)
    for name, value in dict(lora_scale=scale, lora_dropout=config.lora.dropout).items():
      if leaf := spec.get(f"{layer}/{name}"):
        flat[f"{layer}/{name}"] = np.full(leaf.shape, value, np.float32)
  for rule in full:
    if missing := set(_names(rule)) - set(tensors):
      raise UserError(f"{folder}: lacks {min(missing)}, though other layers are trained in full")
    some = {name: tensors[name] for name in _names(rule)}
    flat |= flax.traverse_util.flatten_dict(mapping.to_params(some, [rule], str(folder)), sep="/")
  return config, flax.traverse_util.unflatten_dict(flat, sep="/")


def write(
  folder: Path,
  config: FrozenConfigDict,
  params: Mapping[str, Any],
  family: ModuleType,
  rules: Sequence[Rule],
) -> None:
  """The adapter of a model as a folder of PEFT. params: of the adapted model, NumPy arrays. Raises
  UserError: it has none, or PEFT cannot express it.
  """
  if not config.lora.params:
    raise UserError("this checkpoint has no adapter (config.lora.params): export it --to hf")
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  layers = {name: len(x) if "layers" in name.split("/") else None for name, x in flat.items()}
  trained, by_ours = trained_slices(config, layers), {rule.ours: rule for rule in rules}
  _check_tied(config, [name for name in flat if trained[name].any()], "this adapter")
  tensors: dict[str, np.ndarray] = {}
  saved: list[str] = []
  for name in flat:
    layer, _, leaf = name.rpartition("/")
    kernel = adapted_by(name) if leaf == "lora_a" else name
    if not trained[name].any() or leaf == "lora_b":
      continue
    if layer.endswith(OF_TABLE):
      raise UserError(
        f"this adapter has factors of {kernel}, but a folder of PEFT gets those of kernels alone: "
        "export the whole model --to hf, with the factors added"
      )
    if kernel not in by_ours:
      raise UserError(f"transformers has no place for {kernel}, which this run trains")
    rule = by_ours[kernel]
    if leaf == "lora_a":
      pair = flat[name], flat[f"{layer}/lora_b"]
      tensors |= _tensors(rule, flat[kernel], *pair, np.atleast_1d(trained[name]))
    else:
      more = mapping.to_tensors(
        flax.traverse_util.unflatten_dict({name: flat[name]}, sep="/"), [rule]
      )
      tensors |= more
      saved += [x.rpartition(".")[0] for x in more]
  is_text = config.model.name == "language_model"
  tensors = single.with_prefix(tensors, family.PREFIX, is_text)
  named = single.with_prefix({name: np.empty(0) for name in saved}, family.PREFIX, is_text)
  facts = dict(
    peft_type="LORA",
    task_type="CAUSAL_LM" if is_text else None,
    base_model_name_or_path=None,
    inference_mode=True,
    r=config.lora.rank,
    lora_alpha=config.lora.alpha,
    lora_dropout=config.lora.dropout,
    use_rslora=config.lora.rslora,
    target_modules=[name.removesuffix(A) for name in tensors if name.endswith(A)],
    modules_to_save=list(named) or None,
    bias="none",
    fan_in_fan_out=False,
  )
  (folder / CONFIG).write_text(json.dumps(facts, indent=2))
  safetensors.write(folder / WEIGHTS, {AT + name: x for name, x in tensors.items()})


def _settings(stated: Mapping[str, Any]) -> dict[str, Any]:
  """What config.lora says of an adapter_config.json. Raises UserError: it asks for more."""
  kind = stated.get("peft_type")
  if kind != "LORA":
    raise UserError(f"peft_type is {kind!r}, but only 'LORA' is supported")
  if stated.get("use_dora"):
    raise UserError("use_dora is True: DoRA is not supported, only LoRA")
  for key, value in stated.items():
    if value and key not in (*HARMLESS, *READ):
      raise UserError(f"{key} is {value!r:.80}, which is not supported")
  if stated.get("bias", "none") != "none":
    raise UserError(f"bias is {stated['bias']!r}, but only 'none' is supported")
  if stated.get("init_lora_weights") not in BEGINNINGS:
    raise UserError(
      f"init_lora_weights is {stated['init_lora_weights']!r}, which changes the base. Convert the "
      "adapter to LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
    )
  rank, alpha = stated.get("r", 8), stated.get("lora_alpha", 8)
  for key, value in dict(r=rank, lora_alpha=alpha).items():
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
      raise UserError(f"{key} is {value!r}, but must be a number above 0")
  return dict(
    rank=int(rank),
    alpha=float(alpha),
    dropout=float(stated.get("lora_dropout") or 0),
    rslora=bool(stated.get("use_rslora")),
  )


def _factors(
  rule: Rule,
  tensors: Mapping[str, np.ndarray],
  kernel: np.ndarray,
  shape: tuple[int, int],
  folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
  """A [layers, inputs, P, r] and B [layers, P, r, outputs of a part] of a kernel, from PEFT's for
  each of the layers that it is there; zeros where there are none, which stay zero in training.
  shape: (P, r).
  """
  parts, rank = shape
  kernels = kernel if rule.layers else kernel[None]
  inputs, count = _inputs(rule, kernels[0]), len(rule.theirs)
  outputs = kernels[0].size // inputs // parts
  a = np.zeros((len(kernels), inputs, parts, rank), np.float32)
  b = np.zeros((len(kernels), parts, rank, outputs), np.float32)
  each = parts // count  # projections here of one layer there
  for i in range(len(kernels)):
    for p, name in enumerate(name.format(i=i).removesuffix(".weight") for name in rule.theirs):
      pair = [tensors[name + x] for x in (A, B) if name + x in tensors]
      if not pair:
        continue
      shapes = [x.shape for x in pair]
      wanted = [(rank, inputs), (each * outputs, rank)]
      if shapes != wanted:
        raise UserError(
          f"{folder}: the factors of {name} have the shapes {shapes}, but here they are "
          f"{wanted}: it is an adapter of another model"
        )
      chosen = slice(p * each, (p + 1) * each)
      a[i, :, chosen] = pair[0].T[:, None]
      b[i, chosen] = pair[1].T.reshape(rank, each, outputs).swapaxes(0, 1)
  return a, b


def _tensors(
  rule: Rule, kernel: np.ndarray, a: np.ndarray, b: np.ndarray, layers: np.ndarray
) -> dict[str, np.ndarray]:
  """PEFT's factors of a kernel, of the layers that are trained."""
  kernels = kernel if rule.layers else kernel[None]
  inputs, (parts, rank) = _inputs(rule, kernels[0]), a.shape[-2:]
  if len(rule.theirs) != parts:
    raise UserError(
      f"{rule.ours} has factors for each of its {parts} projections, which are one layer in PEFT "
      f"({rule.theirs[0]}). Export the merged model: --to hf"
    )
  a = a.reshape(len(kernels), inputs, parts, rank)
  b = b.reshape(len(kernels), parts, rank, -1)
  tensors: dict[str, np.ndarray] = {}
  for i in np.flatnonzero(layers):
    for p, name in enumerate(name.format(i=i).removesuffix(".weight") for name in rule.theirs):
      tensors |= {name + A: a[i, :, p].T, name + B: b[i, p].T}
  return tensors


def _inputs(rule: Rule, kernel: np.ndarray) -> int:
  """How many inputs a kernel has. Raises UserError: it is not the matrices of its rule, one beside
  the other, transposed.
  """
  weights = rule.back(kernel)
  inputs = weights[0].shape[-1]
  beside = np.concatenate([np.atleast_2d(w).T for w in weights], axis=1)
  if kernel.size % inputs or not np.array_equal(kernel.reshape(inputs, -1), beside):
    raise UserError(
      f"{rule.ours} is laid out otherwise than {rule.theirs[0]}, for which adapters in PEFT's form "
      "are not supported. Export the merged model: --to hf"
    )
  return inputs


def _check_tied(config: FrozenConfigDict, full: Sequence[str], where: str) -> None:
  """Raises UserError: one table is input and output here, and two of which one is trained there."""
  if "embedding" in full and config.model.get("tied"):
    raise UserError(
      f"{where} trains the embeddings of a model whose output table is tied to them, which PEFT "
      "unties. Export or import the merged model"
    )


def _names(rule: Rule) -> list[str]:
  return [name.format(i=i) for i in range(rule.layers or 1) for name in rule.theirs]


def _modules(rule: Rule) -> list[str]:
  return [name.rpartition(".")[0] for name in _names(rule)]
