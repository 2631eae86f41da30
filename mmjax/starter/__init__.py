"""`mmjax init`: a config that fits, written from what a data set holds, what this machine has, and
what a checkpoint was trained with.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax import config as configs
from mmjax import files, printing
from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer
from mmjax.starter import origin, rows, sizes, tasks, tokens
from mmjax.starter.machine import Machine, this_machine
from mmjax.starter.origin import Origin
from mmjax.starter.parts import PARTS, Part
from mmjax.starter.survey import Survey, survey
from mmjax.starter.tasks import FOLD, LOWER_IS_BETTER, TASKS, Ask, Task
from mmjax.starter.text import Draft

EVALUATORS = 4  # splits at most that are evaluated


def init(
  task: str,
  source: str,
  out: str | os.PathLike,
  *,
  split: str = "",
  modalities: Sequence[str] = (),
  languages: Sequence[str] = (),
  start: str = "",
  tokenizer: str = "",
  hf: str = "",
  force: bool = False,
  data_dir: str = "",
  machine: Machine | None = None,
  log: Callable[[str], None] = printing.log,
) -> Path:
  """Writes the config file `out` that trains `task` (a name of TASKS) on data set `source`, and
  trains a tokenizer where it needs one.

  split: to train on; "" = train. modalities: to read; () = all that there are. languages: of the
  captions; () = all. start: a run, step or import folder, or one of Hugging Face, to start from.
  tokenizer: the name of one that is there already. hf: a family of transformers (of
  tasks.FAMILIES) that shall be able to express the model, or "usual". force: replace `out`.
  machine: None = this one.
  Raises UserError: the data set lacks what the task needs, or `out` exists.
  """
  out = Path(out)
  if out.exists() and not force:
    raise UserError(f"{out}: exists. Choose another --out, or replace it with --force")
  if out.suffix != ".py":
    raise UserError(f"{out}: a config is a Python file: end its name in .py")
  files.check_output(out)
  found = survey(source, split, data_dir)
  machine = machine or this_machine()
  begin = origin.open_origin(start, out, log) if start else None
  chosen = _modalities(task, found, modalities, begin)
  family = tasks.family(task, chosen, hf) if hf else ""
  size = begin.sizes if begin else sizes.model(found.rows, machine)
  parts = _parts(task, found, machine, size, [m for m in chosen if m != "text"], family)
  encoders = {name: begin.encoder(name) if begin else None for name in parts}
  ask = Ask(
    found,
    machine,
    size,
    chosen,
    {name: encoders[name] or part.encoder() for name, part in parts.items()},
    family,
  )
  made = TASKS[task](ask)
  if begin:
    made = begin.adopt(made)
  spoken = _languages(found, made, languages)
  name = tokens.find(found, made, spoken, tokenizer, begin, log) if made.text else None
  draft = Draft()
  if data_dir:
    draft.set("data.dir", data_dir)
  _write_settings(draft, found, made, parts, machine, begin, name, spoken, bool(hf))
  if hf:
    _check_export(draft, name[1] if name else None)
  command = _command(
    ("init", task),
    source=source,
    out=out.name,
    split=split,
    modality=",".join(modalities),
    languages=",".join(languages),
    start=start,
    tokenizer=tokenizer,
    hf=hf,
    data_dir=data_dir,
  )
  docstring = _docstring(task, source, out, command, machine)
  text = draft.file(docstring)
  with files.disk_errors(out.parent, f"{out} cannot be written"):
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(out, text)
  config = configs.load(str(out))  # what was written is a config, or this says what is not
  if begin and begin.add_map(draft, config):
    files.write_whole(out, draft.file(docstring))
    configs.load(str(out))
  log(f"wrote {out}: {task} on {found.name} ({found.rows:,} rows), for {machine}")
  if not found.held_out:
    log(
      f"warning: {source} has no split besides {found.train}, so that the scores of this run are "
      f"those of rows that it learned. Convert it with --split train:80,validation:10,test:10"
    )
  log(f"mmjax train --config {shlex.quote(str(out))} --workdir runs/{out.stem}")
  return out


def _modalities(
  task: str, found: Survey, wanted: Sequence[str], begin: Origin | None
) -> tuple[str, ...]:
  """The modalities that a model of this task reads."""
  media, texts = list(found.media), bool(found.languages)
  said = texts or found.questions or found.conversations
  given = [*media, *(["text"] if said else [])]
  for name in wanted:
    if name not in given:
      raise UserError(
        f"--modality {name}: data set {found.name!r} has {', '.join(given) or 'nothing'}"
      )
  if wanted:
    chosen = list(wanted)
  elif task == "retrieval":
    chosen = [*media, *(["text"] if texts else [])]
  elif task in ("captioning", "speech-recognition"):
    chosen = ["audio"] if task == "speech-recognition" and "audio" in media else media
  else:
    chosen = media or (["text"] if texts else [])
    if begin and (known := [name for name in chosen if begin.encoder(name)]):
      chosen = known
  if task == "question-answering" and "text" not in chosen:
    chosen.append("text")
  if task == "dialogue":
    chosen = [name for name in chosen if name != "text"]
  return tuple(dict.fromkeys(chosen))


def _parts(
  task: str, found: Survey, machine: Machine, size: sizes.Model, media: Sequence[str], family: str
) -> dict[str, Part]:
  """{medium: its part of the config}."""
  more: dict[str, dict[str, Any]] = dict(
    image=dict(family=family, fold=FOLD if task == "dialogue" else 1),
    audio=dict(speech=bool(found.languages), plain=family == "whisper"),
  )
  parts: dict[str, Part] = {}
  for name in media:
    if not len(found.media_values(name, next(iter(_FIRST[name])))):
      raise UserError(f"data set {found.name!r}: no {name} of split {found.train} can be read")
    parts[name] = PARTS[name](found, machine, size, **more.get(name, {}))
  return parts


_FIRST = {"image": ("height",), "audio": ("seconds",), "video": ("seconds",), "series": ("length",)}


def _languages(found: Survey, made: Task, wanted: Sequence[str]) -> tuple[str, ...]:
  """The languages of the captions that are read; () where texts are none, or questions."""
  if made.text != "caption":
    return ()
  for language in wanted:
    if language not in found.languages:
      raise UserError(
        f"--languages {language}: data set {found.name!r} has {', '.join(found.languages)}"
      )
  return tuple(wanted) or found.languages


def _write_settings(
  draft: Draft,
  found: Survey,
  made: Task,
  parts: Mapping[str, Part],
  machine: Machine,
  begin: Origin | None,
  tokenizer: tuple[str, Tokenizer] | None,
  languages: tuple[str, ...],
  hf: bool,
) -> None:
  """Writes the settings of the config, in the order in which those of configs/ stand."""
  measured = (
    found.with_tokenizer(tokenizer[1], tokens.lowercase(made, begin)) if tokenizer else found
  )
  before, several, places = len(draft.lines), 1.0, 0
  _source(draft, measured, made, parts, machine, languages)
  for name, part in parts.items():
    if begin and begin.data(draft, name):
      continue
    part.data(draft)
  if tokenizer:
    tokens.write(draft, measured, made, tokenizer, begin)
    if made.text == "conversation":
      several, places = rows.write(draft, found, made, parts, machine, begin, tokenizer[1])
  first = Draft()
  _length_of_run(first, measured, made, parts, machine, begin, several, places)
  draft.lines[before:before] = first.lines
  if made.label != "none":
    draft.set("data.label", made.label)
    draft.set("data.classes", made.classes, _classes(measured, made))
  if made.values:
    names = ", ".join(found.measured.value_names)
    draft.set("data.values", made.values, f"standardised by those of {found.train}: {names}")
  draft.gap()
  draft.set("model", made.model)
  if not machine.accelerated:
    draft.set("precision.compute", "float32", "bfloat16 is for accelerators")
  if hf:
    draft.set("export.hf", True, "refuses a model that transformers cannot express")
  for name, entry in made.objectives.items():
    draft.set(f"objectives.{name}", entry)
  draft.set("optimizer", _optimizer(made, begin))
  draft.set("schedule", dict(name="cosine", warmup="10%", final=0.01))
  if begin:
    begin.start(draft)
  draft.gap()
  _evaluators(draft, found, made, languages)


def _length_of_run(
  draft: Draft,
  found: Survey,
  made: Task,
  parts: Mapping[str, Part],
  machine: Machine,
  begin: Origin | None,
  several: float,
  places: int,
) -> None:
  """several: how many rows of the data share a row of a batch. places: tokens of one, of a language
  model; else 0.
  """
  media = tuple(parts)
  size = sizes.model(found.rows, machine) if begin is None else begin.sizes
  each = sum(sizes.activation_bytes(part.tokens, size, size.depth) for part in parts.values())
  each += sizes.activation_bytes(64, size, size.text) if made.text else 0
  batch = sizes.batch_size(found.rows, made.batch, each, machine)
  work = max((part.work for part in parts.values()), default=1.0)
  work *= (size.width / 128) ** 2 * max(1, size.depth / 2) if not machine.accelerated else 1
  if places:
    media, work = ("text",), sizes.work_of_tokens(places) * (size.width / 128) ** 2
  count = round(found.rows / several)
  steps = sizes.steps(count, batch, media or ("text",), work, machine)
  if begin:  # what is learned already takes less
    steps = max(min(steps, 100), steps // 3)
  epochs = steps * batch * several / max(1, found.rows)
  draft.set("train.steps", steps, f"{epochs:.3g} epochs of {found.rows:,} rows")
  shared = f"rows, of some {several:.2g} conversations each" if several > 1 else ""
  draft.set("train.batch_size", batch, shared)


def _source(
  draft: Draft,
  found: Survey,
  made: Task,
  parts: Mapping[str, Part],
  machine: Machine,
  languages: tuple[str, ...],
) -> None:
  entry: dict[str, Any] = dict(name=found.name)
  if found.train != "train":
    entry["split"] = found.train
  if made.text in ("question", "conversation"):
    entry["text"] = made.text
  elif languages and set(languages) != set(found.languages):
    entry["languages"] = languages
  if sizes.may_cache(found, machine):
    entry["cache"] = True
  draft.set(f"data.sources.{found.name}", entry)
  read = tuple(parts) + (("text",) if made.text else ())
  if made.model["name"] == "captioner":
    draft.set("data.modalities", read)
  shares = {name: share for name, share in found.media.items() if name in parts and share < 1}
  if shares and len(read) > 1 and "fusion" in made.model:
    lacking = ", ".join(
      f"{1 - share:.0%} of the rows have no {name}" for name, share in shares.items()
    )
    draft.set("data.missing", "mask", lacking)


def _classes(found: Survey, made: Task) -> str:
  if made.label == "answer":
    return "answers"
  labels = found.measured.labels
  most = max(labels.values(), default=0)
  return f"the commonest has {most / max(1, sum(labels.values())):.0%} of the labels"


def _optimizer(made: Task, begin: Origin | None) -> dict[str, Any]:
  if not begin:
    return dict(made.optimizer)
  return begin.optimizer(made)


def _evaluators(draft: Draft, found: Survey, made: Task, languages: tuple[str, ...]) -> None:
  splits = found.held_out[:EVALUATORS] or (found.train,)
  entry = dict(kind=made.evaluator["kind"], source=found.name)
  if not found.held_out:
    draft.note("There is no other split: these are scores of rows that it learned.")
  for split in splits:
    rest = {key: value for key, value in made.evaluator.items() if key != "kind"}
    draft.set(f"evaluation.evaluators[{made.name}/{split}]", dict(entry, split=split, **rest))
  draft.set("evaluation.every", "20%")
  if splits[0].startswith(("val", "dev")):
    draft.set("checkpoint.best", f"{made.name}/{splits[0]}/{made.best}", "kept besides the last")
    if made.best in LOWER_IS_BETTER:
      draft.set("checkpoint.best_mode", "min")


def _check_export(draft: Draft, tokenizer: Tokenizer | None) -> None:
  """Raises UserError: transformers cannot express the model, such as one of a checkpoint."""
  from mmjax.interop.huggingface import check_export

  assets = tokenizer.to_assets() if tokenizer else {}
  try:
    check_export(configs.resolve(draft.config()), assets)
  except UserError as error:
    raise UserError(f"--hf: {error}") from error


def _command(words: Sequence[str], *, start: str, hf: str, **options: str) -> str:
  """The command line that asks for this config."""
  words = ["mmjax", *words]
  for name, value in (options | {"from": start}).items():
    if value:
      words += [f"--{name.replace('_', '-')}", value]
  if hf:
    words += ["--hf", *([hf] if hf != tasks.USUAL else [])]
  return shlex.join(words)


def _docstring(task: str, source: str, out: Path, command: str, machine: Machine) -> str:
  return (
    f"{task.capitalize()} on {source}, written by\n\n"
    f"{command}\n\n"
    f"for {machine}. `mmjax config show {out.name} --docs` says what each setting means.\n\n"
    f"mmjax train --config {out.name} --workdir runs/{out.stem}"
  )
