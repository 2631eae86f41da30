"""HuBERT (model_type "hubert"): wav2vec2.py under another name, whose dense layer after the
convolutions may lack its norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import wav2vec2
from mmjax.interop.huggingface.wav2vec2 import (  # noqa: F401
  BESIDE,
  PROCESSOR_CLASS,
  TOKENIZER_CLASS,
  files,
  rules,
)

PREFIX, ARCHITECTURE = "hubert.", "HubertModel"


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "audio": settings of data.audio} of a config.json and the file beside it."""
  return wav2vec2.settings(facts, tensors, kind="hubert")


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a HuBERT of transformers must have."""
  return wav2vec2.refusals(config, projection_norms=(True, False))


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a HubertModel, a HubertForCTC or a HubertForSequenceClassification."""
  return wav2vec2.facts(config, special, "Hubert")
