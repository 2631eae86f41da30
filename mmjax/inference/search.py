"""`mmjax embed` and `mmjax search`: embeddings of folders, a text file or a data set in one .npz,
and looking things up in it.

The .npz loads with `allow_pickle=False`. Its arrays, each there when it was asked for:
  image_embeddings float32 [N, D], image_ids str [N], image_keys uint64 [N] (equal = the same
  content); the same for audio, video and series text_embeddings float32 [T, D], texts str [T],
  text_keys uint64 [T] (equal = same caption), text_owners int64 [T] (row of the caption's picture,
  sound, ..., -1 = none) skipped str [M] (what could not be read), scale, bias float32, model str (a
  hash of the parameters)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.image import Unreadable
from mmjax.data.media import ENDINGS, WORDS, bytes_key, content_key
from mmjax.data.sources import open_source
from mmjax.data.text import text_key
from mmjax.evaluation import languages_of
from mmjax.files import check_output, files_below, read_file
from mmjax.inference.predictor import Predictor
from mmjax.inference.programs import in_threads

FILES = {
  modality: tuple(f".{ending}" for ending in endings) for modality, endings in ENDINGS.items()
}
_NOUNS = {"image": "pictures", "audio": "sounds", "video": "videos", "series": "series"}
Index = dict[str, np.ndarray]


def embed(
  checkpoint: str | os.PathLike | Predictor,
  out: str | os.PathLike,
  *,
  images: str | None = None,
  audio: str | None = None,
  video: str | None = None,
  texts: str | None = None,
  source: str | None = None,
  split: str = "train",
  languages: Sequence[str] = (),
  modality: str | None = None,
  allow_code: Sequence[str] = (),
  log: Callable[[str], None] = printing.log,
) -> Path:
  """Embeds folders of pictures (`images`), sounds (`audio`) or videos, the lines of a text file
  (`texts`), or a split of a data set (`source`), and writes `out`.

  modality: of `source`; None = the first that model and records have. Unreadable files are named,
  skipped and counted.
  Raises UserError: nothing to embed, or `out` cannot be written.
  """
  check_output(out)
  out = Path(out)
  folders = {
    name: folder
    for name, folder in (("image", images), ("audio", audio), ("video", video))
    if folder
  }
  if bool(source) == bool(folders or texts):
    raise UserError(
      "embed takes --images, --audio, --video and --texts, or --source alone: give folders, a "
      "text file or a data set"
    )
  _check_writable(out)
  predictor = (
    checkpoint
    if isinstance(checkpoint, Predictor)
    else Predictor.load(checkpoint, allow_code=allow_code)
  )
  index: Index = {"skipped": np.array([], str)}
  for name, folder in folders.items():
    found = embed_folder(predictor, folder, log, name)
    index.update(found | {"skipped": np.concatenate([index["skipped"], found["skipped"]])})
  if texts:
    index.update(embed_texts(predictor, read_lines(texts)))
  if source:
    index.update(embed_source(predictor, source, split, languages, log, modality))
  save(out, predictor, index)
  counts = [
    f"{len(index[f'{name}_ids'])} {noun}" for name, noun in _NOUNS.items() if f"{name}_ids" in index
  ]
  counts += [f"{len(index['texts'])} texts"] if "texts" in index else []
  log(
    f"wrote {out}: {', '.join(counts)}, {predictor.width} channels; {len(index['skipped'])} skipped"
  )
  return out


def search(
  checkpoint: str | os.PathLike | Predictor,
  query,
  *,
  images: str | os.PathLike | None = None,
  audio: str | os.PathLike | None = None,
  video: str | os.PathLike | None = None,
  index: str | os.PathLike | Index | None = None,
  modality: str | None = None,
  k: int = 5,
  allow_code: Sequence[str] = (),
  log: Callable[[str], None] = printing.log,
) -> list[tuple[str, float]]:
  """The `k` pictures (sounds, videos) nearest to `query` as (name, cosine), best first; ties by
  name.

  query: words, a path of a picture, sound or video, or a picture (bytes, PIL, uint8 array). images,
  audio, video: a folder to search; index: what `embed` wrote. modality: which of an index; None =
  the first that it has. Raises UserError: not one place to search is given, the index is of another
  model, or the query cannot be read.
  """
  folders = {
    name: folder
    for name, folder in (("image", images), ("audio", audio), ("video", video))
    if folder is not None
  }
  if len(folders) + (index is not None) != 1:
    raise UserError(
      "search takes --images, --audio or --video (a folder) or --index (a file that `mmjax embed` "
      "wrote), one of them"
    )
  if k < 1:
    raise UserError(f"-k is {k}, but must be at least 1")
  predictor = (
    checkpoint
    if isinstance(checkpoint, Predictor)
    else Predictor.load(checkpoint, allow_code=allow_code)
  )
  for name, folder in folders.items():
    modality, index = name, embed_folder(predictor, folder, log, name)
  if isinstance(index, (str, os.PathLike)):
    index = load_index(index, predictor)
  assert index is not None  # there is a folder or an index
  modality = modality or next((name for name in _NOUNS if f"{name}_embeddings" in index), "image")
  if f"{modality}_embeddings" not in index:
    raise UserError(
      f"the index has no {_NOUNS[modality]}. Make one with `mmjax embed --{_option(modality)} "
      "FOLDER` or `--source NAME`"
    )
  kind = "image"
  if isinstance(query, str):
    kind = next(
      (
        name
        for name, endings in FILES.items()
        if query.lower().endswith(endings) and os.path.isfile(query)
      ),
      "text",
    )
  vector = predictor.encode(kind, [query])[0]
  scores = index[f"{modality}_embeddings"] @ vector
  ids = index[f"{modality}_ids"]
  best = np.lexsort((ids, -scores))[:k]
  return [(str(ids[i]), float(scores[i])) for i in best]


def embed_folder(
  predictor: Predictor,
  folder: str | os.PathLike,
  log: Callable[[str], None] = printing.log,
  modality: str = "image",
) -> Index:
  """The pictures (sounds, videos) in a folder and its sub-folders, in the order of their names:
  image_embeddings, image_ids, image_keys, skipped.
  """
  root, endings, noun = Path(folder), FILES[modality], _NOUNS[modality]
  if not root.is_dir():
    raise UserError(f"{folder} is no folder. Give a folder of {noun}")
  everything, closed = files_below(root)
  names = [p.relative_to(root).as_posix() for p in everything if p.suffix.lower() in endings]
  for place, why in closed:
    log(f"skipped {place}: {why}")
  if not names:
    raise UserError(f"{folder} has no {noun} ({' '.join(endings)})")
  index = _embed_media(predictor, modality, names, lambda name: _from_file(root, name), log)[0]
  folders = np.array([place.relative_to(root).as_posix() for place, _ in closed], str)
  return {**index, "skipped": np.concatenate([index["skipped"], folders])}


def embed_texts(predictor: Predictor, texts: Sequence[str]) -> Index:
  """Texts without pictures: text_embeddings, texts, text_keys, text_owners (-1)."""
  return dict(
    text_embeddings=predictor.encode_text(texts),
    texts=np.array(texts, str),
    text_keys=_text_keys(texts),
    text_owners=np.full(len(texts), -1, np.int64),
  )


def embed_source(
  predictor: Predictor,
  source: str,
  split: str,
  languages: Sequence[str] = (),
  log: Callable[[str], None] = printing.log,
  modality: str | None = None,
) -> Index:
  """One modality of a data set and, where the model reads texts, its captions: every array of the
  module's docstring.

  A split may be several: "train+validation". languages: of the captions; () = those that the model
  was trained on, where it was on this data set. modality: None = the first of the model's that one
  of the first records has.
  """
  languages = tuple(languages) or languages_of(predictor.config, source)
  opened = open_source(
    dict(name=source, split=split, languages=languages, path=""), predictor.config
  )
  captions: dict[int, list[str]] = {}
  modality = modality or _modality_of(opened, list(predictor.media))

  def read(i: int) -> tuple[str, bytes | np.ndarray | None, int]:
    record = opened[i]
    captions[i] = [text for texts in record["captions"].values() for text in texts]
    content = record.get(modality)
    return record["id"], content, 0 if content is None else content_key(record, modality)

  index, kept = _embed_media(predictor, modality, range(len(opened)), read, log)
  if "text" not in predictor.modalities:
    return index
  owners = np.array([row for row, i in enumerate(kept) for _ in captions[i]], np.int64)
  return {
    **index,
    **embed_texts(predictor, [text for i in kept for text in captions[i]]),
    "text_owners": owners,
  }


def save(out: Path, predictor: Predictor, index: Index) -> None:
  """Writes an index as .npz, whole or not at all."""
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      arrays: dict[str, Any] = {
        **index,
        "scale": np.float32(predictor.scale),
        "bias": np.float32(predictor.bias),
        "model": np.array(predictor.fingerprint),
      }
      np.savez(file, **arrays)
    os.replace(temporary, out)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise UserError(
      f"{out}: cannot be written ({error.strerror or error}). Free space or give another place"
    ) from error


def load_index(path: str | os.PathLike, predictor: Predictor | None = None) -> Index:
  """Reads what `save` wrote; nothing is unpickled. With a predictor, refuses the index of another
  model. Raises UserError.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      index = {name: file[name] for name in file.files}
  except FileNotFoundError as error:
    raise UserError(
      f"{path}: no such index. Make it with `mmjax embed --images FOLDER --out {path}`"
    ) from error
  except Exception as error:  # zipfile and NumPy raise many kinds for damaged files
    raise UserError(f"{path}: not an index of `mmjax embed`, or damaged. Make it again") from error
  if predictor is not None and (
    "model" not in index or str(index["model"]) != predictor.fingerprint
  ):
    raise UserError(
      f"{path}: embedded by another model than this checkpoint. Make it again with `mmjax embed`"
    )
  return index


def read_lines(path: str | os.PathLike) -> list[str]:
  """The lines of a UTF-8 text file that are not blank. Raises UserError."""
  try:
    lines = [line.strip() for line in read_file(path).decode("utf-8").splitlines()]
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8, one text a line"
    ) from error
  lines = [line for line in lines if line]
  if not lines:
    raise UserError(f"{path}: no text in it. Write one text a line")
  return lines


def _embed_media(
  predictor: Predictor, modality: str, items: Sequence, read: Callable, log: Callable[[str], None]
) -> tuple[Index, list]:
  """`read(item)` -> (name, content, key). Returns the arrays of an index for one modality, and the
  items that could be read.
  """
  if modality not in predictor.media:
    raise UserError(
      f"this checkpoint has no encoder for {modality}; it has "
      f"{', '.join(sorted(predictor.modalities))}"
    )
  names, keys, kept, skipped = [], [], [], []

  def attempt(item):
    name = str(item)
    try:
      name, data, key = read(item)
      if data is None:
        raise Unreadable(f"{name}: has no {WORDS[modality]}")
      return item, name, key, predictor.media[modality](data, name)
    except UserError as error:
      return item, name, error, None

  def readable():
    for item, name, key, example in in_threads(attempt, items):
      if example is None:
        skipped.append(name)
        log(f"skipped {key}")
        continue
      names.append(name)
      keys.append(key)
      kept.append(item)
      yield example

  vectors = predictor.encode(modality, readable())
  if not names:
    raise UserError(
      f"none of the {len(skipped)} {_NOUNS[modality]} could be read; the first: "
      f"{skipped[0] if skipped else 'there is none'}"
    )
  return {
    f"{modality}_embeddings": vectors,
    f"{modality}_ids": np.array(names, str),
    f"{modality}_keys": np.array(keys, np.uint64),
    "skipped": np.array(skipped, str),
  }, kept


def _modality_of(source, modalities: Sequence[str]) -> str:
  """The first of `modalities`, in the order of _NOUNS, that one of the first records of a source
  has.
  """
  order = [name for name in _NOUNS if name in modalities]
  for i in range(min(100, len(source))):
    try:
      record = source[i]
    except UserError:
      continue
    for name in order:
      if record.get(name) is not None:
        return name
  return order[0] if order else "image"


def _option(modality: str) -> str:
  return "images" if modality == "image" else modality


def _from_file(root: Path, name: str) -> tuple[str, bytes, int]:
  try:
    data = read_file(root / name)
  except OSError as error:
    raise Unreadable(f"{name}: cannot be opened ({error.strerror or error})") from error
  return name, data, bytes_key(data)


def _text_keys(texts: Sequence[str]) -> np.ndarray:
  return np.array([high << 32 | low for high, low in map(text_key, texts)], np.uint64)


def _check_writable(out: Path) -> None:
  """Refuses, before any work, a place where `out` cannot go."""
  if os.path.isdir(out):
    raise UserError(f"{out} is a folder. Give a file name, such as {out / 'index.npz'}")
  if not os.path.isdir(out.parent):
    raise UserError(f"{out.parent} is no folder. Make it, or give another place for {out.name}")
  if os.path.exists(out) and not os.path.isfile(out):
    raise UserError(f"{out} is no file. Give another place for the embeddings")
