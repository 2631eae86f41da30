"""CLAP's tower of sounds (model_type "clap_audio_model"): HTS-AT without fusion of several windows,
and a projection of two layers or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import clap_features, mapping, single
from mmjax.interop.huggingface.clap_text import PROJECTION, projection_facts, projection_settings
from mmjax.interop.huggingface.clip import ACTIVATIONS, square
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.swin import stage_rules
from mmjax.models.encoders.swin import relative_index, stages_of

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "", "", "audio_model."
ARCHITECTURE, ENCODER = "ClapAudioModel", "audio_encoder."
BESIDE, files = clap_features.BESIDE, clap_features.files
USUAL = dict(patch_embed_input_channels=1, flatten_patch_embeds=True, enable_patch_layer_norm=True)
NAMES = dict(  # ours -> theirs, in config.json
  window="window_size",
  mels="num_mel_bins",
  width="patch_embeds_hidden_size",
  mlp_ratio="mlp_ratio",
  eps="layer_norm_eps",
  drop_path="drop_path_rate",
)
# What transformers assumes where config.json is silent.
AUDIO = {
  **dict(window_size=8, num_mel_bins=64, spec_size=256, patch_size=4, patch_stride=(4, 4)),
  **dict(depths=(2, 2, 6, 2), num_attention_heads=(4, 8, 16, 32), mlp_ratio=4.0, qkv_bias=True),
  **dict(hidden_size=768, patch_embeds_hidden_size=96, hidden_act="gelu", layer_norm_eps=1e-5),
  **dict(enable_fusion=False, drop_path_rate=0.0, **USUAL, **PROJECTION),
}


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "audio": settings of data.audio} of a config.json and the file beside it."""
  preprocessor = facts.get("preprocessor_config.json", {})
  facts = {**AUDIO, **facts}
  entry, audio = audio_settings(facts, preprocessor)
  model = single.projected(
    tensors,
    "audio_projection.linear2.weight",
    dict(audio=entry),
    facts["hidden_size"],
    **projection_settings(facts),
  )
  return dict(model=model, audio=audio, notes=clap_features.notes(audio))


def audio_settings(
  facts: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(the entry of model.encoders.audio, settings of data.audio) of an audio_config that is filled
  in and a preprocessor_config.json. Raises UserError: no such encoder here.
  """
  if facts["enable_fusion"]:
    raise UserError(
      "enable_fusion is true, but only CLAP without fusion of several windows is supported, such "
      "as clap-htsat-unfused"
    )
  single.only(facts, qkv_bias=True, **USUAL)
  spectrogram, audio = clap_features.settings(preprocessor, facts["num_mel_bins"])
  entry = dict(
    kind="htsat",
    size=square(facts["spec_size"], "spec_size"),
    patch=square(facts["patch_size"], "patch_size"),
    stride=square(facts["patch_stride"], "patch_stride"),
    depths=tuple(facts["depths"]),
    heads=tuple(facts["num_attention_heads"]),
    activation=single.activation(facts),
    **{ours: facts[theirs] for ours, theirs in NAMES.items()},
    **spectrogram,
  )
  return entry, audio


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ClapAudioModel and its projection, without the prefix that it has beside
  one.
  """
  projects = config["model"]["projection"]
  return [
    *audio_rules(config["model"]["encoders"]["audio"]),
    *(mapping.two_layers("projection", "audio_projection") if projects else ()),
  ]


def audio_rules(audio: Mapping[str, Any]) -> list[Rule]:
  """The weights of a ClapAudioModel."""
  depths, heads = stages_of(audio["width"], audio["depths"], audio["heads"])
  patches = f"{ENCODER}patch_embed"
  return [
    *mapping.batch_norm("audio/input_norm", f"{ENCODER}batch_norm"),
    mapping.patches("audio/patch/kernel", f"{patches}.proj.weight", audio["patch"]),
    mapping.same("audio/patch/bias", f"{patches}.proj.bias"),
    *mapping.norm("audio/patch_norm", f"{patches}.norm"),
    *stage_rules("audio", f"{ENCODER}layers", depths, heads),
    *mapping.norm("audio/norm", f"{ENCODER}norm"),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a ClapAudioModel must have."""
  return [
    *audio_refusals(config),
    *single.headless(config, projection_bias=True, functions=tuple(ACTIVATIONS.values())),
  ]


def audio_refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """What the tower itself must have."""
  audio, seconds = config["model"]["encoders"]["audio"], config["data"]["audio"]["seconds"]
  stages = len(stages_of(audio["width"], audio["depths"], audio["heads"])[0])
  last, rest = divmod(audio["size"], audio["stride"] * 2 ** (stages - 1))
  return [
    ("model.encoders.audio.window", audio["window"], tuple(range(1, last + 1))),
    ("model.encoders.audio.size", audio["size"], (audio["size"] - rest,)),
    ("data.audio.seconds", seconds, (max(1, round(seconds)),)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a ClapAudioModel or a ClapAudioModelWithProjection."""
  audio, projects = config["model"]["encoders"]["audio"], config["model"].get("projection")
  depths, heads = stages_of(audio["width"], audio["depths"], audio["heads"])
  return dict(
    model_type="clap_audio_model",
    architectures=[f"{ARCHITECTURE}WithProjection" if projects else ARCHITECTURE],
    torch_dtype="float32",
    spec_size=audio["size"],
    hidden_act=single.activation_name(audio["activation"]),
    patch_size=audio["patch"],
    patch_stride=[audio["stride"]] * 2,
    depths=list(depths),
    num_attention_heads=list(heads),
    num_hidden_layers=len(depths),
    hidden_size=audio["width"] * 2 ** (len(depths) - 1),
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    enable_fusion=False,
    qkv_bias=True,
    **{theirs: audio[ours] for ours, theirs in NAMES.items()},
    **USUAL,
    **projection_facts(config),
  )


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """{name: tensor} of what transformers keeps in the file beside the weights."""
  audio = config["model"]["encoders"]["audio"]
  depths, _ = stages_of(audio["width"], audio["depths"], audio["heads"])
  index = relative_index(audio["window"]).astype(np.int64)
  return {
    f"{ENCODER}layers.{stage}.blocks.{i}.attention.self.relative_position_index": index
    for stage, depth in enumerate(depths)
    for i in range(depth)
  }
