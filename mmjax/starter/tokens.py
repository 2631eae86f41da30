"""The tokenizer of a config: the one that is named, that of a checkpoint, or one that is trained on
the texts of the data set; and the settings of data.text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmjax import files
from mmjax.config import UserError
from mmjax.data.sources import open_source
from mmjax.data.tokenizer_training import train_tokenizer, turns_of
from mmjax.data.tokenizers import RESERVED, SPARE, Tokenizer, open_tokenizer
from mmjax.starter.origin import Origin
from mmjax.starter.survey import Survey, fit
from mmjax.starter.tasks import Task
from mmjax.starter.text import Draft

MOST_TEXTS = 200_000  # that a tokenizer is trained on


def lowercase(made: Task, begin: Origin | None) -> bool:
  """Whether texts are lower-cased: in search alone, and where the checkpoint did it."""
  if begin and begin.has_tokenizer:
    return begin.text["lowercase"]
  return made.name == "retrieval"


def find(
  found: Survey,
  made: Task,
  languages: Sequence[str],
  name: str,
  begin: Origin | None,
  log: Callable[[str], None],
) -> tuple[str, Tokenizer]:
  """(what data.text.tokenizer names, the tokenizer)."""
  if name:
    return name, open_tokenizer(name, found.folder)
  if begin and begin.has_tokenizer and begin.reads_text(made):
    return begin.tokenizer(found.folder)
  texts = list(itertools.islice(_texts(found, made, languages, begin), MOST_TEXTS))
  words = len({word for text in texts for word in text.split()})
  letters = len(set("".join(texts)))
  fixed = len(RESERVED) + len(SPARE) + 256
  wanted = min(made.pieces, -(-(fixed + letters + words) // 64) * 64)
  stem = f"{found.name}_letters" if made.pieces < 1024 else found.name
  path, tokenizer = _trained(texts, found.folder / "tokenizers", stem, wanted)
  log(
    f"tokenizer {path}: {tokenizer.vocab_size} pieces from {len(texts):,} texts with {words:,} "
    f"words. Another: `mmjax data tokenizer --source {found.name} --vocab-size N --name NAME`, "
    "then --tokenizer NAME here"
  )
  return path.stem, tokenizer


def write(
  draft: Draft, found: Survey, made: Task, tokenizer: tuple[str, Tokenizer], begin: Origin | None
) -> None:
  """The settings of data.text."""
  name, made_of = tokenizer
  draft.set("data.text.tokenizer", name)
  theirs = begin.text if begin and begin.has_tokenizer else None
  size = max(made_of.vocab_size, theirs["vocab_size"] if theirs else 0)
  draft.set("data.text.vocab_size", size, f"{made_of.vocab_size:,} pieces of it")
  if made.text == "conversation":  # rows say how long they are
    if begin and theirs:
      begin.text_settings(draft)
    return
  ends = 1 if theirs is None else int(theirs["bos"]) + int(theirs["eos"])
  contrastive = any(entry["kind"] == "contrastive" for entry in made.objectives.values())
  most = 64 if contrastive else 256
  if begin and theirs:
    most = min(most, begin.longest_text)
  lengths = found.text_values(made.text) + ends
  length = fit(lengths, 4, most)
  what = "questions" if made.text == "question" else "captions"
  draft.set("data.text.length", int(length.value), length.says(what))
  if begin and theirs:
    begin.text_settings(draft)
  elif lowercase(made, begin):
    draft.set("data.text.lowercase", True)
    draft.set("data.text.drop_words", 0.1)
  if not (begin and theirs):
    for key, value in made.text_settings.items():
      draft.set(f"data.text.{key}", value)
  if made.text == "question" and found.questions > 1:
    draft.set("data.text.per_example", min(4, found.questions), "questions about each encoded once")


def _texts(
  found: Survey, made: Task, languages: Sequence[str], begin: Origin | None
) -> Iterator[str]:
  """The captions in these languages, the questions, or the turns of the training split."""
  entry = dict(name=found.name, split=found.train, languages=tuple(languages))
  source = open_source(entry, str(found.folder))
  for index in range(len(source)):
    try:
      record = source[index]
    except UserError:
      continue
    if made.text == "conversation":
      texts = list(turns_of(record))
    elif made.text == "question":
      texts = [question for question, _ in record.get("questions") or ()]
    else:
      texts = [text for several in record["captions"].values() for text in several]
    yield from (text.lower() if lowercase(made, begin) else text for text in texts)


def _trained(texts: list[str], folder: Path, stem: str, size: int) -> tuple[Path, Tokenizer]:
  """A new tokenizer as folder/STEM.model, or STEM_2, ... where another one has that name."""
  temporary = folder / f"incomplete_{stem}.model"
  train_tokenizer(texts, temporary, size)
  content = temporary.read_bytes()
  temporary.unlink()
  path, number = folder / f"{stem}.model", 1
  while path.exists() and path.read_bytes() != content:
    number += 1
    path = folder / f"{stem}_{number}.model"
  if not path.exists():
    files.write_whole(path, content)
  return path, Tokenizer.from_assets({"tokenizer.model": content})
