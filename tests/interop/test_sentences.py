"""Folders of sentence-transformers: every pooling, dense layers and lengths, against pooling by
hand and against the library.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mmjax
from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.state import checkpoint as checkpoints
from tests.interop import test_text_families as text_families
from tests.interop.test_single_encoders import TOWER, WORDS, randomise, tokenizer

TEXTS = ["a cat with a hat", "red house and blue car on the house with the dog and a cat", "Dog"]
LENGTH, POSITIONS = 9, 14
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


def folder_of(folder, *modules, settings=None, inside="", **facts):
  """A BERT in `inside`, and modules around it: (kind, settings of its config.json, tensors or
  None).
  """
  where = folder / inside
  model = randomise(
    transformers.BertModel(
      transformers.BertConfig(**TOWER, vocab_size=len(WORDS) + 5, max_position_embeddings=POSITIONS)
    )
  )
  model.save_pretrained(where)
  tokenizer(where)
  put_around(folder, *modules, settings=settings, inside=inside, **facts)
  return model


def put_around(folder, *modules, settings=None, inside="", **facts):
  """Writes the files of sentence-transformers around the encoder in folder/inside."""
  (folder / inside / "sentence_bert_config.json").write_text(
    json.dumps(settings or dict(max_seq_length=LENGTH, do_lower_case=False))
  )
  listed = [("Transformer", inside)]
  for i, (kind, config, tensors) in enumerate(modules, 1):
    listed.append((kind, f"{i}_{kind}"))
    (folder / f"{i}_{kind}").mkdir()
    if config is not None:
      (folder / f"{i}_{kind}" / "config.json").write_text(json.dumps(config))
    if tensors:
      save_file(tensors, folder / f"{i}_{kind}" / "model.safetensors")
  (folder / "modules.json").write_text(
    json.dumps(
      [
        dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
        for i, (kind, path) in enumerate(listed)
      ]
    )
  )
  (folder / "config_sentence_transformers.json").write_text(json.dumps(facts))


def pooling(*kinds):
  names = (
    "cls_token",
    "max_tokens",
    "mean_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
  )
  return (
    "Pooling",
    dict(word_embedding_dimension=16, **{f"pooling_mode_{name}": name in kinds for name in names}),
    None,
  )


def dense(width, out, activation, seed=0, **more):
  generator = torch.Generator().manual_seed(seed)
  tensors = {
    "linear.weight": torch.randn(out, width, generator=generator),
    "linear.bias": torch.randn(out, generator=generator),
  }
  return (
    "Dense",
    dict(in_features=width, out_features=out, bias=True, activation_function=activation, **more),
    tensors,
  )


NORMALIZE = ("Normalize", None, None)
CASES = {
  "mean": [pooling("mean_tokens"), NORMALIZE],
  "class": [pooling("cls_token"), NORMALIZE],
  "max": [pooling("max_tokens")],
  "root": [pooling("mean_sqrt_len_tokens"), NORMALIZE],
  "weighted": [pooling("weightedmean_tokens"), NORMALIZE],
  "last": [pooling("lasttoken")],
  "every one, and dense": [
    pooling(
      "cls_token",
      "max_tokens",
      "mean_tokens",
      "mean_sqrt_len_tokens",
      "weightedmean_tokens",
      "lasttoken",
    ),
    dense(96, 24, TANH),
    dense(24, 8, IDENTITY, 1),
    NORMALIZE,
  ],
}


def by_hand(model, folder, texts, modules):
  """The embeddings of length one, by the definition of each module."""
  inputs = transformers.AutoTokenizer.from_pretrained(folder)(
    texts, padding=True, max_length=LENGTH, truncation=True, return_tensors="pt"
  )
  with torch.no_grad():
    x = model(**inputs).last_hidden_state.double()
  rows = []
  for tokens, mask in zip(x, inputs["attention_mask"], strict=True):
    real, parts = tokens[mask > 0], []
    n = len(real)
    for kind, value in modules[0][1].items():
      if value is True:
        parts.append(
          {
            "pooling_mode_cls_token": real[0],
            "pooling_mode_max_tokens": real.max(0).values,
            "pooling_mode_mean_tokens": real.mean(0),
            "pooling_mode_mean_sqrt_len_tokens": real.sum(0) / n**0.5,
            "pooling_mode_lasttoken": real[-1],
            "pooling_mode_weightedmean_tokens": (real * torch.arange(1, n + 1)[:, None]).sum(0)
            / (n * (n + 1) / 2),
          }[kind]
        )
    row = torch.cat(parts)
    for kind, config, tensors in modules[1:]:
      if kind == "Dense":
        row = tensors["linear.weight"].double() @ row + tensors["linear.bias"]
        row = torch.tanh(row) if config["activation_function"] == TANH else row
    rows.append((row / row.norm()).numpy())
  return np.stack(rows)


@pytest.mark.parametrize("case", ["mean", "every one, and dense"])
def test_embeddings_equal_the_modules_both_ways(case, tmp_path):
  modules = CASES[case]
  model = folder_of(tmp_path / "st", *modules)
  want = by_hand(model, tmp_path / "st", TEXTS, modules)
  import_hf(tmp_path / "st", tmp_path / "mmjax")
  predictor = mmjax.load(str(tmp_path / "mmjax"))
  assert predictor.config.data.text.length == LENGTH and predictor.width == want.shape[1]
  np.testing.assert_allclose(predictor.encode_text(TEXTS), want, atol=1e-5)
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("st", "back"))
  assert {name for name in before if not name.startswith("pooler.")} == set(after)
  assert all(torch.equal(after[name], before[name]) for name in after)
  import_hf(tmp_path / "back", tmp_path / "again")
  assert checkpoints.load_config(str(tmp_path / "again")).model == predictor.config.model
  for i, (kind, _, tensors) in enumerate(modules, 1):
    if kind == "Dense":
      found = load_file(tmp_path / "back" / f"{i}_Dense" / "model.safetensors")
      assert all(torch.equal(found[name], x) for name, x in tensors.items())


def test_the_encoder_in_a_folder_of_its_own_lower_case_and_what_is_not_kept(tmp_path):
  lines = []
  folder_of(
    tmp_path / "st",
    pooling("mean_tokens"),
    settings=dict(max_seq_length=None, do_lower_case=True),
    inside="0_BERT",
    default_prompt_name="query",
    prompts=dict(query="find: "),
  )
  import_hf(tmp_path / "st", tmp_path / "mmjax", lines.append)
  assert len(lines) == 1 and "default prompt 'query' ('find: ') is not kept" in lines[0]
  predictor = mmjax.load(str(tmp_path / "mmjax"))
  assert predictor.config.data.text.length == POSITIONS  # model_max_length of the tokenizer
  np.testing.assert_array_equal(*predictor.encode_text(["DOG and Cat", "dog and cat"]))


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_texts_that_are_cut_at_their_start_are_said(place, tmp_path):
  folder_of(tmp_path / "st", pooling("mean_tokens"))
  path = tmp_path / "st" / place
  left = dict(max_length=5, direction="Left", strategy="LongestFirst", stride=0)
  facts = (
    dict(truncation_side="left") if place == "tokenizer_config.json" else dict(truncation=left)
  )
  path.write_text(json.dumps(json.loads(path.read_text()) | facts))
  lines = []
  import_hf(tmp_path / "st", tmp_path / "mmjax", lines.append)
  assert len(lines) == 1 and f"more than {LENGTH} tokens at their start" in lines[0]


def test_modules_of_other_packages_are_not_taken_for_those_of_the_same_name(tmp_path):
  folder_of(tmp_path / "st", pooling("mean_tokens"))
  path = tmp_path / "st" / "modules.json"
  path.write_text(path.read_text().replace("sentence_transformers.models.Tr", "custom_st.Tr"))
  with pytest.raises(UserError, match="the module 'custom_st.Transformer' is code of its own"):
    import_hf(tmp_path / "st", tmp_path / "mmjax")


@pytest.mark.parametrize(
  "says, modules, more",
  [
    ("WeightedLayerPooling", [("WeightedLayerPooling", {}, None), pooling("mean_tokens")], {}),
    ("has the modules Transformer, Normalize", [NORMALIZE], {}),
    ("activation_function 'os.system'", [pooling("mean_tokens"), dense(16, 4, "os.system")], {}),
    ("use_residual is True", [pooling("mean_tokens"), dense(16, 4, TANH, use_residual=True)], {}),
    ("pickled", [pooling("mean_tokens"), ("Dense", dense(16, 4, TANH)[1], None)], {}),
    ("by 'dot' of vectors", [pooling("mean_tokens")], dict(similarity_fn_name="dot")),
    ("pooling_mode 'median'", [("Pooling", dict(pooling_mode="median"), None)], {}),
  ],
)
def test_other_modules_are_refused_by_name(says, modules, more, tmp_path):
  folder_of(tmp_path / "st", *modules, **more)
  if says == "pickled":
    (tmp_path / "st" / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match=says):
    import_hf(tmp_path / "st", tmp_path / "mmjax")
  assert not (tmp_path / "mmjax").exists()


BACKBONES = {  # as in the folders of that name, or with that pooling
  "all-mpnet-base-v2": ("MPNetModel", [pooling("mean_tokens"), NORMALIZE]),
  "all-distilroberta-v1": ("RobertaModel", [pooling("mean_tokens"), NORMALIZE]),
  "multilingual-e5": ("XLMRobertaModel", [pooling("mean_tokens"), NORMALIZE]),
  "bge-m3": ("XLMRobertaModel", [pooling("cls_token"), NORMALIZE]),
  "msmarco-distilbert": ("DistilBertModel", [pooling("mean_tokens")]),
  "distiluse": ("DistilBertModel", [pooling("mean_tokens"), dense(16, 8, TANH)]),
}


def backbone_of(case, folder):
  """(model, modules) of a folder whose encoder is no BERT."""
  kind, modules = BACKBONES[case]
  model, _, _ = text_families.folder_of(kind, folder)
  path = folder / "tokenizer_config.json"
  facts = json.loads(path.read_text())  # without token types, as these families' tokenizers are
  path.write_text(json.dumps({**facts, "model_input_names": ["input_ids", "attention_mask"]}))
  put_around(folder, *modules)
  return model, modules


QUICK = ("all-mpnet-base-v2", "all-distilroberta-v1", "bge-m3", "msmarco-distilbert")


@pytest.mark.parametrize("case", QUICK)
def test_embeddings_of_other_encoders_equal_the_modules_both_ways(case, tmp_path):
  model, modules = backbone_of(case, tmp_path / "st")
  want = by_hand(model, tmp_path / "st", TEXTS, modules)
  import_hf(tmp_path / "st", tmp_path / "mmjax")
  predictor = mmjax.load(str(tmp_path / "mmjax"))
  assert predictor.config.data.text.length == LENGTH
  np.testing.assert_allclose(predictor.encode_text(TEXTS), want, atol=1e-5)
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("st", "back"))
  assert {name for name in before if not name.startswith("pooler.")} == set(after)
  assert all(torch.equal(after[name], before[name]) for name in after)
  again = transformers.AutoModel.from_pretrained(tmp_path / "back")
  assert type(again).__name__ == type(model).__name__.removeprefix("XLM")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *BACKBONES])
def test_embeddings_equal_the_library(case, tmp_path):
  """Also of what was exported; 25 seconds of it are the import of sentence_transformers."""
  library = pytest.importorskip("sentence_transformers")
  if case in CASES:
    folder_of(tmp_path / "st", *CASES[case])
  else:
    backbone_of(case, tmp_path / "st")
  import_hf(tmp_path / "st", tmp_path / "mmjax")
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  got = mmjax.load(str(tmp_path / "mmjax")).encode_text(TEXTS)
  for name in ("st", "back"):
    model = library.SentenceTransformer(str(tmp_path / name), device="cpu")
    assert model.max_seq_length == LENGTH
    np.testing.assert_allclose(model.encode(TEXTS, normalize_embeddings=True), got, atol=1e-5)
