"""LLaVA-OneVision with pictures (model_type "llava_onevision", Li et al. 2024, arXiv:2408.03326):
SigLIP's tower without its last layers, two dense layers, and Qwen2 or another of the families of
language models. A picture comes whole and in tiles whose tokens make one grid with a learned token
at the end of each row, see data/tiles.py; several of a prompt come whole alone, as the processor
has them of a list within a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clip, decoders, llava, mapping, siglip, single, with_media
from mmjax.interop.huggingface.llava import constants as constants
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.preprocessing import PROCESSORS
from mmjax.interop.huggingface.with_media import BESIDE as BESIDE
from mmjax.interop.huggingface.with_media import rename as rename

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "Qwen2Tokenizer", "LlavaOnevisionProcessor", "model."
IMAGE_PROCESSOR_CLASS = "LlavaOnevisionImageProcessor"
PREPROCESSOR: dict[str, Any] = PROCESSORS["LlavaOnevision"]
ARCHITECTURE, PAD, MASK_PADDING = "LlavaOnevisionForConditionalGeneration", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "LlavaOnevisionModel"),)
TEXT = ("qwen2", "qwen3", "llama", "mistral")  # families that may write

# What transformers assumes where config.json is silent.
FACTS = dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
FACTS |= dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
FACTS |= dict(tie_word_embeddings=False, image_token_index=151_646, image_grid_pinpoints=None)
EXPANDS = dict(vision_aspect_ratio="anyres_max_9")  # the processor's too
VISION: dict[str, Any] = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26)
VISION |= dict(num_attention_heads=16, patch_size=14, image_size=384, vision_use_head=False)
UNUSED = re.compile(r"vision_tower\.(post_layernorm\.|head\.|encoder\.layers\.(\d+)\.)")


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  single.only(f, vision_feature_select_strategy="full")
  tied = f["tie_word_embeddings"] or (f.get("text_config") or {}).get("tie_word_embeddings", False)
  found = with_media.text_settings(f, tensors, TEXT, "qwen2", tie_word_embeddings=tied)
  vision = {**VISION, **(f.get("vision_config") or {})}
  depth = llava.depth_below(f["vision_feature_layer"], vision["num_hidden_layers"])
  vision["num_hidden_layers"] = depth
  image, size = with_media.siglip_settings(dict(vision_config=vision))
  found["model"].update(
    encoders=dict(image=dict(image, final_norm=False)),
    connectors=dict(image=dict(llava.connector_settings(f), end=True)),
    media_ids=dict(image=f.get("image_token_id", f["image_token_index"])),
  )
  for name in tensors:
    if (match := UNUSED.match(name)) and (match[2] is None or int(match[2]) >= depth):
      found["left_out"].append(name)
  tokens = (size // image["patch"]) ** 2
  processor = f.get(with_media.PROCESSOR, {})
  single.only({**EXPANDS, "num_image_tokens": tokens, **processor}, num_image_tokens=tokens)
  budget, theirs = (_budget({**EXPANDS, **x}["vision_aspect_ratio"]) for x in (facts, processor))
  if processor and budget != theirs:
    raise UserError(f"vision_aspect_ratio is anyres_max_{budget}, but the processor has {theirs}")
  pinpoints = f["image_grid_pinpoints"] or PREPROCESSOR["image_grid_pinpoints"]
  cut = dict(grids=_grids(pinpoints, size), budget=budget)
  return dict(found, image_size=size, places=dict(image=tokens + 1), tiles=cut)


def tiles(facts: Mapping[str, Any]) -> dict[str, Any]:
  """data.image.tiles of a preprocessor_config.json. Raises UserError: frames of broken tiles."""
  grids = _grids(facts["image_grid_pinpoints"], clip.square(facts["size"], "size"))
  return dict(most=max(rows * columns for rows, columns in grids), grids=grids)


def _grids(pinpoints: Sequence[Sequence[int]], size: int) -> tuple[tuple[int, int], ...]:
  """(rows, columns) of tiles of the frames (height, width) that pictures are put into."""
  if any(side % size for frame in pinpoints for side in frame):
    raise UserError(f"image_grid_pinpoints has frames that tiles of {size} pixels do not fill")
  return tuple((height // size, width // size) for height, width in pinpoints)


def _budget(ratio: str) -> int:
  if not (match := re.fullmatch(r"anyres_max_([1-9]\d*)", ratio)):
    raise UserError(f"vision_aspect_ratio is {ratio!r}, but only anyres_max_N is supported")
  return int(match[1])


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  return with_media.files(
    config,
    assets,
    processor_class=PROCESSOR_CLASS,
    num_image_tokens=config["data"]["sequence"]["image"] - 1,
    vision_feature_select_strategy="full",
    vision_aspect_ratio=_ratio(config),
  )


def _ratio(config: Mapping[str, Any]) -> str:
  return f"anyres_max_{config['data']['image']['tiles']['budget']}"


def image_processor(config: Mapping[str, Any]) -> dict[str, Any]:
  """What preprocessor_config.json says beside the preparation of pictures."""
  return dict(do_pad=True, image_grid_pinpoints=_pinpoints(config))


def _pinpoints(config: Mapping[str, Any]) -> list[list[int]]:
  size, grids = config["data"]["image"]["size"], config["data"]["image"]["tiles"]["grids"]
  return [[rows * size, columns * size] for rows, columns in grids]


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a LlavaOnevisionForConditionalGeneration that it reads."""
  tower = with_media.siglip_rules(config["model"]["encoders"]["image"])
  return [
    *(rule for rule in tower if not rule.ours.startswith("image/norm/")),
    *llava.connector_rules(config),
    mapping.same("image_connector/end", "image_newline"),
    *with_media.text_rules(config, TEXT),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what such a model must have."""
  if other := with_media.parts_refusals(config, image=("vit", "mlp")):
    return other
  if not config["data"]["image"]["tiles"]["grids"]:
    return [("data.image.tiles.grids", (), ("some",))]
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a LlavaOnevisionForConditionalGeneration."""
  return with_media.config_json(
    config,
    special,
    "llava_onevision",
    ARCHITECTURE,
    with_media.text_facts(config, special, TEXT),
    vision_config=dict(siglip.image_facts(config), vision_use_head=False),
    vision_feature_select_strategy="full",
    vision_feature_layer=-1,
    **llava.connector_facts(config),
    vision_aspect_ratio=_ratio(config),
    image_grid_pinpoints=_pinpoints(config),
    image_token_index=config["model"]["media_ids"].get("image", 0),
  )
