"""Special tokens are the tokenizer's: in configs, in what a resume verifies, and in evaluation."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import tokenizers

from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.data.pipeline import Pipeline
from mmjax.data.text import TextTransform
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import Tokenizer, load_tokenizer
from mmjax.describe import describe
from mmjax.evaluation import Evaluation
from mmjax.models import make_model
from mmjax.parallel.mesh import single_device_mesh
from mmjax.training.start import check_position
from tests.data.conftest import config, record, tiny  # noqa: F401  fixtures

# ruff: noqa: F811

BERT = {"[PAD]": 0, "[UNK]": 7, "[CLS]": 8, "[SEP]": 9, "[MASK]": 10, "red": 11, "heart": 12}


def save(folder, words):
  """A tokenizer.json with a word a piece, as a folder."""
  folder.mkdir(exist_ok=True)
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.save(str(folder / "tokenizer.json"))
  return str(folder)


def multitask(tokenizer, **changes):
  c = configs.base()
  c.data.text.update(tokenizer=tokenizer, vocab_size=400, length=8)
  c.model = dict(
    name="multitask",
    width=16,
    masked_text=True,
    decoder=dict(depth=1, heads=2),
    encoders=dict(
      image=dict(kind="vit", depth=1, heads=2),
      text=dict(kind="transformer", depth=1, heads=2, pooling="eos"),
    ),
  )
  c.objectives = dict(words=dict(kind="masked_tokens"), captions=dict(kind="captioning", ctc=0.5))
  return configs.resolve(c, [f"{path}={value!r}" for path, value in changes.items()])


def ids_of(config):
  model, objectives = config.model, config.objectives
  return dict(
    start=model.decoder.prompt,
    end=model.decoder.eos_id,
    fill=model.decoder.pad_id,
    pool=model.encoders.text.eos_id,
    special=objectives.words.special,
    spoken=objectives.captions.eos_id,
    blank=objectives.captions.blank,
  )


def expected(pad, bos, eos, unk, mask):
  return dict(
    start=(bos,),
    end=eos,
    fill=pad,
    pool=eos,
    special=(pad, bos, eos, unk, mask),
    spoken=eos,
    blank=pad,
  )


def test_every_part_has_the_ids_of_the_tokenizer(tmp_path, tiny):
  config = multitask(save(tmp_path / "bert", BERT))
  assert ids_of(config) == expected(pad=0, bos=8, eos=9, unk=7, mask=10)
  assert "model.decoder.eos_id = 9\n" in describe(config)
  model = make_model(config)
  assert (model.decoder.prompt, model.decoder.eos_id, model.encoders["text"].eos_id) == ((8,), 9, 9)
  assert ids_of(multitask("tiny", **{"data.dir": str(tiny)})) == expected(0, 1, 2, 3, 4)


def test_a_tokenizer_that_is_not_made_yet_has_the_ids_of_all_of_this_project(tmp_path):
  for name in ("mine", "", str(tmp_path / "mine.model")):
    assert ids_of(multitask(name, **{"data.dir": str(tmp_path)})) == expected(0, 1, 2, 3, 4)
  for name in ("tokenizer.json", "folder"):
    with pytest.raises(ConfigError, match=f"no tokenizer .*{name}"):
      multitask(str(tmp_path / name))


@pytest.mark.parametrize(
  ("token", "key", "changes"),
  [
    ("[MASK]", "objectives.words.special", {}),
    ("[CLS]", "model.decoder.prompt", {}),
    ("[SEP]", "model.decoder.eos_id", {"model.encoders.text.pooling": "last"}),
    ("[SEP]", "model.encoders.text.eos_id", {"model.decoder": None}),
    (
      "[SEP]",
      "objectives.captions.eos_id",
      {"model.decoder.eos_id": 11, "model.encoders.text.pooling": "last"},
    ),
    ("[PAD]", "data.text.pad_id", {}),
    (
      "[PAD]",
      "data.text.pad_id",
      {"model.decoder": None, "objectives.captions.ctc": 0.0, "data.sources.x.name": "x"},
    ),
  ],
)
def test_a_token_that_a_part_needs_and_the_tokenizer_lacks_is_named(tmp_path, token, key, changes):
  folder = save(
    tmp_path / "lacking", {word: number for word, number in BERT.items() if word != token}
  )
  role = {"[MASK]": "mask", "[CLS]": "bos", "[SEP]": "eos", "[PAD]": "pad"}[token]
  with pytest.raises(
    ConfigError,
    match=f"lacking' has no <{role}>, which {key} stands for. Set {key} to .*mmjax data tokenizer",
  ):
    multitask(folder, **changes)


def test_what_is_not_needed_may_be_missing_and_one_key_mends_the_padding(tmp_path):
  folder = save(
    tmp_path / "few",
    {word: number for word, number in BERT.items() if word not in ("[PAD]", "[SEP]")},
  )
  c = multitask(
    folder,
    **{
      "data.text.pad_id": 12,
      "model.decoder.eos_id": 11,
      "model.encoders.text.pooling": "last",
      "objectives.captions.ctc": 0.0,
    },
  )
  assert ids_of(c) == dict(
    start=(8,), end=11, fill=12, pool=-1, special=(12, 8, -1, 7, 10), spoken=-1, blank=12
  )


def test_ids_of_a_config_win_and_others_than_the_tokenizers_are_said(tmp_path, caplog):
  folder = save(tmp_path / "bert", BERT)
  with caplog.at_level(logging.WARNING, "mmjax"):
    c = multitask(folder, **{"model.decoder.prompt": (8, 11), "model.encoders.text.eos_id": 9})
    assert not caplog.records and c.model.decoder.prompt == (8, 11)
    c = multitask(
      folder, **{"model.decoder.eos_id": 2, "objectives.words.special": (0, 1, 2, 3, 4)}
    )
  assert c.model.decoder.eos_id == 2 and c.objectives.words.special[4] == 4
  assert [r.getMessage().split(",")[0] for r in caplog.records] == [
    "model.decoder.eos_id is 2",
    "objectives.words.special is (0",
  ]


def test_stored_configs_keep_the_ids_that_they_had(tmp_path):
  folder = save(tmp_path / "bert", BERT)
  new = multitask(folder)
  assert configs.from_json(configs.to_json(new)).to_dict() == new.to_dict()
  old = json.loads(configs.to_json(multitask("mine", **{"data.dir": str(tmp_path)})))
  old["model"]["decoder"]["prompt"] = ()  # as it was written before
  del old["objectives"]["captions"]["blank"]
  old["data"]["text"]["tokenizer"] = folder
  again = configs.from_json(json.dumps(old))
  assert ids_of(again) == expected(0, 1, 2, 3, 4)
  assert "model.decoder.eos_id: 2 -> 9" in configs.changed_on_resume(again, new)


def test_a_checkpoints_own_tokenizer_stands_for_the_one_in_the_data_folder(tmp_path):
  folder = save(tmp_path / "bert", BERT)
  config, own = multitask(folder), load_tokenizer(multitask(folder).data).special_tokens
  # Another one by now, without any of them.
  save(tmp_path / "bert", {f"w{i}": i for i in range(500)} | {"[UNK]": 500})
  again = configs.resolve(config.to_dict(), ["evaluation.batch_size=8"], own)
  assert ids_of(again) == ids_of(config) and again.evaluation.batch_size == 8
  with pytest.raises(ConfigError, match="vocab_size is 400, but .* has 501 pieces"):
    configs.resolve(config.to_dict(), ["evaluation.batch_size=8"])


def test_a_table_that_is_too_small_for_the_tokenizer_is_refused_at_once(tmp_path):
  with pytest.raises(
    ConfigError, match="data.text.vocab_size is 9, but tokenizer .* has 13 pieces"
  ):
    multitask(save(tmp_path / "bert", BERT), **{"data.text.vocab_size": 9})


def test_a_tokenizer_retrained_under_its_name_is_noticed_on_resume(tiny, tmp_path, config):
  file = tmp_path / "tokenizers" / "tiny.model"
  (tmp_path / "tiny").symlink_to(tiny / "tiny")
  file.parent.mkdir()
  file.write_bytes((tiny / "tokenizers" / "tiny.model").read_bytes())
  c = config(**{"data.dir": str(tmp_path)})
  before = Pipeline(c)
  position = dict(step=1, steps=10, fingerprint=json.loads(json.dumps(before.fingerprint())))
  check_position(c, position, Pipeline(c), 10, 1, False)
  train_tokenizer([record(i)["captions"]["de"][0] for i in range(60)], file, vocab_size=380)
  after = Pipeline(c)
  with pytest.raises(
    UserError, match="tokenizer: 'tiny: content .*' -> 'tiny: content .*allow-change"
  ):
    check_position(c, position, after, 10, 1, False)
  check_position(c, position, after, 10, 1, True)
  del position["fingerprint"]["tokenizer"]  # a run of an older version
  check_position(c, position, after, 10, 1, False)


def test_evaluation_reads_texts_with_the_tokenizer_of_the_checkpoint(config, tmp_path):
  c = config()
  theirs = {
    "tokenizer.model": train_tokenizer(
      ["a blue thing number 9"] * 9, tmp_path / "t.model", vocab_size=340
    ).read_bytes()
  }
  run = Evaluation(c, None, single_device_mesh(), assets={**theirs, "classes.json": b"[]"})
  data = run.data("tiny", "test", ("en",))
  first = next(iter(data.batches(("text",))))
  captions = [record(i)["captions"]["en"][0] for i in range(50, 58)]
  np.testing.assert_array_equal(
    first["text"]["tokens"],
    TextTransform(c.data.text, Tokenizer.from_assets(theirs))(captions)["tokens"],
  )
  assert (
    first["text"]["tokens"]
    != TextTransform(c.data.text, load_tokenizer(c.data))(captions)["tokens"]
  ).any()
  assert (
    Evaluation(c, None, single_device_mesh(), assets={"classes.json": b"[]"}).tokenizer.vocab_size
    == 400
  )


@pytest.mark.parametrize("kind", ["byte-level", "end of word", "words", "metaspace"])
def test_words_are_what_stands_between_spaces_in_any_tokenizer(kind, tmp_path, config):
  make, models, trainers = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.trainers
  model, before, trainer = {
    "byte-level": (
      models.BPE(),
      make.ByteLevel(add_prefix_space=False),
      trainers.BpeTrainer(vocab_size=300, initial_alphabet=make.ByteLevel.alphabet()),
    ),
    "end of word": (
      models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
      make.Whitespace(),
      trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], end_of_word_suffix="</w>"),
    ),
    "words": (
      models.WordLevel(unk_token="<unk>"),
      make.Whitespace(),
      trainers.WordLevelTrainer(special_tokens=["<unk>"]),
    ),
    "metaspace": (
      models.Unigram(),
      make.Metaspace(),
      trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
      ),
    ),
  }[kind]
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = before
  tokenizer.train_from_iterator(["a red apple", "two green pears", "don't stop, now!"] * 5, trainer)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  c = config(
    **{
      "data.text.tokenizer": str(tmp_path),
      "data.text.words": True,
      "data.text.eos": False,
      "data.text.length": 80,
      "data.text.pad_id": 0,
    }
  )
  text = "two red pears, don't stop 𓀀 now"
  out = TextTransform(c.data.text, load_tokenizer(c.data))([text, text[:7], ""])
  spans = tokenizer.encode(text).offsets
  for word in range(7):
    covered = {
      i
      for (start, stop), w in zip(spans, out["words"][0], strict=False)
      if w == word
      for i in range(start, stop)
    }
    assert text.split()[word] == "".join(text[i] for i in sorted(covered)).strip()
  assert out["words"][0].max() == 6 and out["words"][1].max() == 1 and (out["words"][2] == -1).all()
  assert np.array_equal(out["words"] >= 0, out["mask"])
