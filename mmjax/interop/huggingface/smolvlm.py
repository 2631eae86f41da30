"""SmolVLM 1 and 2 (model_type "smolvlm", Marafioti et al. 2025, arXiv:2504.05299), but for clips:
Idefics 3 under other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.interop.huggingface import decoders, idefics3, with_media
from mmjax.interop.huggingface.idefics3 import BESIDE as BESIDE
from mmjax.interop.huggingface.idefics3 import MASK_PADDING as MASK_PADDING
from mmjax.interop.huggingface.idefics3 import PAD as PAD
from mmjax.interop.huggingface.idefics3 import PREFIX as PREFIX
from mmjax.interop.huggingface.idefics3 import PREPROCESSOR as PREPROCESSOR
from mmjax.interop.huggingface.idefics3 import TOKENIZER_CLASS as TOKENIZER_CLASS
from mmjax.interop.huggingface.idefics3 import image_processor as image_processor
from mmjax.interop.huggingface.idefics3 import rules as rules
from mmjax.interop.huggingface.idefics3 import settings as settings
from mmjax.interop.huggingface.idefics3 import tiles as tiles
from mmjax.interop.huggingface.idefics3 import written as written

PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS = "SmolVLMProcessor", "SmolVLMImageProcessor"
ARCHITECTURE = "SmolVLMForConditionalGeneration"
ARCHITECTURES = ((ARCHITECTURE, "SmolVLMModel"),)


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  tokens = config["data"]["sequence"]["image"]
  return with_media.files(config, assets, processor_class=PROCESSOR_CLASS, image_seq_len=tokens)


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a SmolVLMForConditionalGeneration must have."""
  other = with_media.parts_refusals(config, image=("vit", "mlp"))
  return other or decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a SmolVLMForConditionalGeneration."""
  stated = idefics3.facts(config, special)
  stated["vision_config"]["model_type"] = "smolvlm_vision"
  return dict(stated, model_type="smolvlm", architectures=[ARCHITECTURE])
