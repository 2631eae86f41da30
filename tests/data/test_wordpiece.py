"""BERT's vocab.txt against transformers' BertTokenizer: equal ids on odd texts."""

from __future__ import annotations

import json

import pytest
import transformers

from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer as Ours
from mmjax.data.tokenizers import read_assets
from mmjax.data.wordpiece import tokenizer_json

PIECES = (
  "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a cat ##s ##t the un ##aff ##able caf ##e ##é cafe "
  "naïve naive Cat ! , . - ' 猫 犬 \u0130 i ##\u0307 ß ss 1 ##2 ##3 hello world \u200b \ufffd "
  "don t [ ] UNK mask"
).split(" ")
TEXTS = [
  "The CATS, unaffable!",
  "café CAFÉ cafe\u0301",
  "naïve Naïve",
  "猫犬 cat猫s",
  "\u0130 ß",
  "hello\u00a0world\u200bhello\tworld\r\n",
  "don't [MASK] a [UNK] [unused0] mask",
  "123 a\x00b \ufffd",
  "a" * 101 + " cat",
  "",
  "  ",
  "😀 cat",
  "[mask] [SEP]",
  "c\u00ada\u0301t",
]


@pytest.mark.parametrize(
  "facts",
  (
    {},
    dict(do_lower_case=False),
    dict(strip_accents=False),
    dict(do_lower_case=False, strip_accents=True),
    dict(tokenize_chinese_chars=False),
    dict(unk_token="[unused0]", mask_token={"content": "mask", "__type": "AddedToken"}),
    dict(
      added_tokens_decoder={
        str(PIECES.index("world")): dict(
          content="world", special=False, normalized=True, lstrip=True
        )
      }
    ),
  ),
  ids=str,
)
def test_ids_are_those_of_transformers(facts, tmp_path):
  (tmp_path / "vocab.txt").write_bytes("\r\n".join(PIECES).encode() + b"\n")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
  (tmp_path / "config.json").write_text(json.dumps(dict(model_type="bert")))
  theirs, ours = (
    transformers.BertTokenizer.from_pretrained(tmp_path),
    Ours.from_assets(read_assets(tmp_path)),
  )
  for text in TEXTS:
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
  assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id, ours.mask_id) == (
    theirs.pad_token_id,
    theirs.cls_token_id,
    theirs.sep_token_id,
    theirs.unk_token_id,
    theirs.mask_token_id,
  )


def test_a_vocabulary_that_does_not_fit_is_refused():
  for files, says in (
    ({"vocab.txt": b"a\n[UNK]\n"}, r"has no '\[SEP\]'"),
    ({"vocab.txt": b"\xff\n"}, "no UTF-8"),
    (
      {"vocab.txt": b"a", "tokenizer_config.json": b'{"do_basic_tokenize": false}'},
      "do_basic_tokenize",
    ),
  ):
    with pytest.raises(UserError, match=says):
      tokenizer_json(files)
