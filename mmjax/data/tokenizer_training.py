"""Training a sentencepiece tokenizer on texts, or on those of a data set."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from mmjax import files, printing
from mmjax.config import UserError
from mmjax.data.folders import local_data_dir
from mmjax.data.readers.cells import broken_text, printable
from mmjax.data.sources import open_source
from mmjax.data.tokenizers import RESERVED, SPARE, Tokenizer, check_texts, read_assets


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
    f"tokenizer {out}: {Tokenizer.from_assets(read_assets(out)).vocab_size} pieces from "
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
