"""Tokenizers, cutting and padding, keys of captions, training a tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.text import TextTransform, drop_words, normalise_caption, split_key, text_key
from mmjax.data.tokenizer_training import train_tokenizer, train_tokenizer_from_source
from mmjax.data.tokenizers import Tokenizer, load_tokenizer
from tests.data.conftest import record


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
  """A byte-level BPE tokenizer.json with CLIP's names, as a folder."""
  import tokenizers

  folder = tmp_path_factory.mktemp("hf")
  model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<|endoftext|>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=["<|startoftext|>", "<|endoftext|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator(["a red apple", "a green apple", "two red apples"] * 4, trainer)
  model.post_processor = tokenizers.processors.RobertaProcessing(
    ("<|endoftext|>", 1), ("<|startoftext|>", 0)
  )
  model.enable_truncation(4)
  model.enable_padding(length=9)
  model.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"pad_token": {"content": "<|endoftext|>"}, "unk_token": None})
  )
  return folder


def test_reserved_pieces(config):
  tokenizer = load_tokenizer(config().data)
  assert (
    tokenizer.pad_id,
    tokenizer.bos_id,
    tokenizer.eos_id,
    tokenizer.unk_id,
    tokenizer.mask_id,
  ) == (0, 1, 2, 3, 4)
  for text in (
    "<pad> <bos> <eos> <unk> <mask> <spare_0> <spare_63>",
    "𓀀 ☃ \u200d 漢字",
    "naïve façade\n\ttab",
  ):
    ids = tokenizer.encode(text)
    assert min(ids) >= 5 + 64  # neither special nor spare pieces, nor <unk>: bytes take over
  assert tokenizer.decode(tokenizer.encode("𓀀 red ☃")) == "𓀀 red ☃"


def test_training_is_deterministic_and_whole_or_not_at_all(tmp_path):
  captions = [
    f"{colour} thing {i} 事物" for i in range(50) for colour in ("red", "green", "rot", "赤い")
  ]
  a, b = (
    train_tokenizer(iter(captions), tmp_path / folder / "t.model", 380).read_bytes()
    for folder in "ab"
  )
  assert a == b
  for bad, words in (
    (dict(captions=[], vocab_size=400), "no captions"),
    (dict(captions=["  "], vocab_size=400), "no captions"),
    (dict(captions=captions, vocab_size=300), "325 pieces are reserved"),
  ):
    with pytest.raises(UserError, match=words):
      train_tokenizer(out=tmp_path / "c.model", **bad)
  assert not list(tmp_path.glob("*c.model*"))
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot be written"):
    train_tokenizer(captions, tmp_path / "file" / "t.model", 380)


def test_byte_pair_encoding_makes_whole_words_where_there_are_few(tmp_path):
  words = "what which first thing bigger sign".split()
  texts = [" ".join(np.roll(words, i)[: 1 + i % 6]) for i in range(200)]
  content = train_tokenizer(texts, tmp_path / "t.model", 400, "bpe").read_bytes()
  tokenizer = Tokenizer.from_assets({"tokenizer.model": content})
  ids = tokenizer.encode(" ".join(words))
  assert len(ids) == len(words) and tokenizer.decode(ids) == " ".join(words)


def test_a_tokenizer_from_a_data_set(tiny, tmp_path):
  lines = []
  path = train_tokenizer_from_source(
    "tiny",
    split="train+test",
    languages=("en",),
    vocab_size=380,
    name="english",
    data_dir=str(tiny),
    log=lines.append,
  )
  assert (
    path == tiny / "tokenizers" / "english.model"
    and "380 pieces from tiny train+test, languages en" in lines[0]
  )
  path.unlink()
  with pytest.raises(UserError, match="no data set 'nothing'"):
    train_tokenizer_from_source("tiny,nothing", data_dir=str(tiny))


def test_a_tokenizer_from_several_data_sets(tmp_path):
  words = {"fruit": "apple pear quince plum", "tools": "hammer chisel plane saw"}
  for name, text in words.items():
    write_dataset(
      name,
      tmp_path,
      {
        "train": [
          record(i, captions={"en": [" ".join(np.roll(text.split(), i)[: 1 + i % 3])]})
          for i in range(400)
        ]
      },
    )
  lines, pieces = [], {}
  for source in ("fruit", "fruit, tools"):
    path = train_tokenizer_from_source(
      source, vocab_size=420, data_dir=str(tmp_path), log=lines.append
    )
    tokenizer = Tokenizer.from_assets({"tokenizer.model": path.read_bytes()})
    pieces[source] = [len(tokenizer.encode(text)) for text in words.values()]
  assert (
    path.name == "fruit_tools.model" and "pieces from fruit, tools train, languages en" in lines[1]
  )
  assert pieces["fruit"][1] > 2 * pieces["fruit, tools"][1]  # tools have pieces of their own now


def test_a_tokenizer_of_answers_too(tmp_path):
  asked = [record(i, captions={"en": ["a cat"]}) for i in range(300)]
  for i, one in enumerate(asked):
    one["questions"] = [("where is it?", ("bottom centre", "upper left")[i % 2])]
  write_dataset("asked", tmp_path, {"train": asked}, fields=("questions",))
  words = {}
  for answers in (False, True):
    path = train_tokenizer_from_source(
      "asked", vocab_size=400, model="bpe", answers=answers, data_dir=str(tmp_path)
    )
    tokenizer = Tokenizer.from_assets({"tokenizer.model": path.read_bytes()})
    words[answers] = len(tokenizer.encode("bottom centre"))
  assert words[False] > 6 and words[True] == 2


def test_captions_become_rows(config):
  c = config()
  transform = TextTransform(c.data.text, load_tokenizer(c.data))
  out = transform(["a red thing", "", "x" * 10_000, "red " * 5_000])
  assert out["tokens"].shape == out["mask"].shape == (4, 12)
  assert (
    out["tokens"].dtype == np.int32 and out["mask"].dtype == bool and out["key"].dtype == np.uint32
  )
  assert out["tokens"][1].tolist() == [2] + [0] * 11 and out["mask"][1].sum() == 1
  for row in (2, 3):
    assert out["mask"][row].all() and out["tokens"][row, -1] == 2  # cut, and the end is kept
  first = out["tokens"][0][out["mask"][0]]
  assert first[-1] == 2 and transform.tokenizer.decode(first.tolist()) == "a red thing"
  assert transform([])["key"].shape == (0, 2)


def test_begin_lower_case_and_visible_padding(config):
  c = config(
    **{
      "data.text.bos": True,
      "data.text.eos": False,
      "data.text.lowercase": True,
      "data.text.mask_padding": False,
      "data.text.pad_id": 7,
    }
  )
  out = TextTransform(c.data.text, load_tokenizer(c.data))(["A RED Thing", "a red thing"])
  assert (out["tokens"][0] == out["tokens"][1]).all()
  assert out["tokens"][0, 0] == 1 and 2 not in out["tokens"] and out["tokens"][0, -1] == 7
  assert out["mask"].all()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_equal_captions_have_equal_keys(text):
  assert text_key(text) == text_key(f"  {normalise_caption(text)}\n")
  high, low = text_key(text)
  assert split_key(high << 32 | low) == (high, low) and max(high, low) < 2**32


def test_keys_tell_captions_apart():
  assert text_key("Red  Apple") == text_key("red apple") == text_key("ｒｅｄ apple")
  assert text_key("red apple") != text_key("red apples")
  # A change of the hash would be felt in stored data.
  assert text_key("") == (3836125271, 1954132660)


@settings(max_examples=60, deadline=None)
@given(
  words=st.lists(st.sampled_from(["red", "green", "apple", "two"]), max_size=8),
  p=st.floats(0, 1),
  seed=st.integers(0, 99),
)
def test_dropping_words_keeps_order_and_one_word(words, p, seed):
  text = " ".join(words)
  kept = drop_words(text, p, np.random.default_rng(seed)).split()
  left = iter(words)
  assert all(word in left for word in kept)  # a subsequence
  assert bool(kept) == bool(words)
  assert p or kept == words


def test_hugging_face_files(hugging_face, config):
  for path in (hugging_face, hugging_face / "tokenizer.json"):
    tokenizer = load_tokenizer(config(**{"data.text.tokenizer": str(path)}).data)
    assert (
      tokenizer.bos_id,
      tokenizer.eos_id,
      tokenizer.pad_id,
      tokenizer.unk_id,
      tokenizer.mask_id,
    ) == (0, 1, 1, 1, -1)
    ids = tokenizer.encode("a red apple and more words than four")
    assert len(ids) > 4 and not {0, 1} & set(ids)  # no truncation, padding or specials of the file
    assert tokenizer.decode(ids) == "a red apple and more words than four"


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging_face"])
def test_assets_bring_the_tokenizer_back(kind, hugging_face, config):
  name = "tiny" if kind == "sentencepiece" else str(hugging_face)
  tokenizer = load_tokenizer(config(**{"data.text.tokenizer": name}).data)
  again = Tokenizer.from_assets({"preprocessing.json": b"{}", **tokenizer.to_assets()})
  roles = ("vocab_size", "pad_id", "bos_id", "eos_id", "unk_id", "mask_id")
  assert [getattr(again, role) for role in roles] == [getattr(tokenizer, role) for role in roles]
  assert (
    again.encode("a red apple") == tokenizer.encode("a red apple")
    and again.to_assets() == tokenizer.to_assets()
  )


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"data.text.tokenizer": "tyni"},
      ["no tokenizer 'tyni'", "Did you mean 'tiny'", "mmjax data tokenizer", "--name tyni"],
    ),
    ({"data.text.tokenizer": "/no/such.model"}, ["/no/such.model"]),
    (
      {"data.text.vocab_size": 100},
      ["data.text.vocab_size is 100", "400 pieces", "to 400 or more"],
    ),
  ],
)
def test_mistakes_name_the_way_out(config, changes, words):
  with pytest.raises(UserError) as error:
    load_tokenizer(config(**changes).data)
  for word in words:
    assert word in str(error.value)


def test_damaged_tokenizers_are_named(config, tmp_path):
  for name, content in (
    ("bad.model", b"not a model"),
    ("tokenizer.json", b"{}"),
    ("empty.model", b""),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
      UserError, match=f"{name}: the tokenizer cannot be read.*mmjax data tokenizer"
    ) as error:
      load_tokenizer(config(**{"data.text.tokenizer": str(tmp_path / name)}).data)
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="no tokenizer"):
    Tokenizer.from_assets({"other": b""})


def test_a_tokenizer_of_a_stranger_that_gives_up_is_named(hugging_face, capfd):
  """The library panics, which is no Exception: a regex that backtracks without end."""
  import tokenizers

  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
  pattern = tokenizers.Regex(r"^(a|a|aa)*$")
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
  tokenizer = Tokenizer.from_assets({"tokenizer.json": model.to_str().encode()})
  for use in (tokenizer.encode, tokenizer.encode_plain, tokenizer.word_starts):
    with pytest.raises(UserError, match="the tokenizer fails .*retry-limit"):
      use("a" * 40 + "!")
  assert tokenizer.encode("a") == [0]
  whole = {path.name: path.read_bytes() for path in hugging_face.iterdir()}
  for template in (7, [1], [{"name": "default", "template": 7}]):
    facts = json.dumps({"chat_template": template}).encode()
    with pytest.raises(UserError, match="the tokenizer cannot be read|chat_template is no text"):
      Tokenizer.from_assets(whole | {"tokenizer_config.json": facts})


def test_settings_that_the_tokenizer_cannot_meet(config, hugging_face):
  c = config(**{"data.text.length": 1, "data.text.bos": True})
  with pytest.raises(UserError, match="no room"):
    TextTransform(c.data.text, load_tokenizer(c.data))
  c = config(**{"data.text.pad_id": 9999})
  with pytest.raises(UserError, match="pad_id is 9999"):
    TextTransform(c.data.text, load_tokenizer(c.data))
