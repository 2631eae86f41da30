"""Qwen2-Audio (model_type "qwen2_audio", Chu et al. 2024, arXiv:2407.10759): Whisper's encoder,
whose tokens are averaged in pairs before its last norm, a dense layer, and Qwen2. A short sound has
few tokens: the silence after it is seen by the convolutions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.placeholders import HERE
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import decoders, mapping, whisper, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.with_media import rename as rename

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "Qwen2Tokenizer", "Qwen2AudioProcessor", "model."
ARCHITECTURE, PAD, MASK_PADDING = "Qwen2AudioForConditionalGeneration", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "Qwen2AudioModel"),)
BESIDE = ("preprocessor_config.json", decoders.GENERATION, with_media.PROCESSOR)
TEXT = ("qwen2",)  # families that may write
POSITIONS = "audio_tower.embed_positions.weight"

# What transformers assumes where config.json is silent.
AUDIO: dict[str, Any] = dict(num_mel_bins=128, encoder_layers=32, encoder_attention_heads=20)
AUDIO |= dict(encoder_ffn_dim=5120, d_model=1280, activation_function="gelu")
POOL = 2


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  stated = {**AUDIO, **(facts.get("audio_config") or {})}
  with_media.only_tower(stated, "qwen2_audio_encoder", "audio_config")
  preprocessor = dict(facts.get("preprocessor_config.json", {}))
  preprocessor.setdefault("feature_size", stated["num_mel_bins"])
  if POSITIONS in tensors:
    whisper.take_positions(tensors, POSITIONS)  # or it says what is wrong with them
  tied = dict(tie_word_embeddings=facts.get("tie_word_embeddings", False))
  found = with_media.text_settings(facts, tensors, TEXT, "qwen2", **tied)
  audio = whisper.encoder_settings(stated, preprocessor)
  audio.update(mask_padding=True, mask_frames=False, pool=POOL)
  found["model"].update(
    encoders=dict(audio=audio),
    connectors=dict(audio=dict(kind="mlp", width=0, layers=1)),
    media_ids=dict(audio=facts.get("audio_token_id", facts.get("audio_token_index", 151_646))),
  )
  of_audio = whisper.audio_settings(stated, preprocessor)
  step = 2 * POOL * audio["hop"]
  tokens = round(of_audio["seconds"] * of_audio["rate"]) // step
  return dict(found, audio=of_audio, places=dict(audio=tokens, audio_step=step))


def written(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.sequence: how prompts write a sound, by tokenizer_config.json."""
  begin, end = (stated.get(f"audio_{x}_token", f"<|audio_{x}|>") for x in ("bos", "eos"))
  known = all(tokenizer.piece(i) == x for x in (begin, end) for i in tokenizer.encode(x)[:1])
  return dict(written=dict(audio=f"{begin}{HERE}{end}")) if known else {}


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  extractor = whisper.extractor_facts(config, PROCESSOR_CLASS, return_attention_mask=True)
  stated = with_media.files(config, assets, processor_class=PROCESSOR_CLASS)
  return {"preprocessor_config.json": extractor, **stated}


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a Qwen2AudioForConditionalGeneration, but for the encoder's positions."""
  audio = config["model"]["encoders"]["audio"]
  return [
    *whisper.encoder_rules(audio["heads"], audio["depth"], theirs="audio_tower"),
    *mapping.linear("audio_connector/layer1", "multi_modal_projector.linear"),
    *with_media.text_rules(config, TEXT),
  ]


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of a file that are no parameters here."""
  width = config["model"]["encoders"]["audio"]["width"]
  return whisper.put_positions(width, whisper.positions_of(config), POSITIONS)


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a Qwen2AudioForConditionalGeneration must have."""
  if other := with_media.parts_refusals(config, audio=("whisper", "mlp")):
    return other
  sequence, audio = config["data"]["sequence"], config["model"]["encoders"]["audio"]
  step = ("data.sequence.audio_step", sequence["audio_step"], (2 * POOL * audio["hop"],))

  def stated(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    extractor = whisper.extractor_facts(config, PROCESSOR_CLASS)
    return {**facts(config, special), "preprocessor_config.json": extractor}

  return [step, *decoders.refusals(config, settings, stated)]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Qwen2AudioForConditionalGeneration."""
  audio = config["model"]["encoders"]["audio"]
  text = with_media.text_facts(config, special, TEXT)
  return with_media.config_json(
    config,
    special,
    "qwen2_audio",
    ARCHITECTURE,
    text,
    audio_config=dict(
      model_type="qwen2_audio_encoder",
      num_mel_bins=audio["mels"],
      encoder_layers=audio["depth"],
      encoder_attention_heads=audio["heads"],
      encoder_ffn_dim=audio["mlp"],
      d_model=audio["width"],
      max_source_positions=whisper.positions_of(config),
    ),
    audio_token_index=config["model"]["media_ids"].get("audio", 0),
  )
