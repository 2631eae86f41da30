"""Qwen2-Audio against transformers: a tiny random model, its processor, sounds of two lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from mmjax.config import UserError
from mmjax.interop.huggingface import qwen2_audio
from mmjax.models.positions import sinusoids
from tests.interop.media_families import IMAGE, SPACES, TEXT, assert_equal_both_ways, save
from tests.interop.test_language_models import words

SOUNDS = [  # 48 and 13 frames: an odd number of pairs, and a frame too many
  np.round(8000 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32) / 32_768
  for seed, size in enumerate([7600, 2000])
]


def save_model(folder, **settings):
  torch.manual_seed(0)
  text = dict(TEXT, model_type="qwen2")
  del text["head_dim"]
  audio = dict(
    num_mel_bins=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    d_model=16,
    max_source_positions=50,
  )
  config = transformers.Qwen2AudioConfig(
    text_config=text, audio_config=audio, audio_token_index=IMAGE, **settings
  )
  model = transformers.Qwen2AudioForConditionalGeneration(config)
  positions = model.model.audio_tower.embed_positions.weight
  positions.data = torch.from_numpy(sinusoids(50, 16))  # as all of them were trained
  save(folder, model, keep=positions)
  words(folder, more=["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], spaces=SPACES)
  transformers.Qwen2AudioProcessor(
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    transformers.AutoTokenizer.from_pretrained(folder),
  ).save_pretrained(folder)


@pytest.mark.parametrize(
  "settings", [{}, pytest.param(dict(tie_word_embeddings=True), marks=pytest.mark.slow)]
)
def test_qwen2_audio_equals_transformers_both_ways(settings, tmp_path):
  save_model(tmp_path / "theirs", **settings)
  _, batch, _ = assert_equal_both_ways(
    tmp_path,
    transformers.Qwen2AudioForConditionalGeneration,
    lambda processor, text: processor(
      audio=SOUNDS, text=text, return_tensors="pt", sampling_rate=16_000
    ),
    "a <audio>b c<audio> d",
    dict(audio=SOUNDS),
    ("model.multi_modal_projector.linear.weight", "audio_connector/layer1/kernel", lambda x: x.T),
    "a <|audio_bos|><|AUDIO|><|audio_eos|>b c<|audio_bos|><|AUDIO|><|audio_eos|> d",
  )
  counts = [(batch["sequence"]["media_index"] == slot).sum() for slot in range(2)]
  assert counts == [12, 3]


def test_variants_that_are_not_covered_are_refused_by_name():
  for stated, error in (
    (dict(text_config=dict(model_type="llama")), "text_config.model_type is 'llama'"),
    (dict(audio_config=dict(model_type="whisper")), "only qwen2_audio_encoder"),
    (dict(audio_config=dict(activation_function="relu")), "activation_function is 'relu'"),
    (dict(audio_config=dict(max_source_positions=100)), "max_source_positions is 100"),
  ):
    with pytest.raises(UserError, match=error):
      qwen2_audio.settings(stated, {})
