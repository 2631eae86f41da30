"""Gemma 3 with pictures (model_type "gemma3", arXiv:2503.19786): SigLIP's tower, whose tokens are
averaged over squares, normed and multiplied by a matrix, and gemma3_text, in which the tokens of a
picture see each other both ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.placeholders import HERE
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import decoders, mapping, siglip, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.with_media import BESIDE as BESIDE
from mmjax.interop.huggingface.with_media import rename as rename

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "GemmaTokenizer", "Gemma3Processor", "model."
IMAGE_PROCESSOR_CLASS, PREPROCESSOR = "Gemma3ImageProcessor", dict(siglip.PREPROCESSOR, resample=2)
ARCHITECTURE, PAD, MASK_PADDING = "Gemma3ForConditionalGeneration", "<pad>", True
ARCHITECTURES = ((ARCHITECTURE, "Gemma3Model"),)
TEXT = ("gemma3_text",)  # families that may write

# What transformers assumes where config.json is silent.
FACTS = dict(mm_tokens_per_image=256, tie_word_embeddings=True)
FACTS |= dict(image_token_index=262_144)
AT = "multi_modal_projector.mm_"


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py. Raises UserError: its pictures' tokens make no
  squares of patches.
  """
  f = {**FACTS, **facts}
  tied = dict(tie_word_embeddings=f["tie_word_embeddings"])
  found = with_media.text_settings(f, tensors, TEXT, "gemma3_text", **tied)
  image, size = with_media.siglip_settings(f)
  side, tokens = size // image["patch"], math.isqrt(f["mm_tokens_per_image"])
  if tokens**2 != f["mm_tokens_per_image"] or side % tokens:
    raise UserError(
      f"mm_tokens_per_image is {f['mm_tokens_per_image']}, which squares of {side} x {side} "
      "patches do not give"
    )
  connector = dict(kind="mlp", width=0, layers=1, pool=side // tokens, norm="rms", bias=False)
  found["model"].update(
    encoders=dict(image=image),
    connectors=dict(image=dict(connector, eps=image["eps"])),
    media_ids=dict(image=f.get("image_token_id", f["image_token_index"])),
    both_ways="media",
  )
  found["model"]["logit_cap"] = 0.0  # this class of transformers leaves final_logit_softcapping out
  found["left_out"] += [name for name in tensors if name.startswith("vision_tower.head.")]
  return dict(found, image_size=size, places=dict(image=tokens**2))


def written(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.sequence: how the processor writes a picture, by tokenizer_config.json."""
  begin, end = (with_media.piece(stated, f"{name}_token") for name in ("boi", "eoi"))
  return dict(written=dict(image=f"\n\n{begin}{HERE}{end}\n\n"))


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  tokens = config["data"]["sequence"]["image"]
  return with_media.files(config, assets, processor_class=PROCESSOR_CLASS, image_seq_length=tokens)


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a Gemma3ForConditionalGeneration."""
  return [
    *with_media.siglip_rules(config["model"]["encoders"]["image"]),
    decoders.scale("image_connector/norm", f"{AT}soft_emb_norm", plus=1.0),
    mapping.same("image_connector/layer1/kernel", f"{AT}input_projection_weight"),
    *with_media.text_rules(config, TEXT),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a Gemma3ForConditionalGeneration must have."""
  other = with_media.parts_refusals(config, image=("vit", "mlp"))
  return other or decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Gemma3ForConditionalGeneration."""
  text = with_media.text_facts(config, special, TEXT)
  return with_media.config_json(
    config,
    special,
    "gemma3",
    ARCHITECTURE,
    text,
    vision_config=dict(siglip.image_facts(config), vision_use_head=False),
    mm_tokens_per_image=config["data"]["sequence"]["image"],
    image_token_index=config["model"]["media_ids"].get("image", 0),
  )
