"""The `mmjax` command: each sub-command parses its arguments and calls one function; heavy imports
stay inside.

Exit codes: 0 done, 75 stopped early with a checkpoint saved (start again to go on), 1 failed, 2 bad
usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.ranges import (
  Count,
  Examples,
  Exponent,
  Few,
  NonNegative,
  Portion,
  Positive,
  Seed,
  Size,
  Vocabulary,
)

EXIT_FAILED, EXIT_USAGE = 1, 2
_MEDIA = ("image", "audio", "video", "series")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; mistakes of the user end in one line on stderr (`--debug` shows the
  traceback).
  """
  try:
    return _main(argv)
  except _Failure as failure:
    _complain(failure.why)
    if argv is None:
      _end_peers(failure)
    return failure.code


class _Failure(Exception):
  """Ends a command with an exit code and one line on stderr."""

  def __init__(self, code: int, why: object):
    super().__init__(str(why))
    self.code, self.why = code, why


def _end_peers(failure: _Failure) -> None:
  """Ends this process, if it is one of several of a run, in such a way that the others end too."""
  from mmjax.parallel.environment import may_have_peers

  if sys.argv[1:2] in (["train"], ["eval"]) and may_have_peers(os.environ):
    from mmjax.config import ConfigError, UserError
    from mmjax.parallel import multihost

    kind = ConfigError if failure.code == EXIT_USAGE else UserError
    multihost.tell(kind(str(failure)))
    multihost.leave(failure.code)


def _main(argv: Sequence[str] | None) -> int:
  arguments = list(sys.argv[1:] if argv is None else argv)
  try:
    os.getcwd()
  except FileNotFoundError:
    raise _Failure(EXIT_USAGE, "the current folder is gone. Change to one that is there") from None
  parser = _parser()
  options, rest = parser.parse_known_args(arguments)
  options.overrides = [word for word in rest if word.startswith("--config.")]
  strays = [word for word in rest if not word.startswith("--config.")]
  if strays or (options.overrides and not getattr(options, "takes_overrides", False)):
    words = strays or options.overrides
    options.parser.error(
      f"unknown argument {words[0]!r}"
      + (
        "; write overrides as --config.KEY=VALUE"
        if getattr(options, "takes_overrides", False)
        else ""
      )
    )
  if argv is None and options.command == "train":
    _use_huge_pages()
  from mmjax.config import ConfigError, UserError

  try:
    return options.run(options) or 0
  except UserError as error:
    if options.debug:
      raise
    raise _Failure(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED, error) from error
  except KeyboardInterrupt as error:
    raise _Failure(EXIT_FAILED, "interrupted") from error
  except SystemExit as error:  # of a kind's own code: a launcher would take 0 for done
    why = f"code of this run called sys.exit({error.code!r:.80})"
    raise _Failure(EXIT_FAILED, why) from error
  except BrokenPipeError as error:
    sys.stderr.close()
    raise _Failure(EXIT_FAILED, "nobody reads what it prints") from error
  except Exception as error:
    if options.debug:
      raise
    why = f"{type(error).__name__}: {error!s:.600} (--debug shows where)"
    if isinstance(error, OSError) and error.filename:  # the disk said no; Python knows where
      why = f"{error.filename!s:.300}: {error.strerror}"
    raise _Failure(EXIT_FAILED, why) from error


def _complain(what: object) -> None:
  """One line on stderr, whatever names and texts it holds; none where nobody reads."""
  if sys.stderr.closed:
    return
  from mmjax.printing import printable

  line = " ".join(printable(what, keep="\n\t").split())
  print(f"mmjax: {line if len(line) < 2000 else line[:2000] + ' ...'}", file=sys.stderr)


def _use_huge_pages() -> None:
  """Starts this process again with huge pages for malloc: XLA's CPU steps then run about a quarter
  faster on Linux.

  XLA maps its temporary buffer anew for every step, and with 4 KiB pages the faults cost as much as
  the arithmetic saves.
  glibc reads this setting only when a process starts; the process id stays the same.
  """
  if sys.platform.startswith("linux") and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# -- Commands --------------------------------------------------------------------------------------


def _init(options) -> None:
  from mmjax import starter

  starter.init(
    options.task,
    options.source,
    options.out,
    split=options.split,
    modalities=_words(options.modality),
    languages=_words(options.languages),
    start=options.start,
    tokenizer=options.tokenizer,
    hf=options.hf,
    force=options.force,
    data_dir=options.data_dir,
  )


def _words(text: str) -> tuple[str, ...]:
  """The words of "a,b"."""
  return tuple(word.strip() for word in text.split(",") if word.strip())


def _train(options) -> int:
  from mmjax import config

  resolved = config.load(options.config, options.overrides, options.allow_code)

  if options.find_lr:
    from mmjax.training import find_lr

    find_lr.find_lr(resolved, options.workdir)
    return 0

  from mmjax.training import loop

  return loop.train(
    resolved,
    options.workdir,
    allow_change=options.allow_change,
    profile=options.profile,
    estimate=_estimate,
  )


def _estimate(*step):
  from mmjax import plan

  return plan.estimate(*step)


def _eval(options) -> int:
  from mmjax.training import evaluate

  table = evaluate.evaluate(
    options.checkpoint,
    config_file=options.config,
    overrides=options.overrides,
    suite=options.suite,
    out=options.out,
    allow_code=options.allow_code,
    judge_prompts=options.judge_prompts,
    judge_model=options.judge_model,
    judge_scores=options.judge_scores,
  )
  if options.json:
    print(json.dumps(table, indent=2))
  return 0


def _plan(options) -> int:
  from mmjax.plan import report

  return report.command(
    options.config,
    options.overrides,
    options.topology,
    sweep_all=options.sweep or bool(options.apply),
    apply=options.apply,
    as_json=options.json,
    dump_hlo=options.dump_hlo,
    out=options.out,
    no_cache=options.no_cache,
    allow_code=options.allow_code,
  )


def _data_build(options) -> None:
  from mmjax.data import builders

  builders.build(options.name, options.data_dir)


def _data_convert(options) -> None:
  from mmjax import printing
  from mmjax.data.builders import convert

  log = (lambda line: printing.log(line, sys.stderr)) if options.json else printing.log
  columns = _columns(options)
  summary = convert.convert(
    options.format,
    options.source,
    options.name,
    options.data_dir,
    workers=options.workers,
    split=options.split,
    language=options.language,
    columns=columns,
    media=options.media,
    root=options.root,
    encoding=options.encoding,
    separator=options.separator,
    classes=[name.strip() for name in options.classes.split(",")] if options.classes else (),
    log=log,
  )
  if options.json:
    print(json.dumps(summary.to_dict(), indent=2))


def _columns(options) -> dict[str, str] | None:
  """{role: column} that the options of `data convert` name."""
  columns = _pairs(options.columns, "ROLE=COLUMN, such as caption=title")
  if options.labels:
    columns["labels"] = options.labels
  if options.group:
    columns["group"] = options.group
  if options.value:
    columns["value"] = "+".join(name.strip() for name in options.value.split(","))
  return columns or None


def _data_show(options) -> None:
  from mmjax.data import show

  show.show_data_set(
    options.name,
    options.out,
    split=options.split,
    count=options.count,
    seed=options.seed,
    data_dir=options.data_dir,
    config=_shown_config(options),
  )


def _shown_config(options):
  """The resolved config of `data show`, None without --config."""
  from mmjax import config

  if not options.config:
    if options.overrides:
      raise config.ConfigError(f"{options.overrides[0]} changes a config: name it with --config")
    return None
  place = [f"--config.data.dir={options.data_dir}"] if options.data_dir else []
  return config.load(options.config, [*options.overrides, *place])


def _data_tokenizer(options) -> None:
  from mmjax.data import text

  text.train_tokenizer_from_source(
    options.source,
    split=options.split,
    languages=_words(options.languages),
    vocab_size=options.vocab_size,
    model=options.model,
    name=options.name,
    data_dir=options.data_dir,
  )


def _config_show(options) -> None:
  from mmjax import config, describe

  resolved = config.load(options.file, options.overrides)
  from mmjax import printing

  printing.log(
    config.to_json(resolved) if options.json else describe.describe(resolved, docs=options.docs)
  )


def _config_keys(options) -> None:
  from mmjax import reference

  _print_table(options, reference.keys(options.pattern), reference.keys_table)


def _config_kinds(options) -> None:
  from mmjax import reference

  _print_table(options, reference.kinds(options.name), reference.kinds_table)


def _config_methods(options) -> None:
  from mmjax import reference

  _print_table(options, reference.methods(), reference.methods_table)


def _print_table(options, rows: list[dict], markdown: Callable[[list[dict]], str]) -> None:
  from mmjax import printing

  printing.log(json.dumps(rows, indent=2, ensure_ascii=False) if options.json else markdown(rows))


def _import(options) -> None:
  from mmjax.interop import huggingface

  huggingface.import_hf(options.folder, options.out, adapter=options.adapter)


def _export(options) -> None:
  from mmjax.interop import export

  export.export(options.checkpoint, options.to, options.out, options.allow_code)


def _embed(options) -> None:
  from mmjax.inference import search

  search.embed(
    options.checkpoint,
    options.out,
    images=options.images,
    audio=options.audio,
    video=options.video,
    texts=options.texts,
    source=options.source,
    split=options.split,
    languages=_words(options.languages),
    modality=options.modality,
    allow_code=options.allow_code,
  )


def _search(options) -> None:
  from mmjax.inference import search

  results = search.search(
    options.checkpoint,
    options.query,
    images=options.images,
    audio=options.audio,
    video=options.video,
    index=options.index,
    modality=options.modality,
    k=options.k,
    allow_code=options.allow_code,
  )
  from mmjax.printing import printable

  if options.json:
    print(json.dumps([dict(name=name, score=score) for name, score in results], indent=2))
  else:
    for name, score in results:
      print(f"{score:.4f}  {printable(name)}")


def _generate(options) -> None:
  from mmjax import printing
  from mmjax.inference import generate
  from mmjax.printing import printable

  written = generate.generate(
    options.checkpoint,
    options.files,
    beams=options.beams,
    max_length=options.max_length,
    length_penalty=options.length_penalty,
    timestamps=options.timestamps,
    prompt=options.prompt,
    stop=options.stop,
    seed=options.seed,
    temperature=options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    cache=options.cache,
    allow_code=options.allow_code,
  )
  rows: list[dict[str, Any]] = []
  for file, answer in written:
    if isinstance(answer, str):
      rows.append(dict(file=file, text=answer))
      continue
    segments = [dict(start=round(s.start, 3), end=round(s.end, 3), text=s.text) for s in answer]
    rows.append(dict(file=file, segments=segments))
  if options.json:
    printing.log(json.dumps(rows, indent=2, ensure_ascii=False))
    return
  for row in rows:
    name = printable(row["file"])
    if not name:  # a prompt alone
      print(printable(row["text"]))
      continue
    for s in row.get("segments", ()):
      print(f"{name}: [{s['start']:.2f} - {s['end']:.2f}] {printable(s['text'])}")
    if "text" in row:
      print(f"{name}: {printable(row['text'])}")


def _chat(options) -> None:
  from mmjax.inference import terminal
  from mmjax.inference.predictor import Predictor

  predictor = Predictor.load(options.checkpoint, allow_code=options.allow_code, cache=options.cache)
  terminal.on_terminal(
    predictor.chat(
      template=options.template,
      system=options.system,
      window=options.window,
      max_length=options.max_length,
      keep_media=options.keep_media,
      temperature=options.temperature,
      top_k=options.top_k,
      top_p=options.top_p,
    )
  )


def _serve(options) -> None:
  from mmjax.inference import server
  from mmjax.inference.predictor import Predictor
  from mmjax.printing import log

  server.serve(
    Predictor.load(options.checkpoint, allow_code=options.allow_code, cache=options.cache),
    options.host,
    options.port,
    lambda address: log(f"serving {options.checkpoint} at {address} (Ctrl-C ends)", sys.stderr),
    name=options.name or os.path.basename(os.path.abspath(options.checkpoint)),
    template=options.template,
    window=options.window,
    max_length=options.max_length,
    rows=options.rows,
    waiting=options.waiting,
    largest=options.largest << 20,
    seconds=options.seconds,
    key=options.key or os.environ.get("MMJAX_KEY", ""),
    media_root=options.media_root,
  )


def _predict(options) -> None:
  from mmjax.inference import predict
  from mmjax.inference.predictor import Predictor
  from mmjax.printing import log

  rows = predict.command(
    Predictor.load(options.checkpoint, allow_code=options.allow_code),
    options.inputs,
    columns=_pairs(options.columns, "MODALITY=COLUMN, such as image=file"),
    root=options.root,
    out=options.out,
    timestamps=options.timestamps,
    beams=options.beams,
  )
  _show_predictions(options, rows)
  if options.out:
    failed = sum("error" in row for row in rows)
    what = f"{len(rows)} rows" + (f", {failed} of them unreadable" if failed else "")
    log(f"wrote {options.out}: {what}", sys.stderr)


def _classify(options) -> None:
  from mmjax.inference import predict
  from mmjax.inference.predictor import Predictor

  rows = predict.zero_shot(
    Predictor.load(options.checkpoint, allow_code=options.allow_code),
    options.inputs,
    [label.strip() for label in options.labels.split(",") if label.strip()],
    templates=options.template or ("{}",),
    out=options.out,
  )
  _show_predictions(options, rows)


def _pairs(text: str, form: str) -> dict[str, str]:
  """{"image": "file"} of "image=file". form: how it is written. Raises ConfigError."""
  from mmjax.config import ConfigError

  pairs = {}
  for pair in filter(None, text.split(",")):
    name, equals, column = pair.partition("=")
    if not (name and equals and column):
      raise ConfigError(f"--columns: {pair!r:.80} is not {form}")
    pairs[name.strip()] = column
  return pairs


def _show_predictions(options, rows: list[dict[str, Any]]) -> None:
  """Prints rows as JSON, or as lines where no file is written."""
  from mmjax.printing import log, printable

  if options.json:
    log(json.dumps(rows, indent=2, ensure_ascii=False))
  elif not options.out:
    for row in rows:
      shown = {k: v for k, v in row.items() if k != "file" and not k.startswith("probability/")}
      words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
      print(f"{printable(row['file'])}: {printable(', '.join(words))}")


# -- Arguments -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  """argparse with one-line errors, for which "" names no file, folder or data set."""

  def add_argument(self, *names, **settings):
    if settings.get("metavar") in ("DIR", "FILE", "SRC", "NAME") and settings.get("default") != "":
      settings.setdefault("type", _not_empty)
    return super().add_argument(*names, **settings)

  def error(self, message: str):
    raise _Failure(EXIT_USAGE, f"{message}. See `{self.prog} --help`")


def _not_empty(text: str) -> str:
  if not text.strip():
    raise argparse.ArgumentTypeError("it is empty: give a name")
  return text


def _number(annotation: typing.Any) -> Callable[[str], float]:
  """The `type` of an argument whose number lies in the range of `annotation` (ranges.py)."""
  kind, bounds = typing.get_args(annotation)
  noun = "a whole number" if kind is int else "a number"

  def read(text: str) -> float:
    try:
      number = kind(text)
    except ValueError:
      number = None
    if number is None or not bounds.holds(number):
      raise argparse.ArgumentTypeError(f"it is {text!r:.40}, but must be {noun}, {bounds}")
    return number

  return read


def _parser() -> argparse.ArgumentParser:
  from mmjax import __version__

  parser = _Parser(
    prog="mmjax",
    description="Train multimodal models in JAX, from a laptop to a TPU pod.",
    epilog="Start with: bash launch/quickstart.sh   Each command has --help with an example.",
  )
  parser.add_argument("--version", action="version", version=f"mmjax {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

  def command(
    parent, name: str, run: Callable, text: str, example: str, overrides: bool = False
  ) -> argparse.ArgumentParser:
    sub = parent.add_parser(
      name,
      help=text,
      description=text,
      epilog=f"Example: {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(run=run, parser=sub, takes_overrides=overrides)
    return sub

  sub = command(
    commands,
    "init",
    _init,
    "Write a config that fits a data set and this machine, ready to train.",
    "mmjax init retrieval --source photos --out photos.py",
  )
  sub.add_argument(
    "task",
    metavar="TASK",
    choices=(
      "retrieval",
      "classification",
      "multi-label",
      "regression",
      "captioning",
      "speech-recognition",
      "question-answering",
      "dialogue",
    ),
    help="retrieval, classification, multi-label, regression, captioning, speech-recognition, "
    "question-answering or dialogue",
  )
  sub.add_argument("--source", required=True, metavar="NAME", help="data set to train on")
  sub.add_argument("--out", required=True, metavar="FILE", help="the config, a Python file")
  sub.add_argument(
    "--from",
    dest="start",
    default="",
    metavar="DIR",
    help="start from this run, import or Hugging Face folder: its encoders, tokenizer and "
    "preprocessing; default: from nothing",
  )
  sub.add_argument("--split", default="", help="to train on; default: train")
  sub.add_argument(
    "--modality",
    default="",
    metavar="NAME[,NAME]",
    help="image, audio, video, series, text: what the model reads; default: the media that there "
    "are, or else the text",
  )
  sub.add_argument("--languages", default="", help="comma-separated; default: all that there are")
  sub.add_argument(
    "--tokenizer",
    default="",
    metavar="NAME",
    help="one that is there; default: one is trained on the texts, or taken from --from",
  )
  sub.add_argument(
    "--hf",
    action="store_true",
    help="a model that `mmjax export --to hf` can write: CLIP, ViT, BERT or Whisper",
  )
  sub.add_argument("--force", action="store_true", help="replace FILE")
  _data_dir(sub)

  sub = command(
    commands,
    "train",
    _train,
    "Start a run, or resume it: the same command does both.",
    "mmjax train --config configs/quickstart.py --workdir runs/quickstart "
    "--config.optimizer.lr=1e-3",
    overrides=True,
  )
  _allow_code(sub)
  sub.add_argument(
    "--config",
    required=True,
    metavar="FILE",
    help="config file; FILE:ARG passes ARG to its get_config",
  )
  sub.add_argument("--workdir", required=True, metavar="DIR", help="run folder")
  sub.add_argument(
    "--allow-change",
    action="store_true",
    help="resume although settings or data that alter numbers have changed",
  )
  sub.add_argument(
    "--find-lr",
    action="store_true",
    help="instead of training, try growing learning rates for some 100 steps: prints a table and a "
    "suggestion, and draws DIR/find_lr.html",
  )
  sub.add_argument(
    "--profile",
    default="",
    metavar="START:STOP",
    help="trace these steps (both included) for xprof, into DIR/profile",
  )

  sub = command(
    commands,
    "eval",
    _eval,
    "Evaluate a checkpoint: writes eval.json and report.html.",
    "mmjax eval --checkpoint runs/quickstart --suite 'retrieval/*'",
    overrides=True,
  )
  _allow_code(sub)
  sub.add_argument(
    "--checkpoint", required=True, metavar="DIR", help="run folder, step folder or import folder"
  )
  sub.add_argument(
    "--config",
    metavar="FILE",
    help="take evaluators and data from this config instead of the checkpoint's",
  )
  sub.add_argument(
    "--suite", metavar="NAME", help="only the evaluators of this name (wildcards allowed)"
  )
  sub.add_argument(
    "--out", metavar="DIR", help="where eval.json and report.html go; default: the run folder"
  )
  sub.add_argument(
    "--judge-prompts",
    default="",
    metavar="FILE",
    help="write prompts for an outside judge of dialogues, as OpenAI's batch files",
  )
  sub.add_argument("--judge-model", default="", metavar="TEXT", help="the judge's name in them")
  sub.add_argument(
    "--judge-scores",
    default="",
    metavar="FILE",
    help="take what the judge answered into eval.json and report.html",
  )
  sub.add_argument("--json", action="store_true", help="print the scores as JSON")

  sub = command(
    commands,
    "plan",
    _plan,
    "Memory, time and cost of a run on a TPU slice, from its compiler, without TPUs, or roughly on "
    "GPUs; writes plan.json.",
    "mmjax plan --config configs/siglip_b16.py --topology v5e-16",
    overrides=True,
  )
  _allow_code(sub)
  sub.add_argument(
    "--config",
    required=True,
    metavar="FILE",
    help="config file; FILE:ARG passes ARG to its get_config",
  )
  sub.add_argument(
    "--topology",
    required=True,
    metavar="NAME",
    help="v5e-N, v6e-N (N chips), v4-N, v5p-N, 7x-N (N cores, two a chip), v5p:4x4x12 (a shape), "
    "2xv5e-256 (two slices); a100-40gb-N, a100-80gb-N, h100-N, h200-N, b200-N (N GPUs of a "
    "machine)",
  )
  sub.add_argument(
    "--sweep",
    action="store_true",
    help="also try other meshes, remat policies, microbatches and unrolled layers; prints a table, "
    "best first",
  )
  sub.add_argument(
    "--apply",
    default="",
    metavar="FILE",
    help="sweep, and write the overrides of the best to FILE, one a line: mmjax train --config ... "
    "$(cat FILE)",
  )
  sub.add_argument("--dump-hlo", default="", metavar="FILE", help="write the compiled program")
  sub.add_argument(
    "--out", default="plan.json", metavar="FILE", help="where the figures go; default: plan.json"
  )
  sub.add_argument(
    "--no-cache", action="store_true", help="compile although the same plan was made before"
  )
  sub.add_argument("--json", action="store_true", help="print the figures as JSON")

  data = commands.add_parser(
    "data", help="Build, convert and look at data sets; train tokenizers."
  ).add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=_Parser)
  sub = command(
    data, "build", _data_build, "Build an embedded data set.", "mmjax data build openmoji"
  )
  sub.add_argument(
    "name",
    metavar="NAME",
    help="easy_vqa, emoji_scenes, moving_emoji, openmoji, spoken_emoji, or module:function of your "
    "own",
  )
  _data_dir(sub)
  sub = command(
    data,
    "convert",
    _data_convert,
    "Convert pictures, sounds and videos with captions, questions or labels into a data set.",
    "mmjax data convert webdataset 'shards/{00000..00009}.tar' --name laion",
  )
  sub.add_argument(
    "format",
    metavar="FORMAT",
    choices=(
      "folder",
      "csv",
      "json",
      "jsonl",
      "coco",
      "vqa",
      "conversations",
      "documents",
      "webdataset",
      "parquet",
    ),
    help="folder (media with .txt each, with tables, or a folder a class), csv (and TSV), json "
    "(lines, an array or a document: jsonl, coco, vqa and conversations of LLaVA or OpenAI, with "
    "judged answers too, are the same), documents (texts without media: .txt, .md, or lines of "
    "JSON), webdataset (tars), parquet",
  )
  sub.add_argument("source", metavar="SRC", help="folder, file, or a pattern of files")
  sub.add_argument("--name", required=True, metavar="NAME", help="name of the new data set")
  sub.add_argument(
    "--split",
    metavar="NAME",
    help="its split, or shares of several: train:80,validation:10,test:10; default: train, or what "
    "the folders train, val, test of a folder say",
  )
  sub.add_argument(
    "--group",
    default="",
    metavar="COLUMN",
    help="column whose equal rows stay in one split of several, such as a speaker",
  )
  sub.add_argument("--language", default="en", help="language of the captions")
  sub.add_argument(
    "--columns",
    default="",
    help="columns of a table by role (image, audio, video, series, caption, question, answer, "
    "label, id, image_id, language, conversation), e.g. image=jpg,caption=alt; caption=a+b reads "
    "both",
  )
  sub.add_argument(
    "--labels",
    default="",
    metavar="COLUMN",
    help="column of any number of labels: a list, or a text with --separator between them",
  )
  sub.add_argument(
    "--separator", default=",", metavar="TEXT", help="between several labels; default: a comma"
  )
  sub.add_argument(
    "--classes",
    default="",
    metavar="A,B,C",
    help="what labels may be, in the order of their numbers, such as low,medium,high; default: all "
    "that there are, sorted",
  )
  sub.add_argument(
    "--value",
    default="",
    metavar="COLUMN[,COLUMN]",
    help="columns of numbers to predict (regression)",
  )
  sub.add_argument(
    "--media",
    default="",
    metavar="FOLDER",
    help="where the files lie that annotations name; default: beside them",
  )
  sub.add_argument(
    "--root",
    default="",
    metavar="FOLDER",
    help="tables and JSON may name files anywhere below it; default: --media",
  )
  sub.add_argument(
    "--encoding",
    default="",
    help="of texts that are not UTF-8 and have no byte order mark, e.g. cp1252",
  )
  sub.add_argument(
    "--workers", type=_number(Few), default=os.cpu_count() or 1, metavar="N", help="processes"
  )
  sub.add_argument("--json", action="store_true", help="print the summary as JSON")
  _data_dir(sub)
  sub = command(
    data,
    "show",
    _data_show,
    "Draw a sample sheet of a data set (HTML).",
    "mmjax data show openmoji --out sample.html --config configs/quickstart.py",
    overrides=True,
  )
  sub.add_argument("name", metavar="NAME")
  sub.add_argument("--split", default="train")
  sub.add_argument(
    "--count", type=_number(Examples), default=48, metavar="N", help="examples on the sheet"
  )
  sub.add_argument(
    "--seed", type=_number(Seed), default=0, metavar="N", help="of their random choice"
  )
  sub.add_argument("--out", default="sample.html", metavar="FILE")
  sub.add_argument(
    "--config", metavar="FILE", help="say what this config would cut of its texts, sounds, series"
  )
  _data_dir(sub)
  sub = command(
    data,
    "tokenizer",
    _data_tokenizer,
    "Train a sentencepiece tokenizer on the captions and questions of data sets.",
    "mmjax data tokenizer --source openmoji --name mine --vocab-size 4096",
  )
  sub.add_argument(
    "--source",
    required=True,
    metavar="NAME[,NAME]",
    help="data set, or several that share the pieces",
  )
  sub.add_argument(
    "--name", required=True, metavar="NAME", help="name of the tokenizer, for data.text.tokenizer"
  )
  sub.add_argument("--split", default="train")
  sub.add_argument("--languages", default="", help="comma-separated; default: all that there are")
  sub.add_argument(
    "--vocab-size", type=_number(Vocabulary), default=4096, metavar="N", help="pieces at most"
  )
  sub.add_argument(
    "--model",
    choices=("unigram", "bpe"),
    default="unigram",
    help="bpe makes whole words of texts that have few; default: unigram",
  )
  _data_dir(sub)

  config = commands.add_parser(
    "config", help="Show a resolved config, and all keys and kinds that there are."
  ).add_subparsers(dest="config_command", metavar="COMMAND", required=True, parser_class=_Parser)
  sub = command(
    config,
    "show",
    _config_show,
    "Print the resolved config of a file.",
    "mmjax config show configs/quickstart.py --docs",
    overrides=True,
  )
  sub.add_argument("file", metavar="FILE")
  sub.add_argument("--docs", action="store_true", help="with the meaning of each key")
  sub.add_argument("--json", action="store_true", help="as JSON")
  sub = command(
    config,
    "keys",
    _config_keys,
    "Print what every key of a config means and takes (Markdown).",
    "mmjax config keys 'data.image.*'",
  )
  sub.add_argument("pattern", nargs="?", default="*", help="only keys that fit; default: all")
  sub.add_argument("--json", action="store_true", help="as JSON")
  sub = command(
    config,
    "kinds",
    _config_kinds,
    "Print the kinds of encoders, objectives, optimizers, ... and their settings (Markdown).",
    "mmjax config kinds contrastive",
  )
  sub.add_argument("name", nargs="?", default="", help="a kind or a group; default: all")
  sub.add_argument("--json", action="store_true", help="as JSON")
  sub = command(
    config,
    "methods",
    _config_methods,
    "Print the methods of the models that objectives call (Markdown).",
    "mmjax config methods",
  )
  sub.add_argument("--json", action="store_true", help="as JSON")

  sub = command(
    commands,
    "import",
    _import,
    "Import a Hugging Face folder as a checkpoint.",
    "mmjax import --from hf clip-vit-b32 --out imported/clip",
  )
  sub.add_argument("--from", dest="origin", required=True, choices=("hf",))
  sub.add_argument("folder", metavar="DIR")
  sub.add_argument("--out", required=True, metavar="DIR")
  sub.add_argument(
    "--adapter",
    default="",
    metavar="DIR",
    help="a PEFT folder: its LoRA is imported with the model",
  )

  sub = command(
    commands,
    "export",
    _export,
    "Export parameters for inference elsewhere.",
    "mmjax export --checkpoint runs/quickstart --to stablehlo --out exported",
  )
  _allow_code(sub)
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--to", required=True, choices=("hf", "safetensors", "stablehlo", "peft"))
  sub.add_argument("--out", required=True, metavar="DIR")

  sub = command(
    commands,
    "embed",
    _embed,
    "Embed pictures, sounds, videos, texts or a data set into an .npz file.",
    "mmjax embed --checkpoint runs/quickstart --images photos --out photos.npz",
  )
  _allow_code(sub)
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--images", metavar="DIR", help="folder of pictures, searched through")
  sub.add_argument("--audio", metavar="DIR", help="folder of sounds, searched through")
  sub.add_argument("--video", metavar="DIR", help="folder of videos, searched through")
  sub.add_argument("--texts", metavar="FILE", help="text file, one text a line")
  sub.add_argument(
    "--source",
    metavar="NAME",
    help="data set: its pictures (or what else the model takes) and captions",
  )
  sub.add_argument(
    "--modality", choices=_MEDIA, help="of --source; default: the first that model and records have"
  )
  sub.add_argument("--split", default="train", help="split of --source")
  sub.add_argument(
    "--languages", default="", help="of --source, comma-separated; default: as in training"
  )
  sub.add_argument("--out", required=True, metavar="FILE")

  sub = command(
    commands,
    "search",
    _search,
    "Find pictures, sounds or videos by words, or by another picture, sound or video.",
    "mmjax search --checkpoint runs/quickstart --images photos 'a red heart'",
  )
  _allow_code(sub)
  sub.add_argument("query", metavar="QUERY", help="words, or the path of a picture, sound or video")
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--images", metavar="DIR", help="folder of pictures")
  sub.add_argument("--audio", metavar="DIR", help="folder of sounds")
  sub.add_argument("--video", metavar="DIR", help="folder of videos")
  sub.add_argument("--index", metavar="FILE", help="what `mmjax embed` wrote")
  sub.add_argument("--modality", choices=_MEDIA, help="of --index; default: the first that it has")
  sub.add_argument("-k", type=_number(Size), default=5, metavar="N", help="number of hits")
  sub.add_argument("--json", action="store_true")

  sub = command(
    commands,
    "predict",
    _predict,
    "Say what a model was trained to say about files or the rows of a table: labels with "
    "probabilities, values, captions, transcripts, answers.",
    "mmjax predict --checkpoint runs/photos/best photos --out predictions.csv",
  )
  _allow_code(sub)
  sub.add_argument(
    "inputs",
    nargs="+",
    metavar="FILE",
    help="files, folders of them, or tables (csv, tsv, jsonl, json, parquet) with a column a "
    "modality",
  )
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument(
    "--columns",
    default="",
    help="columns of a table, e.g. image=file,text=question,id=name; default: by their usual names",
  )
  sub.add_argument(
    "--root", default="", metavar="DIR", help="where the files of a table lie; default: beside it"
  )
  sub.add_argument(
    "--out", default="", metavar="FILE", help="a .csv, .json or .jsonl; default: print them"
  )
  sub.add_argument(
    "--beams", type=_number(Few), default=1, metavar="N", help="width of a decoder's beam search"
  )
  sub.add_argument(
    "--timestamps", action="store_true", help="of sounds, when each part of a transcript is said"
  )
  sub.add_argument("--json", action="store_true", help="print the predictions as JSON")

  sub = command(
    commands,
    "classify",
    _classify,
    "Sort pictures, sounds or videos into labels of yours, without training on them, by a model of "
    "media and texts.",
    "mmjax classify --checkpoint runs/quickstart photos --labels 'cat,dog,house'",
  )
  _allow_code(sub)
  sub.add_argument("inputs", nargs="+", metavar="FILE", help="files, or folders of them")
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--labels", required=True, metavar="A,B,C")
  sub.add_argument(
    "--template",
    action="append",
    default=[],
    metavar="TEXT",
    help="a sentence with {} for the label, 'a photo of a {}'; repeatable; default: the label",
  )
  sub.add_argument(
    "--out", default="", metavar="FILE", help="a .csv, .json or .jsonl; default: print them"
  )
  sub.add_argument("--json", action="store_true", help="print the predictions as JSON")

  sub = command(
    commands,
    "generate",
    _generate,
    "Write captions of pictures and clips, or transcripts of speech, by a model with a decoder or "
    "a CTC head; or go on from a prompt by a language model.",
    "mmjax generate --checkpoint runs/scene_captions photos/a.png photos/b.png --beams 4",
  )
  _allow_code(sub)
  sub.add_argument(
    "files", nargs="*", metavar="FILE", help="pictures, sounds or videos, or folders of them"
  )
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument(
    "--prompt",
    metavar="TEXT",
    help="what a language model goes on from, about each file or alone; <image>, <audio>, <video> "
    "or <series> in it says where the file stands, else it comes first",
  )
  _cache(sub)
  _sampling(sub)
  sub.add_argument("--seed", type=_number(Seed), default=0, metavar="N", help="of the draws")
  sub.add_argument(
    "--stop", action="append", default=[], metavar="TEXT", help="end texts before it; repeatable"
  )
  sub.add_argument(
    "--beams",
    type=_number(Few),
    default=1,
    metavar="N",
    help="width of a decoder's beam search; default: 1, the likeliest token each time",
  )
  sub.add_argument(
    "--max-length",
    type=_number(Count),
    default=0,
    metavar="N",
    help="tokens at most; default: as in training",
  )
  sub.add_argument(
    "--length-penalty",
    type=_number(Exponent),
    default=1.0,
    metavar="X",
    help="of the beam search: above 1 favours longer texts",
  )
  sub.add_argument(
    "--timestamps", action="store_true", help="of sounds, when each part is said (by a Whisper)"
  )
  sub.add_argument(
    "--json",
    action="store_true",
    help="print [{file, text}] as JSON; with --timestamps [{file, segments: [{start, end, text}]}]",
  )
  sub = command(
    commands,
    "chat",
    _chat,
    "Converse with a language model on the terminal; /help there lists the commands.",
    "mmjax chat --checkpoint runs/answers --template plain",
  )
  _allow_code(sub)
  _conversing(sub)
  sub.add_argument("--system", default="", metavar="TEXT", help="the system's turn, which stays")
  sub.add_argument(
    "--keep-media",
    action="store_true",
    help="when the history outgrows the window, drop turns with media last",
  )
  _sampling(sub)

  sub = command(
    commands,
    "serve",
    _serve,
    "Serve a checkpoint over HTTP in the form of OpenAI's API (chat, embeddings), with a page to "
    "try it. Needs: pip install 'mmjax[serve]'",
    "mmjax serve --checkpoint runs/quickstart --port 8000",
  )
  _allow_code(sub)
  _conversing(sub)
  sub.add_argument(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="default: this machine alone"
  )
  sub.add_argument("--port", type=_number(Count), default=8000, metavar="N", help="0 = a free one")
  sub.add_argument("--name", default="", metavar="TEXT", help="of the model; default: its folder's")
  sub.add_argument(
    "--key", default="", metavar="TEXT", help="what clients must present; default: $MMJAX_KEY"
  )
  sub.add_argument(
    "--rows", type=_number(Few), default=8, metavar="N", help="texts written at the same time"
  )
  sub.add_argument(
    "--waiting", type=_number(Examples), default=256, metavar="N", help="requests that may wait"
  )
  sub.add_argument(
    "--largest", type=_number(Few), default=20, metavar="MIB", help="of a request, in MiB"
  )
  sub.add_argument(
    "--seconds", type=_number(Positive), default=120.0, metavar="X", help="of a request at most"
  )
  sub.add_argument(
    "--media-root",
    default="",
    metavar="DIR",
    help="a folder whose files messages may name; default: none, media come within messages",
  )
  return parser


def _cache(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--cache",
    default="float",
    choices=("float", "int8"),
    help="keys and values of a language model's texts; int8 takes a quarter of float32's memory",
  )


def _sampling(sub: argparse.ArgumentParser) -> None:
  """How a language model chooses the next token."""
  sub.add_argument(
    "--temperature",
    type=_number(NonNegative),
    default=None,
    metavar="X",
    help="draw texts (language models); 0 = the likeliest token each time; default: as the "
    "generation_config.json of an imported model says, else 0",
  )
  sub.add_argument(
    "--top-k", type=_number(Count), default=None, metavar="N", help="draw among so many; 0 = all"
  )
  sub.add_argument(
    "--top-p", type=_number(Portion), default=None, metavar="X", help="draw among this probability"
  )


def _conversing(sub: argparse.ArgumentParser) -> None:
  _cache(sub)
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument(
    "--template",
    default="",
    metavar="NAME",
    help="chat template: a name, or a .jinja file; default: the checkpoint's",
  )
  sub.add_argument(
    "--window",
    type=_number(Count),
    default=0,
    metavar="N",
    help="tokens of history and answer; default: data.sequence.length, 4,096 at most",
  )
  sub.add_argument(
    "--max-length",
    type=_number(Examples),
    default=256,
    metavar="N",
    help="tokens of an answer at most; default: 256",
  )


def _allow_code(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--allow-code",
    action="append",
    default=[],
    metavar="MODULE",
    help="let a checkpoint run code of this module of yours; repeatable",
  )


def _data_dir(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--data-dir",
    default="",
    metavar="DIR",
    help="folder of the data sets; default: $MMJAX_DATA, else ~/.cache/mmjax",
  )


if __name__ == "__main__":
  sys.exit(main())
