"""Whisper's encoder and AST against transformers: spectrograms, tiny random models, outputs and
gradients.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmjax.config import UserError
from mmjax.interop import safetensors
from mmjax.interop.huggingface import ast, mapping, whisper
from mmjax.models import positions
from mmjax.models.encoders import audio as encoders

RATE = 16_000
RNG = np.random.default_rng(0)
LENGTHS = np.array([RATE, 9_000], np.int32)


def sound(samples=RATE):
  """Two rows of int16: tones under noise, and silence after LENGTHS."""
  t = np.arange(samples) / RATE
  x = np.stack(
    [
      0.4 * np.sin(2 * np.pi * f * t * (1 + t)) + 0.02 * RNG.standard_normal(samples)
      for f in (300, 1100)
    ]
  )
  return (
    (np.where(np.arange(samples) < LENGTHS[:, None], x, 0) * 32768)
    .clip(-32768, 32767)
    .astype(np.int16)
  )


WAVEFORM = sound()
FLOATS = WAVEFORM.astype(np.float32) / 32768
BATCH = dict(waveform=WAVEFORM, length=LENGTHS)


def randomised(model):
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if "embed_positions" not in name or "decoder" in name:
        p.add_(torch.randn(p.shape, generator=generator) * 0.1)
  return model.eval()


def encoder_of(entry, seconds=1.0):
  settings = {k: v for k, v in entry.items() if k != "kind"}
  return getattr(encoders, entry["kind"])(
    dict(audio=dict(rate=RATE, seconds=seconds)), dict(compute="float32"), **settings
  )


def gradients_match(encoder, params, rules, model, output, target):
  """Every gradient of the mean square of our tokens less `target` equals PyTorch's of `output` less
  `target`.
  """
  model.zero_grad()
  (output - torch.from_numpy(target)).square().mean().backward()
  want = mapping.to_params(
    {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None},
    rules,
    "gradients",
  )

  def loss(p):
    return jnp.square(encoder.apply({"params": p["audio"]}, BATCH).tokens - target).mean()

  got = jax.jit(jax.grad(loss))({"audio": params})
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), got, want)


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whisper")
  model = randomised(
    transformers.WhisperModel(
      transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
      )
    )
  )
  generation = transformers.WhisperForConditionalGeneration(model.config)
  generation.model.load_state_dict(model.state_dict())
  generation.save_pretrained(folder)
  extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
  extractor.save_pretrained(folder)
  return folder, model.encoder, extractor


def test_whisper_spectrogram_equals_transformers(whisper_folder):
  for extractor in (
    whisper_folder[2],
    transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=1),
  ):
    want = extractor(list(FLOATS), sampling_rate=RATE, return_tensors="np")[
      "input_features"
    ].transpose(0, 2, 1)
    got, mask = encoders.log_mel(WAVEFORM, LENGTHS, mels=extractor.feature_size)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert mask.sum(1).tolist() == [100, -(-9000 // 160)]


def test_whisper_encoder_equals_transformers_and_goes_back(whisper_folder):
  folder, model, extractor = whisper_folder
  facts, preprocessor = (
    safetensors.read_json(folder / name) for name in ("config.json", "preprocessor_config.json")
  )
  assert whisper.audio_settings(facts, preprocessor) == dict(rate=RATE, seconds=1.0)
  tensors = safetensors.read_folder(folder)
  params = whisper.encoder_params(tensors, facts, str(folder))
  encoder = encoder_of(whisper.encoder_settings(facts, preprocessor))
  output = model(
    torch.from_numpy(
      extractor(list(FLOATS), sampling_rate=RATE, return_tensors="np")["input_features"]
    )
  ).last_hidden_state
  got = jax.jit(encoder.apply)({"params": params}, BATCH)
  np.testing.assert_allclose(got.tokens, output.detach().numpy(), atol=1e-4)
  assert got.mask.all()
  target = RNG.standard_normal(got.tokens.shape).astype(np.float32)
  gradients_match(
    encoder, params, whisper.encoder_rules(4, 2, theirs=""), _named(model), output, target
  )
  back = mapping.to_tensors({"audio": params}, whisper.encoder_rules(4, 2)) | whisper.put_positions(
    32, 50
  )
  for name, tensor in back.items():
    np.testing.assert_allclose(tensor, tensors[name], atol=1e-5)
  assert set(back) == {name for name in tensors if name.startswith("model.encoder.")}
  start = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), BATCH))["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)


def _named(model):
  """The model with names that begin with a dot, as `theirs=""` gives them."""

  class Named:
    zero_grad = model.zero_grad

    def named_parameters(self):
      return ((f".{name}", p) for name, p in model.named_parameters())

  return Named()


def test_whisper_positions_equal_transformers_at_full_length():
  model = transformers.WhisperModel(
    transformers.WhisperConfig(
      vocab_size=8,
      d_model=384,
      encoder_layers=0,
      decoder_layers=0,
      pad_token_id=0,
      bos_token_id=1,
      eos_token_id=2,
      decoder_start_token_id=1,
    )
  )
  # Float32 angles of up to 1499.
  np.testing.assert_allclose(
    positions.sinusoids(1500, 384), model.encoder.embed_positions.weight, atol=2e-4
  )


def test_whisper_folders_that_do_not_fit_are_refused(whisper_folder):
  folder, _, _ = whisper_folder
  tensors = safetensors.read_folder(folder)
  facts = safetensors.read_json(folder / "config.json")
  name = "model.encoder.embed_positions.weight"
  with pytest.raises(UserError, match="not the table of sines"):
    whisper.encoder_params({**tensors, name: np.ones_like(tensors[name])}, facts, "x")
  with pytest.raises(UserError, match="lacks model.encoder.conv1.bias"):
    whisper.encoder_params(
      {k: v for k, v in tensors.items() if k != "model.encoder.conv1.bias"}, facts, "x"
    )
  with pytest.raises(UserError, match="max_source_positions is 50, but"):
    whisper.audio_settings(facts, {})
  with pytest.raises(UserError, match="activation_function is 'relu'"):
    whisper.encoder_settings(dict(activation_function="relu"), {})


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ast")
  config = transformers.ASTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_length=112,
    num_mel_bins=64,
    num_labels=5,
  )
  model = randomised(transformers.ASTForAudioClassification(config))
  model.save_pretrained(folder)
  extractor = transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=112)
  extractor.save_pretrained(folder)
  return folder, model, extractor


@pytest.mark.parametrize("mels", (64, 128))
def test_kaldi_spectrogram_equals_transformers(mels):
  extractor = transformers.ASTFeatureExtractor(num_mel_bins=mels, max_length=98, do_normalize=False)
  for length in LENGTHS:
    want = extractor(FLOATS[0, :length], sampling_rate=RATE, return_tensors="np")["input_values"]
    got, mask = encoders.kaldi_mel(WAVEFORM[:1], jnp.array([length]), mels=mels)
    np.testing.assert_allclose(np.where(mask[..., None], got, 0), want, atol=1e-3)


def test_ast_equals_transformers_and_goes_back(ast_folder):
  folder, model, extractor = ast_folder
  facts, preprocessor = (
    safetensors.read_json(folder / name) for name in ("config.json", "preprocessor_config.json")
  )
  tensors = safetensors.read_folder(folder)
  params = mapping.to_params(
    tensors, [*ast.encoder_rules(4, 2, 16), *ast.classifier_rules()], str(folder)
  )
  encoder = encoder_of(ast.encoder_settings(facts, preprocessor))
  rows = [FLOATS[i, :length] for i, length in enumerate(LENGTHS)]
  values = torch.from_numpy(np.stack(extractor(rows, sampling_rate=RATE)["input_values"]))
  inner = model.audio_spectrogram_transformer(values)
  got = jax.jit(encoder.apply)({"params": params["audio"]}, BATCH)
  np.testing.assert_allclose(got.tokens, inner.last_hidden_state.detach().numpy(), atol=1e-4)
  np.testing.assert_allclose(got.pooled, inner.pooler_output.detach().numpy(), atol=1e-4)
  head = params["classifier"]
  x = np.asarray(got.pooled)
  x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * head["norm"]["scale"] + head[
    "norm"
  ]["bias"]
  np.testing.assert_allclose(
    x @ head["out"]["kernel"] + head["out"]["bias"],
    model(values).logits.detach().numpy(),
    atol=1e-4,
  )

  names = dict(
    zip(
      dict(model.audio_spectrogram_transformer.named_parameters()),
      sorted_like(model, tensors),
      strict=True,
    )
  )

  class Filed:
    zero_grad = model.zero_grad

    def named_parameters(self):
      return (
        (names[name], p) for name, p in model.audio_spectrogram_transformer.named_parameters()
      )

  target = RNG.standard_normal(got.tokens.shape).astype(np.float32)
  gradients_match(
    encoder, params["audio"], ast.encoder_rules(4, 2, 16), Filed(), inner.last_hidden_state, target
  )
  back = mapping.to_tensors(params, [*ast.encoder_rules(4, 2, 16), *ast.classifier_rules()])
  assert set(back) == set(tensors)
  for name, tensor in back.items():
    np.testing.assert_allclose(tensor, tensors[name], atol=1e-6)
  start = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), BATCH))["params"]
  assert jax.tree.map(jnp.shape, params["audio"]) == jax.tree.map(jnp.shape, start)


def sorted_like(model, tensors):
  """The name in the file of each parameter of the model: the tensor that is equal to it."""
  for p in model.audio_spectrogram_transformer.parameters():
    p = p.detach().numpy()
    yield next(name for name, t in tensors.items() if t.shape == p.shape and np.array_equal(t, p))


def test_ast_folders_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match="strides are 10 and 8"):
    ast.encoder_settings(dict(time_stride=8), {})
  with pytest.raises(UserError, match="max_length is 512, but preprocessor_config.json has 1024"):
    ast.encoder_settings(dict(max_length=512), {})
