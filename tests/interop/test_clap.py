"""CLAP and its towers against transformers: the spectrogram, tiny random models, both ways, and the
commands.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file

import mmjax
from mmjax import cli
from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.models.encoders.htsat import htsat, stretch
from tests.interop.test_single_encoders import TEXTS, TOWER, loaded, randomise
from tests.interop.test_text_families import tokenizer

RATE, WORDS = 8000, 26
AUDIO = dict(
  window_size=4,
  num_mel_bins=16,
  spec_size=64,
  patch_size=4,
  patch_stride=[4, 4],
  depths=[2, 2],
  num_attention_heads=[2, 4],
  patch_embeds_hidden_size=8,
  hidden_size=16,
)
TEXT = dict(TOWER, vocab_size=WORDS, max_position_embeddings=16, type_vocab_size=1)
SPECIALS = dict(
  cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>"
)


def sounds():
  """Floats that int16 holds exactly: a second, 0.3 s and 0.021 s of tones under noise."""
  rng, t = np.random.default_rng(0), np.arange(RATE) / RATE
  whole = [0.4 * np.sin(2 * np.pi * f * t * (1 + t)) for f in (300, 1100, 700)]
  noisy = [x + 0.02 * rng.standard_normal(RATE) for x in whole]
  return [
    (np.rint(x * 32768) / 32768).astype(np.float32)[:n]
    for x, n in zip(noisy, (RATE, 2400, 170), strict=True)
  ]


def extractor(**more):
  return transformers.ClapFeatureExtractor(
    **{
      **dict(feature_size=16, sampling_rate=RATE, hop_length=80, max_length_s=1),
      **dict(fft_window_size=256, frequency_min=50, frequency_max=3500, truncation="rand_trunc"),
      **more,
    }
  )


def batch_of(rows):
  waveform = np.zeros((len(rows), RATE), np.int16)
  for row, x in zip(waveform, rows, strict=True):
    row[: len(x)] = np.rint(x * 32768)
    row[len(x) :] = 99  # which no one may read
  return dict(audio=dict(waveform=waveform, length=np.array([len(x) for x in rows], np.int32)))


def features_of(folder, rows):
  prepare = transformers.AutoFeatureExtractor.from_pretrained(folder)
  return prepare(rows, sampling_rate=RATE, return_tensors="pt")["input_features"].float()


def random_model(kind, **facts):
  model = randomise(kind(kind.config_class(**facts)))
  for name, buffer in model.named_buffers():
    if "running_mean" in name:
      buffer.sub_(40)  # decibels
    if "running_var" in name:
      buffer.mul_(300)
  return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A ClapModel with its processor, whose two scales differ."""
  folder = tmp_path_factory.mktemp("clap")
  model = random_model(
    transformers.ClapModel, text_config=TEXT, audio_config=AUDIO, projection_dim=12
  )
  with torch.no_grad():
    model.logit_scale_a.fill_(3.0)
    model.logit_scale_t.fill_(3.5)
  model.save_pretrained(folder)
  tokenizer(folder, SPECIALS)
  extractor().save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
  """(import folder, what was said)."""
  out, lines = tmp_path_factory.mktemp("mmjax") / "clap", []
  import_hf(folder, out, lines.append)
  return out, lines


@pytest.mark.parametrize("padding", ("repeatpad", "repeat", "pad"))
def test_features_equal_the_feature_extractor(padding):
  want = extractor(padding=padding)(sounds(), sampling_rate=RATE)["input_features"]
  encoder = htsat(
    dict(audio=dict(rate=RATE)),
    dict(compute="float32"),
    **dict(mels=16, n_fft=256, hop=80, low=50.0, high=3500.0, size=64, width=8, depths=(2,)),
    padding=padding,
  )
  got = jax.jit(encoder.features)(batch_of(sounds())["audio"])
  np.testing.assert_allclose(got, np.stack(want)[:, 0], atol=1e-3)  # of -100 to 20 decibels


def test_features_of_the_published_size_equal_the_feature_extractor():
  rng = np.random.default_rng(0)
  x = (np.rint(rng.normal(0, 3000, 70_000)) / 32768).astype(np.float32)
  prepare = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")
  want = prepare(x, sampling_rate=48_000)["input_features"][0][0]
  encoder = htsat(dict(audio=dict(rate=48_000)), dict(compute="float32"), low=50.0, high=14_000.0)
  waveform = np.zeros((1, 480_000), np.int16)
  waveform[0, : len(x)] = np.rint(x * 32768)
  got = encoder.features(dict(waveform=waveform, length=np.array([len(x)])))
  assert got.shape == (1, 1001, 64)
  np.testing.assert_allclose(got[0], want, atol=1e-3)


@pytest.mark.parametrize(("old", "new"), ((101, 256), (1001, 1024), (2, 9), (7, 7)))
def test_stretching_equals_torch(old, new):
  x = np.random.default_rng(0).standard_normal((2, old, 3)).astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.from_numpy(x)[:, None], (new, 3), mode="bicubic", align_corners=True
  )[:, 0]
  np.testing.assert_allclose(stretch(x, new), want, atol=1e-5)


def test_embeddings_and_logits_equal_transformers_both_ways(folder, imported, tmp_path):
  out, lines = imported
  assert len(lines) == 2 and "a random 1 s of a longer sound" in lines[0]
  assert "logit_scale_a, is kept for both directions" in lines[1]
  model = transformers.ClapModel.from_pretrained(folder).eval()
  inputs = transformers.AutoTokenizer.from_pretrained(folder)(
    TEXTS, padding=True, truncation=True, return_tensors="pt"
  )
  with torch.no_grad():
    want = model(
      input_ids=inputs["input_ids"],
      attention_mask=inputs["attention_mask"],
      input_features=features_of(folder, sounds()),
    )
  predictor = mmjax.load(str(out))
  sound, text = predictor.encode_audio(sounds()), predictor.encode_text(TEXTS)
  np.testing.assert_allclose(sound, want.audio_embeds, atol=1e-4)
  np.testing.assert_allclose(text, want.text_embeds, atol=1e-4)
  logits = predictor.scale * sound @ text.T
  np.testing.assert_allclose(logits, want.logits_per_audio, atol=1e-3)

  export_hf(out, tmp_path / "back")
  again, report = transformers.ClapModel.from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  before, after = load_file(folder / "model.safetensors"), again.state_dict()
  assert set(before) == set(after)
  assert {n for n in before if not torch.equal(before[n], after[n])} == {"logit_scale_t"}
  assert after["logit_scale_t"] == 3.0
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
  assert type(processor).__name__ == "ClapProcessor"
  for key, value in extractor().to_dict().items():
    assert getattr(processor.feature_extractor, key) == value, key
  import_hf(tmp_path / "back", tmp_path / "again", (said := []).append)
  np.testing.assert_array_equal(mmjax.load(str(tmp_path / "again")).encode_audio(sounds()), sound)
  assert len(said) == 1


@pytest.mark.parametrize(
  "case", ("ClapTextModelWithProjection", "ClapAudioModelWithProjection", "ClapAudioModel")
)
def test_towers_alone_equal_transformers_both_ways(case, tmp_path):
  kind = getattr(transformers, case)
  facts = TEXT if "Text" in case else dict(AUDIO, patch_size=6, layer_norm_eps=1e-3)
  model = random_model(kind, **facts, projection_dim=12, projection_hidden_act="gelu")
  model.save_pretrained(tmp_path / "hf")
  if "Text" in case:
    made = tokenizer(tmp_path / "hf", SPECIALS)
    inputs = dict(
      made(TEXTS, padding="max_length", max_length=14, truncation=True, return_tensors="pt")
    )
    inputs.pop("token_type_ids", None)
    tokens = inputs["input_ids"].numpy().astype(np.int32)
    batch = dict(text=dict(tokens=tokens, mask=inputs["attention_mask"].numpy() > 0))
  else:
    extractor().save_pretrained(tmp_path / "hf")
    inputs, batch = dict(input_features=features_of(tmp_path / "hf", sounds())), batch_of(sounds())
  with torch.no_grad():
    out = model(**inputs)
    want = next(
      x
      for name in ("text_embeds", "audio_embeds", "pooler_output")
      if (x := getattr(out, name, None)) is not None
    )
  import_hf(tmp_path / "hf", tmp_path / "mmjax", [].append)
  net, variables = loaded(tmp_path / "mmjax")
  (modality,) = batch
  run = jax.jit(lambda v, b: net.apply(v, modality, b, method="embedding"))
  want = torch.nn.functional.normalize(want, dim=-1)
  np.testing.assert_allclose(run(variables, batch), want, atol=1e-4)

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert again.config.architectures == [case]
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(
  ("file", "change", "says"),
  (
    ("config.json", dict(audio_config=dict(AUDIO, enable_fusion=True)), "enable_fusion is true"),
    ("preprocessor_config.json", dict(truncation="fusion"), "truncation is 'fusion'"),
    ("preprocessor_config.json", dict(feature_size=32), "num_mel_bins is 16, but"),
    (
      "config.json",
      dict(audio_config=dict(AUDIO, window_size=9)),
      "relative_position_bias_table gives a",
    ),
    ("config.json", dict(audio_config=dict(AUDIO, qkv_bias=False)), "qkv_bias is False"),
    ("config.json", dict(projection_hidden_act="mish"), "projection_hidden_act 'mish'"),
    ("preprocessor_config.json", dict(max_length_s=3), "a spectrogram of 301 frames"),
  ),
)
def test_what_is_not_supported_is_refused_by_name(file, change, says, folder, tmp_path):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  facts = json.loads((tmp_path / file).read_text())
  (tmp_path / file).write_text(json.dumps({**facts, **change}))
  with pytest.raises(UserError, match=says):
    import_hf(tmp_path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_commands_embed_sounds_and_classify_them_by_prompts(
  folder, imported, tmp_path, monkeypatch
):
  out, _ = imported
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  rows, labels = sounds(), ("cat", "dog", "cat")
  for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
    (tmp_path / "sounds" / label).mkdir(parents=True, exist_ok=True)
    soundfile.write(tmp_path / "sounds" / label / f"{i}.wav", row, RATE, subtype="PCM_16")
  (tmp_path / "texts.txt").write_text("a cat\na dog\n")
  model = transformers.ClapModel.from_pretrained(folder).eval()
  words = transformers.AutoTokenizer.from_pretrained(folder)(
    ["a cat", "a dog"], return_tensors="pt"
  )
  with torch.no_grad():
    want = model(
      input_ids=words["input_ids"],
      attention_mask=words["attention_mask"],
      input_features=features_of(folder, rows),
    )

  command = ["embed", "--checkpoint", str(out), "--audio", str(tmp_path / "sounds")]
  command += ["--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "index.npz")]
  assert cli.main(command) == 0
  index = np.load(tmp_path / "index.npz")
  order = np.argsort([int(name.split("/")[-1][0]) for name in index["audio_ids"]])
  np.testing.assert_allclose(index["audio_embeddings"][order], want.audio_embeds, atol=1e-4)
  np.testing.assert_allclose(index["text_embeddings"], want.text_embeds, atol=1e-4)

  assert cli.main(["data", "convert", "folder", str(tmp_path / "sounds"), "--name", "sounds"]) == 0
  entry = dict(kind="zero_shot", source="sounds", split="train", modality="audio")
  command = ["eval", "--checkpoint", str(out), "--out", str(tmp_path / "eval")]
  for key, value in dict(entry, templates="('a {}',)").items():
    command.append(f"--config.evaluation.evaluators.classes.{key}={value}")
  assert cli.main(command) == 0
  found = json.loads((tmp_path / "eval" / "eval.json").read_text())["classes"]
  correct = want.logits_per_audio.argmax(1).numpy() == [("cat", "dog").index(x) for x in labels]
  assert found["examples"] == 3 and found["accuracy"] == pytest.approx(correct.mean())
