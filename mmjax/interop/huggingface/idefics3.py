"""Idefics 3 (model_type "idefics3", Laurencon et al. 2024, arXiv:2408.12637), which SmolVLM is
too: SigLIP's tower of pictures, squares of tokens as one (pixel shuffle), a matrix, and Llama.
Pictures come in tiles with the whole picture after them, see data/tiles.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.placeholders import HERE
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import clip, decoders, mapping, preprocessing, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.with_media import BESIDE as BESIDE

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "PreTrainedTokenizerFast", "Idefics3Processor", "model."
IMAGE_PROCESSOR_CLASS = "Idefics3ImageProcessor"
PREPROCESSOR = preprocessing.PROCESSORS["Idefics3"]
ARCHITECTURE, PAD, MASK_PADDING = "Idefics3ForConditionalGeneration", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "Idefics3Model"),)
TEXT = ("llama", "mistral", "qwen2")  # families that may write
AT, TOWER = "text_model.", "vision_model."

# What transformers assumes where config.json is silent.
FACTS = dict(image_token_id=128_257, scale_factor=2, tie_word_embeddings=False)
VISION: dict[str, Any] = dict(hidden_size=1152, intermediate_size=3072, num_hidden_layers=12)
VISION |= dict(num_attention_heads=16, image_size=224, patch_size=32)
FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py. Raises UserError: its patches make no squares
  of scale_factor.
  """
  f = {**FACTS, **facts}
  eps = (f.get("text_config") or {}).get("rms_norm_eps", 1e-5)
  tied = dict(tie_word_embeddings=f["tie_word_embeddings"], rms_norm_eps=eps)
  found = with_media.text_settings(f, tensors, TEXT, "llama", AT, **tied)
  image, size = with_media.siglip_settings(f, _kind(f), **VISION)
  side, fold = size // image["patch"], f["scale_factor"]
  if side % fold:
    raise UserError(f"scale_factor is {fold}, but pictures have {side} x {side} patches")
  found["model"].update(
    encoders=dict(image=image),
    connectors=dict(image=dict(kind="mlp", width=0, layers=1, fold=fold, bias=False)),
    media_ids=dict(image=f["image_token_id"]),
  )
  return dict(found, image_size=size, places=dict(image=(side // fold) ** 2))


def _kind(f: Mapping[str, Any]) -> str:
  return "smolvlm_vision" if f.get("model_type") == "smolvlm" else "idefics3_vision"


def tiles(facts: dict[str, Any]) -> dict[str, int]:
  """data.image.tiles of a preprocessor_config.json; puts the size of a tile in the place of the
  whole picture's.
  """
  size, longest = facts["max_image_size"]["longest_edge"], facts["size"]["longest_edge"]
  facts["size"] = {"height": size, "width": size}
  if not facts["do_image_splitting"]:
    raise UserError("do_image_splitting is false: pictures that are not cut are not supported")
  return dict(most=max(2, math.ceil(longest / size) ** 2), least=1, longest=longest)


def written(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.sequence: how the processor writes a picture."""
  texts = (f"{FAKE}<row_{{row}}_col_{{column}}>", "\n", f"\n{FAKE}{WHOLE}", f"{FAKE}{WHOLE}")
  return dict(written=dict(image=f"{HERE}{FAKE}"), tiles=texts)


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  tokens = config["data"]["sequence"]["image"]
  return with_media.files(config, assets, processor_class=PROCESSOR_CLASS, image_seq_len=tokens)


def image_processor(config: Mapping[str, Any]) -> dict[str, Any]:
  """What preprocessor_config.json says beside and instead of the preparation of pictures."""
  image = config["data"]["image"]
  return dict(
    do_image_splitting=True,
    do_pad=True,
    size={"longest_edge": image["tiles"]["longest"]},
    max_image_size={"longest_edge": image["size"]},
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of an Idefics3ForConditionalGeneration."""
  projection = mapping.linear(
    "image_connector/layer1", "connector.modality_projection.proj", bias=False
  )
  return [
    *with_media.siglip_rules(config["model"]["encoders"]["image"], TOWER),
    *projection,
    *with_media.text_rules(config, TEXT, AT),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what an Idefics3ForConditionalGeneration must have."""
  other = with_media.parts_refusals(config, image=("vit", "mlp"))
  return other or decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of an Idefics3ForConditionalGeneration."""
  image = config["model"]["encoders"]["image"]
  text = with_media.text_facts(config, special, TEXT)
  vision = clip.tower_facts(image, "idefics3_vision")
  vision |= dict(image_size=config["data"]["image"]["size"], patch_size=image["patch"])
  return with_media.config_json(
    config,
    special,
    "idefics3",
    ARCHITECTURE,
    text,
    vision_config=dict(vision, num_channels=3),
    scale_factor=config["model"]["connectors"]["image"]["fold"],
    image_token_id=config["model"]["media_ids"].get("image", 0),
  )
