"""The arguments of every command of `mmjax`, its help, and what is wrong with them in one line."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable
from typing import Any

from mmjax.data.workers import cores
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
  Workers,
)

EXIT_FAILED, EXIT_USAGE = 1, 2
MEDIA = ("image", "audio", "video", "series")


class Failure(Exception):
  """Ends a command with an exit code and one line on stderr."""

  def __init__(self, code: int, why: object):
    super().__init__(str(why))
    self.code, self.why = code, why


class Parser(argparse.ArgumentParser):
  """argparse with one-line errors, for which "" names no file, folder or data set, unless it is the
  default.
  """

  def add_argument(self, *names, **settings):
    if settings.get("metavar") in ("DIR", "FILE", "FOLDER", "SRC", "NAME"):
      settings.setdefault("type", _name_or_none if settings.get("default") == "" else _name)
    return super().add_argument(*names, **settings)

  def error(self, message: str):
    raise Failure(EXIT_USAGE, f"{message}. See `{self.prog} --help`")


def _name(text: str) -> str:
  if not text.strip():
    raise argparse.ArgumentTypeError("it is empty: give a name")
  try:
    nul = b"\0" in os.fsencode(text)
  except UnicodeEncodeError:
    nul = True
  if nul:
    raise argparse.ArgumentTypeError(f"no file can be called {text!r:.200}")
  return text


def _name_or_none(text: str) -> str:
  return text and _name(text)


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


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands; cli.py runs them."""
  from mmjax import __version__

  parser = Parser(
    prog="mmjax",
    description="Train multimodal models in JAX, from a laptop to a TPU pod.",
    epilog="Start with: bash launch/quickstart.sh   Each command has --help with an example.",
  )
  parser.add_argument("--version", action="version", version=f"mmjax {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

  _add_runs(commands)
  _add_data(commands)
  _add_configs(commands)
  _add_exchange(commands)
  _add_models(commands)
  return parser


def command(
  parent: Any, name: str, text: str, example: str, overrides: bool = False
) -> argparse.ArgumentParser:
  """The parser of a command; its options have `run`, the words that call it ("data build")."""
  sub = parent.add_parser(
    name,
    help=text,
    description=text,
    epilog=f"Example: {example}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
  run = sub.prog.partition(" ")[2]
  sub.set_defaults(run=run, parser=sub, takes_overrides=overrides)
  return sub


def _add_runs(commands: Any) -> None:
  """init, train, eval, plan."""
  sub = command(
    commands,
    "init",
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
    nargs="?",
    const="usual",
    default="",
    choices=("usual", "clip", "siglip", "vit", "resnet", "bert", "whisper", "llama"),
    metavar="FAMILY",
    help="a model that `mmjax export --to hf` can write: clip or siglip, vit or resnet, bert, "
    "whisper, llama; default FAMILY: the first that fits",
  )
  sub.add_argument("--force", action="store_true", help="replace FILE")
  _data_dir(sub)

  sub = command(
    commands,
    "train",
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
    "Evaluate a checkpoint: writes eval.json and report.html.",
    "mmjax eval --checkpoint runs/quickstart --suite 'retrieval/*'",
    overrides=True,
  )
  _allow_code(sub)
  sub.add_argument(
    "--checkpoint", required=True, metavar="DIR", help="run folder, step folder or import folder"
  )
  sub.add_argument(
    "--config", metavar="FILE", help="take evaluators from this config instead of the checkpoint's"
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


def _add_data(commands: Any) -> None:
  """data build, convert, show, tokenizer."""
  data = commands.add_parser(
    "data", help="Build, convert and look at data sets; train tokenizers."
  ).add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=Parser)
  sub = command(data, "build", "Build an embedded data set.", "mmjax data build openmoji")
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
    "--workers", type=_number(Workers), default=cores(), metavar="N", help="processes"
  )
  sub.add_argument("--json", action="store_true", help="print the summary as JSON")
  _data_dir(sub)
  sub = command(
    data,
    "show",
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
  sub.add_argument(
    "--answers", action="store_true", help="of answers too, which a language model writes"
  )
  _data_dir(sub)


def _add_configs(commands: Any) -> None:
  """config show, keys, kinds, methods."""
  config = commands.add_parser(
    "config", help="Show a resolved config, and all keys and kinds that there are."
  ).add_subparsers(dest="config_command", metavar="COMMAND", required=True, parser_class=Parser)
  sub = command(
    config,
    "show",
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
    "Print what every key of a config means and takes (Markdown).",
    "mmjax config keys 'data.image.*'",
  )
  sub.add_argument("pattern", nargs="?", default="*", help="only keys that fit; default: all")
  sub.add_argument("--json", action="store_true", help="as JSON")
  sub = command(
    config,
    "kinds",
    "Print the kinds of encoders, objectives, optimizers, ... and their settings (Markdown).",
    "mmjax config kinds contrastive",
  )
  sub.add_argument("name", nargs="?", default="", help="a kind or a group; default: all")
  sub.add_argument("--json", action="store_true", help="as JSON")
  sub = command(
    config,
    "methods",
    "Print the methods of the models that objectives call (Markdown).",
    "mmjax config methods",
  )
  sub.add_argument("--json", action="store_true", help="as JSON")


def _add_exchange(commands: Any) -> None:
  """import, export."""
  sub = command(
    commands,
    "import",
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
    "Export parameters for inference elsewhere.",
    "mmjax export --checkpoint runs/quickstart --to stablehlo --out exported",
  )
  _allow_code(sub)
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--to", required=True, choices=("hf", "safetensors", "stablehlo", "peft"))
  sub.add_argument("--out", required=True, metavar="DIR")


def _add_models(commands: Any) -> None:
  """What uses a model: embed, search, generate, chat, serve, predict, classify."""
  sub = command(
    commands,
    "embed",
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
    "--modality", choices=MEDIA, help="of --source; default: the first that model and records have"
  )
  sub.add_argument("--split", default="train", help="split of --source")
  sub.add_argument(
    "--languages", default="", help="of --source, comma-separated; default: as in training"
  )
  sub.add_argument("--out", required=True, metavar="FILE")

  sub = command(
    commands,
    "search",
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
  sub.add_argument("--modality", choices=MEDIA, help="of --index; default: the first that it has")
  sub.add_argument("-k", type=_number(Size), default=5, metavar="N", help="number of hits")
  sub.add_argument("--json", action="store_true")

  sub = command(
    commands,
    "predict",
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
