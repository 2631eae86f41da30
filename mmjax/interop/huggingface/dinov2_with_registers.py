"""DINOv2 with registers (model_type "dinov2_with_registers", Darcet et al. 2024, arXiv:2309.16588):
dinov2.py with other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.interop.huggingface import dinov2
from mmjax.interop.huggingface.dinov2 import (  # noqa: F401
  IMAGE_PROCESSOR_CLASS,
  PREPROCESSOR,
  PROCESSOR_CLASS,
  TOKENIZER_CLASS,
  constants,
  facts,
  rules,
  settings,
)

PREFIX, ARCHITECTURE = f"{dinov2.REGISTERS}.", "Dinov2WithRegistersModel"


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a DINOv2 with registers must have."""
  return dinov2.refusals(config, registers=True)
