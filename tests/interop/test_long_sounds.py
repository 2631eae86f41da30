"""Sounds longer than a window: segments and their times against transformers' long-form Whisper."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import transformers

from mmjax import cli
from mmjax.config import UserError
from mmjax.inference.predictor import Predictor
from mmjax.interop.huggingface import import_hf
from tests.inference import tiny
from tests.interop.test_audio_families import RATE, randomised

torch.set_num_threads(1)
EOS, SILENT, TIMES = 4, 39, 51
GENERATION = dict(
  decoder_start_token_id=1,
  bos_token_id=1,
  eos_token_id=EOS,
  pad_token_id=0,
  suppress_tokens=[0, 7, 8],
  begin_suppress_tokens=[9, EOS],
  return_timestamps=False,
  max_length=24,
  no_timestamps_token_id=SILENT,
  max_initial_timestamp_index=20,
)


def make(folder, seed, **generation):
  """A Whisper of random weights that reads windows of one second, and its folder."""
  torch.manual_seed(seed)
  model = randomised(
    transformers.WhisperForConditionalGeneration(
      transformers.WhisperConfig(
        vocab_size=SILENT + 1 + TIMES,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
        decoder_start_token_id=1,
      )
    )
  ).eval()
  model.generation_config = transformers.GenerationConfig(
    **{**GENERATION, "forced_decoder_ids": [[1, 5], [2, SILENT]], **generation}
  )
  model.save_pretrained(folder)
  transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {
        "<|pad|>": 0,
        "<|start|>": 1,
        "<|unk|>": 2,
        "<|endoftext|>": EOS,
        **{f"w{i}": i for i in range(5, SILENT)},
      },
      unk_token="<|unk|>",
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      dict(
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|endoftext|>",
        unk_token="<|unk|>",
      )
    )
  )
  return model


def sound(seconds, seed):
  rng = np.random.default_rng(seed)
  loud = np.repeat(rng.random(int(seconds * 10) + 1), RATE // 10)[: int(seconds * RATE)]
  return (0.3 * loud * rng.normal(size=int(seconds * RATE))).astype(np.float32)


def theirs(model, folder, x):
  """[(start, end, tokens)] that transformers finds in a long sound."""
  extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
  inputs = extractor(
    x,
    sampling_rate=RATE,
    truncation=False,
    padding="longest",
    return_tensors="pt",
    return_attention_mask=True,
  )
  found = model.generate(
    inputs["input_features"],
    attention_mask=inputs["attention_mask"],
    return_timestamps=True,
    return_segments=True,
  )
  return [
    (float(s["start"]), float(s["end"]), tuple(s["tokens"].tolist())) for s in found["segments"][0]
  ]


LANGUAGES = dict(
  lang_to_id={f"<|l{token}|>": token for token in (10, 21, 22, 35)},
  task_to_id=dict(transcribe=38),
  is_multilingual=True,
  forced_decoder_ids=[[1, None], [2, 38]],
)


@pytest.mark.parametrize(
  "generation", [{}, dict(LANGUAGES, max_new_tokens=7)], ids=["forced", "languages, short"]
)
def test_segments_and_times_equal_transformers(tmp_path, generation):
  model = make(tmp_path / "hf", len(generation), **generation)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  predictor = Predictor.load(tmp_path / "mmjax")
  sounds = [sound(seconds, seed) for seed, seconds in enumerate((3.37, 1.5, 5.01))]
  got = predictor.generate(audio=sounds, timestamps=True)
  lengths = set()
  for x, segments in zip(sounds, got, strict=True):
    want = theirs(model, tmp_path / "hf", x)
    assert [s.tokens for s in segments] == [tokens for _, _, tokens in want]
    np.testing.assert_allclose(
      [(s.start, s.end) for s in segments], [times[:2] for times in want], atol=1e-6
    )
    lengths |= {len(s.tokens) for s in segments}
    assert all(s.text.split() == [f"w{t}" for t in s.tokens if t < SILENT] for s in segments)
  assert len(lengths) > 1 and sum(map(len, got)) > 6  # not the same over and over
  texts = predictor.generate(audio=[*sounds, sound(0.8, 9)])
  assert texts[:3] == [" ".join(s.text for s in segments if s.text) for segments in got]
  assert texts[3] == predictor.generate(audio=sound(0.8, 9))[0]
  assert predictor.generate(audio=sounds[1], timestamps=True) == got[1:2]


def test_the_command_prints_segments(tmp_path, capsys):
  make(tmp_path / "hf", 0)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  soundfile.write(tmp_path / "a.wav", sound(2.5, 0), RATE, subtype="FLOAT")
  command = ["generate", "--checkpoint", str(tmp_path / "mmjax"), str(tmp_path / "a.wav")]
  predictor = Predictor.load(tmp_path / "mmjax")
  (want,) = predictor.generate(audio=sound(2.5, 0), timestamps=True)
  capsys.readouterr()
  assert cli.main([*command, "--timestamps", "--json"]) == 0
  (row,) = json.loads(capsys.readouterr().out)
  assert row["segments"] == [
    dict(start=round(s.start, 3), end=round(s.end, 3), text=s.text) for s in want
  ]
  assert cli.main([*command, "--timestamps"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert (
    len(lines) == len(want)
    and lines[0] == f"{tmp_path}/a.wav: [{want[0].start:.2f} - {want[0].end:.2f}] {want[0].text}"
  )


def test_what_another_model_does_not_hear_is_said(tmp_path, caplog):
  predictor = Predictor.load(
    tiny.save(
      tiny.media_config("captioner", ("audio",), **{"model.decoder": dict(depth=1, heads=2)}),
      tmp_path,
    )
  )
  # A quarter of a second is 2000 samples.
  x = np.random.default_rng(0).normal(size=6000).astype(np.float32) * 0.1
  with caplog.at_level(logging.WARNING, "mmjax"):
    assert predictor.generate(audio=[x[:2000], x]) == predictor.generate(audio=[x[:2000]]) * 2
  assert "sound 2 of 2 is 0.8 s long; the model reads the first 0.25" in caplog.text
  with pytest.raises(
    UserError, match="timestamps need audio= alone, and a decoder with tokens for times"
  ):
    predictor.generate(audio=x, timestamps=True)
