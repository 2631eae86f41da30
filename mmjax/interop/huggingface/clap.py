"""CLAP (model_type "clap"): sounds and texts in one space (Wu et al. 2023, arXiv:2211.06687)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import clap_audio, clap_features, clap_text, clip, mapping
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = clap_text.TOKENIZER_CLASS, "ClapProcessor", ""
ARCHITECTURE, PAD, MASK_PADDING = "ClapModel", clap_text.PAD, clap_text.MASK_PADDING
BESIDE = clap_features.BESIDE
AUDIO, TEXT = "audio_model.", "text_model."  # what names of the towers' tensors begin with
SCALES = ("logit_scale_a", "logit_scale_t")  # of sounds compared with texts, and the other way


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "audio", "text": settings of data} of a config.json and the file beside it.

  Of the two scales the one of a sound's logits over texts is kept, which classifies by prompts.
  """
  text = {**clap_text.TEXT, **(facts.get("text_config") or {})}
  audio = {**clap_audio.AUDIO, **(facts.get("audio_config") or {})}
  projection = {**clap_text.PROJECTION, **facts}
  audio_entry, audio_data = clap_audio.audio_settings(
    audio, facts.get("preprocessor_config.json", {})
  )
  text_entry, text_data = clap_text.text_settings(text)
  lines = clap_features.notes(audio_data)
  stored = [np.asarray(tensors[name], np.float32) for name in SCALES if name in tensors]
  scales = [float(scale) for scale in stored]
  if len(set(scales)) > 1:
    lines.append(
      f"its logit scales differ (exp of {scales[0]:.6g} and {scales[1]:.6g}): that of sounds "
      f"compared with texts, {SCALES[0]}, is kept for both directions"
    )
  model = dict(
    name="dual_encoder",
    width=projection["projection_dim"],
    bias=False,
    scale_init=float(facts.get("logit_scale_init_value", 1 / 0.07)),
    scale_max=clip.scale_limit(dict(zip(["logit_scale"], stored, strict=False)), 100.0),
    encoders=dict(audio=audio_entry, text=text_entry),
    **clap_text.projection_settings(projection),
  )
  return dict(model=model, audio=audio_data, text=text_data, notes=lines)


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ClapModel. Both scales are written as the one that is here."""
  encoders = config["model"]["encoders"]
  return [
    *mapping.under(AUDIO, clap_audio.audio_rules(encoders["audio"])),
    *mapping.two_layers("audio_projection", "audio_projection"),
    *mapping.under(TEXT, clap_text.text_rules(encoders["text"])),
    *mapping.two_layers("text_projection", "text_projection"),
    Rule("log_scale", SCALES, lambda t: t[0].reshape(()), lambda p: [p, p]),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a ClapModel must have."""
  model = config["model"]
  function = model["projection_function"]
  return [
    *clap_audio.audio_refusals(config),
    *clap_text.text_refusals(model["encoders"]["text"]),
    ("model.unprojected", tuple(model["unprojected"]), ((),)),
    ("model.projection_bias", model["projection_bias"], (True,)),
    ("model.projection_function", function, tuple(clip.ACTIVATIONS.values())),
    ("model.bias", model["bias"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a ClapModel. special: the tokenizer's pad_token_id, bos_token_id and
  eos_token_id.
  """
  return dict(
    model_type="clap",
    architectures=[ARCHITECTURE],
    torch_dtype="float32",
    logit_scale_init_value=config["model"]["scale_init"],
    **clap_text.projection_facts(config),
    text_config=clap_text.facts(config, special),
    audio_config=clap_audio.facts(config, special),
  )


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the file beside config.json: how sound is prepared."""
  found = clap_features.files(config, assets)
  return {name: dict(content, processor_class=PROCESSOR_CLASS) for name, content in found.items()}


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """{name: tensor} of what transformers keeps in the file beside the weights."""
  towers = ((AUDIO, clap_audio), (TEXT, clap_text))
  return {
    prefix + name: x for prefix, tower in towers for name, x in tower.constants(config).items()
  }
