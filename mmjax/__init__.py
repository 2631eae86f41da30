"""mmjax: train multimodal models in JAX, from a laptop to a TPU pod.

`mmjax.config.base()` starts a config, `mmjax.load(DIR)` opens a checkpoint for inference;
everything else is a command (`mmjax --help`). Importing this package is cheap: heavy libraries load
with the first attribute that needs them.
"""

from __future__ import annotations

import mmjax.printing  # noqa: F401  what the logger says is harmless from here on

__version__ = "0.1.0"
__all__ = ["__version__", "config", "load"]


def __getattr__(name: str):
  if name == "config":
    import importlib

    return importlib.import_module("mmjax.config")
  raise AttributeError(f"module 'mmjax' has no attribute {name!r}")


def load(checkpoint: str, **settings):
  """Opens a run folder, a step folder, an import folder or what `mmjax export --to safetensors`
  wrote as a `mmjax.inference.predictor.Predictor`.
  """
  from mmjax.inference.predictor import Predictor

  return Predictor.load(checkpoint, **settings)
