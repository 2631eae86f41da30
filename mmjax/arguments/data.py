"""What makes data sets and shows them: data build, convert, show, tokenizer."""

from __future__ import annotations

from typing import Any

from mmjax.arguments.parser import Parser, command, data_dir, number
from mmjax.data.workers import cores
from mmjax.ranges import Examples, Seed, Vocabulary, Workers


def add_commands(commands: Any) -> None:
  group = commands.add_parser(
    "data", help="Build, convert and look at data sets; train tokenizers."
  ).add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=Parser)
  _build(group)
  _convert(group)
  _show(group)
  _tokenizer(group)


def _build(commands: Any) -> None:
  sub = command(commands, "build", "Build an embedded data set.", "mmjax data build openmoji")
  sub.add_argument(
    "name",
    metavar="NAME",
    help="easy_vqa, emoji_scenes, moving_emoji, openmoji, spoken_emoji, or module:function of your "
    "own",
  )
  data_dir(sub)


def _convert(commands: Any) -> None:
  sub = command(
    commands,
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
    "--workers", type=number(Workers), default=cores(), metavar="N", help="processes"
  )
  sub.add_argument("--json", action="store_true", help="print the summary as JSON")
  data_dir(sub)


def _show(commands: Any) -> None:
  sub = command(
    commands,
    "show",
    "Draw a sample sheet of a data set (HTML).",
    "mmjax data show openmoji --out sample.html --config configs/quickstart.py",
    overrides=True,
  )
  sub.add_argument("name", metavar="NAME")
  sub.add_argument("--split", default="train")
  sub.add_argument(
    "--count", type=number(Examples), default=48, metavar="N", help="examples on the sheet"
  )
  sub.add_argument(
    "--seed", type=number(Seed), default=0, metavar="N", help="of their random choice"
  )
  sub.add_argument("--out", default="sample.html", metavar="FILE")
  sub.add_argument(
    "--config", metavar="FILE", help="say what this config would cut of its texts, sounds, series"
  )
  data_dir(sub)


def _tokenizer(commands: Any) -> None:
  sub = command(
    commands,
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
    "--vocab-size", type=number(Vocabulary), default=4096, metavar="N", help="pieces at most"
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
  data_dir(sub)
