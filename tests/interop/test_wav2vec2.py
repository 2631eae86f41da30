"""wav2vec 2.0 and HuBERT against transformers: tiny random models of every variant, there and
back.
"""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer
from mmjax.inference.engine import without_repeats
from mmjax.inference.predictor import Predictor
from mmjax.interop import safetensors
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints

RATE, SAMPLES = 16_000, 4_000
LENGTHS = np.array([SAMPLES, 2_300], np.int32)
RNG = np.random.default_rng(0)
SOUNDS = [(RNG.standard_normal(n) * 3_000 + 500).astype(np.int16) for n in LENGTHS]
FLOATS = [sound.astype(np.float32) / 32768 for sound in SOUNDS]
BATCH = {
  "audio": dict(
    waveform=np.stack([np.pad(s, (0, SAMPLES - len(s)), constant_values=9_999) for s in SOUNDS]),
    length=LENGTHS,
  )
}
# As the large models have it.
LARGE = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
# Few tokens, for sounds as long as an import reads.
COARSE = dict(LARGE, conv_stride=(10, 4, 4), conv_kernel=(20, 4, 4))
CASES = {  # name -> (class, settings of its config)
  "base": ("Wav2Vec2Model", {}),
  "large": ("Wav2Vec2Model", LARGE),
  "odd": (
    "Wav2Vec2Model",
    dict(feat_extract_norm="layer", num_conv_pos_embeddings=5, do_normalize=False),
  ),
  "classifier": (
    "Wav2Vec2ForSequenceClassification",
    dict(LARGE, classifier_proj_size=6, num_labels=3),
  ),
  "hubert base": ("HubertModel", {}),
  "hubert large": ("HubertModel", LARGE),
  "hubert without norm": ("HubertModel", dict(feat_proj_layer_norm=False)),
  "hubert classifier": (
    "HubertForSequenceClassification",
    dict(classifier_proj_size=6, num_labels=3),
  ),
}


def made(name, **settings):
  """(a tiny random model of transformers, its feature extractor's settings)."""
  preparation = {key: settings.pop(key) for key in ("do_normalize",) if key in settings}
  config = getattr(transformers, f"{name.split('For')[0].removesuffix('Model')}Config")(
    **{
      **dict(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(6, 8, 10),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 4, 4),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=4,
        layer_norm_eps=1e-4,
      ),
      **settings,
    }
  )
  torch.manual_seed(0)
  model = getattr(transformers, name)(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape) * 0.1)
  return model.eval(), preparation


def saved(folder, name, **settings):
  model, preparation = made(name, **settings)
  model.save_pretrained(folder)
  transformers.Wav2Vec2FeatureExtractor(
    return_attention_mask=model.config.feat_extract_norm == "layer", **preparation
  ).save_pretrained(folder)
  return model


def theirs(folder, model, padded=False):
  """[outputs of each sound alone], or with `padded` those of both at once, with an attention mask
  if the extractor gives one.
  """
  extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
  assert extractor.return_attention_mask == (model.config.feat_extract_norm == "layer")

  def run(sounds):
    with torch.no_grad():
      output = model(**extractor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt"))
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).numpy()

  return run(FLOATS) if padded else [run([sound])[0] for sound in FLOATS]


def assert_equal(found, want):
  """Ours, (outputs, which are real), against a list of outputs."""
  got, mask = found
  for row, real, expected in zip(got, mask, want, strict=True):
    assert not real[len(expected) :].any() and real[: len(expected)].all()
    np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-4)


def ours(folder, batch=BATCH, **settings):
  config = checkpoints.load_config(checkpoints.find_checkpoint(str(folder))).to_dict()
  config["model"]["encoders"]["audio"].update(settings)
  model, variables = (
    make_model(config),
    {"params": checkpoints.load_params(checkpoints.find_checkpoint(str(folder)))},
  )
  if config["model"]["classes"]:
    return np.asarray(
      jax.jit(lambda v, b: model.apply(v, ("audio",), b, method="classify"))(variables, batch)
    ), np.ones((len(batch["audio"]["length"]), config["model"]["classes"]), bool)
  encoded = jax.jit(lambda v, b: model.apply(v, "audio", b, method="encode"))(variables, batch)
  return np.asarray(encoded.tokens), np.asarray(encoded.mask)


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_transformers_there_and_back(tmp_path, case):
  name, settings = CASES[case]
  model = saved(tmp_path / "theirs", name, **settings)
  want = theirs(tmp_path / "theirs", model)
  import_hf(tmp_path / "theirs", tmp_path / "ours")
  assert_equal(ours(tmp_path / "ours"), want)
  export_hf(tmp_path / "ours", tmp_path / "back")
  again, info = getattr(transformers, name).from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for a, b in zip(theirs(tmp_path / "back", again.eval()), want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_attention_mask_of_transformers_is_the_length_of_the_sound(tmp_path):
  model = saved(tmp_path / "theirs", "Wav2Vec2Model", **LARGE)
  import_hf(tmp_path / "theirs", tmp_path / "ours")
  got, mask = ours(tmp_path / "ours")
  np.testing.assert_allclose(
    got[mask], theirs(tmp_path / "theirs", model, padded=True)[mask], atol=1e-4
  )
  assert not mask.all()


@pytest.mark.parametrize("settings", ({}, LARGE))
def test_without_a_mask_silence_is_seen_as_transformers_sees_zeros(tmp_path, settings):
  model = saved(tmp_path / "theirs", "HubertModel", **settings)
  import_hf(tmp_path / "theirs", tmp_path / "ours")
  normed = [(x - x.mean()) / np.sqrt(x.var() + 1e-7) for x in FLOATS]
  with torch.no_grad():
    want = model(
      torch.tensor(np.stack([np.pad(x, (0, SAMPLES - len(x))) for x in normed]))
    ).last_hidden_state.numpy()
  assert_equal(ours(tmp_path / "ours", mask_padding=False), want)


@pytest.mark.parametrize(
  "name, left_out",
  [
    ("HubertForCTC", "the CTC head (lm_head) is left out"),
    ("Wav2Vec2ForPreTraining", "what only pre-training uses is left out"),
  ],
)
def test_what_is_left_out_of_an_import_is_named(tmp_path, name, left_out):
  model = saved(
    tmp_path / "theirs",
    name,
    **LARGE,
    **dict(num_codevectors_per_group=4, codevector_dim=8, proj_codevector_dim=8),
  )
  bare = getattr(model, model.base_model_prefix)
  notes = []
  import_hf(tmp_path / "theirs", tmp_path / "ours", log=notes.append)
  assert len(notes) == 1 and left_out in notes[0]
  assert_equal(ours(tmp_path / "ours"), theirs(tmp_path / "theirs", bare))


VOCABULARY = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}


def speller(folder, name, **tokenizer):
  """(model, tokenizer) in a folder, with a CTC head that spells neither <s>, </s> nor <unk>."""
  model, _ = made(name, **COARSE)
  with torch.no_grad():
    logits = model(torch.tensor(np.stack([FLOATS[0] / FLOATS[0].std()]))).logits
    model.lm_head.bias -= logits.mean((0, 1))  # each as likely as any other
    model.lm_head.bias[[0, 2, 3]] = -1e4
  model.config.pad_token_id = 1
  model.save_pretrained(folder)
  transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
  (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
  tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **tokenizer)
  tokenizer.save_pretrained(folder)
  return model, tokenizer


@pytest.mark.parametrize(
  "name, settings", [("Wav2Vec2ForCTC", {}), ("HubertForCTC", dict(do_lower_case=True))]
)
def test_a_ctc_head_writes_what_transformers_reads_off_it_there_and_back(tmp_path, name, settings):
  model, tokenizer = speller(tmp_path / "theirs", name, **settings)
  want = [tokenizer.decode(logits.argmax(-1)) for logits in theirs(tmp_path / "theirs", model)]
  assert len(set(want)) == 2 and all(len(set(text)) > 1 for text in want), want
  import_hf(tmp_path / "theirs", tmp_path / "ours")
  predictor = Predictor.load(tmp_path / "ours")
  assert predictor.generate(audio=FLOATS) == want
  (short,) = predictor.generate(audio=FLOATS[0], max_length=5)
  assert want[0].startswith(short) and 0 < len(short) <= 5
  with pytest.raises(UserError, match="beams=1"):
    predictor.generate(audio=FLOATS, beams=2)
  export_hf(tmp_path / "ours", tmp_path / "back")
  again, info = getattr(transformers, name).from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
  assert [
    back.decode(logits.argmax(-1)) for logits in theirs(tmp_path / "back", again.eval())
  ] == want
  assert again.config.pad_token_id == back.pad_token_id == 1


@pytest.mark.parametrize("settings", ({}, dict(do_lower_case=True)))
def test_characters_are_those_of_transformers(tmp_path, settings):
  (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
  want = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **settings)
  want.save_pretrained(tmp_path)
  got = Tokenizer.from_assets(
    {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "tokenizer_config.json")}
  )
  for text in ("AB BA", "ab a", "A?B", ""):
    assert got.encode(text) == want(text).input_ids
    assert got.decode([5, 1, 5, 4, 6]) == want.decode([5, 1, 5, 4, 6], group_tokens=False)
  assert (got.pad_id, got.bos_id, got.eos_id, got.unk_id, got.vocab_size) == (1, 0, 2, 3, 7)
  assert got.word_starts("AB BA") == [True, False, False, True, False]


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda v: {k: x for k, x in v.items() if k != "<pad>"}, "no '<pad>'"),
    (lambda v: {"eng": v}, "several languages"),
  ],
)
def test_a_vocabulary_without_a_blank_or_of_several_languages_is_refused(tmp_path, change, words):
  speller(tmp_path / "theirs", "Wav2Vec2ForCTC")
  path = tmp_path / "theirs" / "vocab.json"
  path.write_text(json.dumps(change(json.loads(path.read_text()))))
  with pytest.raises(UserError, match=words):
    import_hf(tmp_path / "theirs", tmp_path / "ours")


def test_a_ctc_path_is_read_as_by_itertools():
  rng = np.random.default_rng(0)
  path = rng.integers(0, 4, (50, 12)).astype(np.int32)
  for row, got in zip(path, np.asarray(without_repeats(path, 2)), strict=True):
    want = [token for token, _ in itertools.groupby(row.tolist()) if token != 2]
    assert got.tolist() == want + [2] * (12 - len(want))


def test_weight_norm_under_its_old_names_is_read(tmp_path):
  saved(tmp_path / "new", "Wav2Vec2Model", **LARGE)
  saved(tmp_path / "old", "Wav2Vec2Model", **LARGE)
  tensors = safetensors.read_folder(tmp_path / "old")
  renamed = {
    name.replace("parametrizations.weight.original0", "weight_g").replace(
      "parametrizations.weight.original1", "weight_v"
    ): x
    for name, x in tensors.items()
  }
  assert set(renamed) != set(tensors)
  safetensors.write(tmp_path / "old" / "model.safetensors", renamed)
  for folder in ("new", "old"):
    import_hf(tmp_path / folder, tmp_path / f"{folder} ours")
  np.testing.assert_array_equal(ours(tmp_path / "new ours")[0], ours(tmp_path / "old ours")[0])


def test_a_position_of_the_kernel_that_is_all_zero_survives_the_way_there_and_back(tmp_path):
  model, _ = made("Wav2Vec2Model", **LARGE)
  with torch.no_grad():
    model.encoder.pos_conv_embed.conv.parametrizations.weight.original0[..., 0] = 0
  model.save_pretrained(tmp_path / "theirs")
  transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(
    tmp_path / "theirs"
  )
  import_hf(tmp_path / "theirs", tmp_path / "ours")
  export_hf(tmp_path / "ours", tmp_path / "back")
  again = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "back").eval()
  for a, b in zip(
    theirs(tmp_path / "back", again), theirs(tmp_path / "theirs", model), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
  "name, facts, words",
  [
    ("config.json", dict(add_adapter=True), "add_adapter"),
    ("config.json", dict(adapter_attn_dim=4), "adapter_attn_dim"),
    ("config.json", dict(conv_pos_batch_norm=True), "conv_pos_batch_norm"),
    ("config.json", dict(use_weighted_layer_sum=True), "use_weighted_layer_sum"),
    ("config.json", dict(feat_extract_activation="relu"), "feat_extract_activation"),
    ("config.json", dict(feat_extract_norm="batch"), "feat_extract_norm"),
    ("config.json", dict(architectures=["Wav2Vec2ForXVector"]), "Wav2Vec2ForXVector"),
    ("config.json", dict(model_type="wav2vec2-conformer"), "wav2vec2-conformer"),
    ("preprocessor_config.json", dict(padding_side="left"), "padding_side"),
    ("preprocessor_config.json", None, "no preprocessor_config.json"),
  ],
)
def test_variants_that_are_not_supported_are_refused_by_name(tmp_path, name, facts, words):
  saved(tmp_path / "theirs", "Wav2Vec2Model", **LARGE)
  path = tmp_path / "theirs" / name
  if facts is None:
    path.unlink()
  else:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
  with pytest.raises(UserError, match=words):
    import_hf(tmp_path / "theirs", tmp_path / "ours")


def test_a_predictor_encodes_sounds_of_an_imported_model(tmp_path):
  model = saved(tmp_path / "theirs", "Wav2Vec2Model", **COARSE)
  import_hf(tmp_path / "theirs", tmp_path / "ours")
  got = Predictor.load(tmp_path / "ours").encode_audio(FLOATS)
  for row, tokens in zip(got, theirs(tmp_path / "theirs", model), strict=True):
    np.testing.assert_allclose(row, tokens.mean(0) / np.linalg.norm(tokens.mean(0)), atol=1e-4)
