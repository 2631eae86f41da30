"""Hugging Face folders: `import_hf` makes a checkpoint of one, `export_hf` writes one that
transformers loads.

One file a model family. What a model is - activation, pooling, padding, preprocessing - is read
from the folder's files, never guessed from a name.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax

import mmjax.config
from mmjax import files as files_of
from mmjax import printing
from mmjax.config import UserError
from mmjax.data.pipeline import batch_spec
from mmjax.interop import safetensors
from mmjax.interop.huggingface import (
  decoders,
  mapping,
  open_clip,
  own_tokenizer,
  preprocessing,
  sentences,
  single,
)
from mmjax.kinds import kind_function, kind_settings
from mmjax.models import make_model
from mmjax.models.lora import merge
from mmjax.ownership import new_folder
from mmjax.state import checkpoint as checkpoints

AST = "audio-spectrogram-transformer"
# the nearest first: what several can express is exported as the first of them
WITH_MEDIA = (
  "llava",
  "paligemma",
  "gemma3",
  "internvl",
  "idefics3",
  "smolvlm",
  "qwen2_audio",
  "llava_onevision",
  "qwen3_vl",
)
# What a family asks before all else: a model that lacks it was compared no further.
ASKED_FIRST = ("model.encoders", "data.image.tiles.grids")
LANGUAGE_MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
FAMILIES = {  # model_type -> the module of this package that reads and writes it
  **{
    name: name
    for name in (
      "clip",
      "siglip",
      "siglip2",
      "bert",
      "vit",
      "resnet",
      "swin",
      "whisper",
      "wav2vec2",
      "hubert",
    )
  },
  AST: "ast",
  **{
    f"{tower}_model": tower
    for tower in ("clip_vision", "clip_text", "siglip_vision", "siglip_text")
  },
  "roberta": "roberta",
  "xlm-roberta": "roberta",
  "distilbert": "distilbert",
  "mpnet": "mpnet",
  "clap": "clap",
  "clap_text_model": "clap_text",
  "clap_audio_model": "clap_audio",
  **{name: name for name in ("dinov2", "dinov2_with_registers", *LANGUAGE_MODELS, *WITH_MEDIA)},
}
DUAL = ("clip", "siglip")  # those that hold two encoders
ALONE = {  # an encoder's kind -> the families that it alone may be
  "bert": ("bert", "roberta", "distilbert", "mpnet", "clap_text_model"),
  "transformer": ("clip_text_model", "siglip_text_model"),
  "vit": ("vit", "clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"),
  "resnet": ("resnet",),
  "swin": ("swin",),
  "ast": (AST,),
  "htsat": ("clap_audio_model",),
  "wav2vec2": ("wav2vec2",),
  "hubert": ("hubert",),
}
SINGLE = f"single encoders of the kinds {', '.join(ALONE)}"
NEAREST = {  # model.name -> what there is of its sort, for models that have no family
  "dual_encoder": "dual encoders of vit or naflex with transformer, or of htsat with bert",
  "captioner": "captioners with whisper for audio alone",
}


def _warn(line: str) -> None:
  printing.log(f"mmjax: {line}", sys.stderr)


def import_hf(
  folder: str | os.PathLike,
  out: str | os.PathLike,
  log: Callable[[str], None] = _warn,
  adapter: str | os.PathLike = "",
) -> None:
  """Makes the import folder `out` (params, config, tokenizer) of a transformers folder. log: takes
  a line for each thing that the folder holds and the import leaves out. adapter: a folder of PEFT
  with an adapter of that model, which is imported with it, beside its kernels.

  Raises UserError: a file is missing or damaged, the model is of no family that is known here, its
  weights lack tensors or hold some that its config does not explain, or its preprocessing cannot be
  expressed.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(files_of.no_folder(folder))
  around = sentences.read(folder)
  if around:
    folder = around.encoder
  if open_clip.is_here(folder):
    family, (facts, tensors) = open_clip, open_clip.read(folder)
  else:
    facts = safetensors.read_json(folder / "config.json")
    family, tensors = _family(str(facts.get("model_type")), folder), None
  files = getattr(family, "BESIDE", ())
  facts.update(preprocessing.beside(folder, files))
  if files and files[0] not in facts:
    raise UserError(
      f"{folder}: no {files[0]}, so how its input was prepared is unknown. Copy it too"
    )
  tensors = single.without_prefix(
    safetensors.read_folder(folder) if tensors is None else tensors, family.PREFIX
  )
  if hasattr(family, "rename"):
    tensors = family.rename(tensors)
  if around:
    tensors = sentences.text_tensors(tensors)
  try:
    if around and facts.get("model_type") in (*LANGUAGE_MODELS, *WITH_MEDIA):
      raise UserError(
        f"model_type is {facts['model_type']!r}: a language model that embeds sentences is not "
        "supported, only encoders such as bert"
      )
    if facts.get("quantization_config"):
      raise UserError(
        "quantization_config: quantised weights are not supported. Save the model in float32, "
        "float16 or bfloat16"
      )
    if not around:
      single.check_architecture(facts, tensors, *getattr(family, "ARCHITECTURES", ()))
    found = family.settings(facts, tensors)
    for name in found.get("left_out", ()):
      del tensors[name]
    classes, names = found["model"].get("classes", 0), []
    if classes and found["model"]["name"] == "encoder":
      found["model"]["probabilities"] = single.scores(facts, classes)
      names = single.class_names(facts, classes)
    if around:
      sentences.add(found["model"], around)
      tensors.update(around.tensors)
  except UserError as error:
    raise UserError(f"{folder / getattr(family, 'CONFIG', 'config.json')}: {error}") from error
  c = mmjax.config.base()
  assets: dict[str, bytes] = {}
  c.model = found["model"]
  if "image" in c.model.encoders:
    c.data.image.update(
      found["image"] if "image" in found else preprocessing.image_settings(folder, family, found)
    )
  if "audio" in c.model.encoders:
    c.data.audio.update(found["audio"])
  if "text" in c.model.encoders or "decoder" in c.model:
    c.data.modalities = tuple(dict.fromkeys((*c.model.encoders, "text")))
    text: dict[str, Any] = {}
    # A decoder also writes without one.
    if "text" in c.model.encoders or preprocessing.has_tokenizer(folder):
      text, assets = preprocessing.text_settings(folder, family)
      text["tokenizer"] = str(folder.resolve())
    c.data.text.update(
      {**text, **found["text"]} if "decoder" in c.model else {**found["text"], **text}
    )
  elif c.model.name == "language_model":
    assets = decoders.prepare(c, folder, family, found)
  elif found.get("text"):  # of a CTC head
    c.data.text.update(found["text"])
  if "text" in c.model.encoders:
    length = found["text"]["length"]
    limit = around.length if around and around.length else preprocessing.longest_text(assets)
    if 0 < limit < length:
      c.model.encoders["text"]["max_positions"], c.data.text.length = length, limit
    c.data.text.lowercase = c.data.text.lowercase or bool(around and around.lowercase)
  for name in files[1:]:
    if name in facts:
      assets[name] = safetensors.read_bytes(folder / name, safetensors.LARGEST_JSON)
  if names:
    assets["classes.json"] = json.dumps(names).encode()
  c.precision.compute = "float32"
  config = mmjax.config.resolve(c)
  rules = [*family.rules(config), *sentences.rules(config)]
  on_disk = functools.partial(files_of.array_on_disk, out)
  with files_of.disk_errors(out, f"cannot write beside {out}"):
    params = mapping.to_params(tensors, rules, str(folder), on_disk)
  _check_shapes(config, params, rules, folder)
  if adapter:
    from mmjax.interop import peft

    config, params = peft.read(adapter, config, params, rules, family.PREFIX)
  state = {name: params.pop(name) for name in (mapping.STATISTICS,) if name in params}
  checkpoints.save_import(str(out), params, config, assets, state)
  notes = [*found.get("notes", ()), *(around.notes if around else ())]
  if "text" in c.model.encoders and preprocessing.cuts_the_start(assets):
    notes.append(
      f"its tokenizer cuts texts of more than {c.data.text.length} tokens at their start, but they "
      "are cut at their end here: shorten them before"
    )
  for note in notes:
    log(f"{folder}: {note}")


def _check_shapes(
  config: Any, params: Mapping[str, Any], rules: Sequence[mapping.Rule], where: Path
) -> None:
  """Raises UserError naming the tensor that makes a parameter of another shape than the model of
  the config has.
  """
  batch = batch_spec(config, 1)
  model = make_model(config)
  wanted = flax.traverse_util.flatten_dict(
    nn.unbox(jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)), sep="/"
  )
  theirs = {rule.ours: rule.theirs[0] for rule in rules}
  for name, value in flax.traverse_util.flatten_dict(params, sep="/").items():
    spec = wanted.get(name if name.startswith(f"{mapping.STATISTICS}/") else f"params/{name}")
    if spec is None or spec.shape != value.shape:
      needs = "does not belong to it" if spec is None else f"should have {list(spec.shape)}"
      raise UserError(
        f"{where}: {theirs[name].format(i=0)} gives a parameter of shape {list(value.shape)}, "
        f"which by its config.json {needs}"
      )


def export_hf(
  checkpoint: str | os.PathLike, out: str | os.PathLike, allow_code: Sequence[str] = ()
) -> Path:
  """Writes a checkpoint (run, step or import folder) as a folder for transformers: the family that
  can express it.

  Raises UserError: transformers has no such architecture (naming the settings), or `out` exists and
  is not empty.
  """
  out = Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out}: exists and is not empty. Choose another folder")
  found = checkpoints.find_checkpoint(os.fspath(checkpoint))
  config = _filled(checkpoints.load_config(found, allow_code).to_dict())
  assets = checkpoints.load_assets(found)
  family = _expressed_by(config)
  special, facts = {}, {}
  is_sentence = bool(config["model"].get("sentence_pooling"))
  if _tokenizes(config, assets):
    tokenizer = preprocessing.Tokenizer.from_assets(assets)
    special = {
      f"{name}_token_id": number
      for name in ("pad", "bos", "eos")
      if (number := getattr(tokenizer, f"{name}_id")) >= 0
    }
    facts = preprocessing.tokenizer_files(config, assets, family, lowercases=is_sentence)
  if "image" in config["model"]["encoders"]:
    facts["preprocessor_config.json"] = json.dumps(
      preprocessing.image_facts(config, family), indent=2
    ).encode()
  params = merge(checkpoints.load_params(found))
  variables = {**params, **checkpoints.load_model_state(found)}
  end = own_tokenizer.moved_end(config, assets)
  if end is not None:
    text = config["model"]["encoders"]["text"]
    table = own_tokenizer.swap_rows(variables["text"]["embedding"], text["eos_id"], end)
    variables["text"] = {**variables["text"], "embedding": table}
    text["eos_id"] = special["eos_token_id"] = end
  stated = family.facts(config, special)
  if config["model"].get("classes") and config["model"]["name"] == "encoder":
    stated.update(single.label_facts(config, json.loads(assets.get("classes.json", b"[]"))))
  facts["config.json"] = json.dumps(stated, indent=2).encode()
  if hasattr(family, "files"):
    facts.update(
      {
        name: json.dumps(content, indent=2).encode()
        for name, content in family.files(config, assets).items()
      }
    )
  tensors = mapping.to_tensors(variables, [*family.rules(config), *sentences.rules(config)])
  if hasattr(family, "constants"):
    tensors.update(family.constants(config))
  weights = {}
  if is_sentence:
    for name, content in sentences.files(config, tensors).items():
      if name.endswith(".safetensors"):
        weights[name] = content
      else:
        facts[name] = json.dumps(content, indent=2).encode()
  headed = config["model"]["name"] == "language_model"
  weights["model.safetensors"] = single.with_prefix(tensors, family.PREFIX, headed)
  with new_folder(out) as partial:
    for name in (*facts, *weights):
      (partial / name).parent.mkdir(exist_ok=True)
    for name, content in facts.items():
      (partial / name).write_bytes(content)
    for name, tensors in weights.items():
      safetensors.write(partial / name, tensors)
  return out


def export_adapter(
  checkpoint: str | os.PathLike, out: str | os.PathLike, allow_code: Sequence[str] = ()
) -> Path:
  """Writes the adapter of a checkpoint alone (config.lora), as a folder for PEFT. Raises UserError:
  it has none, or as `export_hf`.
  """
  from mmjax.interop import peft

  found = checkpoints.find_checkpoint(os.fspath(checkpoint))
  config = checkpoints.load_config(found, allow_code)
  filled = _filled(config.to_dict())
  family, params = _expressed_by(filled), checkpoints.load_params(found)
  with new_folder(Path(out)) as folder:
    peft.write(folder, config, params, family, family.rules(filled))
  return Path(out)


def check_export(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> str:
  """The architecture of transformers that `export_hf` would write for a model of this config with
  these assets. Raises UserError: as `export_hf`, of what can be known without parameters.
  """
  filled = _filled(config.to_dict() if hasattr(config, "to_dict") else dict(config))
  family = _expressed_by(filled)
  if _tokenizes(filled, assets):
    is_sentence = bool(filled["model"].get("sentence_pooling"))
    preprocessing.tokenizer_files(filled, assets, family, lowercases=is_sentence)
  own_tokenizer.moved_end(filled, assets)
  if "image" in filled["model"]["encoders"]:
    preprocessing.image_facts(filled, family)
  return family.ARCHITECTURE


def _tokenizes(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> bool:
  """Whether the folder of a model has a tokenizer: a decoder may do without."""
  found = any(name in assets for name in ("tokenizer.json", "tokenizer.model"))
  return found or "text" in config["model"]["encoders"]


def _family(model_type: str, where: Path) -> ModuleType:
  if model_type not in FAMILIES:
    raise UserError(
      f"{where / 'config.json'}: model_type {model_type!r} is not known here; there are: "
      f"{', '.join(FAMILIES)}"
    )
  return importlib.import_module(f"mmjax.interop.huggingface.{FAMILIES[model_type]}")


def _expressed_by(config: Mapping[str, Any]) -> ModuleType:
  """The family whose architecture the config has. Raises UserError naming what stands in the way of
  the nearest one.
  """
  name = config["model"]["name"]
  kinds = {modality: encoder["kind"] for modality, encoder in config["model"]["encoders"].items()}
  candidates: Sequence[str] = ()
  other: list[tuple[str, Any, tuple]] = []  # what is wrong whatever the family
  if name == "multitask" and len(kinds) == 1 and not config["model"].get("decoder"):
    other = [("model.name", name, ("encoder",))]
    name, config = "encoder", _as_encoder(config)
  if name == "encoder":
    other.append(("data.values", config["data"]["values"], (0,)))
    other.append(("model.ordinal", config["model"]["ordinal"], (False,)))
    candidates = [family for kind in kinds.values() for family in ALONE.get(kind, ())]
  if name == "dual_encoder" and kinds == {"image": "vit", "text": "transformer"}:
    candidates = DUAL
  if name == "dual_encoder" and kinds == {"image": "naflex", "text": "transformer"}:
    candidates = ("siglip2",)
  if name == "dual_encoder" and kinds == {"audio": "htsat", "text": "bert"}:
    candidates = ("clap",)
  if name == "captioner" and kinds == {"audio": "whisper"}:
    candidates = ("whisper",)
  if name == "language_model":
    candidates = WITH_MEDIA if kinds else LANGUAGE_MODELS
  if not candidates:
    raise UserError(
      f"transformers has no model for this one; the nearest are {NEAREST.get(name, SINGLE)}. "
      "Export to safetensors or stablehlo"
    )
  best: tuple[tuple[bool, int], str, list[str]] | None = None
  for name in candidates:
    family = _family(name, Path())
    try:
      refusals = family.refusals(config)
    except UserError:  # its config.json cannot even say this model's sizes
      continue
    lacks = [
      (key, f"{key} = {value!r} (needs {' or '.join(map(repr, allowed))})")
      for key, value, allowed in (*other, *refusals, *sentences.refusals(config))
      if value not in allowed
    ]
    if not lacks:
      return family
    distance = any(key in ASKED_FIRST for key, _ in lacks), len(lacks)
    if best is None or distance < best[0]:
      best = distance, family.ARCHITECTURE, [reason for _, reason in lacks]
  _, nearest, why = best or ((), "", [])
  raise UserError(
    f"transformers cannot express this model; nearest is {nearest}, but for "
    f"{', '.join(why)}. Export to safetensors or stablehlo"
  )


def _as_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config of the single encoder with a classifier that is nearest to a model of several heads
  over one encoder."""
  function = kind_function(dict(name="encoder"), "model")
  model = {name: setting.default for name, setting in kind_settings(function).items()}
  classes = config["data"]["classes"] if config["data"]["label"] != "none" else 0
  kept = {key: config["model"][key] for key in ("encoders", "width")}
  return {**config, "model": {**model, **kept, "name": "encoder", "classes": classes}}


def _filled(config: dict[str, Any]) -> dict[str, Any]:
  """The config with the widths, heads and hidden units that are 0 (for "the usual") written out."""
  for encoder in (*config["model"]["encoders"].values(), config["model"].get("decoder")):
    if not encoder or "depth" not in encoder:  # no plain stack of blocks
      continue
    encoder["width"] = encoder.get("width") or config["model"]["width"]
    encoder["heads"] = encoder.get("heads") or max(1, encoder["width"] // 64)
    encoder["mlp"] = encoder.get("mlp") or 4 * encoder["width"]
  return config
