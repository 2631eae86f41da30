"""Captions to tokens: tokenizers (sentencepiece .model and Hugging Face tokenizer.json), cutting,
padding, keys, training one.

Tokenizers that `train_tokenizer` makes reserve <pad> 0, <bos> 1, <eos> 2, <unk> 3, <mask> 4 and 64
spare pieces, which text never becomes by itself, and fall back to bytes, so that no caption holds
an unknown piece.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmjax import files, printing
from mmjax.config import UserError
from mmjax.data import wordpiece
from mmjax.data.folders import data_dir, local_data_dir
from mmjax.data.readers.cells import broken_text, printable
from mmjax.data.sources import list_tokenizers, open_source
from mmjax.keys import SPECIAL_TOKENS

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
    return Tokenizer.from_assets(_read_assets(path))
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


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextTransform:
  """Captions as arrays: TextTransform(config.data.text, tokenizer)(captions, length) -> dict of

  tokens int32 [N, L] (cut with <eos> kept, padded; L = length, 0 = data.text.length), mask bool [N,
  L] (True = real), key uint32 [N, 2] (`text_key`), and with data.text.words: words int32 [N, L],
  the number of the word of each token (-1 = none).
  """

  def __init__(self, config, tokenizer: Tokenizer):
    self.tokenizer, self.length, self.lowercase, self.mask_padding = (
      tokenizer,
      config.length,
      config.lowercase,
      config.mask_padding,
    )
    self.punctuation, self.words = config.punctuation, config.get("words", False)
    self.pad_id = config.pad_id if config.pad_id >= 0 else max(tokenizer.pad_id, 0)
    if not 0 <= self.pad_id < config.vocab_size:
      raise UserError(
        f"data.text.pad_id is {self.pad_id}, but must be below data.text.vocab_size "
        f"{config.vocab_size}"
      )
    for name in ("bos", "eos"):
      if config[name] and getattr(tokenizer, f"{name}_id") < 0:
        raise UserError(
          f"data.text.{name} is true, but tokenizer {config.tokenizer!r} has no <{name}>. Set "
          f"data.text.{name}=false"
        )
    self.start = [tokenizer.bos_id] if config.bos else []
    self.end = [tokenizer.eos_id] if config.eos else []
    if len(self.start) + len(self.end) > self.length:
      raise UserError(f"data.text.length is {self.length}: no room for <bos> and <eos>")

  def __call__(self, captions: Sequence[str], length: int = 0) -> dict[str, np.ndarray]:
    tokens = np.full((len(captions), length or self.length), self.pad_id, np.int32)
    mask = np.full(tokens.shape, not self.mask_padding)
    words = np.full(tokens.shape, -1, np.int32)
    for row, caption in enumerate(captions):
      ids = self.encode(caption, length)
      tokens[row, : len(ids)] = ids
      mask[row, : len(ids)] = True
      if self.words:
        inner = slice(len(self.start), len(ids) - len(self.end))
        starts = self.tokenizer.word_starts(self._prepared(caption))[: inner.stop - inner.start]
        words[row, inner] = np.cumsum([False, *starts[1:]])[: len(starts)]
    keys = np.array([text_key(c) for c in captions], np.uint32).reshape(-1, 2)
    return {"tokens": tokens, "mask": mask, "key": keys, **({"words": words} if self.words else {})}

  def encode(self, caption: str, length: int = 0) -> list[int]:
    """At most `length` ids (0 = data.text.length), with <bos> and <eos> as configured."""
    ids = self.tokenizer.encode(self._prepared(caption))
    return self.start + ids[: (length or self.length) - len(self.start) - len(self.end)] + self.end

  def _prepared(self, caption: str) -> str:
    return prepared(caption, self.lowercase, self.punctuation)


def prepared(caption: str, lowercase: bool, punctuation: bool) -> str:
  """A caption as the tokenizer reads it: data.text.lowercase, data.text.punctuation."""
  if lowercase:
    caption = caption.lower()
  return caption if punctuation else " ".join(caption.translate(_NO_PUNCTUATION).split())


def decode(tokenizer: Tokenizer, tokens: Sequence[int], eos_id: int | Sequence[int]) -> str:
  """The text of generated ids, up to the end token (or the first of several), which padding may
  follow. Ids that no piece has (a model's table may be longer) are left out."""
  ends = np.atleast_1d(eos_id)
  ids = list(itertools.takewhile(lambda token: token not in ends, np.asarray(tokens).tolist()))
  return tokenizer.decode([i for i in ids if i != tokenizer.bos_id and i < tokenizer.vocab_size])


def normalise_caption(caption: str) -> str:
  """What makes two captions equal: NFKC, case folded, white space as single spaces."""
  return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def check_texts(texts: Iterable[str]) -> None:
  """Raises UserError: a text that UTF-8 cannot hold (half an emoji), on which tokenizers end in
  errors of their own.
  """
  for text in texts:
    if bad := broken_text(text):
      raise UserError(f"broken text: {bad}")


def text_key(caption: str) -> tuple[int, int]:
  """Hash of the normalised caption as two uint32, high half first: equal captions have equal
  keys.
  """
  return split_key(
    int.from_bytes(
      hashlib.blake2b(normalise_caption(caption).encode(), digest_size=8).digest(), "big"
    )
  )


def split_key(key: int) -> tuple[int, int]:
  """A uint64 as two uint32, high half first: JAX has no uint64 by default."""
  return key >> 32, key & 0xFFFFFFFF


def drop_words(caption: str, probability: float, rng: np.random.Generator) -> str:
  """The caption without some of its words, each left out with `probability`; at least one stays."""
  words = caption.split()
  if len(words) < 2:
    return caption
  keep = rng.random(len(words)) >= probability
  keep[rng.integers(len(words))] |= not keep.any()
  return " ".join(word for word, kept in zip(words, keep, strict=True) if kept)


# -- Training a tokenizer --------------------------------------------------------------------------


def train_tokenizer(
  captions: Iterable[str],
  out: str | os.PathLike,
  vocab_size: int,
  model: Literal["unigram", "bpe"] = "unigram",
) -> Path:
  """Trains a sentencepiece model and writes it to `out`, whole or not at all.

  model: unigram (Kudo 2018, arXiv:1804.10959) or byte-pair encoding (Sennrich et al. 2016,
  arXiv:1508.07909), which makes one piece of each word where there are few words. Captions that
  UTF-8 cannot hold are passed over. Deterministic: the same captions give the same bytes. Few
  captions may give fewer than `vocab_size` pieces.
  Raises UserError: no captions, or vocab_size is too small for the reserved pieces and the 256
  bytes.
  """
  import sentencepiece

  texts = [
    text for caption in captions if (text := " ".join(caption.split())) and not broken_text(text)
  ]
  if not texts:
    raise UserError("no captions to train a tokenizer on")
  fixed = len(RESERVED) + len(SPARE) + 256
  if vocab_size <= fixed:
    raise UserError(
      f"vocab_size is {vocab_size}, but {fixed} pieces are reserved (special, spare and the 256 "
      "bytes). Give more, such as 4096"
    )
  written = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=written,
      model_type=model,
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      byte_fallback=True,
      character_coverage=0.995 if model == "unigram" else 0.9999,
      normalization_rule_name="nmt_nfkc",
      max_sentence_length=1 << 16,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      pad_piece="<pad>",
      bos_piece="<bos>",
      eos_piece="<eos>",
      unk_piece="<unk>",
      control_symbols=[RESERVED[4], *SPARE],
      num_threads=1,
      shuffle_input_sentence=False,
      minloglevel=2,
    )
  except Exception as error:
    raise UserError(f"the tokenizer cannot be trained: {' '.join(str(error).split())}") from error
  out = Path(out)
  try:
    files.write_whole(out, written.getvalue())
  except OSError as error:
    raise UserError(
      f"{out}: the tokenizer cannot be written ({error.strerror or error})"
    ) from error
  return out


def train_tokenizer_from_source(
  source: str,
  *,
  split: str = "train",
  languages: Sequence[str] = (),
  vocab_size: int = 4096,
  model: Literal["unigram", "bpe"] = "unigram",
  answers: bool = False,
  name: str | None = None,
  data_dir: str = "",
  path: str = "",
  log=printing.log,
) -> Path:
  """Trains on the captions and questions of data sets and writes DATA_DIR/tokenizers/NAME.model
  (None: those of the sources, joined by "_").

  source: a data set, or several, separated by commas: for a mix, whose texts then share their
  pieces. `languages`: those of each, () = all that it has. answers: on those to the questions too,
  which a language model writes. `path`: tar files, when `source` is "tars". Returns the file.
  Raises UserError.
  """

  if name is not None:
    files.check_name("a tokenizer", name)
  root = local_data_dir(data_dir)
  opened = [
    open_source(dict(name=one.strip(), split=split, languages=tuple(languages), path=path), root)
    for one in source.split(",")
  ]
  unreadable: dict[str, str] = {}
  captions = (text for one in opened for text in _readable_texts(one, answers, unreadable))
  out = train_tokenizer(
    captions,
    root / "tokenizers" / f"{name or '_'.join(one.name for one in opened)}.model",
    vocab_size,
    model,
  )
  spoken = sorted({language for one in opened for language in one.languages})
  log(
    f"tokenizer {out}: {Tokenizer.from_assets(_read_assets(out)).vocab_size} pieces from "
    f"{', '.join(one.name for one in opened)} {split}, languages {', '.join(spoken)}"
  )
  if unreadable:
    name, why = next(iter(unreadable.items()))
    log(
      f"left out {len(unreadable):,} unreadable records, such as {printable(name)}: "
      f"{printable(why)}"
    )
  return out


def _readable_texts(source, answers: bool, unreadable: dict[str, str]) -> Iterator[str]:
  """The texts of the records of a source, those of conversations once each, for their questions
  repeat; {name: why} of the others goes into `unreadable`.
  """
  said: set[str] = set()
  for index in range(len(source)):
    try:
      record = source[index]
      texts, turns = _texts(record, answers), list(turns_of(record))
      check_texts(texts + turns)
    except UserError as error:
      unreadable[f"{source.name}[{index}]"] = str(error)
      continue
    yield from texts
    yield from (text for text in turns if text not in said)
    said.update(turns)


def _texts(record, answers: bool) -> list[str]:
  return [
    *(caption for texts in record["captions"].values() for caption in texts),
    *(text for pair in record.get("questions") or () for text in pair[: 1 + answers]),
  ]


def turns_of(record) -> Iterator[str]:
  """The turns of a record's conversations and judged answers, each after its role, as templates
  write them, and once more with commas: sentencepiece looks for pieces in what several different
  words share.
  """
  talks = list(record.get("conversations") or ())
  for one in record.get("preferences") or ():
    answers = [one[side] for side in ("chosen", "rejected") if side in one]
    talks.append([*one["prompt"], *(dict(role="assistant", content=text) for text in answers)])
  for talk in talks:
    for turn in talk:
      content = turn["content"]
      parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
      text = f"{turn['role']}: {' '.join(parts)}"
      yield text
      yield re.sub(r"(?<=\w)\b", ",", text)


# -- The three kinds -------------------------------------------------------------------------------


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


def _find_tokenizer(name: str, root: Path) -> Path:
  """The file (or folder) of a tokenizer, by path or by name. Raises UserError."""
  folder = root / "tokenizers"
  if files.origin(folder):
    folder = files.bring(folder)
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
    f"data.text.tokenizer: no tokenizer {name!r} under {files.origin(root) or root}/tokenizers "
    f"(there: {', '.join(available) or 'none'}).{hint}{make}"
  )


def _read_assets(path: Path) -> dict[str, bytes]:
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
