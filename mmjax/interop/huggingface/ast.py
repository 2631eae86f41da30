"""AST (model_type "audio-spectrogram-transformer"): the bare encoder, or with a classifier, both
ways.

Names are those of the files, which transformers keeps although its modules are called otherwise by
now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.clip import ACTIVATIONS, square
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models.encoders.spectrogram import kaldi_frames

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "", "", "audio_spectrogram_transformer."
ARCHITECTURE = "ASTModel"
BESIDE = ("preprocessor_config.json",)  # read with config.json; it has to be there

# What transformers assumes where config.json and preprocessor_config.json are silent.
ENCODER = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
  hidden_act="gelu",
  layer_norm_eps=1e-12,
  patch_size=16,
  qkv_bias=True,
  frequency_stride=10,
  time_stride=10,
  max_length=1024,
  num_mel_bins=128,
)
PREPROCESSOR = dict(
  sampling_rate=16_000,
  num_mel_bins=128,
  max_length=1024,
  do_normalize=True,
  mean=-4.2677393,
  std=4.5689974,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "audio": settings of data.audio} of a config.json and the file beside it."""
  preprocessor = {**PREPROCESSOR, **facts.get("preprocessor_config.json", {})}
  entry, weight = encoder_settings(facts, preprocessor), tensors.get("classifier.dense.weight")
  rate, classes = preprocessor["sampling_rate"], 0 if weight is None else int(weight.shape[0])
  model = dict(
    name="encoder",
    width=entry["width"],
    classes=classes,
    classifier_norm=bool(classes),
    encoders=dict(audio=entry),
  )
  return dict(
    model=model,
    audio=dict(rate=rate, seconds=(rate // 40 + (entry["frames"] - 1) * (rate // 100)) / rate),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of an ASTModel and its classifier, without the prefix that it has beside one."""
  audio = config["model"]["encoders"]["audio"]
  head = classifier_rules() if config["model"]["classes"] else []
  return [*encoder_rules(audio["heads"], audio["depth"], audio["patch"], theirs=""), *head]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what an AST of transformers must have."""
  model, audio = config["model"], config["model"]["encoders"]["audio"]
  return [
    ("model.encoders.audio.mask_padding", audio["mask_padding"], (False,)),
    ("model.encoders.audio.pooling", audio["pooling"], ("class",)),
    (
      "model.classifier_norm",
      model["classifier_norm"],
      (True,) if model["classes"] else (True, False),
    ),
    ("model.masked_tokens", model["masked_tokens"], (False,)),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of an ASTModel or an ASTForAudioClassification."""
  model, audio = config["model"], config["model"]["encoders"]["audio"]
  return dict(
    model_type="audio-spectrogram-transformer",
    architectures=["ASTForAudioClassification" if model["classes"] else ARCHITECTURE],
    torch_dtype="float32",
    hidden_size=audio["width"],
    num_hidden_layers=audio["depth"],
    num_attention_heads=audio["heads"],
    intermediate_size=audio["mlp"],
    hidden_act=single.activation_name(audio["activation"]),
    layer_norm_eps=audio["eps"],
    patch_size=audio["patch"],
    frequency_stride=audio["stride"],
    time_stride=audio["stride"],
    max_length=_frames(config),
    num_mel_bins=audio["mels"],
    qkv_bias=True,
    hidden_dropout_prob=audio["dropout"],
    attention_probs_dropout_prob=0.0,
    **single.labels(config),
  )


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the file beside config.json: how sound is prepared."""
  audio = config["model"]["encoders"]["audio"]
  return {
    "preprocessor_config.json": dict(
      feature_extractor_type="ASTFeatureExtractor",
      feature_size=1,
      sampling_rate=config["data"]["audio"]["rate"],
      num_mel_bins=audio["mels"],
      max_length=_frames(config),
      do_normalize=True,
      mean=audio["mean"],
      std=audio["std"],
      padding_side="right",
      padding_value=0.0,
      return_attention_mask=False,
    )
  }


def _frames(config: Mapping[str, Any]) -> int:
  data = config["data"]["audio"]
  return config["model"]["encoders"]["audio"]["frames"] or kaldi_frames(
    round(data["rate"] * data["seconds"]), data["rate"]
  )


def encoder_settings(facts: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
  """The entry of model.encoders.audio of a config.json and a preprocessor_config.json. Raises
  UserError: no such encoder here.
  """
  f, p = {**ENCODER, **facts}, {**PREPROCESSOR, **preprocessor}
  if f["hidden_act"] not in ACTIVATIONS:
    raise UserError(
      f"hidden_act {f['hidden_act']!r} is not supported; there are: {', '.join(ACTIVATIONS)}"
    )
  if not f["qkv_bias"] or f["frequency_stride"] != f["time_stride"]:
    raise UserError(
      f"qkv_bias is {f['qkv_bias']} and the strides are {f['frequency_stride']} and "
      f"{f['time_stride']}, but only attention with biases and equal strides are supported"
    )
  for name in ("num_mel_bins", "max_length"):
    if f[name] != p[name]:
      raise UserError(f"{name} is {f[name]}, but preprocessor_config.json has {p[name]}")
  mean, std = (p["mean"], p["std"]) if p["do_normalize"] else (0.0, 0.5)
  return dict(
    kind="ast",
    mels=f["num_mel_bins"],
    patch=square(f["patch_size"], "patch_size"),
    stride=f["time_stride"],
    frames=f["max_length"],
    mean=float(mean),
    std=float(std),
    mask_padding=False,
    width=f["hidden_size"],
    depth=f["num_hidden_layers"],
    heads=f["num_attention_heads"],
    mlp=f["intermediate_size"],
    pooling="class",
    activation=ACTIVATIONS[f["hidden_act"]],
    eps=f["layer_norm_eps"],
  )


def encoder_rules(
  heads: int,
  depth: int,
  patch: int,
  *,
  ours: str = "audio",
  theirs: str = "audio_spectrogram_transformer",
) -> list[Rule]:
  """The weights of an ASTModel. theirs "": of a file of the model without a classifier."""
  theirs = f"{theirs}." if theirs else ""
  at = f"{theirs}encoder.layer.{{i}}"
  embeddings, inside = f"{theirs}embeddings", f"{at}.attention.attention"

  def table(name):
    return f"{embeddings}.{name}"

  return [
    Rule(
      f"{ours}/class", (table("cls_token"),), lambda t: t[0].reshape(-1), lambda p: [p[None, None]]
    ),
    Rule(
      f"{ours}/distillation",
      (table("distillation_token"),),
      lambda t: t[0].reshape(-1),
      lambda p: [p[None, None]],
    ),
    mapping.row(f"{ours}/position", table("position_embeddings")),
    mapping.patches(f"{ours}/patch/kernel", table("patch_embeddings.projection.weight"), patch),
    mapping.same(f"{ours}/patch/bias", table("patch_embeddings.projection.bias")),
    Rule(
      f"{ours}/layers/attention/qkv/kernel",
      tuple(f"{inside}.{x}.weight" for x in ("query", "key", "value")),
      lambda t: np.stack([w.T.reshape(w.shape[1], heads, -1) for w in t], axis=1),
      lambda p: [p[:, i].reshape(p.shape[0], -1).T for i in range(3)],
      depth,
    ),
    Rule(
      f"{ours}/layers/attention/qkv/bias",
      tuple(f"{inside}.{x}.bias" for x in ("query", "key", "value")),
      lambda t: np.stack([b.reshape(heads, -1) for b in t]),
      lambda p: [p[i].reshape(-1) for i in range(3)],
      depth,
    ),
    *mapping.attention_output(
      f"{ours}/layers/attention/out", f"{at}.attention.output.dense", heads, depth
    ),
    *mapping.norm(f"{ours}/layers/attention_norm", f"{at}.layernorm_before", depth),
    *mapping.norm(f"{ours}/layers/mlp_norm", f"{at}.layernorm_after", depth),
    *mapping.linear(f"{ours}/layers/mlp/up", f"{at}.intermediate.dense", depth),
    *mapping.linear(f"{ours}/layers/mlp/down", f"{at}.output.dense", depth),
    *mapping.norm(f"{ours}/norm", f"{theirs}layernorm"),
  ]


def classifier_rules(ours: str = "classifier", theirs: str = "classifier") -> list[Rule]:
  """The head of an ASTForAudioClassification: a layer norm ("norm") and a linear layer ("out") on
  the pooled vector.
  """
  return [
    *mapping.norm(f"{ours}/norm", f"{theirs}.layernorm"),
    *mapping.linear(f"{ours}/out", f"{theirs}.dense"),
  ]
