"""InternVL 3 (model_type "internvl", Zhu et al. 2025, arXiv:2504.10479): a tower of pictures whose
parts are scaled, squares of four tokens as one (pixel shuffle), a norm and two dense layers, and
one of the families of language models. Pictures come in tiles, see data/tiles.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.placeholders import HERE
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import clip, decoders, mapping, preprocessing, single, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.with_media import BESIDE as BESIDE
from mmjax.interop.huggingface.with_media import rename as rename

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "Qwen2Tokenizer", "InternVLProcessor", "model."
IMAGE_PROCESSOR_CLASS, PREPROCESSOR = "GotOcr2ImageProcessor", preprocessing.PROCESSORS["GotOcr2"]
ARCHITECTURE, PAD, MASK_PADDING = "InternVLForConditionalGeneration", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "InternVLModel"),)
TEXT = ("qwen2", "llama", "qwen3")  # families that may write

# What transformers assumes where config.json is silent.
FACTS: dict[str, Any] = dict(image_token_id=151_667, projector_hidden_act="gelu")
FACTS |= dict(vision_feature_layer=-1, vision_feature_select_strategy="default")
FACTS |= dict(tie_word_embeddings=True, downsample_ratio=0.5)
VISION: dict[str, Any] = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
VISION |= dict(intermediate_size=4096, image_size=448, patch_size=14, num_channels=3)
VISION |= dict(hidden_act="gelu", layer_norm_eps=1e-6, attention_bias=False, use_qk_norm=False)
VISION |= dict(norm_type="layer_norm", use_mask_token=False, use_mean_pooling=True)
VISION |= dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.1)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py. Raises UserError: a tower of another kind."""
  f = {**FACTS, **facts}
  single.only(f, vision_feature_layer=-1, vision_feature_select_strategy="default")
  vision = {**VISION, **(f.get("vision_config") or {})}
  with_media.only_tower(vision, "internvl_vision")
  fixed = dict(norm_type="layer_norm", use_qk_norm=False, use_mask_token=False)
  single.only(vision, **fixed, use_absolute_position_embeddings=True)
  tied = dict(tie_word_embeddings=f["tie_word_embeddings"])
  found = with_media.text_settings(f, tensors, TEXT, "qwen2", **tied)
  image = clip.vision_settings(vision)
  image.update(
    pooling="class",
    input_norm=False,
    patch_bias=True,
    final_norm=not vision["use_mean_pooling"],
    layer_scale=vision["layer_scale_init_value"] or 1.0,
    block=dict(qkv_bias=vision["attention_bias"]),
  )
  size = clip.square(vision["image_size"], "vision_config.image_size")
  side, fold = size // image["patch"], round(1 / f["downsample_ratio"])
  if side % fold:
    raise UserError(
      f"downsample_ratio is {f['downsample_ratio']}, which {side} x {side} patches do not divide by"
    )
  activation = single.activation(f, clip.ACTIVATIONS, "projector_hidden_act")
  connector = dict(kind="mlp", width=0, layers=2, skip=1, fold=fold, norm="layer", eps=1e-5)
  found["model"].update(
    encoders=dict(image=image),
    connectors=dict(image=dict(connector, activation=activation)),
    media_ids=dict(image=f["image_token_id"]),
  )
  return dict(found, image_size=size, places=dict(image=(side // fold) ** 2))


def tiles(facts: Mapping[str, Any]) -> dict[str, int]:
  """data.image.tiles of a preprocessor_config.json, which cuts whatever it says of that."""
  return dict(most=facts["max_patches"], least=facts["min_patches"])


def written(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.sequence: how the processor writes a picture, by tokenizer_config.json."""
  begin, end = (with_media.piece(stated, f"{name}_image_token") for name in ("start", "end"))
  return dict(written=dict(image=f"{begin}{HERE}{end}"))


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  tokens = config["data"]["sequence"]["image"]
  return with_media.files(config, assets, processor_class=PROCESSOR_CLASS, image_seq_length=tokens)


def image_processor(config: Mapping[str, Any]) -> dict[str, Any]:
  """What preprocessor_config.json says beside the preparation of pictures."""
  of_data = config["data"]["image"]["tiles"]
  return dict(crop_to_patches=True, min_patches=of_data["least"], max_patches=of_data["most"])


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of an InternVLForConditionalGeneration."""
  image, at = config["model"]["encoders"]["image"], "vision_tower.encoder.layer.{i}"
  embeddings, depth = "vision_tower.embeddings", image["depth"]
  names = [f"{at}.attention.{x}_proj" for x in "qkv"], f"{at}.attention.projection_layer"
  attention = mapping.self_attention("image/layers/attention", *names, image["heads"], depth)
  biased = image.get("block", {}).get("qkv_bias", True)
  patch = f"{embeddings}.patch_embeddings.projection"
  return [
    mapping.same("image/class", f"{embeddings}.cls_token", shape=(1, 1, -1)),
    mapping.row("image/position", f"{embeddings}.position_embeddings"),
    mapping.patches("image/patch/kernel", f"{patch}.weight", image["patch"]),
    mapping.same("image/patch/bias", f"{patch}.bias"),
    *(rule for rule in attention if biased or not rule.ours.endswith("qkv/bias")),
    *mapping.norm("image/layers/attention_norm", f"{at}.layernorm_before", depth),
    *mapping.norm("image/layers/mlp_norm", f"{at}.layernorm_after", depth),
    mapping.same("image/layers/attention_scale/scale", f"{at}.lambda_1", depth),
    mapping.same("image/layers/mlp_scale/scale", f"{at}.lambda_2", depth),
    *mapping.linear("image/layers/mlp/up", f"{at}.mlp.fc1", depth),
    *mapping.linear("image/layers/mlp/down", f"{at}.mlp.fc2", depth),
    *(mapping.norm("image/norm", "vision_tower.layernorm") if image["final_norm"] else ()),
    *mapping.norm("image_connector/norm", "multi_modal_projector.layer_norm"),
    *mapping.linear("image_connector/layer1", "multi_modal_projector.linear_1"),
    *mapping.linear("image_connector/layer2", "multi_modal_projector.linear_2"),
    *with_media.text_rules(config, TEXT),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what an InternVLForConditionalGeneration must have."""
  other = with_media.parts_refusals(config, image=("vit", "mlp"))
  return other or decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of an InternVLForConditionalGeneration."""
  image, connector = config["model"]["encoders"]["image"], config["model"]["connectors"]["image"]
  names = {ours: theirs for theirs, ours in reversed(clip.ACTIVATIONS.items())}
  text = with_media.text_facts(config, special, TEXT)
  vision = dict(clip.tower_facts(image, "internvl_vision"), norm_type="layer_norm", num_channels=3)
  vision |= dict(image_size=config["data"]["image"]["size"], patch_size=image["patch"])
  vision |= dict(attention_bias=image.get("block", {}).get("qkv_bias", True))
  vision |= dict(use_mean_pooling=not image["final_norm"])
  return with_media.config_json(
    config,
    special,
    "internvl",
    ARCHITECTURE,
    text,
    vision_config=dict(vision, layer_scale_init_value=image["layer_scale"]),
    downsample_ratio=1 / connector["fold"],
    projector_hidden_act=names.get(connector["activation"], "gelu"),
    image_seq_length=config["data"]["sequence"]["image"],
    image_token_id=config["model"]["media_ids"].get("image", 0),
  )
