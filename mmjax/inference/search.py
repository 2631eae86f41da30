"""`mmjax embed` and `mmjax search`: embeddings of a folder, a text file or a data set in one .npz, and looking things
up in it.

The .npz loads with `allow_pickle=False`. Its arrays, each there when it was asked for:
  image_embeddings float32 [N, D], image_ids str [N], image_keys uint64 [N] (equal = identical picture)
  text_embeddings float32 [T, D], texts str [T], text_keys uint64 [T] (equal = same caption), text_owners int64 [T]
  (row of the caption's picture, -1 = none) skipped str [M] (what could not be read), scale, bias float32, model str (a
  hash of the parameters)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmjax.config import UserError
from mmjax.data.image import Unreadable
from mmjax.data.sources import open_source
from mmjax.data.text import text_key
from mmjax.inference.predictor import Predictor, in_threads

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
Index = dict[str, np.ndarray]


def embed(
  checkpoint: str | os.PathLike | Predictor,
  out: str | os.PathLike,
  *,
  images: str | None = None,
  texts: str | None = None,
  source: str | None = None,
  split: str = "train",
  languages: Sequence[str] = (),
  log: Callable[[str], None] = print,
) -> Path:
  """Embeds a folder of pictures (`images`), the lines of a text file (`texts`), or a split of a data set (`source`),
  and writes `out`.

  Unreadable pictures are named, skipped and counted. Raises UserError: nothing to embed, or `out` cannot be written.
  """
  out = Path(out)
  if source and (images or texts) or not (source or images or texts):
    raise UserError(
      "embed takes --images and --texts, or --source alone: give a folder of pictures, a text file or a data set"
    )
  _check_writable(out)
  predictor = checkpoint if isinstance(checkpoint, Predictor) else Predictor.load(checkpoint)
  index: Index = {"skipped": np.array([], str)}
  if images:
    index.update(embed_folder(predictor, images, log))
  if texts:
    index.update(embed_texts(predictor, read_lines(texts)))
  if source:
    index.update(embed_source(predictor, source, split, languages, log))
  save(out, predictor, index)
  counts = [
    f"{len(index[name])} {words}" for name, words in (("image_ids", "pictures"), ("texts", "texts")) if name in index
  ]
  log(f"wrote {out}: {', '.join(counts)}, {predictor.width} channels; {len(index['skipped'])} skipped")
  return out


def search(
  checkpoint: str | os.PathLike | Predictor,
  query,
  *,
  images: str | os.PathLike | None = None,
  index: str | os.PathLike | Index | None = None,
  k: int = 5,
  log: Callable[[str], None] = print,
) -> list[tuple[str, float]]:
  """The `k` pictures nearest to `query` as (name, cosine), best first; ties by name.

  query: words, a path of a picture, or a picture (bytes, PIL, uint8 array). images: a folder to search; index: what
  `embed` wrote. Raises UserError: neither or both are given, the index is of another model, or the query cannot be
  read.
  """
  if (images is None) == (index is None):
    raise UserError("search takes --images (a folder) or --index (a file that `mmjax embed` wrote), one of them")
  if k < 1:
    raise UserError(f"-k is {k}, but must be at least 1")
  predictor = checkpoint if isinstance(checkpoint, Predictor) else Predictor.load(checkpoint)
  if images is not None:
    index = embed_folder(predictor, images, log)
  elif not isinstance(index, dict):
    index = load_index(index, predictor)
  if "image_embeddings" not in index:
    raise UserError("the index has no pictures. Make one with `mmjax embed --images FOLDER` or `--source NAME`")
  picture = not isinstance(query, str) or (query.lower().endswith(PICTURES) and os.path.isfile(query))
  vector = (predictor.encode_image([query]) if picture else predictor.encode_text([query]))[0]
  scores = index["image_embeddings"] @ vector
  best = np.lexsort((index["image_ids"], -scores))[:k]
  return [(str(index["image_ids"][i]), float(scores[i])) for i in best]


def embed_folder(predictor: Predictor, folder: str | os.PathLike, log: Callable[[str], None] = print) -> Index:
  """The pictures in a folder and its sub-folders, in the order of their names: image_embeddings, image_ids,
  image_keys, skipped.
  """
  root = Path(folder)
  if not root.is_dir():
    raise UserError(f"{folder} is no folder. Give a folder of pictures")
  names = sorted(
    path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()
  )
  if not names:
    raise UserError(f"{folder} has no pictures ({' '.join(PICTURES)})")
  return _embed_pictures(predictor, names, lambda name: _from_file(root, name), log)[0]


def embed_texts(predictor: Predictor, texts: Sequence[str]) -> Index:
  """Texts without pictures: text_embeddings, texts, text_keys, text_owners (-1)."""
  return dict(
    text_embeddings=predictor.encode_text(texts),
    texts=np.array(texts, str),
    text_keys=_text_keys(texts),
    text_owners=np.full(len(texts), -1, np.int64),
  )


def embed_source(
  predictor: Predictor, source: str, split: str, languages: Sequence[str] = (), log: Callable[[str], None] = print
) -> Index:
  """Pictures and captions of a data set, every array of the module's docstring. A split may be several:
  "train+validation".
  """
  opened = open_source(dict(name=source, split=split, languages=tuple(languages), path=""), predictor.config)
  captions: dict[int, list[str]] = {}

  def read(i: int) -> tuple[str, bytes | None, int]:
    record = opened[i]
    captions[i] = [text for texts in record["captions"].values() for text in texts]
    return record["id"], record["image"], record["image_key"]

  index, kept = _embed_pictures(predictor, range(len(opened)), read, log)
  owners = np.array([row for row, i in enumerate(kept) for _ in captions[i]], np.int64)
  return {**index, **embed_texts(predictor, [text for i in kept for text in captions[i]]), "text_owners": owners}


def save(out: Path, predictor: Predictor, index: Index) -> None:
  """Writes an index as .npz, whole or not at all."""
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      np.savez(
        file,
        **index,
        scale=np.float32(predictor.scale),
        bias=np.float32(predictor.bias),
        model=np.array(predictor.fingerprint),
      )
    os.replace(temporary, out)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise UserError(
      f"{out}: cannot be written ({error.strerror or error}). Free space or give another place"
    ) from error


def load_index(path: str | os.PathLike, predictor: Predictor | None = None) -> Index:
  """Reads what `save` wrote; nothing is unpickled. With a predictor, refuses the index of another model. Raises
  UserError.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      index = {name: file[name] for name in file.files}
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such index. Make it with `mmjax embed --images FOLDER --out {path}`") from error
  except Exception as error:  # zipfile and NumPy raise many kinds for damaged files
    raise UserError(f"{path}: not an index of `mmjax embed`, or damaged. Make it again") from error
  if predictor is not None and ("model" not in index or str(index["model"]) != predictor.fingerprint):
    raise UserError(f"{path}: embedded by another model than this checkpoint. Make it again with `mmjax embed`")
  return index


def read_lines(path: str | os.PathLike) -> list[str]:
  """The lines of a UTF-8 text file that are not blank. Raises UserError."""
  try:
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8, one text a line") from error
  lines = [line for line in lines if line]
  if not lines:
    raise UserError(f"{path}: no text in it. Write one text a line")
  return lines


def _embed_pictures(
  predictor: Predictor, items: Sequence, read: Callable, log: Callable[[str], None]
) -> tuple[Index, list]:
  """`read(item)` -> (name, encoded bytes, key). Returns the picture arrays of an index, and the items that could be
  read.
  """
  names, keys, kept, skipped = [], [], [], []

  def attempt(item):
    name = str(item)
    try:
      name, data, key = read(item)
      if data is None:
        raise Unreadable(f"{name}: has no picture")
      return item, name, key, predictor.pixels(data, name)
    except UserError as error:
      return item, name, error, None

  def pixels():
    for item, name, key, picture in in_threads(attempt, items):
      if picture is None:
        skipped.append(name)
        log(f"skipped {key}")
        continue
      names.append(name)
      keys.append(key)
      kept.append(item)
      yield picture

  vectors = predictor.encode_pixels(pixels())
  if not names:
    raise UserError(
      f"none of the {len(skipped)} pictures could be read; the first: {skipped[0] if skipped else 'there is none'}"
    )
  return dict(
    image_embeddings=vectors,
    image_ids=np.array(names, str),
    image_keys=np.array(keys, np.uint64),
    skipped=np.array(skipped, str),
  ), kept


def _from_file(root: Path, name: str) -> tuple[str, bytes, int]:
  try:
    data = (root / name).read_bytes()
  except OSError as error:
    raise Unreadable(f"{name}: cannot be opened ({error.strerror or error})") from error
  return name, data, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _text_keys(texts: Sequence[str]) -> np.ndarray:
  return np.array([high << 32 | low for high, low in map(text_key, texts)], np.uint64)


def _check_writable(out: Path) -> None:
  """Refuses, before any work, a place where `out` cannot go."""
  if out.is_dir():
    raise UserError(f"{out} is a folder. Give a file name, such as {out / 'index.npz'}")
  if not out.parent.is_dir():
    raise UserError(f"{out.parent} is no folder. Make it, or give another place for {out.name}")
  if not os.access(out.parent, os.W_OK):
    raise UserError(f"{out.parent} cannot be written. Give another place for {out.name}")
