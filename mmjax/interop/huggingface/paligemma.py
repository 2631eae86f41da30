"""PaliGemma 2 (model_type "paligemma", Steiner et al. 2024, arXiv:2412.03555): SigLIP's tower of
pictures, a dense layer, and Gemma 2, whose tokens of the prompt and of its pictures see each other
both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.placeholders import HERE
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import decoders, mapping, siglip, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.with_media import BESIDE as BESIDE
from mmjax.interop.huggingface.with_media import rename as rename

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "GemmaTokenizer", "PaliGemmaProcessor", "model."
IMAGE_PROCESSOR_CLASS, PREPROCESSOR = "SiglipImageProcessor", siglip.PREPROCESSOR
ARCHITECTURE, PAD, MASK_PADDING = "PaliGemmaForConditionalGeneration", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "PaliGemmaModel"),)
TEXT = ("gemma2",)  # families that may write

# What transformers assumes where config.json is silent.
FACTS = dict(image_token_index=256_000, tie_word_embeddings=True)
VISION: dict[str, Any] = dict(hidden_size=1152, intermediate_size=4096, num_hidden_layers=27)
VISION |= dict(num_attention_heads=16, patch_size=14, vision_use_head=False)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  found = with_media.text_settings(
    f,
    tensors,
    TEXT,
    "gemma",
    tie_word_embeddings=f["tie_word_embeddings"],
    use_bidirectional_attention=None,  # True there, of prompts alone
  )
  image, size = with_media.siglip_settings(f, **VISION)
  found["model"].update(
    encoders=dict(image=image),
    connectors=dict(image=dict(kind="mlp", width=0, layers=1)),
    media_ids=dict(image=f.get("image_token_id", f["image_token_index"])),
    both_ways="prompt",
  )
  found["left_out"] += [name for name in tensors if name.startswith("vision_tower.head.")]
  found["text"]["bos"] = False
  return dict(found, image_size=size, places=dict(image=(size // image["patch"]) ** 2))


def written(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.sequence: how the processor writes prompts."""
  return dict(prompt=f"{tokenizer.piece(tokenizer.bos_id)}{HERE}\n")


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  return with_media.files(config, assets, processor_class=PROCESSOR_CLASS)


def image_processor(config: Mapping[str, Any]) -> dict[str, Any]:
  """What preprocessor_config.json says beside the preparation of pictures."""
  return dict(image_seq_length=config["data"]["sequence"]["image"])


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a PaliGemmaForConditionalGeneration."""
  return [
    *with_media.siglip_rules(config["model"]["encoders"]["image"]),
    *mapping.linear("image_connector/layer1", "multi_modal_projector.linear"),
    *with_media.text_rules(config, TEXT),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a PaliGemmaForConditionalGeneration must have."""
  other = with_media.parts_refusals(config, image=("vit", "mlp"))
  return other or decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a PaliGemmaForConditionalGeneration."""
  text = with_media.text_facts(config, special, TEXT)
  return with_media.config_json(
    config,
    special,
    "paligemma",
    ARCHITECTURE,
    dict(text, use_bidirectional_attention=True),
    vision_config=siglip.image_facts(config),
    projection_dim=text["hidden_size"],
    hidden_size=text["hidden_size"],
    vocab_size=text["vocab_size"],
    image_token_index=config["model"]["media_ids"].get("image", 0),
  )
