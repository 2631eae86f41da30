"""Whole Whisper and AST folders against transformers: logits, generated tokens, sound prepared, and
the way back, by command.
"""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from mmjax import cli
from mmjax.config import UserError
from mmjax.inference.engine import generate_text
from mmjax.interop import safetensors
from mmjax.interop.huggingface import export_hf, import_hf, whisper_decoder
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints
from tests.interop.test_audio_families import FLOATS, LENGTHS, RATE, WAVEFORM, randomised

torch.set_num_threads(1)  # tiny models: threads that wait for each other take longer
PROMPT, EOS, PAD = (1, 5, 39), 4, 0
AUDIO = dict(waveform=WAVEFORM, length=LENGTHS)
TEXT = np.array([[11, 12, 13, 4], [14, 15, 4, 0]], np.int32)


def loaded(folder):
  model = make_model(checkpoints.load_config(str(folder)))
  return model, {"params": checkpoints.load_params(str(folder))}


def whisper_model():
  torch.manual_seed(0)
  model = randomised(
    transformers.WhisperForConditionalGeneration(
      transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=16,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        decoder_start_token_id=1,
      )
    )
  )
  model.generation_config = transformers.GenerationConfig(
    decoder_start_token_id=1,
    bos_token_id=1,
    eos_token_id=EOS,
    pad_token_id=PAD,
    forced_decoder_ids=[[1, 5], [2, 39]],
    suppress_tokens=[PAD, 7, 8],
    begin_suppress_tokens=[9, EOS],
    return_timestamps=False,
    max_length=16,
    no_timestamps_token_id=39,
  )
  return model


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whisper")
  model = whisper_model()
  model.save_pretrained(folder / "hf")
  transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder / "hf")
  words = {
    "<|pad|>": 0,
    "<|start|>": 1,
    "<|unk|>": 2,
    "<|endoftext|>": EOS,
    **{f"w{i}": i for i in range(5, 40)},
  }
  spoken = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|unk|>"))
  spoken.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  spoken.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|start|> $A <|endoftext|>", special_tokens=[("<|start|>", 1), ("<|endoftext|>", EOS)]
  )
  spoken.save(str(folder / "hf" / "tokenizer.json"))
  (folder / "hf" / "tokenizer_config.json").write_text(
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
  assert (
    cli.main(["import", "--from", "hf", str(folder / "hf"), "--out", str(folder / "mmjax")]) == 0
  )
  assert (
    cli.main(
      ["export", "--checkpoint", str(folder / "mmjax"), "--to", "hf", "--out", str(folder / "back")]
    )
    == 0
  )
  return folder, model


def features(folder):
  extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
  rows = [FLOATS[i, :length] for i, length in enumerate(LENGTHS)]
  return extractor(rows, sampling_rate=RATE, return_tensors="pt")


def spoken_by(model, folder):
  """Lists of tokens that transformers' own `generate` of Whisper writes, without the prompt and
  from the end token on.
  """
  out = []
  for row in model.generate(features(folder)["input_features"]).tolist():
    row = row[len(PROMPT) :] if tuple(row[: len(PROMPT)]) == PROMPT else row
    out.append(row[: row.index(EOS)] if EOS in row else [token for token in row if token != PAD])
  return out


def test_whisper_logits_and_texts_are_equal(whisper_folder):
  folder, theirs = whisper_folder
  config = checkpoints.load_config(str(folder / "mmjax"))
  assert (
    config.model.decoder.prompt == PROMPT
    and config.data.text.length == 13
    and config.data.modalities == ("audio", "text")
  )
  assert not config.data.text.bos and config.data.text.eos and config.data.audio.seconds == 1.0
  model, variables = loaded(folder / "mmjax")
  assert set(variables["params"]) == {"audio", "decoder"}
  batch = dict(audio=AUDIO, text=dict(tokens=TEXT, mask=TEXT > 0))
  hidden, table = jax.jit(lambda v, b: model.apply(v, ("audio",), b, method="decode"))(
    variables, batch
  )
  inputs = np.concatenate([np.tile(PROMPT, (2, 1)), TEXT[:, :-1]], axis=1)
  with torch.no_grad():
    want = theirs(
      input_features=features(folder / "hf")["input_features"],
      decoder_input_ids=torch.tensor(inputs).long(),
    ).logits[:, 2:]
  real = TEXT > 0
  np.testing.assert_allclose((hidden @ table.T)[real], want.numpy()[real], atol=1e-4)
  tokens = np.asarray(
    jax.jit(lambda v, b: generate_text(model, v, ("audio",), config.data.text.length, 1, 1.0, b))(
      variables, dict(audio=AUDIO)
    )
  )
  ours = [row[: row.index(EOS)] if EOS in row else row for row in tokens.tolist()]
  assert ours == spoken_by(theirs, folder / "hf")
  assert (
    all(len(row) > 3 and row[0] != 9 and not {PAD, 7, 8} & set(row) for row in ours)
    and len(set(ours[0])) > 1
  )


def test_whisper_goes_back(whisper_folder):
  folder, theirs = whisper_folder
  again, report = transformers.WhisperForConditionalGeneration.from_pretrained(
    folder / "back", output_loading_info=True
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, tensor in theirs.state_dict().items():
    np.testing.assert_allclose(again.state_dict()[name], tensor, atol=2e-6, err_msg=name)
  assert torch.equal(
    features(folder / "hf")["input_features"], features(folder / "back")["input_features"]
  )
  assert spoken_by(again.eval(), folder / "back") == spoken_by(theirs, folder / "hf")
  assert (folder / "back" / "tokenizer.json").read_bytes() == (
    folder / "hf" / "tokenizer.json"
  ).read_bytes()


def test_a_whisper_without_a_tokenizer_and_a_trained_one(tmp_path):
  whisper_model().save_pretrained(tmp_path / "hf")
  with pytest.raises(UserError, match=r"no preprocessor_config.json"):
    import_hf(tmp_path / "hf", tmp_path / "none")
  transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path / "hf")
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  assert checkpoints.load_config(str(tmp_path / "mmjax")).data.text.tokenizer == ""
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  assert not (tmp_path / "back" / "tokenizer.json").exists()
  config = checkpoints.load_config(str(tmp_path / "mmjax")).to_dict()
  config["model"]["decoder"]["project_memory"] = True
  checkpoints.save_import(
    str(tmp_path / "other"), loaded(tmp_path / "mmjax")[1]["params"], config, {}
  )
  with pytest.raises(
    UserError,
    match="nearest is WhisperForConditionalGeneration, but for "
    r"model\.decoder\.project_memory = True",
  ):
    export_hf(tmp_path / "other", tmp_path / "no")


LANGUAGES, TASKS = {"<|en|>": 10, "<|de|>": 21, "<|fr|>": 22}, dict(transcribe=38, translate=37)
MANY = dict(lang_to_id=LANGUAGES, task_to_id=TASKS, no_timestamps_token_id=39, is_multilingual=True)
GENERATIONS = [
  {},
  dict(forced_decoder_ids=[[1, 5]]),
  dict(forced_decoder_ids=[[1, None], [2, 38]]),
  MANY,
  dict(MANY, task="translate"),
  dict(lang_to_id=LANGUAGES, no_timestamps_token_id=39),
  dict(MANY, forced_decoder_ids=[[1, None], [2, 38]]),
  dict(MANY, forced_decoder_ids=[[1, None], [2, 38], [3, 39]]),
  dict(MANY, forced_decoder_ids=[[1, 21], [2, 38]]),
  dict(MANY, language="german"),
  dict(MANY, language="<|de|>", task="translate"),
  dict(MANY, language="fr", forced_decoder_ids=[[1, 21], [2, 38]]),
  dict(task_to_id=TASKS, no_timestamps_token_id=39, task="translate"),
  dict(no_timestamps_token_id=39, is_multilingual=False, forced_decoder_ids=[[1, 39]]),
  dict(no_timestamps_token_id=39, is_multilingual=False),
  dict(no_timestamps_token_id=39, forced_decoder_ids=[[2, 39]]),
  dict(max_length=16),
  dict(max_length=5),
  dict(max_length=100),
  dict(max_new_tokens=4),
  dict(MANY, max_new_tokens=4, max_length=16),
]


def test_prompt_and_length_are_those_of_transformers_and_go_back(tmp_path):
  """English-only and multilingual models; language and task stated, forced, or neither; every kind
  of limit.
  """
  net = whisper_model()
  transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path)
  inputs, facts = features(tmp_path)["input_features"], json.loads(net.config.to_json_string())

  def written(generation):
    net.generation_config = transformers.GenerationConfig(**generation)
    # With the prompt.
    out = net.generate(inputs, return_dict_in_generate=True, force_unique_generate_call=True)
    return json.loads(net.generation_config.to_json_string()), out.sequences

  for generation in GENERATIONS:
    ids = dict(
      decoder_start_token_id=1,
      bos_token_id=1,
      eos_token_id=EOS,
      pad_token_id=PAD,
      suppress_tokens=[EOS, PAD],
    )
    stated, sequences = written({**ids, **generation})  # never ends before its limit
    found = whisper_decoder.settings(facts, stated)
    start, limit = found["decoder"]["prompt"], found["text"]["length"]
    want = sequences[:, : len(start)].clone()
    if found["decoder"]["languages"]:
      assert (
        set(want[:, 1].tolist()) <= set(found["decoder"]["languages"]) == set(LANGUAGES.values())
      )
      want[:, 1] = start[1]
    assert want.tolist() == [list(start)] * 2, generation
    assert sequences.shape[1] - len(start) == limit, generation
    back = written(whisper_decoder.generation_facts(found["decoder"], found["text"], stated))[1]
    assert torch.equal(back, sequences), generation


def test_what_a_generation_config_asks_and_is_not_kept_is_said(whisper_folder, tmp_path):
  shutil.copytree(whisper_folder[0] / "hf", tmp_path / "hf")
  path, lines = tmp_path / "hf" / "generation_config.json", []
  facts = json.loads(path.read_text())
  path.write_text(
    json.dumps(dict(facts, return_timestamps=True, num_beams=5, no_repeat_ngram_size=3))
  )
  import_hf(tmp_path / "hf", tmp_path / "mmjax", lines.append)
  assert (
    len(lines) == 1
    and "num_beams 5, no_repeat_ngram_size 3, return_timestamps True, which is not kept" in lines[0]
    and "--timestamps" in lines[0]
  )
  path.write_text(json.dumps(dict(facts, lang_to_id={"<|en|>": 5}, language="klingon")))
  with pytest.raises(UserError, match="language 'klingon' is not in lang_to_id, which has: <|en|>"):
    import_hf(tmp_path / "hf", tmp_path / "other")


def test_the_language_is_detected_in_each_sound(whisper_folder, tmp_path):
  folder = whisper_folder[0]
  theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder / "hf").eval()
  languages = {f"<|l{token}|>": token for token in (10, 21, 22, 35)}
  facts = dict(
    lang_to_id=languages,
    task_to_id=dict(transcribe=38),
    is_multilingual=True,
    forced_decoder_ids=[[1, None], [2, 38]],
  )
  for name, value in facts.items():
    setattr(theirs.generation_config, name, value)
  theirs.save_pretrained(tmp_path / "hf")
  (tmp_path / "hf" / "preprocessor_config.json").write_bytes(
    (folder / "hf" / "preprocessor_config.json").read_bytes()
  )
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  decoder = checkpoints.load_config(str(tmp_path / "mmjax")).model.decoder
  assert decoder.languages == (10, 21, 22, 35) and decoder.prompt == (1, 10, 38, 39)
  model, variables = loaded(tmp_path / "mmjax")

  @jax.jit
  def run(variables, batch):
    memory = model.apply(variables, ("audio",), batch, method="init_memory")
    return model.apply(variables, memory, method="detect_language"), generate_text(
      model, variables, ("audio",), 9, 1, 1.0, batch
    )

  scores = np.random.default_rng(0).normal(size=(2, *FLOATS.shape[1:])) * 0.3
  batch = dict(
    audio=dict(
      waveform=np.concatenate([WAVEFORM, (scores * 32767).clip(-32768, 32767).astype(np.int16)]),
      length=np.concatenate([LENGTHS, np.full(2, FLOATS.shape[1], np.int32)]),
    )
  )
  found, tokens = jax.device_get(run(variables, batch))
  extractor = transformers.AutoFeatureExtractor.from_pretrained(folder / "hf")
  rows = [
    (wave[:n] / 32768).astype(np.float32)
    for wave, n in zip(batch["audio"]["waveform"], batch["audio"]["length"], strict=True)
  ]
  inputs = extractor(rows, sampling_rate=RATE, return_tensors="pt")["input_features"]
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  for net in (
    theirs,
    transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "back").eval(),
  ):
    assert net.detect_language(inputs).tolist() == found.tolist()
    for row, language, ours in zip(
      net.generate(inputs, max_new_tokens=9).tolist(), found, tokens.tolist(), strict=True
    ):
      text = row[4:] if row[:4] == [1, language, 38, 39] else row
      assert [t for t in text if t not in (PAD, EOS)] == [t for t in ours if t not in (PAD, EOS)]


@pytest.mark.parametrize("classes", [5, 0])
def test_ast_is_equal_both_ways(classes, tmp_path):
  config = transformers.ASTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_length=112,
    num_mel_bins=64,
    num_labels=classes or 2,
  )
  theirs = randomised(
    (transformers.ASTForAudioClassification if classes else transformers.ASTModel)(config)
  )
  theirs.save_pretrained(tmp_path / "hf")
  transformers.ASTFeatureExtractor(
    num_mel_bins=64, max_length=112, mean=-3.0, std=2.5
  ).save_pretrained(tmp_path / "hf")
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  settings = checkpoints.load_config(str(tmp_path / "mmjax"))
  assert (
    settings.model.classes == classes
    and round(RATE * settings.data.audio.seconds) == 400 + 111 * 160
  )
  model, variables = loaded(tmp_path / "mmjax")
  method, args = ("classify", (("audio",),)) if classes else ("encode", ("audio",))
  run = jax.jit(lambda v, b: model.apply(v, *args, dict(audio=b), method=method))
  ours = run(variables, AUDIO) if classes else run(variables, AUDIO).pooled

  def outputs(net, folder):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    with torch.no_grad():
      out = net(
        torch.from_numpy(
          np.stack(
            [
              extractor(FLOATS[i, :n], sampling_rate=RATE)["input_values"][0]
              for i, n in enumerate(LENGTHS)
            ]
          )
        )
      )
    return (out.logits if classes else out.pooler_output).numpy()

  np.testing.assert_allclose(ours, outputs(theirs, tmp_path / "hf"), atol=1e-4)
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  np.testing.assert_allclose(
    outputs(again.eval(), tmp_path / "back"), outputs(theirs, tmp_path / "hf"), atol=1e-5
  )
  before, after = (safetensors.read_folder(tmp_path / name) for name in ("hf", "back"))
  assert set(before) == set(after) and all(
    np.array_equal(before[name], after[name]) for name in before
  )
