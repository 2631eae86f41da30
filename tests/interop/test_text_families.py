"""RoBERTa, XLM-R, DistilBERT and MPNet against transformers: tiny random models, every output
compared, both ways.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.models.encoders.bert import relative_buckets
from tests.interop.test_single_encoders import (
  TEXTS,
  TOWER,
  WORDS,
  base,
  loaded,
  outputs,
  randomise,
  reference,
)

SMALL = dict(TOWER, vocab_size=26)
DISTILLED = dict(
  dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=26, max_position_embeddings=14
)
CASES = {
  "RobertaModel": dict(SMALL, max_position_embeddings=16, type_vocab_size=1, layer_norm_eps=1e-5),
  "RobertaForMaskedLM": dict(SMALL, max_position_embeddings=16),
  "RobertaForSequenceClassification": dict(
    SMALL, max_position_embeddings=16, num_labels=3, hidden_act="gelu_new"
  ),
  "XLMRobertaModel": dict(SMALL, max_position_embeddings=18, pad_token_id=3, type_vocab_size=3),
  "DistilBertModel": DISTILLED,
  "DistilBertForMaskedLM": dict(DISTILLED, activation="relu"),
  "DistilBertForSequenceClassification": dict(DISTILLED, sinusoidal_pos_embds=True, num_labels=3),
  "MPNetModel": dict(SMALL, max_position_embeddings=16),
  "MPNetForMaskedLM": dict(SMALL, max_position_embeddings=16),
  "MPNetForSequenceClassification": dict(SMALL, max_position_embeddings=16, num_labels=3),
}
QUICK = (
  "RobertaForSequenceClassification",
  "XLMRobertaModel",
  "DistilBertForMaskedLM",
  "MPNetModel",
)


def tokenizer(folder, specials):
  """A word-level tokenizer.json, with `specials` {role: piece} first, that frames texts."""
  import tokenizers

  pieces = {p: i for i, p in enumerate([*specials.values(), *WORDS])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token=specials["unk_token"]))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  start, end = specials["cls_token"], specials["sep_token"]
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{start} $A {end}", special_tokens=[(piece, pieces[piece]) for piece in (start, end)]
  )
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, **specials, model_max_length=14
  )
  made.save_pretrained(folder)
  return made


def folder_of(case, folder):
  """(model, its inputs, our batch), saved in `folder` with its tokenizer."""
  kind, facts = getattr(transformers, case), CASES[case]
  model = randomise(kind(kind.config_class(**facts)))
  model.save_pretrained(folder)
  roles = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
  names = "[CLS] [PAD] [SEP] [UNK] [MASK]" if "Distil" in case else "<s> <pad> </s> <unk> <mask>"
  specials = dict(zip(roles, names.split(), strict=True))
  if "XLM" in case:  # its padding is token 3 here
    specials = {
      role: specials[role]
      for role in ("cls_token", "unk_token", "sep_token", "pad_token", "mask_token")
    }
  inputs = dict(
    tokenizer(folder, specials)(
      TEXTS, padding="max_length", max_length=14, truncation=True, return_tensors="pt"
    )
  )
  inputs.pop("token_type_ids", None)
  batch = dict(
    text=dict(
      tokens=inputs["input_ids"].numpy().astype(np.int32), mask=inputs["attention_mask"].numpy() > 0
    )
  )
  return model, inputs, batch


def compare(got, want, real):
  for name, value in want.items():
    whole = name == "tokens" or (name == "logits" and value.ndim == 3)
    a, b = (x[real] if whole else x for x in (got[name], value))
    np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_equal_outputs_after_import_and_after_export(case, tmp_path):
  model, inputs, batch = folder_of(case, tmp_path / "hf")
  want = reference(model, inputs)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  net, variables = loaded(tmp_path / "mmjax")
  compare(outputs(net, variables, batch), want, batch["text"]["mask"])

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  auto = getattr(
    transformers,
    "Auto"
    + next(part for part in ("ForMaskedLM", "ForSequenceClassification", "Model") if part in case)
    .replace("ForMaskedLM", "ModelForMaskedLM")
    .replace("ForSequence", "ModelForSequence"),
  )
  again, report = auto.from_pretrained(tmp_path / "back", output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  assert type(again).__name__ == case.removeprefix("XLM") and type(base(again)).__name__ == type(
    base(model)
  ).__name__.removeprefix("XLM")
  ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")(
    TEXTS, padding="max_length", max_length=14, truncation=True
  )["input_ids"]
  np.testing.assert_array_equal(ids, inputs["input_ids"])


def test_the_buckets_of_far_positions_are_those_of_transformers():
  encoder = transformers.MPNetModel(transformers.MPNetConfig(**CASES["MPNetModel"])).encoder
  with torch.no_grad():
    encoder.relative_attention_bias.weight[:] = torch.arange(32.0)[:, None]
    want = encoder.compute_position_bias(torch.zeros(1, 400, 16))[0, 0].numpy()
  np.testing.assert_array_equal(relative_buckets(400, 32), want)


@pytest.mark.parametrize(
  ("case", "change", "says"),
  (
    ("RobertaForMaskedLM", dict(hidden_act="relu"), "hidden_act is 'relu', but only 'gelu'"),
    ("RobertaForTokenClassification", {}, "only those are supported that end in"),
    ("DistilBertForTokenClassification", {}, "only those are supported that end in"),
    ("MPNetModel", dict(relative_attention_num_buckets=16), "relative_attention_num_buckets is 16"),
    ("RobertaModel", dict(is_decoder=True), "is_decoder is True"),
  ),
)
def test_what_is_not_supported_is_refused_by_name(case, change, says, tmp_path, monkeypatch):
  monkeypatch.setitem(
    CASES, case, CASES.get(case) or CASES[case.replace("ForTokenClassification", "Model")]
  )
  folder_of(case, tmp_path / "hf")
  path = tmp_path / "hf" / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError, match=says):
    import_hf(tmp_path / "hf", tmp_path / "out")


def test_an_output_layer_of_its_own_is_refused(tmp_path):
  from safetensors.torch import load_file, save_file

  folder_of("RobertaForMaskedLM", tmp_path / "hf")
  path = tmp_path / "hf" / "model.safetensors"
  tensors = load_file(path)
  save_file(
    {**tensors, "lm_head.decoder.weight": tensors["roberta.embeddings.word_embeddings.weight"] + 1},
    path,
  )
  with pytest.raises(
    UserError, match=r"lm_head\.decoder\.weight differs from embeddings\.word_embeddings\.weight"
  ):
    import_hf(tmp_path / "hf", tmp_path / "out")
