"""LLaVA-1.5 (model_type "llava", Liu et al. 2023, arXiv:2310.03744): CLIP's tower of pictures
without its last layers, two dense layers, and one of the families of language models.

The tower's layers above vision_feature_layer, and its last norm, have no part in the model: an
import leaves them out, an export writes a tower that ends where the model reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clip, decoders, mapping, single, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.with_media import BESIDE as BESIDE
from mmjax.interop.huggingface.with_media import rename as rename

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "PreTrainedTokenizerFast", "LlavaProcessor", "model."
IMAGE_PROCESSOR_CLASS, PREPROCESSOR = "CLIPImageProcessor", clip.PREPROCESSOR
ARCHITECTURE, PAD, MASK_PADDING = "LlavaForConditionalGeneration", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "LlavaModel"),)
TEXT = ("llama", "mistral", "qwen2", "qwen3")  # families that may write

# What transformers assumes where config.json is silent, and where it has no vision_config.
FACTS = dict(vision_feature_select_strategy="default", vision_feature_layer=-2)
FACTS |= dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
FACTS |= dict(tie_word_embeddings=False, image_token_index=32_000)
LARGE = dict(intermediate_size=4096, hidden_size=1024, patch_size=14, image_size=336)
LARGE |= dict(num_hidden_layers=24, num_attention_heads=16)
UNUSED = re.compile(r"vision_tower\.(post_layernorm\.|encoder\.layers\.(\d+)\.)")


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  vision = {**clip.VISION, **(f.get("vision_config") or LARGE)}
  with_media.only_tower(vision, "clip_vision_model")
  tied = f["tie_word_embeddings"] or (f.get("text_config") or {}).get("tie_word_embeddings")
  found = with_media.text_settings(f, tensors, TEXT, "llama", tie_word_embeddings=tied)
  depth = depth_below(f["vision_feature_layer"], vision["num_hidden_layers"])
  image = clip.vision_settings(dict(vision, num_hidden_layers=depth))
  image.update(pooling="class", input_norm=True, patch_bias=False, final_norm=False)
  whole = f["vision_feature_select_strategy"] == "full"  # with the class token
  connector = dict(connector_settings(f), skip=0 if whole else 1)
  found["model"].update(
    encoders=dict(image=image),
    connectors=dict(image=connector),
    media_ids=dict(image=f.get("image_token_id", f["image_token_index"])),
  )
  for name in tensors:
    if (match := UNUSED.match(name)) and (match[2] is None or int(match[2]) >= depth):
      found["left_out"].append(name)
  size = single.image_size(vision)
  return dict(found, image_size=size, places=dict(image=(size // image["patch"]) ** 2 + whole))


def connector_settings(f: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of its two dense layers."""
  activation = single.activation(f, clip.ACTIVATIONS, "projector_hidden_act")
  bias = f["multimodal_projector_bias"]
  return dict(kind="mlp", width=0, layers=2, bias=bias, activation=activation)


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json: how texts are generated, and how many tokens
  stand for a picture.
  """
  return with_media.files(
    config,
    assets,
    processor_class=PROCESSOR_CLASS,
    patch_size=config["model"]["encoders"]["image"]["patch"],
    vision_feature_select_strategy=_strategy(config),
    num_additional_image_tokens=1,
  )


def _strategy(config: Mapping[str, Any]) -> str:
  return "default" if config["model"]["connectors"]["image"]["skip"] else "full"


def depth_below(layer: Any, layers: int) -> int:
  """The layers of the tower below `layer`, counted as transformers counts its hidden states."""
  depth = layer + layers + 1 if isinstance(layer, int) and layer < 0 else layer
  if not isinstance(depth, int) or not 0 < depth <= layers:
    raise UserError(f"vision_feature_layer is {layer!r}, but one of {layers} layers is supported")
  return depth


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a LlavaForConditionalGeneration that it reads."""
  tower = clip.image_rules(config["model"]["encoders"]["image"], "vision_tower.")
  return [
    *(rule for rule in tower if not rule.ours.startswith("image/norm/")),
    *connector_rules(config),
    *with_media.text_rules(config, TEXT),
  ]


def connector_rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of its two dense layers."""
  biased, at = config["model"]["connectors"]["image"]["bias"], "multi_modal_projector.linear_"
  return [
    rule
    for i in (1, 2)
    for rule in mapping.linear(f"image_connector/layer{i}", f"{at}{i}", bias=biased)
  ]


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The norm that a file has and the model does not read."""
  width = config["model"]["encoders"]["image"]["width"]
  at = "vision_tower.post_layernorm"
  return {f"{at}.weight": np.ones(width, np.float32), f"{at}.bias": np.zeros(width, np.float32)}


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a LlavaForConditionalGeneration must have."""
  if other := with_media.parts_refusals(config, image=("vit", "mlp")):
    return other
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a LlavaForConditionalGeneration."""
  return with_media.config_json(
    config,
    special,
    "llava",
    ARCHITECTURE,
    with_media.text_facts(config, special, TEXT),
    vision_config=clip.image_facts(config),
    vision_feature_select_strategy=_strategy(config),
    vision_feature_layer=-1,
    **connector_facts(config),
    image_token_index=config["model"]["media_ids"].get("image", 0),
    image_seq_length=config["data"]["sequence"]["image"],
  )


def connector_facts(config: Mapping[str, Any]) -> dict[str, Any]:
  """The keys of config.json for its two dense layers."""
  connector = config["model"]["connectors"]["image"]
  names = {ours: theirs for theirs, ours in reversed(clip.ACTIVATIONS.items())}
  activation = names.get(connector["activation"], "gelu")
  return dict(projector_hidden_act=activation, multimodal_projector_bias=connector["bias"])
