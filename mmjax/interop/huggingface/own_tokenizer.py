"""A tokenizer.json of a sentencepiece model (unigram or byte-pair encoding), with what `data.text`
does before it: lower-casing, punctuation, <bos> and <eos>.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.tokenizers import RESERVED, SPARE
from mmjax.interop.huggingface.clip import LEGACY_EOS
from mmjax.special_tokens import SPECIAL_TOKENS

UNIGRAM, BPE = 1, 2  # trainer_spec.model_type of sentencepiece
NEVER = -1e4  # score of pieces that text must not become; the likeliest of any text are far above
FINAL_SIGMA = r"(?<=\p{L})Σ(?!\p{L})"
PUNCTUATION = r"[!-/:-@\[-`{-~]"  # string.punctuation


def is_own(model: bytes) -> bool:
  """Whether a sentencepiece model has the special tokens of those that `mmjax data tokenizer`
  trains."""
  import sentencepiece

  if not model:
    return False
  pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  return [pieces.id_to_piece(i) for i in range(len(RESERVED))] == list(RESERVED)


def moved_end(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> int | None:
  """The piece that <eos> trades places with in an exported model; None = it stays.

  It has the id 2, with which a CLIP of transformers pools the token of the highest id instead, so
  that it becomes the last spare piece. Raises UserError: it is another program's tokenizer.
  """
  encoder = config["model"]["encoders"].get("text") or {}
  if encoder.get("pooling") != "eos" or encoder.get("eos_id") != LEGACY_EOS:
    return None
  if not is_own(assets.get("tokenizer.model", b"")):
    raise UserError(
      f"model.encoders.text.pooling is 'eos' with eos_id {LEGACY_EOS}, which transformers takes "
      "for pooling 'highest'. Give the end token of the tokenizer another id"
    )
  return len(RESERVED) + len(SPARE) - 1


def swap_rows(table: np.ndarray, first: int, second: int) -> np.ndarray:
  """A copy of the table [N, ...] in which two rows have traded places."""
  out = np.array(table)
  out[[first, second]] = out[[second, first]]
  return out


def merges_of(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
  """The merges of byte-pair encoding, first ones first, of {piece: score}: a piece of a higher
  score is made earlier, of any two pieces that it is made of.
  """
  ranked = sorted((piece for piece in pieces if len(piece) > 1), key=lambda piece: -pieces[piece])
  return [
    (piece[:cut], piece[cut:])
    for piece in ranked
    for cut in range(1, len(piece))
    if piece[:cut] in pieces and piece[cut:] in pieces
  ]


def files(model: bytes, text: Mapping[str, Any], end: int | None = None) -> dict[str, bytes]:
  """{"tokenizer.json": ..., "tokenizer_config.json": ...} of a sentencepiece model. text: the
  config's data.text. end: of `moved_end`.

  AutoTokenizer gives the ids of `TextTransform` for them, with two exceptions: the texts of special
  tokens ("<mask>") are those tokens there, and combining marks after a character that is replaced
  (as in a lone Jamo) may be lost, since that library replaces grapheme by grapheme. Raises
  UserError: the model is of another type.
  """
  import tokenizers
  from sentencepiece import sentencepiece_model_pb2 as pb2
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

  message: Any = getattr(pb2, "ModelProto")  # noqa: B009  made when the module is read
  proto = message.FromString(model)
  if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
    raise UserError(
      "the tokenizer's sentencepiece model is neither unigram nor bpe, of which alone a "
      "tokenizer.json can be made"
    )
  kinds = message.SentencePiece
  pieces = [
    (piece.piece, NEVER if piece.type in (kinds.CONTROL, kinds.UNUSED) else piece.score)
    for piece in proto.pieces
  ]
  if end is not None:
    pieces[LEGACY_EOS], pieces[end] = pieces[end], pieces[LEGACY_EOS]
  unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
  fallback: dict[str, Any] = dict(byte_fallback=proto.trainer_spec.byte_fallback)
  if proto.trainer_spec.model_type == UNIGRAM:
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, **fallback))
  else:
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    parts = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    unk = dict(unk_token=pieces[unknown][0], fuse_unk=True)
    made = tokenizers.Tokenizer(models.BPE(ids, merges_of(parts), **unk, **fallback))
  spec = proto.normalizer_spec
  steps: list[Any] = []
  if text["lowercase"]:
    # Lowercase goes character by character, Python's lower() knows the sigma that ends a word.
    steps.append(normalizers.Replace(tokenizers.Regex(FINAL_SIGMA), "ς"))
    steps.append(normalizers.Lowercase())
  if not text["punctuation"]:
    steps.append(normalizers.Replace(tokenizers.Regex(PUNCTUATION), ""))
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
  made.normalizer = normalizers.Sequence(steps)
  prepend = "always" if spec.add_dummy_prefix else "never"
  made.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=prepend, split=False)
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  known = {piece: number for number, (piece, _) in enumerate(pieces)}
  special = {f"{role}_token": f"<{role}>" for role in SPECIAL_TOKENS if f"<{role}>" in known}
  made.add_special_tokens(
    [tokenizers.AddedToken(piece, normalized=False, special=True) for piece in special.values()]
  )
  frame = [f"<{role}>" for role in ("bos", "eos") if text[role]]
  if frame:
    whole = [*(["<bos>"] if text["bos"] else []), "$A", *(["<eos>"] if text["eos"] else [])]
    made.post_processor = processors.TemplateProcessing(
      single=" ".join(whole), special_tokens=[(piece, known[piece]) for piece in frame]
    )
  facts = dict(tokenizer_class="PreTrainedTokenizerFast", padding_side="right", **special)
  return {
    "tokenizer.json": made.to_str().encode(),
    "tokenizer_config.json": json.dumps(facts, indent=2).encode(),
  }
