"""wav2vec 2.0 (model_type "wav2vec2"): the encoder, bare, with a CTC head or a classifier. HuBERT's
weights have the same names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, single
from mmjax.interop.huggingface.mapping import Rule

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "", "", "wav2vec2."
ARCHITECTURE = "Wav2Vec2Model"
TOKENIZER_FILES = ("vocab.json", "tokenizer_config.json")
# Read with config.json; the first has to be there.
BESIDE = ("preprocessor_config.json", *TOKENIZER_FILES)
SECONDS = (
  15.625  # of a sound: what the base model was trained on; transformers reads sounds of any length
)
TRAINING = ("quantizer.", "project_q.", "project_hid.")  # weights that only pre-training uses
WEIGHT_NORM = "parametrizations.weight.original"

# What transformers assumes where config.json and preprocessor_config.json are silent.
FACTS = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3072,
  hidden_act="gelu",
  layer_norm_eps=1e-5,
  feat_extract_norm="group",
  feat_extract_activation="gelu",
  conv_dim=(512,) * 7,
  conv_stride=(5, 2, 2, 2, 2, 2, 2),
  conv_kernel=(10, 3, 3, 3, 3, 2, 2),
  conv_bias=False,
  num_conv_pos_embeddings=128,
  num_conv_pos_embedding_groups=16,
  do_stable_layer_norm=False,
  feat_proj_layer_norm=True,
  conv_pos_batch_norm=False,
  use_weighted_layer_sum=False,
  add_adapter=False,
  adapter_attn_dim=None,
)
PREPROCESSOR = dict(
  feature_size=1, sampling_rate=16_000, padding_value=0.0, padding_side="right", do_normalize=True
)


def settings(
  facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kind: str = "wav2vec2"
) -> dict[str, Any]:
  """{"model": ..., "audio": settings of data.audio} of a config.json and the file beside it."""
  preprocessor = {**PREPROCESSOR, **facts["preprocessor_config.json"]}
  entry = dict(kind=kind, **encoder_settings(facts, preprocessor))
  model = single.model(tensors, dict(audio=entry), entry["width"])
  if model["classes"] and "projector.weight" in tensors:
    model.update(
      width=int(tensors["projector.weight"].shape[0]), projection=True, projection_bias=True
    )
  left_out, notes, text = [name for name in tensors if name.startswith(TRAINING)], [], {}
  vocabulary = facts.get("vocab.json")
  if "lm_head.weight" in tensors and vocabulary:
    model.update(spelling=int(tensors["lm_head.weight"].shape[0]), blank=_blank(facts, vocabulary))
    text = dict(
      text=dict(
        vocab_size=model["spelling"],
        length=round(SECONDS * preprocessor["sampling_rate"]) // math.prod(entry["strides"]),
      )
    )
  elif "lm_head.weight" in tensors:
    left_out += [name for name in tensors if name.startswith("lm_head.")]
    notes.append(
      "the CTC head (lm_head) is left out: there is no vocab.json, without which it writes no text"
    )
  if any(name.startswith(TRAINING) for name in left_out):
    notes.append(
      "what only pre-training uses is left out: the quantizer and the projections beside it"
    )
  return dict(
    model=model,
    audio=dict(rate=preprocessor["sampling_rate"], seconds=SECONDS),
    left_out=left_out,
    notes=notes,
    **text,
  )


def _blank(facts: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> int:
  """The id of CTC's blank, which is the padding piece. Raises UserError: there is none, or
  vocabularies of several languages.
  """
  pad = facts.get("tokenizer_config.json", {}).get("pad_token") or "<pad>"
  pad = pad["content"] if isinstance(pad, Mapping) else pad
  if not all(isinstance(number, int) for number in vocabulary.values()):
    raise UserError(
      "vocab.json holds vocabularies of several languages (target_lang), which is not supported"
    )
  if pad not in vocabulary:
    raise UserError(f"vocab.json has no {pad!r}, which is the blank of the CTC head (pad_token)")
  return vocabulary[pad]


def encoder_settings(facts: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
  """The entry of model.encoders.audio, but for its kind. Raises UserError: no such encoder here.

  Every sound is read as if it were alone, so that mask_padding is True. transformers does so with
  one sound, and with several where it is given an attention mask and feat_extract_norm is "layer";
  otherwise what pads a sound changes its output there.
  """
  f, p = {**FACTS, **facts}, {**PREPROCESSOR, **preprocessor}
  single.only(
    f,
    conv_pos_batch_norm=False,
    use_weighted_layer_sum=False,
    add_adapter=False,
    adapter_attn_dim=None,
    feat_extract_activation=f["hidden_act"],
  )
  single.only(p, feature_size=1, padding_value=0.0, padding_side="right")
  if f["feat_extract_norm"] not in ("group", "layer"):
    raise UserError(
      f"feat_extract_norm is {f['feat_extract_norm']!r}, but only 'group' and 'layer' are supported"
    )
  return dict(
    channels=tuple(f["conv_dim"]),
    sizes=tuple(f["conv_kernel"]),
    strides=tuple(f["conv_stride"]),
    feature_norm=f["feat_extract_norm"],
    feature_bias=f["conv_bias"],
    projection_norm=f["feat_proj_layer_norm"],
    positions=f["num_conv_pos_embeddings"],
    position_groups=f["num_conv_pos_embedding_groups"],
    norm="pre" if f["do_stable_layer_norm"] else "post",
    normalisation="utterance" if p["do_normalize"] else "none",
    mask_padding=True,
    width=f["hidden_size"],
    depth=f["num_hidden_layers"],
    heads=f["num_attention_heads"],
    mlp=f["intermediate_size"],
    activation=single.activation(f),
    eps=f["layer_norm_eps"],
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a Wav2Vec2Model and its head, without the prefix that it has beside one."""
  model, audio = config["model"], config["model"]["encoders"]["audio"]
  projector = mapping.linear("projection", "projector") if model["projection"] else []
  speller = mapping.linear("speller", "lm_head") if model["spelling"] else []
  return [
    *feature_rules(audio),
    *block_rules(audio),
    *projector,
    *single.classifier(config),
    *speller,
  ]


def feature_rules(audio: Mapping[str, Any]) -> list[Rule]:
  """The weights before the blocks."""
  found = []
  for i in range(len(audio["channels"])):
    ours, theirs = f"audio/convolution_{i}", f"feature_extractor.conv_layers.{i}"
    found.append(mapping.time_convolution(f"{ours}/kernel", f"{theirs}.conv.weight"))
    if audio["feature_bias"]:
      found.append(mapping.same(f"{ours}/bias", f"{theirs}.conv.bias"))
    if audio["feature_norm"] == "layer" or i == 0:
      found += mapping.norm(f"{ours}_norm", f"{theirs}.layer_norm")
  if audio["projection_norm"]:
    found += mapping.norm("audio/projection_norm", "feature_projection.layer_norm")
  position = "encoder.pos_conv_embed.conv"
  return [
    *found,
    *mapping.linear("audio/projection", "feature_projection.projection"),
    Rule(
      "audio/position/kernel",
      tuple(f"{position}.{WEIGHT_NORM}{i}" for i in range(2)),
      _folded,
      _unfolded,
    ),
    mapping.same("audio/position/bias", f"{position}.bias"),
  ]


def _folded(tensors: Any) -> np.ndarray:
  """The kernel [size, C / groups, C] of a weight-normed convolution: a length [1, 1, size] and a
  direction [C, C / groups, size].
  """
  length, direction = tensors
  norm = np.sqrt(np.square(direction.astype(np.float64)).sum((0, 1), keepdims=True))
  return (
    (direction * (length / np.maximum(norm, np.finfo(np.float32).tiny)))
    .astype(np.float32)
    .transpose(2, 1, 0)
  )


def _unfolded(kernel: np.ndarray) -> list[np.ndarray]:
  weight = kernel.transpose(2, 1, 0)
  length = np.sqrt(np.square(weight.astype(np.float64)).sum((0, 1), keepdims=True)).astype(
    np.float32
  )
  # A direction of length 0 would be NaN in PyTorch.
  return [length, np.where(length == 0, np.float32(1), weight)]


def block_rules(audio: Mapping[str, Any]) -> list[Rule]:
  """The weights of the blocks, and of the norm before or after them."""
  depth, ours, theirs = audio["depth"], "audio/layers", "encoder.layers.{i}"
  return [
    *mapping.self_attention(
      f"{ours}/attention",
      [f"{theirs}.attention.{x}_proj" for x in "qkv"],
      f"{theirs}.attention.out_proj",
      audio["heads"],
      depth,
    ),
    *mapping.norm(f"{ours}/attention_norm", f"{theirs}.layer_norm", depth),
    *mapping.linear(f"{ours}/mlp/up", f"{theirs}.feed_forward.intermediate_dense", depth),
    *mapping.linear(f"{ours}/mlp/down", f"{theirs}.feed_forward.output_dense", depth),
    *mapping.norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm", depth),
    *mapping.norm(
      "audio/norm" if audio["norm"] == "pre" else "audio/input_norm", "encoder.layer_norm"
    ),
  ]


def refusals(
  config: Mapping[str, Any], projection_norms: tuple[bool, ...] = (True,)
) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a wav2vec 2.0 of transformers must have."""
  model, audio = config["model"], config["model"]["encoders"]["audio"]
  classifies = bool(model["classes"])
  return [
    ("model.encoders.audio.pooling", audio["pooling"], ("mean",)),
    ("model.encoders.audio.projection_norm", audio["projection_norm"], projection_norms),
    ("model.projection", model["projection"], (classifies,)),
    ("model.projection_bias", model["projection_bias"], (True,) if classifies else (True, False)),
    ("model.classes", model["classes"], (0,) if model["spelling"] else (model["classes"],)),
    ("model.classifier_norm", model["classifier_norm"], (False,)),
    ("model.masked_tokens", model["masked_tokens"], (False,)),
  ]


def facts(
  config: Mapping[str, Any], special: Mapping[str, int], name: str = "Wav2Vec2"
) -> dict[str, Any]:
  """The config.json of a Wav2Vec2Model, a Wav2Vec2ForCTC or a Wav2Vec2ForSequenceClassification."""
  model, audio = config["model"], config["model"]["encoders"]["audio"]
  head = (
    "ForSequenceClassification" if model["classes"] else "ForCTC" if model["spelling"] else "Model"
  )
  spells = (
    dict(vocab_size=model["spelling"], pad_token_id=model["blank"]) if model["spelling"] else {}
  )
  return dict(
    model_type=name.lower(),
    architectures=[f"{name}{head}"],
    **spells,
    torch_dtype="float32",
    hidden_size=audio["width"],
    num_hidden_layers=audio["depth"],
    num_attention_heads=audio["heads"],
    intermediate_size=audio["mlp"],
    hidden_act=single.activation_name(audio["activation"]),
    layer_norm_eps=audio["eps"],
    feat_extract_norm=audio["feature_norm"],
    feat_extract_activation=single.activation_name(audio["activation"]),
    conv_dim=list(audio["channels"]),
    conv_kernel=list(audio["sizes"]),
    conv_stride=list(audio["strides"]),
    conv_bias=audio["feature_bias"],
    feat_proj_layer_norm=audio["projection_norm"],
    num_conv_pos_embeddings=audio["positions"],
    num_conv_pos_embedding_groups=audio["position_groups"],
    do_stable_layer_norm=audio["norm"] == "pre",
    hidden_dropout=audio["dropout"],
    activation_dropout=0.0,
    attention_dropout=0.0,
    feat_proj_dropout=audio["dropout"],
    layerdrop=0.0,
    mask_time_prob=0.0,
    mask_feature_prob=0.0,
    classifier_proj_size=model["width"],
    **single.labels(config),
  )


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json: how sound is prepared, and the tokenizer of a
  CTC head.
  """
  kept = (
    {name: json.loads(assets[name]) for name in TOKENIZER_FILES if name in assets}
    if config["model"]["spelling"]
    else {}
  )
  audio = config["model"]["encoders"]["audio"]
  return {
    **kept,
    "preprocessor_config.json": dict(
      feature_extractor_type="Wav2Vec2FeatureExtractor",
      feature_size=1,
      sampling_rate=config["data"]["audio"]["rate"],
      do_normalize=audio["normalisation"] == "utterance",
      padding_side="right",
      padding_value=0.0,
      return_attention_mask=audio["mask_padding"] and audio["feature_norm"] == "layer",
    ),
  }
