"""A tokenizer.json of BERT's vocab.txt (Devlin et al. 2019, arXiv:1810.04805): cleaned and split
texts, the longest pieces first.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from mmjax.config import UserError

VOCABULARY, CONFIG = "vocab.txt", "tokenizer_config.json"
SPECIAL = {
  "unk_token": "[UNK]",
  "sep_token": "[SEP]",
  "pad_token": "[PAD]",
  "cls_token": "[CLS]",
  "mask_token": "[MASK]",
}


def tokenizer_json(files: Mapping[str, bytes]) -> bytes:
  """The tokenizer.json of files {"vocab.txt": a piece a line, "tokenizer_config.json": settings?},
  as BertTokenizer would make it.

  Read of the settings: do_lower_case, strip_accents, tokenize_chinese_chars, the five special
  tokens, added_tokens_decoder.
  Raises UserError: the vocabulary is no UTF-8, lacks a special token, or texts are not split into
  words first.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

  facts = json.loads(files.get(CONFIG, b"{}"))
  if not facts.get("do_basic_tokenize", True):
    raise UserError(f"{CONFIG}: do_basic_tokenize is false, but texts are split into words here")
  try:
    lines = list(io.TextIOWrapper(io.BytesIO(files[VOCABULARY]), encoding="utf-8"))
  except UnicodeDecodeError as error:
    raise UserError(f"{VOCABULARY} is no UTF-8 ({error}). Copy it again") from error
  pieces = {line.rstrip("\n"): number for number, line in enumerate(lines)}
  special = {role: _content(facts.get(role)) or usual for role, usual in SPECIAL.items()}
  for role in ("unk_token", "sep_token", "cls_token"):
    if special[role] not in pieces:
      raise UserError(f"{VOCABULARY} has no {special[role]!r} ({role}), which a text of BERT needs")
  made = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token=special["unk_token"]))
  made.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=facts.get("tokenize_chinese_chars", True),
    strip_accents=facts.get("strip_accents"),
    lowercase=facts.get("do_lower_case", True),
  )
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece(prefix="##")
  added = {int(number): token for number, token in facts.get("added_tokens_decoder", {}).items()}
  known = {token["content"] for token in added.values()}
  flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
  made.add_tokens(
    [
      tokenizers.AddedToken(
        token["content"], **{name: token[name] for name in flags if name in token}
      )
      for _, token in sorted(added.items())
    ]
  )
  made.add_special_tokens(
    [
      tokenizers.AddedToken(piece, normalized=False, special=True)
      for piece in special.values()
      if piece in pieces and piece not in known
    ]
  )
  if wrong := [
    token["content"]
    for number, token in added.items()
    if made.token_to_id(token["content"]) != number
  ]:
    raise UserError(
      f"{CONFIG} gives {wrong[0]!r} another number than {VOCABULARY}. Copy both files again"
    )
  frame = [(special[role], pieces[special[role]]) for role in ("cls_token", "sep_token")]
  made.post_processor = processors.TemplateProcessing(
    single=f"{frame[0][0]}:0 $A:0 {frame[1][0]}:0",
    pair=f"{frame[0][0]}:0 $A:0 {frame[1][0]}:0 $B:1 {frame[1][0]}:1",
    special_tokens=frame,
  )
  return made.to_str().encode()


def _content(token: Any) -> str | None:
  return token.get("content") if isinstance(token, dict) else token
