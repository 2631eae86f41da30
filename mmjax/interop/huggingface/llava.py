"""LLaVA-1.5 (model_type "llava", Liu et al. 2023, arXiv:2310.03744): CLIP's tower of pictures
without its last layers, two dense layers, and one of the families of language models.

The tower's layers above vision_feature_layer, and its last norm, have no part in the model: an
import leaves them out, an export writes a tower that ends where the model reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clip, decoders, mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "PreTrainedTokenizerFast", "LlavaProcessor", "model."
IMAGE_PROCESSOR_CLASS, PREPROCESSOR = "CLIPImageProcessor", clip.PREPROCESSOR
ARCHITECTURE, PAD, MASK_PADDING = "LlavaForConditionalGeneration", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "LlavaModel"),)
PROCESSOR = "processor_config.json"
BESIDE = ("config.json", decoders.GENERATION, PROCESSOR)
TEXT = ("llama", "mistral", "qwen2", "qwen3")  # families that may write

# What transformers assumes where config.json is silent.
FACTS = dict(vision_feature_select_strategy="default", vision_feature_layer=-2)
FACTS |= dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
FACTS |= dict(tie_word_embeddings=False, image_token_index=32_000)
# Where it has no vision_config.
LARGE = dict(intermediate_size=4096, hidden_size=1024, patch_size=14, image_size=336)
LARGE |= dict(num_hidden_layers=24, num_attention_heads=16)
OLDER = re.compile(  # parts of names
  r"^language_model\.(?=lm_head\.)|(?<=^language_model\.)model\.|(?<=^vision_tower\.)vision_model\."
)
UNUSED = re.compile(r"vision_tower\.(post_layernorm\.|encoder\.layers\.(\d+)\.)")


def rename(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors under the names that transformers has since version 4.52, less their "model."."""
  return {OLDER.sub("", name): x for name, x in tensors.items()}


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  vision = {**clip.VISION, **(f.get("vision_config") or LARGE)}
  if (kind := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
    raise UserError(
      f"vision_config.model_type is {kind!r}, but only clip_vision_model is supported"
    )
  stated = dict(f.get("text_config") or {})
  stated["tie_word_embeddings"] = f["tie_word_embeddings"] or stated.get("tie_word_embeddings")
  own = {name.removeprefix("language_model."): x for name, x in tensors.items()}
  text = decoders.family(stated.get("model_type", "llama"), TEXT)
  ids = {key: f[key] for key in (decoders.GENERATION, "pad_token_id") if key in f}
  found = text.settings({**stated, **ids}, own)
  depth = _depth(f["vision_feature_layer"], vision["num_hidden_layers"])
  image = clip.vision_settings(dict(vision, num_hidden_layers=depth))
  image.update(pooling="class", input_norm=True, patch_bias=False, final_norm=False)
  whole = f["vision_feature_select_strategy"] == "full"  # with the class token
  connector = dict(
    kind="mlp", width=0, layers=2, skip=0 if whole else 1, bias=f["multimodal_projector_bias"]
  )
  connector["activation"] = single.activation(f, clip.ACTIVATIONS, "projector_hidden_act")
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


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json: how texts are generated, and how many tokens
  stand for a picture.
  """
  known = json.loads(assets.get(PROCESSOR, b"{}"))
  known.pop("image_processor", None)  # preprocessor_config.json has it
  stated = dict(
    processor_class=PROCESSOR_CLASS,
    patch_size=config["model"]["encoders"]["image"]["patch"],
    vision_feature_select_strategy=_strategy(config),
    num_additional_image_tokens=1,
  )
  return {**decoders.files(config, assets), PROCESSOR: {**known, **stated}}


def _strategy(config: Mapping[str, Any]) -> str:
  return "default" if config["model"]["connectors"]["image"]["skip"] else "full"


def _depth(layer: Any, layers: int) -> int:
  """The layers of the tower below `layer`, counted as transformers counts its hidden states."""
  depth = layer + layers + 1 if isinstance(layer, int) and layer < 0 else layer
  if not isinstance(depth, int) or not 0 < depth <= layers:
    raise UserError(f"vision_feature_layer is {layer!r}, but one of {layers} layers is supported")
  return depth


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a LlavaForConditionalGeneration that it reads."""
  image, connector = config["model"]["encoders"]["image"], config["model"]["connectors"]["image"]
  at = "multi_modal_projector.linear_"
  of_text = decoders.nearest(config, TEXT).rules(decoders.without_encoders(config))
  return [
    *(r for r in clip.image_rules(image, "vision_tower.") if not r.ours.startswith("image/norm/")),
    *(
      rule
      for i in (1, 2)
      for rule in mapping.linear(f"image_connector/layer{i}", f"{at}{i}", bias=connector["bias"])
    ),
    *(r for r in of_text if decoders.HEAD in r.theirs),
    *mapping.under("language_model.", [r for r in of_text if decoders.HEAD not in r.theirs]),
  ]


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The norm that a file has and the model does not read."""
  width = config["model"]["encoders"]["image"]["width"]
  at = "vision_tower.post_layernorm"
  return {f"{at}.weight": np.ones(width, np.float32), f"{at}.bias": np.zeros(width, np.float32)}


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a LlavaForConditionalGeneration must have."""
  encoders, connectors = config["model"]["encoders"], config["model"]["connectors"]
  kinds = {name: (encoders[name]["kind"], connectors[name]["kind"]) for name in encoders}
  if kinds != (wanted := dict(image=("vit", "mlp"))):
    return [("model.encoders", kinds, (wanted,))]
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a LlavaForConditionalGeneration."""
  connector = config["model"]["connectors"]["image"]
  names = {ours: theirs for theirs, ours in reversed(clip.ACTIVATIONS.items())}
  text = decoders.nearest(config, TEXT).facts(decoders.without_encoders(config), special)
  return dict(
    model_type="llava",
    architectures=[ARCHITECTURE],
    torch_dtype="float32",
    text_config=text,
    vision_config=clip.image_facts(config),
    projector_hidden_act=names.get(connector["activation"], "gelu"),
    vision_feature_select_strategy=_strategy(config),
    vision_feature_layer=-1,
    multimodal_projector_bias=connector["bias"],
    image_token_index=config["model"]["media_ids"].get("image", 0),
    image_seq_length=config["data"]["sequence"]["image"],
    tie_word_embeddings=text["tie_word_embeddings"],
    **decoders.token_facts(config, special),
  )
