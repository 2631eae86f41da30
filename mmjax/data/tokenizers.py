"""Tokenizers: text to ids and back, by sentencepiece (.model), Hugging Face (tokenizer.json) or
characters (vocab.json).

Those that tokenizer_training.py makes reserve <pad> 0, <bos> 1, <eos> 2, <unk> 3, <mask> 4 and 64
spare pieces, which text never becomes by itself, and fall back to bytes, so that no caption holds
an unknown piece.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import files, remote
from mmjax.config import UserError
from mmjax.data import wordpiece
from mmjax.data.folders import data_dir
from mmjax.data.readers.cells import broken_text
from mmjax.data.sources import list_tokenizers
from mmjax.special_tokens import SPECIAL_TOKENS

RESERVED = tuple(f"<{role}>" for role in SPECIAL_TOKENS)
SPARE = tuple(f"<spare_{number}>" for number in range(64))
# Looks like a marker of a chat: "<|im_end|>", "<end_of_turn>", "[INST]".
_MARKER = re.compile(r"<[|\uff5c][^<>]+[|\uff5c]>|</?[a-z]+(?:_[a-z]+)*>|\[/?[A-Z_]+\]")
LARGEST = 2**26  # bytes of a file of a tokenizer; the largest that are published have half of that


class Tokenizer:
  """Text to ids. `encode(text) -> list[int]` adds no special tokens and raises UserError for half a
  character; ids that the tokenizer lacks are -1.

  Attributes: vocab_size, pad_id, bos_id, eos_id, unk_id, mask_id. Made by `load_tokenizer` or
  `Tokenizer.from_assets`.
  """

  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int
  mask_id: int

  def __init__(self, assets: Mapping[str, bytes]):
    self._assets = dict(assets)

  def encode(self, text: str) -> list[int]:
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    raise NotImplementedError

  def piece(self, number: int) -> str:
    """The piece of an id; "" = there is none."""
    raise NotImplementedError

  @property
  def special_pieces(self) -> dict[str, int]:
    """{piece: id} of the tokens that stand for themselves and are part of no text."""
    return {}

  @property
  def chat_template(self) -> str:
    """The chat template that came with the tokenizer, "" = none."""
    return ""

  def encode_plain(self, text: str) -> list[int]:
    """Ids of a text in which nothing is a special token, whatever it looks like."""
    ids = self._encode_plain(text)
    special = self.special_pieces
    if special and not set(special.values()).isdisjoint(ids):
      pieces = re.split(
        "|".join(f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in special if len(p) > 1),
        text,
      )
      ids = [i for piece in pieces for i in self._encode_plain(piece)]
    return ids

  def _encode_plain(self, text: str) -> list[int]:
    return self.encode(text)

  def word_starts(self, text: str) -> list[bool]:
    """For each id of `encode(text)`: whether it begins a word (after white space; in WordPiece: is
    no continuation).
    """
    raise NotImplementedError

  def to_assets(self) -> dict[str, bytes]:
    """The tokenizer as files, {name: content}, for a checkpoint."""
    return dict(self._assets)

  @property
  def special_tokens(self) -> dict[str, int]:
    """{"pad": id, "bos": ..., "eos": ..., "unk": ..., "mask": ...}; -1 = it has none."""
    return {role: getattr(self, f"{role}_id") for role in SPECIAL_TOKENS}

  @property
  def fingerprint(self) -> str:
    """A hash of the files' content: equal for equal tokenizers."""
    mark = hashlib.blake2b(digest_size=6)
    for name, content in sorted(self._assets.items()):
      mark.update(f"{name} {len(content)} ".encode() + content)
    return mark.hexdigest()

  @staticmethod
  def from_assets(assets: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that `to_assets` gave (other files are ignored). Raises UserError: there is
    none, or it is damaged.
    """
    try:
      if "tokenizer.model" in assets:
        return _SentencePiece(assets)
      if "tokenizer.json" in assets:
        return _HuggingFace(assets)
      if "vocab.json" in assets:
        return _Characters(assets)
    except UserError:
      raise
    except Exception as error:  # both libraries raise bare RuntimeErrors and Exceptions
      raise UserError(
        "the tokenizer cannot be read "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
      ) from error
    raise UserError("no tokenizer: neither tokenizer.model nor tokenizer.json is there")

  @staticmethod
  def is_among(assets: Mapping[str, bytes]) -> bool:
    """Whether `from_assets` finds a tokenizer."""
    return any(name in assets for name in ("tokenizer.model", "tokenizer.json", "vocab.json"))


def load_tokenizer(data) -> Tokenizer:
  """The tokenizer of a config's `data` part: a name under data.dir/tokenizers, or a path of a
  .model, a tokenizer.json or their folder.

  Raises UserError: there is none (naming the nearest and the command that makes one), it cannot be
  read, or its vocabulary is larger than data.text.vocab_size.
  """
  name = data.text.tokenizer
  tokenizer = open_tokenizer(name, data_dir(data))
  if tokenizer.vocab_size > data.text.vocab_size:
    raise UserError(
      f"data.text.vocab_size is {data.text.vocab_size}, but tokenizer {name} has "
      f"{tokenizer.vocab_size} pieces. Set data.text.vocab_size to {tokenizer.vocab_size} or more"
    )
  return tokenizer


def open_tokenizer(name: str, root: Path) -> Tokenizer:
  """The tokenizer of this name under root/tokenizers, or at this path. Raises UserError: as
  `load_tokenizer`, whatever its size.
  """
  path = _find_tokenizer(name, root)
  try:
    return Tokenizer.from_assets(read_assets(path))
  except (UserError, OSError) as error:
    raise UserError(
      f"data.text.tokenizer {path}: {error}. Make it again with `mmjax data tokenizer`"
    ) from error


def special_tokens(data) -> dict[str, int]:
  """{"pad": id, "bos": ..., "eos": ..., "unk": ..., "mask": ...} of the tokenizer of a config's
  `data` part; -1 = it has none.

  Where none is named, or a tokenizer of this project is not made yet, those of every tokenizer of
  this project. Raises
  UserError: as `load_tokenizer`, and another program's tokenizer (tokenizer.json) that is not
  there.
  """
  name = data.text.tokenizer
  try:
    _find_tokenizer(name, data_dir(data))
  except UserError:
    if name and not name.endswith(".model") and re.search(r"[/.]", name):
      raise
    return {role: number for number, role in enumerate(SPECIAL_TOKENS)}
  return load_tokenizer(data).special_tokens


def decode(tokenizer: Tokenizer, tokens: Sequence[int], eos_id: int | Sequence[int]) -> str:
  """The text of generated ids, up to the end token (or the first of several), which padding may
  follow. Ids that no piece has (a model's table may be longer) are left out."""
  ends = np.atleast_1d(eos_id)
  ids = list(itertools.takewhile(lambda token: token not in ends, np.asarray(tokens).tolist()))
  return tokenizer.decode([i for i in ids if i != tokenizer.bos_id and i < tokenizer.vocab_size])


def check_texts(texts: Iterable[str]) -> None:
  """Raises UserError: a text that UTF-8 cannot hold (half an emoji), on which tokenizers end in
  errors of their own.
  """
  for text in texts:
    if bad := broken_text(text):
      raise UserError(f"broken text: {bad}")


class _SentencePiece(Tokenizer):
  """A sentencepiece model."""

  def __init__(self, assets: Mapping[str, bytes]):
    import sentencepiece

    super().__init__({"tokenizer.model": assets["tokenizer.model"]})
    if not assets["tokenizer.model"]:
      raise ValueError("the file is empty")
    self._model = sentencepiece.SentencePieceProcessor(model_proto=assets["tokenizer.model"])
    self.vocab_size = self._model.get_piece_size()
    self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
      getattr(self._model, name)() for name in ("pad_id", "bos_id", "eos_id", "unk_id")
    )
    mask = self._model.piece_to_id("<mask>")
    self.mask_id = mask if mask != self.unk_id else -1
    pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
    self._special_pieces = {
      piece: i
      for i, piece in enumerate(pieces)
      if self._model.is_control(i) or _MARKER.fullmatch(piece)
    }

  @property
  def special_pieces(self) -> dict[str, int]:
    return self._special_pieces

  def encode(self, text: str) -> list[int]:
    check_texts([text])
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._model.decode([int(i) for i in ids])

  def piece(self, number: int) -> str:
    return self._model.id_to_piece(number) if number < self.vocab_size else ""

  def word_starts(self, text: str) -> list[bool]:
    return [piece.startswith("\u2581") for piece in self._model.encode(text, out_type=str)]


@contextlib.contextmanager
def _failing_by_name(what: str = "fails") -> Iterator[None]:
  """Raises UserError: the library fails. A panic of it (a regex that gives up, a table that lacks
  what another names) is no Exception, and would end whatever runs.
  """
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
      raise
    raise UserError(f"the tokenizer {what} ({' '.join(str(error).split())[:200]})") from error


class _HuggingFace(Tokenizer):
  """A Hugging Face tokenizer.json. Which pieces are special stands in tokenizer_config.json;
  without it, usual names decide.
  """

  FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
  )
  USUAL = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>"),
    "bos": ("<bos>", "<s>", "[CLS]", "<|startoftext|>", "<|begin_of_text|>"),
    "eos": ("<eos>", "</s>", "[SEP]", "<|endoftext|>", "<|end_of_text|>"),
    "unk": ("<unk>", "[UNK]", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]"),
  }
  ALSO = {"bos": "cls_token", "eos": "sep_token"}

  def __init__(self, assets: Mapping[str, bytes]):
    import tokenizers

    super().__init__({name: assets[name] for name in self.FILES if name in assets})
    with _failing_by_name("cannot be read"):
      self._model = tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode())
    self._model.no_truncation()
    self._model.no_padding()
    self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
    kind = json.loads(assets["tokenizer.json"]).get("model") or {}
    self._continues = (
      kind.get("continuing_subword_prefix") or "" if kind.get("type") == "WordPiece" else ""
    )
    facts: dict = {}
    for name in reversed(self.FILES[1:3]):
      facts.update({k: v for k, v in json.loads(assets.get(name, b"{}")).items() if v is not None})
    self._template = facts.get("chat_template") or ""
    if "chat_template.jinja" in assets:
      self._template = assets["chat_template.jinja"].decode()
    if not isinstance(self._template, str):  # several, by their use
      self._template = {t["name"]: t["template"] for t in self._template}.get("default", "")
    if not isinstance(self._template, str):
      raise UserError("chat_template is no text")
    self._make_plain(json.loads(assets["tokenizer.json"]))
    self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.mask_id = (
      self._special(role, facts) for role in self.USUAL
    )

  def _make_plain(self, model: dict) -> None:
    """The tokenizer that knows no special token, for `encode_plain`."""
    import tokenizers

    added = model.get("added_tokens") or []
    special = [t for t in added if t.get("special") or _MARKER.fullmatch(t["content"])]
    self._special_pieces = {token["content"]: token["id"] for token in special}
    self._plain = self._model
    if special:
      model["added_tokens"] = [token for token in added if token not in special]
      self._plain = tokenizers.Tokenizer.from_str(json.dumps(model))
      self._plain.no_truncation()
      self._plain.no_padding()

  @property
  def special_pieces(self) -> dict[str, int]:
    return self._special_pieces

  @property
  def chat_template(self) -> str:
    return self._template

  def _encode_plain(self, text: str) -> list[int]:
    return self._encoded(self._plain, text).ids

  def _encoded(self, model: Any, text: str) -> Any:
    check_texts([text])
    with _failing_by_name():
      return model.encode(text, add_special_tokens=False)

  def _special(self, role: str, facts: Mapping) -> int:
    stated = facts.get(f"{role}_token") or facts.get(self.ALSO.get(role, ""))
    stated = stated.get("content") if isinstance(stated, dict) else stated
    for piece in (stated,) if stated else self.USUAL[role]:
      if (number := self._model.token_to_id(piece)) is not None:
        return number
    return -1

  def encode(self, text: str) -> list[int]:
    return self._encoded(self._model, text).ids

  def decode(self, ids: Sequence[int]) -> str:
    with _failing_by_name():
      return self._model.decode([int(i) for i in ids])

  def piece(self, number: int) -> str:
    return self._model.id_to_token(number) or ""

  def word_starts(self, text: str) -> list[bool]:
    encoding = self._encoded(self._model, text)
    if self._continues:
      return [not piece.startswith(self._continues) for piece in encoding.tokens]
    # By the text, for pieces mark words in several ways, at either end: one begins with white
    # space, or follows it.
    # A mark that is a piece of its own (the one before is blank) has begun the word; bytes of a
    # character share a place.
    starts, place, blank = [], -1, False
    for start, stop in encoding.offsets:
      begins = text[start:stop][:1].isspace() or text[max(0, start - 1) : start].isspace()
      starts.append(place < 0 or (begins and not blank and start != place))
      place, blank = start, not text[start:stop].strip()
    return starts


class _Characters(Tokenizer):
  """Characters, and one piece for the space, as a Wav2Vec2CTCTokenizer has them: a vocab.json
  {piece: id} and a tokenizer_config.json.

  decode leaves out the padding piece, which is CTC's blank.
  """

  FILES = ("vocab.json", "tokenizer_config.json")

  def __init__(self, assets: Mapping[str, bytes]):
    super().__init__({name: assets[name] for name in self.FILES if name in assets})
    self._ids: dict[str, int] = json.loads(assets["vocab.json"])
    facts = json.loads(assets.get("tokenizer_config.json", b"{}"))
    usual = dict(pad="<pad>", bos="<s>", eos="</s>", unk="<unk>", word_delimiter="|")
    stated = {role: facts.get(f"{role}_token") or piece for role, piece in usual.items()}
    stated = {
      role: piece["content"] if isinstance(piece, dict) else piece for role, piece in stated.items()
    }
    self._delimiter, self._space = (
      stated["word_delimiter"],
      facts.get("replace_word_delimiter_char", " "),
    )
    self._lowercase = bool(facts.get("do_lower_case"))
    self._pieces = {number: piece for piece, number in self._ids.items()}
    self.vocab_size = max(self._pieces) + 1
    self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
      self._ids.get(stated[role], -1) for role in ("pad", "bos", "eos", "unk")
    )
    self.mask_id = -1

  def encode(self, text: str) -> list[int]:
    check_texts([text])
    text = text.upper() if self._lowercase else text
    return [
      self._ids.get(self._delimiter if piece == " " else piece, self.unk_id) for piece in text
    ]

  def decode(self, ids: Sequence[int]) -> str:
    pieces = [self._pieces.get(int(i), "") for i in ids if i != self.pad_id]
    text = "".join(self._space if piece == self._delimiter else piece for piece in pieces).strip()
    return text.lower() if self._lowercase else text

  def piece(self, number: int) -> str:
    return self._pieces.get(number, "")

  def word_starts(self, text: str) -> list[bool]:
    return [not before or before.isspace() for before in ("", *text[:-1])][: len(text)]


def _find_tokenizer(name: str, root: Path) -> Path:
  """The file (or folder) of a tokenizer, by path or by name. Raises UserError."""
  folder = root / "tokenizers"
  if remote.origin(folder):
    folder = remote.bring(folder)
  own = (folder / f"{name}.model", folder / f"{name}.json", folder / name)
  for path in (*own, name):
    if name and (place := files.local_path(path)).exists():
      return place
  if not name:
    raise UserError(
      "data.text.tokenizer is empty. Make one with `mmjax data tokenizer --source DATASET --name "
      "NAME` and name it"
    )
  available = list_tokenizers(folder)
  near = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  make = (
    ""
    if re.search(r"[/.]", name)
    else f" `mmjax data tokenizer --source DATASET --name {name}` makes one"
  )
  raise UserError(
    f"data.text.tokenizer: no tokenizer {name!r} under {remote.origin(root) or root}/tokenizers "
    f"(there: {', '.join(available) or 'none'}).{hint}{make}"
  )


def read_assets(path: Path) -> dict[str, bytes]:
  """The files of a tokenizer under the names of `to_assets`."""
  if path.is_dir():
    found = {file.name: file for file in path.iterdir()}
    spm = next((found[name] for name in ("tokenizer.model", "spiece.model") if name in found), None)
    if "tokenizer.json" not in found and spm:
      return {"tokenizer.model": _read(spm)}
    assets = {name: _read(found[name]) for name in _HuggingFace.FILES if name in found}
    if "tokenizer.json" not in assets and wordpiece.VOCABULARY in found:
      assets["tokenizer.json"] = wordpiece.tokenizer_json(
        {**assets, wordpiece.VOCABULARY: _read(found[wordpiece.VOCABULARY])}
      )
    return assets
  if path.suffix == ".json":
    beside = (
      {name: path.with_name(name) for name in _HuggingFace.FILES[1:]}
      if path.name == "tokenizer.json"
      else {}
    )
    return {
      "tokenizer.json": _read(path),
      **{name: _read(file) for name, file in beside.items() if file.exists()},
    }
  return {"tokenizer.model": _read(path)}


def _read(path: Path) -> bytes:
  return files.read_file(path, LARGEST)
