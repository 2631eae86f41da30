"""What the families of language models with pictures and sounds share: the names of their tensors,
the language model inside them, their towers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clip, decoders, mapping, siglip
from mmjax.interop.huggingface.mapping import Rule

PROCESSOR = "processor_config.json"
BESIDE = ("config.json", decoders.GENERATION, PROCESSOR)
OLDER = re.compile(  # parts of names
  r"^language_model\.(?=lm_head\.)|(?<=^language_model\.)model\.|(?<=^vision_tower\.)vision_model\."
)


def rename(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors under the names that transformers has since version 4.52, less their "model."."""
  return {OLDER.sub("", name): x for name, x in tensors.items()}


def text_settings(
  f: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  names: Sequence[str],
  usual: str,
  at: str = "language_model.",
  **stated: Any,
) -> dict[str, Any]:
  """The settings of the text_config of `f`, which is of one of the families `names`, `usual` where
  it does not say. at: what names of its tensors begin with. stated: what overrides it.
  """
  text = {**(f.get("text_config") or {}), **stated}
  own = {name.removeprefix(at): x for name, x in tensors.items()}
  ids = {key: f[key] for key in (decoders.GENERATION, "pad_token_id") if key in f}
  return decoders.family(text.get("model_type", usual), names).settings({**text, **ids}, own)


def text_rules(
  config: Mapping[str, Any], names: Sequence[str], at: str = "language_model."
) -> list[Rule]:
  """The weights of the language model, whose names begin with `at`."""
  rules = decoders.nearest(config, names).rules(decoders.without_encoders(config))
  return [
    *(r for r in rules if decoders.HEAD in r.theirs),
    *mapping.under(at, [r for r in rules if decoders.HEAD not in r.theirs]),
  ]


def text_facts(
  config: Mapping[str, Any], special: Mapping[str, int], names: Sequence[str]
) -> dict[str, Any]:
  """The text_config of the language model."""
  return decoders.nearest(config, names).facts(decoders.without_encoders(config), special)


def config_json(
  config: Mapping[str, Any],
  special: Mapping[str, int],
  model_type: str,
  architecture: str,
  text: Mapping[str, Any],
  **stated: Any,
) -> dict[str, Any]:
  """A config.json: what all of these say, with `text` for the language model, and what one has
  `stated`.
  """
  return dict(
    model_type=model_type,
    architectures=[architecture],
    torch_dtype="float32",
    text_config=text,
    tie_word_embeddings=text["tie_word_embeddings"],
    **stated,
    **decoders.token_facts(config, special),
  )


def siglip_settings(
  f: Mapping[str, Any], model_type: str = "siglip_vision_model", **usual: Any
) -> tuple[dict[str, Any], int]:
  """(settings of the tower of a vision_config, which is SigLIP's; size of its pictures). usual:
  what holds where it is silent.
  """
  vision = {**siglip.VISION, **usual, **(f.get("vision_config") or {})}
  only_tower(vision, model_type)
  image = clip.vision_settings(vision)
  image.update(pooling="mean", input_norm=False, patch_bias=True)
  return image, clip.square(vision["image_size"], "vision_config.image_size")


def siglip_rules(image: Mapping[str, Any], at: str = "vision_tower.") -> list[Rule]:
  """The weights of a tower of SigLIP without its head."""
  return [*siglip.patch_rules(image, at), *siglip.image_rules(image, at)]


def only_tower(stated: Mapping[str, Any], model_type: str, key: str = "vision_config") -> None:
  """Raises UserError: a tower of another family."""
  if (kind := stated.get("model_type", model_type)) != model_type:
    raise UserError(f"{key}.model_type is {kind!r}, but only {model_type} is supported")


def piece(stated: Mapping[str, Any], name: str) -> str:
  """The special piece of this name in a tokenizer_config.json. Raises UserError: it has none."""
  found = stated.get(name) or (stated.get("extra_special_tokens") or {}).get(name)
  if not found:
    raise UserError(f"tokenizer_config.json has no {name}, which the processor writes around media")
  return str(found["content"] if isinstance(found, Mapping) else found)


def parts_refusals(config: Mapping[str, Any], **wanted: tuple[str, str]) -> list[tuple]:
  """A refusal unless the config has just these encoders and connectors, {modality: kinds}."""
  encoders, connectors = config["model"]["encoders"], config["model"]["connectors"]
  kinds = {name: (encoders[name]["kind"], connectors[name]["kind"]) for name in encoders}
  return [] if kinds == wanted else [("model.encoders", kinds, (wanted,))]


def files(
  config: Mapping[str, Any], assets: Mapping[str, bytes], **stated: Any
) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json: how texts are generated, and what the
  processor is `stated` to do.
  """
  known = json.loads(assets.get(PROCESSOR, b"{}"))
  known.pop("image_processor", None)  # preprocessor_config.json has it
  known.pop("feature_extractor", None)
  known.pop("video_processor", None)
  return {**decoders.files(config, assets), PROCESSOR: {**known, **stated}}
