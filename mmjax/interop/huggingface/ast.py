"""AST (model_type "audio-spectrogram-transformer"): its settings, and which tensors are which parameters, both ways.

Names are those of the files, which transformers keeps although its modules are called otherwise by now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping
from mmjax.interop.huggingface.clip import ACTIVATIONS, square
from mmjax.interop.huggingface.mapping import Rule

# What transformers assumes where config.json and preprocessor_config.json are silent.
ENCODER = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
               layer_norm_eps=1e-12, patch_size=16, qkv_bias=True, frequency_stride=10, time_stride=10, max_length=1024,
               num_mel_bins=128)
PREPROCESSOR = dict(sampling_rate=16_000, num_mel_bins=128, max_length=1024, do_normalize=True, mean=-4.2677393, std=4.5689974)


def encoder_settings(facts: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
  """The entry of model.encoders.audio of a config.json and a preprocessor_config.json. Raises UserError: no such encoder here."""
  f, p = {**ENCODER, **facts}, {**PREPROCESSOR, **preprocessor}
  if f["hidden_act"] not in ACTIVATIONS:
    raise UserError(f"hidden_act {f['hidden_act']!r} is not supported; there are: {', '.join(ACTIVATIONS)}")
  if not f["qkv_bias"] or f["frequency_stride"] != f["time_stride"]:
    raise UserError(f"qkv_bias is {f['qkv_bias']} and the strides are {f['frequency_stride']} and {f['time_stride']}, but only attention "
                    "with biases and equal strides are supported")
  for name in ("num_mel_bins", "max_length"):
    if f[name] != p[name]:
      raise UserError(f"{name} is {f[name]}, but preprocessor_config.json has {p[name]}")
  mean, std = (p["mean"], p["std"]) if p["do_normalize"] else (0.0, 0.5)
  return dict(kind="ast", mels=f["num_mel_bins"], patch=square(f["patch_size"], "patch_size"), stride=f["time_stride"],
              frames=f["max_length"], mean=float(mean), std=float(std), mask_padding=False, width=f["hidden_size"],
              depth=f["num_hidden_layers"], heads=f["num_attention_heads"], mlp=f["intermediate_size"], pooling="class",
              activation=ACTIVATIONS[f["hidden_act"]], eps=f["layer_norm_eps"])


def rules(heads: int, depth: int, patch: int, *, ours: str = "audio", theirs: str = "audio_spectrogram_transformer") -> list[Rule]:
  """The weights of an ASTModel. theirs "": of a file of the model without a classifier."""
  theirs = f"{theirs}." if theirs else ""
  at = f"{theirs}encoder.layer.{{i}}"
  embeddings, inside = f"{theirs}embeddings", f"{at}.attention.attention"
  table = lambda name: f"{embeddings}.{name}"
  return [
    Rule(f"{ours}/class", (table("cls_token"),), lambda t: t[0].reshape(-1), lambda p: [p[None, None]]),
    Rule(f"{ours}/distillation", (table("distillation_token"),), lambda t: t[0].reshape(-1), lambda p: [p[None, None]]),
    Rule(f"{ours}/position", (table("position_embeddings"),), lambda t: t[0][0], lambda p: [p[None]]),
    mapping.patches(f"{ours}/patch/kernel", table("patch_embeddings.projection.weight"), patch),
    mapping.same(f"{ours}/patch/bias", table("patch_embeddings.projection.bias")),
    Rule(f"{ours}/layers/attention/qkv/kernel", tuple(f"{inside}.{x}.weight" for x in ("query", "key", "value")),
         lambda t: np.stack([w.T.reshape(w.shape[1], heads, -1) for w in t], axis=1),
         lambda p: [p[:, i].reshape(p.shape[0], -1).T for i in range(3)], depth),
    Rule(f"{ours}/layers/attention/qkv/bias", tuple(f"{inside}.{x}.bias" for x in ("query", "key", "value")),
         lambda t: np.stack([b.reshape(heads, -1) for b in t]), lambda p: [p[i].reshape(-1) for i in range(3)], depth),
    *mapping.attention_output(f"{ours}/layers/attention/out", f"{at}.attention.output.dense", heads, depth),
    *mapping.norm(f"{ours}/layers/attention_norm", f"{at}.layernorm_before", depth),
    *mapping.norm(f"{ours}/layers/mlp_norm", f"{at}.layernorm_after", depth),
    *mapping.linear(f"{ours}/layers/mlp/up", f"{at}.intermediate.dense", depth),
    *mapping.linear(f"{ours}/layers/mlp/down", f"{at}.output.dense", depth),
    *mapping.norm(f"{ours}/norm", f"{theirs}layernorm"),
  ]


def classifier_rules(ours: str = "classifier", theirs: str = "classifier") -> list[Rule]:
  """The head of an ASTForAudioClassification: a layer norm ("norm") and a linear layer ("out") on the pooled vector."""
  return [*mapping.norm(f"{ours}/norm", f"{theirs}.layernorm"), *mapping.linear(f"{ours}/out", f"{theirs}.dense")]


def params(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], where: str) -> dict[str, Any]:
  """{"audio": ..., "classifier": ... where the file has one} of an AST folder's tensors. Raises UserError: they do not fit."""
  f = {**ENCODER, **facts}
  whole = any(name.startswith("classifier.") for name in tensors)
  prefix = "audio_spectrogram_transformer" if any(n.startswith("audio_spectrogram_transformer.") for n in tensors) else ""
  wanted = rules(f["num_attention_heads"], f["num_hidden_layers"], square(f["patch_size"], "patch_size"), theirs=prefix)
  return mapping.to_params(tensors, [*wanted, *(classifier_rules() if whole else [])], where)
