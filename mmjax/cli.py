"""The `mmjax` command: each sub-command calls one function with its arguments (arguments/); heavy
imports stay inside.

Exit codes: 0 done, 75 stopped early with a checkpoint saved (start again to go on), 1 failed, 2 bad
usage.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.arguments import make_parser
from mmjax.arguments.parser import EXIT_FAILED, EXIT_USAGE, Failure

_DISK_HINTS = {
  errno.EACCES: ". Change the permissions of it and of the folders above it, or name another",
  errno.EPERM: ". It belongs to somebody else: name another",
  errno.EROFS: ". Name one on a disk that can be written",
  errno.ENOSPC: ". Free space, or name one on another disk",
  errno.EDQUOT: ". Free space, or name one on another disk",
  errno.ENAMETOOLONG: ". Give a shorter name",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; mistakes of the user end in one line on stderr (`--debug` shows the
  traceback).
  """
  try:
    return _main(argv)
  except Failure as failure:
    _complain(failure.why)
    if argv is None:
      _end_peers(failure)
    return failure.code


def _end_peers(failure: Failure) -> None:
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
  # What a terminal cannot show, or sends broken, costs itself and not the command.
  for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors=errors)
  try:
    os.getcwd()
  except FileNotFoundError:
    raise Failure(EXIT_USAGE, "the current folder is gone. Change to one that is there") from None
  parser = make_parser()
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
  from mmjax.errors import StoreError

  try:
    return COMMANDS[options.run](options) or 0
  except UserError as error:
    if options.debug:
      raise
    raise Failure(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED, error) from error
  except StoreError as error:
    if options.debug:
      raise
    raise Failure(EXIT_FAILED, error) from error
  except KeyboardInterrupt as error:
    raise Failure(EXIT_FAILED, "interrupted") from error
  except SystemExit as error:  # of a kind's own code: a launcher would take 0 for done
    why = f"code of this run called sys.exit({error.code!r:.80})"
    raise Failure(EXIT_FAILED, why) from error
  except BrokenPipeError as error:
    sys.stderr.close()
    raise Failure(EXIT_FAILED, "nobody reads what it prints") from error
  except Exception as error:
    if options.debug:
      raise
    why = f"{type(error).__name__}: {error!s:.600} (--debug shows where)"
    if str(error).startswith("Unable to initialize backend"):  # JAX_PLATFORMS, or a driver
      why = str(error)
    elif isinstance(error, OSError) and error.filename:  # the disk said no; Python knows where
      why = f"{error.filename!s:.300}: {error.strerror}{_DISK_HINTS.get(error.errno or 0, '')}"
    raise Failure(EXIT_FAILED, why) from error


def _complain(what: object) -> None:
  """One line on stderr, whatever names and texts it holds; none where nobody reads."""
  if sys.stderr.closed:
    return
  from mmjax.printing import printable, shorten

  line = " ".join(shorten(word, 300) for word in printable(what, keep="\n\t").split())
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
    with contextlib.suppress(OSError):  # of an interpreter that may be run, but not again
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
  from mmjax.data import tokenizer_training

  tokenizer_training.train_tokenizer_from_source(
    options.source,
    split=options.split,
    languages=_words(options.languages),
    vocab_size=options.vocab_size,
    model=options.model,
    answers=options.answers,
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


COMMANDS: dict[str, Callable[[Any], int | None]] = {
  "init": _init,
  "train": _train,
  "eval": _eval,
  "plan": _plan,
  "data build": _data_build,
  "data convert": _data_convert,
  "data show": _data_show,
  "data tokenizer": _data_tokenizer,
  "config show": _config_show,
  "config keys": _config_keys,
  "config kinds": _config_kinds,
  "config methods": _config_methods,
  "import": _import,
  "export": _export,
  "embed": _embed,
  "search": _search,
  "predict": _predict,
  "classify": _classify,
  "generate": _generate,
  "chat": _chat,
  "serve": _serve,
}


if __name__ == "__main__":
  sys.exit(main())
