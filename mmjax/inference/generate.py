"""`mmjax generate`: what a model with a decoder or a CTC head writes about files: captions of
pictures and clips, transcripts of speech.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmjax import printing
from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.files import files_below
from mmjax.inference.inputs import Item
from mmjax.inference.predictor import Predictor
from mmjax.inference.programs import in_threads
from mmjax.inference.transcribe import Segment


def generate(
  checkpoint: str | os.PathLike | Predictor,
  files: Sequence[str | os.PathLike],
  *,
  beams: int = 1,
  max_length: int = 0,
  length_penalty: float = 1.0,
  timestamps: bool = False,
  prompt: str | None = None,
  stop: Sequence[str] = (),
  seed: int = 0,
  temperature: float | None = None,
  top_k: int | None = None,
  top_p: float | None = None,
  cache: str = "float",
  allow_code: Sequence[str] = (),
  log: Callable[[str], None] = lambda line: printing.log(line, sys.stderr),
) -> list[tuple[str, str]] | list[tuple[str, list[Segment]]]:
  """[(file, text)] in the order of `files`; a folder stands for the media files in it, sorted.
  timestamps: [(file, segments)] of sounds, by a model that knows times; see `Predictor.generate`,
  also for sounds longer than the model reads.

  Of a language model: what it goes on with after `prompt` about each file, or after the prompt
  alone where `files` is empty ([("", text)]); stop, seed, temperature, top_k, top_p: see
  `Predictor.generate`; cache: see `Predictor.load`.

  Files that cannot be read are named by `log`, skipped and counted. Raises UserError: the model
  writes no text or does not take such files, a file that is none of picture, sound and video, or
  nothing could be read.
  """
  predictor = (
    checkpoint
    if isinstance(checkpoint, Predictor)
    else Predictor.load(checkpoint, allow_code=allow_code, cache=cache)
  )
  if not predictor.writes:
    predictor.generate()  # says why not
  how: dict[str, Any] = dict(beams=beams, max_length=max_length, length_penalty=length_penalty)
  if predictor.language is not None:
    how |= dict(stop=stop, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    if not files:
      if prompt is None:
        raise UserError("give a language model files, or a prompt with --prompt")
      texts_alone: Any = predictor.generate([prompt], **how)
      return [("", text) for text in texts_alone]
  elif prompt is not None or temperature or stop:
    raise UserError(
      "--prompt, --stop and --temperature are for language models; this checkpoint writes the "
      "likeliest text about files"
    )
  elif not files:
    raise UserError("give files, or folders of them")
  names = [name for file in files for name in _expand(file, predictor, log)]
  modalities: list[str] = []
  for name in names:
    modality = modality_of(name)
    if modality is None or modality not in predictor.media:
      what = f"a file of {modality}" if modality else "no picture, sound or video by its ending"
      raise UserError(
        f"{name} is {what}, but this checkpoint writes about {', '.join(sorted(predictor.media))}"
      )
    modalities.append(modality)

  def read(index: int) -> Item | UserError:
    media = predictor.media[modalities[index]]
    try:
      return (media.sound if modalities[index] == "audio" else media)(names[index])
    except UserError as error:
      return error

  items: dict[int, Item] = {}
  errors: list[UserError] = []
  for index, item in enumerate(in_threads(read, range(len(names)))):
    if isinstance(item, UserError):
      errors.append(item)
      log(f"skipped {item}")
    else:
      items[index] = item
  texts: dict[int, Any] = {}
  for modality in sorted(set(modalities)):
    indices = [index for index in items if modalities[index] == modality]
    if indices:
      media: dict[str, Any] = {modality: [items[index] for index in indices]}
      prompts = None if prompt is None else [prompt] * len(indices)
      written = predictor.generate(prompts, timestamps=timestamps, **how, **media)
      texts.update(zip(indices, written, strict=True))
  if not texts:
    raise UserError(f"none of the {len(names)} files could be read; the first: {errors[0]}")
  if errors:
    log(f"{len(texts)} of {len(names)} files read, {len(errors)} skipped")
  return [(names[index], texts[index]) for index in sorted(texts)]


def _expand(file: str | os.PathLike, predictor: Predictor, log: Callable[[str], None]) -> list[str]:
  """The file itself, or the files in a folder that the model takes. Raises UserError: a folder
  without any.
  """
  path = Path(file)
  if not path.is_dir():
    return [os.fspath(file)]
  everything, closed = files_below(path)
  for place, why in closed:
    log(f"skipped {place}: {why}")
  found = [str(p) for p in everything if modality_of(p) in predictor.media]
  if not found:
    raise UserError(f"{file} has no files of {', '.join(sorted(predictor.media))} in it")
  return found
