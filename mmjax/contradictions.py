"""Contradictions between the keys of a config: what each key allows, but not together.

Ranges of single keys stand with the keys (keys.py), those of settings with their kinds. All of it
is checked before any device is touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from mmjax import regexes
from mmjax.errors import ConfigError
from mmjax.kinds import kind_function


def check(config: dict | FrozenConfigDict, device_count: int | None = None) -> None:
  """Refuses contradictions that can be seen without a device; with `device_count`, also a mesh that
  does not fit it.
  """
  c = config.to_dict() if hasattr(config, "to_dict") else config
  _check_batch(c, mesh_shape(c["mesh"], device_count))
  _check_run(c)
  _check_modalities(c, c["model"].get("encoders", {}))
  _check_model(c["model"], c["model"].get("encoders", {}))
  _check_sequences(c)
  _check_objectives(c)
  _check_pictures(c, c["model"].get("encoders", {}).get("image", {}))
  _check_text(c)
  _check_optimizers(c, c.get("optimizers", {}))
  _check_sources(c["data"])


def asks_side_by_side(c: Mapping[str, Any]) -> bool:
  """Whether several questions of a language model's rows follow the tokens of one medium. Where
  these see the question too, or tokens only what is near, each question has its own.
  """
  asks = any(entry.get("text") == "question" for entry in c["data"]["sources"].values())
  windows = any((c["model"].get("block") or {}).get("windows") or ())
  apart = windows or c["model"].get("both_ways") == "prompt"
  return asks and c["data"]["text"]["per_example"] > 1 and not apart


def _check_sequences(c: dict) -> None:
  """A language model has rows of tokens, in which each medium has places; no other model has."""
  sequence, model = c["data"]["sequence"], c["model"]
  group, image = c["data"]["video"]["group"], model.get("encoders", {}).get("image") or {}
  if group and ("connectors" not in model or image.get("frames") != group):
    raise ConfigError(
      f"data.video.group is {group}: clips are read by the encoder of pictures, which needs "
      f"model.encoders.image.frames={group} in a language model. Set both, or neither"
    )
  if "connectors" not in model:
    if sequence["length"]:
      raise ConfigError(
        f"data.sequence.length is {sequence['length']}, but model.name is {model.get('name')!r}, "
        "which reads no sequences. Set model.name='language_model', or the length to 0"
      )
    return
  if not sequence["length"]:
    raise ConfigError(
      "data.sequence.length is 0, but a language model needs rows of tokens: set it, such as 256"
    )
  for modality in model["encoders"]:
    if modality == "text":
      raise ConfigError(
        "model.encoders has text, but a language model reads its text itself. Leave it out"
      )
    if modality not in model["connectors"]:
      raise ConfigError(
        f"model.encoders.{modality} has no connector: give one, such as "
        f"model.connectors.{modality}=dict(kind='mlp')"
      )
    if modality in sequence and not sequence[modality]:
      raise ConfigError(
        f"data.sequence.{modality} is 0: say how many tokens a medium takes, which is what "
        f"model.connectors.{modality} gives"
      )
  talks = any(entry["text"] == "conversation" for entry in c["data"]["sources"].values())
  if talks and model["both_ways"] == "prompt" and c["data"]["text"]["loss"] == "every":
    raise ConfigError(
      "model.both_ways='prompt' reads all before an answer as one prompt, but with data.text.loss="
      "'every' only what is before the first answer is learned so. Set the loss to 'each' or "
      "'last', or both_ways to 'media'"
    )
  tiles = c["data"]["image"]["tiles"]
  if tiles["least"] > tiles["most"]:
    raise ConfigError(
      f"data.image.tiles.least is {tiles['least']}, but data.image.tiles.most is {tiles['most']}"
    )
  sections = ((model.get("block") or {}).get("rotary") or {}).get("sections") or ()
  if len(sections) not in (0, 3):
    raise ConfigError(
      f"model.block.rotary.sections is {tuple(sections)}, but the positions of a language model "
      "have 3 axes: time, row and column"
    )
  grids = tiles["grids"]
  if any(not isinstance(grid, tuple) or len(grid) != 2 for grid in grids):
    raise ConfigError(
      f"data.image.tiles.grids is {grids}, but has to have pairs (rows, columns), such as ((1, 2),)"
    )
  if grids and (count := max(rows * columns for rows, columns in grids)) > tiles["most"]:
    raise ConfigError(
      f"data.image.tiles.grids has {count} tiles, but data.image.tiles.most is {tiles['most']}. "
      "Raise it"
    )
  if grids and "image" in model["encoders"] and not _ends_rows(model, sequence):
    raise ConfigError(
      f"data.image.tiles.grids needs a connector with an end of rows, and squares of tokens beside "
      f"it: set model.connectors.image.end=True, and data.sequence.image, which is "
      f"{sequence['image']}, to a square plus 1"
    )
  for key, text in (
    ("prompt", sequence["prompt"]),
    *((f"written.{name}", text) for name, text in sequence["written"].items()),
  ):
    if text.count("{}") != 1:
      raise ConfigError(
        f"data.sequence.{key} is {text!r}, but has to have {{}} once, where the medium or the text "
        "stands"
      )
  for modality in model["connectors"]:
    if modality not in model["encoders"]:
      raise ConfigError(f"model.connectors.{modality} has no encoder in model.encoders")


def _ends_rows(model: dict, sequence: dict) -> bool:
  """Whether the tokens of a picture are a square and one that ends a row."""
  connector, tokens = model["connectors"]["image"], sequence["image"] - 1
  return bool(connector.get("end")) and math.isqrt(tokens) ** 2 == tokens


def _check_batch(c: dict, mesh: dict[str, int]) -> None:
  """Microbatches and devices divide the batch."""
  batch, micro = c["train"]["batch_size"], c["train"]["microbatches"]
  if batch % micro:
    raise ConfigError(
      f"train.batch_size {batch} is not divisible by train.microbatches {micro}; "
      f"the nearest that is: {_nearest_multiple(batch, micro)}"
    )
  shards = 1
  for axis in ("replica", "data", "fsdp"):
    shards *= max(1, mesh[axis])
  if batch // micro % shards:
    raise ConfigError(
      f"train.batch_size {batch}{f' / {micro} microbatches' if micro > 1 else ''} is not "
      f"divisible by the {shards} devices of mesh.replica x data x fsdp; the nearest that is: "
      f"{_nearest_multiple(batch, micro * shards)}"
    )
  evaluation_batch = c["evaluation"]["batch_size"] or batch
  if evaluation_batch % shards:
    raise ConfigError(
      f"evaluation.batch_size {evaluation_batch} is not divisible by the {shards} devices of the "
      f"mesh; the nearest that is: {_nearest_multiple(evaluation_batch, shards)}"
    )


def _check_run(c: dict) -> None:
  """Length, recovery, checkpoints and code of the run."""
  if not 0 <= c["train"]["rollback"] < max(1, c["train"]["max_skipped"]):
    raise ConfigError(
      f"train.rollback is {c['train']['rollback']}, but must be 0 or less than train.max_skipped "
      f"({c['train']['max_skipped']}), after which the run ends"
    )
  best = c["checkpoint"]["best"]
  evaluators = c["evaluation"]["evaluators"]
  if best and not any(best.startswith(f"{name}/") for name in evaluators):
    raise ConfigError(
      f"checkpoint.best {best!r} is no metric of evaluation.evaluators, which has "
      f"{', '.join(evaluators) or 'none'}. Write EVALUATOR/METRIC"
    )
  if "provenance" in evaluators:
    raise ConfigError(
      "evaluation.evaluators.provenance: eval.json says under that name what its scores are of. "
      "Choose another name"
    )
  if c["evaluation"]["patience"] and not best:
    raise ConfigError(
      "evaluation.patience waits for a better checkpoint.best, which is empty. Name a metric, such "
      "as 'EVALUATOR/loss'"
    )
  if "%" in str(c["train"]["steps"]):
    raise ConfigError(
      f"train.steps {c['train']['steps']!r} is a share of itself. Write steps, '2 epochs' or '1e6 "
      "examples'"
    )
  if not all(isinstance(module, str) for module in c["allow_code"]):
    raise ConfigError(f"allow_code must be names of modules, not {c['allow_code']!r}")


def _check_modalities(c: dict, encoders: dict) -> None:
  """Every modality that a setting names has an encoder."""
  have = ", ".join(sorted(encoders)) or "none"
  named = [(f"model.{key}", c["model"].get(key)) for key in ("unprojected", "masked_patches")]
  if "query" in (c["model"].get("fusion") or {}):
    named.append(("model.fusion.query", c["model"]["fusion"]["query"]))
  for name, entry in c["objectives"].items():
    named += [
      (f"objectives.{name}.{key}", entry.get(key))
      for key in ("between", "modalities", "context", "source", "modality")
    ]
  for name, entry in c["evaluation"]["evaluators"].items():
    named += [
      (f"evaluation.evaluators.{name}.{key}", entry.get(key))
      for key in ("between", "modalities", "context_modalities", "modality")
    ]
  for path, modalities in named:
    for modality in (modalities,) if isinstance(modalities, str) else modalities or ():
      if modality not in encoders:
        raise ConfigError(
          f'{path} names "{modality}", but model.encoders has {have}. '
          f"Add an encoder for it or change `{path.rpartition('.')[2]}`"
        )


def _check_model(model: dict, encoders: dict) -> None:
  """Limits of the scale, bands of spectrograms, and heads that divide the width they share."""
  if "scale_max" in model and model["scale_init"] > model["scale_max"]:
    raise ConfigError(
      f"model.scale_init {model['scale_init']} is above model.scale_max {model['scale_max']}"
    )
  audio = encoders.get("audio", {})
  if audio.get("frequency_width", 0) > audio.get("mels", math.inf):
    raise ConfigError(
      f"model.encoders.audio.frequency_width {audio['frequency_width']} is above mels "
      f"{audio['mels']}"
    )
  entries = {f"encoders.{name}": entry for name, entry in encoders.items()}
  entries |= {name: model[name] for name in ("fusion", "decoder") if model.get(name)}
  for name, entry in entries.items():
    width, heads = entry.get("width") or model.get("width", 512), entry.get("heads")
    if isinstance(heads, int) and heads and width % heads:
      raise ConfigError(
        f"model.{name}: width {width} is not divisible by {heads} heads; "
        f"the nearest that is: {_nearest_multiple(width, heads)}"
      )


def _check_objectives(c: dict) -> None:
  """What objectives train on is there, and who updates for them."""
  groups, data = c.get("optimizers", {}), c["data"]
  for name, entry in c["objectives"].items():
    if entry["kind"] in ("classification", "ordinal"):
      _check_classes(f"objectives.{name}", entry, c)
    if entry["kind"] == "preference":
      _check_preference(f"objectives.{name}", entry, c)
    if entry["kind"] == "grpo":
      _check_grpo(f"objectives.{name}", entry, c)
    if entry["kind"] == "regression" and not data["values"]:
      raise ConfigError(
        f"objectives.{name} predicts values, but data.values is 0. Set it to how many a record has"
      )
  for name, entry in c["evaluation"]["evaluators"].items():
    if entry["kind"] == "classification":
      _check_classes(f"evaluation.evaluators.{name}", entry, c)
  for name, entry in c["objectives"].items():
    if entry.get("group") and entry["group"] not in groups:
      raise ConfigError(
        f"objectives.{name}.group is {entry['group']!r}, but optimizers has "
        f"{', '.join(groups) or 'none'}. Give it an optimizer: c.optimizers.{entry['group']} = "
        "dict(name='adamw', params=r'discriminator/.*')"
      )
  if c["train"]["mixup"]:
    _check_mixup(c["objectives"])


def _check_preference(where: str, entry: dict, c: dict) -> None:
  """Judged answers to learn from, settings that the form uses, and no part of a batch alone."""
  sources, form = c["data"]["sources"], entry["form"]
  if sources and all(source["text"] != "preference" for source in sources.values()):
    raise ConfigError(
      f"{where} learns from judged answers, but no entry of data.sources has text='preference'. "
      "Set it for the one that has them"
    )
  unused = {"dpo": ("desirable", "undesirable"), "kto": ("label_smoothing",)}
  unused["ipo"] = unused["dpo"] + unused["kto"]
  for name in unused.get(form, ()):
    if entry[name] != (0 if name == "label_smoothing" else 1):
      raise ConfigError(
        f"{where}.{name} is {entry[name]}, but form {form!r} has none. Leave it out"
      )
  if form == "kto" and c["train"]["microbatches"] > 1:
    raise ConfigError(
      f"{where}: form 'kto' compares each answer with others of the whole batch, but "
      f"train.microbatches is {c['train']['microbatches']}. Set it to 1, or choose another form"
    )


def _check_grpo(where: str, entry: dict, c: dict) -> None:
  """Prompts to answer, something to reward, and nothing else to learn from the answers."""
  sequence, sources = c["data"]["sequence"], c["data"]["sources"]
  if len(c["objectives"]) > 1 or entry["sources"]:
    others = [name for name in c["objectives"] if where != f"objectives.{name}"]
    what = f"objectives.{others[0]}" if others else f"{where}.sources"
    raise ConfigError(
      f"{where} trains on answers that the model draws to every prompt of a batch, so that {what} "
      "has no place beside it. Leave it out"
    )
  for name, source in sources.items():
    if source["text"] not in ("question", "conversation"):
      raise ConfigError(
        f"{where} answers prompts, but data.sources.{name}.text is {source['text']!r}. Set it to "
        "'question' or 'conversation'"
      )
  if 0 < sequence["length"] <= entry["max_length"]:
    raise ConfigError(
      f"{where}.max_length is {entry['max_length']}, but rows have data.sequence.length "
      f"{sequence['length']} for a prompt and an answer. Raise the length"
    )
  if not entry["exact"] + entry["right"] + entry["form"]:
    raise ConfigError(
      f"{where}: exact, right and form are all 0, so that nothing is rewarded. Raise one"
    )
  pairs = (("right", "check"), ("beta", "teacher"))
  for number, other in (*pairs, ("form", "pattern")):
    if entry[other] and not entry[number]:
      raise ConfigError(
        f"{where}.{other} is {entry[other]!r}, but {where}.{number} is 0, so that it would count "
        f"for nothing. Raise {number}, or leave {other} out"
      )
  for number, other in pairs:
    if entry[number] and not entry[other]:
      what = "a checkpoint, such as that of init.from" if other == "teacher" else "module:function"
      raise ConfigError(
        f"{where}.{number} is {entry[number]}, but {where}.{other} is empty. Set it to {what}"
      )
  _check_regex(f"{where}.pattern", entry["pattern"])


def _check_classes(where: str, entry: dict, c: dict) -> None:
  """Labels to classify by, a number of classes, and a weight for each class."""
  weights, data, model = entry.get("class_weights", ()), c["data"], c["model"]
  if data["label"] == "none":
    raise ConfigError(
      f"{where} classifies, but data.label is 'none'. Set it to 'label', 'labels' or 'answer'"
    )
  if ":" not in model["name"] and not (model.get("classes") or data["classes"]):
    key = "model.classes" if model["name"] == "encoder" else "data.classes"
    raise ConfigError(
      f"{where} classifies, but {key} is 0. Set it to the number of classes, which `mmjax init "
      "classification` counts"
    )
  if entry["kind"] == "ordinal" and data["label"] != "label":
    raise ConfigError(
      f"{where} needs one label a record, but data.label is {data['label']!r}. Set it to 'label'"
    )
  if weights == "balanced" and any(source["balance"] for source in data["sources"].values()):
    raise ConfigError(
      f"{where}.class_weights 'balanced' and data.sources.*.balance both even out the classes: "
      "leave one of them out"
    )
  if weights != "balanced" and weights and len(weights) != data["classes"]:
    raise ConfigError(
      f"{where}.class_weights has {len(weights)} numbers, but data.classes is {data['classes']}. "
      "Give one for each class, or 'balanced'"
    )


def _check_mixup(objectives: dict) -> None:
  """Refuses objectives whose targets do not follow blended pictures. Which modalities one reads is
  told by its settings; one that has none for it is taken to read pictures."""
  for name, entry in objectives.items():
    named = [entry[key] for key in ("between", "modalities", "context", "source") if key in entry]
    read = {modality for some in named for modality in some}
    read |= {entry["modality"]} if "modality" in entry else set() if named else {"image"}
    sound = getattr(kind_function(entry, "objective"), "mixup", "never")
    if "image" not in read or sound == "always" or (sound == "alone" and read == {"image"}):
      continue
    others = f" together with {', '.join(sorted(read - {'image'}))}" if sound == "alone" else ""
    raise ConfigError(
      f"train.mixup blends pictures, but objectives.{name} ({entry['kind']}) trains on "
      f"them{others} as if each were one picture. Set train.mixup to 0, or leave the objective out"
    )


def _check_pictures(c: dict, encoder: dict) -> None:
  """Pictures are cut as their encoder takes them."""
  patch = encoder.get("patch")
  if c["data"]["image"]["resize"] == "naflex":
    kind, cut = encoder.get("kind", ""), c["data"]["image"]["patch"]
    if kind != "naflex" and ":" not in kind:
      raise ConfigError(
        "data.image.resize 'naflex' gives patches of any aspect ratio, which model.encoders.image "
        f"({kind or 'missing'}) does not take. Set its kind to 'naflex', or choose another resize"
      )
    if patch and patch != cut:
      raise ConfigError(
        f"data.image.patch is {cut}, but model.encoders.image.patch is {patch}. Make them equal"
      )
    if c["train"]["mixup"]:
      raise ConfigError(
        "train.mixup mixes pictures of one size, but data.image.resize is 'naflex'. Set "
        "train.mixup to 0"
      )
  elif patch and c["data"]["image"]["size"] % patch and not encoder.get("crop_edge"):
    raise ConfigError(
      f"data.image.size {c['data']['image']['size']} is not divisible by "
      f"model.encoders.image.patch {patch}; the nearest that is: "
      f"{_nearest_multiple(c['data']['image']['size'], patch)}"
    )


def _check_text(c: dict) -> None:
  reads = "text" in c["model"].get("encoders", {}) or c["data"]["sequence"]["length"]
  if reads and c["data"]["sources"] and not c["data"]["text"]["tokenizer"]:
    raise ConfigError(
      "the model reads text, but data.text.tokenizer is empty. Make one with `mmjax data "
      "tokenizer` and name it"
    )
  if c["data"]["text"]["bos"] and c["model"].get("decoder"):
    raise ConfigError(
      "data.text.bos puts <bos> before every text, but model.decoder starts from a prompt of its "
      "own and would learn to repeat <bos>. Set data.text.bos to False"
    )


def _check_optimizers(c: dict, groups: dict) -> None:
  """Groups, regular expressions and moments of the optimizers."""
  if "main" in groups:
    raise ConfigError(
      "optimizers.main: that is the group of `optimizer` itself. Choose another name"
    )
  owners = {"optimizer": c["optimizer"]}
  owners |= {f"optimizers.{name}": entry for name, entry in groups.items()}
  for owner, entry in owners.items():
    _check_regex(f"{owner}.decay", entry["decay"])
    if entry["moments"] == "source" and c["data"]["mix"] != "steps":
      raise ConfigError(
        f"{owner}.moments 'source' needs steps of one source each: set data.mix to 'steps', or "
        "leave moments 'shared'"
      )
  for name, entry in groups.items():
    _check_regex(f"optimizers.{name}.params", entry["params"])
  _check_regex("lora.params", c["lora"]["params"])
  for pattern in c["lora"]["full"]:
    _check_regex("lora.full", pattern)
  pairs = {f"{owner}.rates": entry["rates"] for owner, entry in owners.items()}
  for path, rules in (pairs | {"init.map": c["init"]["map"]}).items():
    for pair in rules:
      other = path == "init.map" and isinstance(pair, (tuple, list)) and len(pair) == 3
      if other and not (pair[2] and isinstance(pair[2], str)):
        raise ConfigError(f"init.map: {pair!r} names no checkpoint as its third item")
      if other and not c["init"]["from"]:
        raise ConfigError(f"init.map names {pair[2]}, but init.from is empty: name the main one")
      if not isinstance(pair, (tuple, list)) or not (len(pair) == 2 or other):
        raise ConfigError(f"{path} must be ((regex, value), ...), not {pair!r}")
      _check_regex(path, pair[0])


def _check_sources(data: dict) -> None:
  """Sources that are read, and lengths of their own."""
  sources = data["sources"]
  if sources and not any(entry["weight"] for entry in sources.values()):
    raise ConfigError(
      f"data.sources.{next(iter(sources))}.weight: every source has weight 0, so nothing would be "
      "read"
    )
  for name, entry in sources.items():
    _check_balance(name, entry, data)
    if not entry["name"]:
      raise ConfigError(
        f"data.sources.{name}.name is empty: name a data set, or 'tars' with a path"
      )
    length, most = entry["length"], data["text"]["length"]
    if length and data["mix"] != "steps":
      raise ConfigError(
        f"data.sources.{name}.length is {length}, but the rows of a batch are of one length "
        "unless data.mix is 'steps'"
      )
    if length and not 2 <= length <= most:
      raise ConfigError(
        f"data.sources.{name}.length is {length}, but must be from 2 to data.text.length {most}, "
        "or 0"
      )


def _check_balance(name: str, entry: dict, data: dict) -> None:
  """Records are drawn by one label each, one by one."""
  if not entry["balance"]:
    return
  if data["label"] not in ("none", "label"):
    raise ConfigError(
      f"data.sources.{name}.balance needs one label a record, but data.label is {data['label']!r}. "
      "Use class_weights of the objective instead"
    )
  if entry["group"] > 1 or data["sequence"]["length"]:
    raise ConfigError(
      f"data.sources.{name}.balance draws records one by one: set group to 1, and no data.sequence"
    )


def mesh_shape(mesh: Mapping, device_count: int | None = None) -> dict[str, int]:
  """{axis: size}, with -1 filled in when `device_count` is known. Raises ConfigError when the axes
  do not fit it.
  """
  shape = dict(mesh)
  free = [axis for axis, size in shape.items() if size == -1]
  if len(free) > 1:
    raise ConfigError(
      f"mesh.{free[0]} and mesh.{free[1]} are both -1: only one axis can take what is left"
    )
  fixed = 1
  for axis, size in shape.items():
    if size != -1 and size < 1:
      raise ConfigError(f"mesh.{axis} is {size}: give a size of at least 1, or -1 for what is left")
    fixed *= max(1, size)
  if device_count is not None:
    if device_count % fixed or (not free and fixed != device_count):
      sizes = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != 1)
      raise ConfigError(
        f"mesh ({sizes}) does not divide the {device_count} devices there are. "
        f"Set one axis to -1, or sizes with a product of {device_count}"
      )
    if free:
      shape[free[0]] = device_count // fixed
  return shape


def _nearest_multiple(value: int, divisor: int) -> int:
  return max(divisor, round(value / divisor) * divisor)


def _check_regex(path: str, pattern: Any) -> None:
  try:
    regexes.compiled(pattern)
  except (re.error, TypeError) as error:
    raise ConfigError(f"{path}: {pattern!r} is no regular expression ({error})") from error
