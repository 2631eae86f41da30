"""What a head gives and what its outputs are called, against transformers; weights that are not
what config.json says are refused.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mmjax
from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.state import checkpoint as checkpoints
from tests.interop.test_single_encoders import TEXTS, bert, randomise, tokenizer

NAMES = {0: "angry", 1: "glad", 2: "sad"}
torch.set_num_threads(1)  # tiny models: threads that wait for each other take longer


def folder_of(folder, kind=transformers.BertForSequenceClassification, stated=None, **facts):
  """A BERT with a head, saved with its tokenizer. stated: put into config.json."""
  model = randomise(bert(kind, **facts))
  model.save_pretrained(folder)
  tokenizer(folder)
  _edit(folder, **(stated or {}))
  return model


def _edit(folder, **facts):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def logits(model, folder):
  inputs = transformers.AutoTokenizer.from_pretrained(folder)(
    TEXTS, padding="max_length", max_length=14, truncation=True, return_tensors="pt"
  )
  with torch.no_grad():
    return model(**inputs).logits


@pytest.mark.parametrize(
  "facts, function",
  [
    (dict(num_labels=1), torch.sigmoid),  # a reranker
    (dict(id2label=NAMES, problem_type="multi_label_classification"), torch.sigmoid),
  ],
)
def test_probabilities_and_names_go_both_ways(facts, function, tmp_path):
  model = folder_of(tmp_path / "hf", **facts)
  want = function(logits(model, tmp_path / "hf")).numpy()
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  predictor = mmjax.load(str(tmp_path / "mmjax"))
  np.testing.assert_allclose(predictor.classes(text=TEXTS), want, atol=1e-5)
  assert predictor.class_names == (() if "num_labels" in facts else tuple(NAMES.values()))
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").eval()
  assert again.config.id2label == model.config.id2label
  assert again.config.label2id == {name: number for number, name in model.config.id2label.items()}
  assert again.config.problem_type == model.config.problem_type
  np.testing.assert_allclose(function(logits(again, tmp_path / "back")).numpy(), want, atol=1e-6)


@pytest.mark.parametrize(
  "facts, want",
  [
    (dict(num_labels=3), "softmax"),
    (dict(num_labels=1, problem_type="regression"), "none"),
    (
      dict(
        num_labels=1,
        stated=dict(sbert_ce_default_activation_function="torch.nn.modules.linear.Identity"),
      ),
      "none",
    ),
    (
      dict(
        num_labels=1,
        stated=dict(
          sentence_transformers=dict(activation_fn="torch.nn.modules.activation.Sigmoid")
        ),
      ),
      "sigmoid",
    ),
  ],
)
def test_what_makes_probabilities(facts, want, tmp_path):
  folder_of(tmp_path / "hf", **facts)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  assert checkpoints.load_config(str(tmp_path / "mmjax")).model.probabilities == want


@pytest.mark.parametrize(
  "kind, stated, says",
  [
    (
      transformers.BertForTokenClassification,
      {},
      "architectures is 'BertForTokenClassification', but only those",
    ),
    (transformers.BertForMultipleChoice, {}, "architectures is 'BertForMultipleChoice'"),
    (transformers.BertForQuestionAnswering, {}, "architectures is 'BertForQuestionAnswering'"),
    (
      transformers.BertForNextSentencePrediction,
      {},
      "architectures is 'BertForNextSentencePrediction'",
    ),
    (
      transformers.BertForSequenceClassification,
      dict(architectures=None),
      "architectures is not stated",
    ),
    (
      transformers.BertForSequenceClassification,
      dict(id2label={"0": "a", "1": "b", "2": "c"}),
      "id2label names 3 classes, but the classifier",
    ),
    (
      transformers.BertForSequenceClassification,
      dict(quantization_config=dict(bits=8)),
      "quantised weights are not supported",
    ),
    (
      transformers.BertModel,
      dict(position_embedding_type="relative_key"),
      "position_embedding_type is 'relative_key'",
    ),
  ],
)
def test_heads_and_settings_of_other_kinds_are_refused(kind, stated, says, tmp_path):
  folder_of(tmp_path / "hf", kind, stated)
  with pytest.raises(UserError, match=says):
    import_hf(tmp_path / "hf", tmp_path / "mmjax")
  assert not (tmp_path / "mmjax").exists()


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
  folder = tmp_path_factory.mktemp("masked") / "hf"
  folder_of(folder, transformers.BertForMaskedLM)
  return folder


WORDS, UP, BIAS = (
  "bert.embeddings.word_embeddings.weight",
  "bert.encoder.layer.1.intermediate.dense.weight",
  "cls.predictions.bias",
)


@pytest.mark.parametrize(
  "name, change, says",
  [
    (UP, lambda x: x.index_fill(0, torch.tensor(3), float("nan")), "holds NaN or infinity"),
    (BIAS, lambda x: x.index_fill(0, torch.tensor(3), float("inf")), "holds NaN or infinity"),
    (UP, lambda x: (x * 40).to(torch.int8), "holds int8, but weights are floating-point"),
    (UP, lambda x: x.to(torch.float8_e4m3fn), "holds F8_E4M3, which is not supported"),
    (
      WORDS,
      lambda x: x[:-1],
      r"word_embeddings.weight gives a parameter of shape \[19, 16\].*should have \[20, 16\]",
    ),
    (BIAS, lambda x: x[:-1], r"cls.predictions.bias gives a parameter of shape \[19\]"),
    (UP, lambda x: x.flatten(), "intermediate.dense.weight"),
    (UP, lambda x: None, f"lacks {UP.removeprefix('bert.')}"),
  ],
)
def test_weights_that_do_not_fit_are_refused_by_name(name, change, says, masked, tmp_path):
  shutil.copytree(masked, tmp_path / "hf")
  tensors = load_file(masked / "model.safetensors")
  value = change(tensors.pop(name))
  save_file(
    tensors if value is None else {**tensors, name: value.contiguous()},
    tmp_path / "hf" / "model.safetensors",
  )
  with pytest.raises(UserError, match=says) as error:
    import_hf(tmp_path / "hf", tmp_path / "mmjax")
  assert "\n" not in str(error.value) and not (tmp_path / "mmjax").exists()


def test_a_decoder_that_differs_from_the_embeddings_is_not_taken_for_tied(masked, tmp_path):
  """transformers does not tie what a file holds twice with other values, whatever config.json
  says.
  """
  shutil.copytree(masked, tmp_path / "hf")
  tensors = load_file(masked / "model.safetensors")
  copy = {
    "cls.predictions.decoder.weight": tensors[WORDS].clone(),
    "cls.predictions.decoder.bias": tensors[BIAS].clone(),
  }
  save_file({**tensors, **copy}, tmp_path / "hf" / "model.safetensors")
  import_hf(tmp_path / "hf", tmp_path / "equal")
  copy["cls.predictions.decoder.weight"] += 1
  save_file({**tensors, **copy}, tmp_path / "hf" / "model.safetensors")
  theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "hf")
  assert not torch.equal(
    theirs.cls.predictions.decoder.weight, theirs.bert.embeddings.word_embeddings.weight
  )
  with pytest.raises(
    UserError, match="cls.predictions.decoder.weight differs from embeddings.word_embeddings.weight"
  ):
    import_hf(tmp_path / "hf", tmp_path / "mmjax")


def test_a_head_that_is_left_out_is_said(tmp_path):
  folder_of(tmp_path / "hf", transformers.BertForPreTraining)
  notes = []
  import_hf(tmp_path / "hf", tmp_path / "mmjax", log=notes.append)
  assert len(notes) == 1 and "(cls.seq_relationship) is left out" in notes[0]
