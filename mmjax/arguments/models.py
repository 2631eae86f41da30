"""What makes and uses checkpoints, but for training: import, export, embed, search, predict,
classify, generate, chat, serve.
"""

from __future__ import annotations

import argparse
from typing import Any

from mmjax.arguments.parser import allow_code, command, number
from mmjax.ranges import Count, Examples, Exponent, Few, NonNegative, Portion, Positive, Seed, Size

MEDIA = ("image", "audio", "video", "series")


def add_commands(commands: Any) -> None:
  _import(commands)
  _export(commands)
  _embed(commands)
  _search(commands)
  _predict(commands)
  _classify(commands)
  _generate(commands)
  _chat(commands)
  _serve(commands)


def _import(commands: Any) -> None:
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


def _export(commands: Any) -> None:
  sub = command(
    commands,
    "export",
    "Export parameters for inference elsewhere.",
    "mmjax export --checkpoint runs/quickstart --to stablehlo --out exported",
  )
  allow_code(sub)
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--to", required=True, choices=("hf", "safetensors", "stablehlo", "peft"))
  sub.add_argument("--out", required=True, metavar="DIR")


def _embed(commands: Any) -> None:
  sub = command(
    commands,
    "embed",
    "Embed pictures, sounds, videos, texts or a data set into an .npz file.",
    "mmjax embed --checkpoint runs/quickstart --images photos --out photos.npz",
  )
  allow_code(sub)
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


def _search(commands: Any) -> None:
  sub = command(
    commands,
    "search",
    "Find pictures, sounds or videos by words, or by another picture, sound or video.",
    "mmjax search --checkpoint runs/quickstart --images photos 'a red heart'",
  )
  allow_code(sub)
  sub.add_argument("query", metavar="QUERY", help="words, or the path of a picture, sound or video")
  sub.add_argument("--checkpoint", required=True, metavar="DIR")
  sub.add_argument("--images", metavar="DIR", help="folder of pictures")
  sub.add_argument("--audio", metavar="DIR", help="folder of sounds")
  sub.add_argument("--video", metavar="DIR", help="folder of videos")
  sub.add_argument("--index", metavar="FILE", help="what `mmjax embed` wrote")
  sub.add_argument("--modality", choices=MEDIA, help="of --index; default: the first that it has")
  sub.add_argument("-k", type=number(Size), default=5, metavar="N", help="number of hits")
  sub.add_argument("--json", action="store_true")


def _predict(commands: Any) -> None:
  sub = command(
    commands,
    "predict",
    "Say what a model was trained to say about files or the rows of a table: labels with "
    "probabilities, values, captions, transcripts, answers.",
    "mmjax predict --checkpoint runs/photos/best photos --out predictions.csv",
  )
  allow_code(sub)
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
    "--beams", type=number(Few), default=1, metavar="N", help="width of a decoder's beam search"
  )
  sub.add_argument(
    "--timestamps", action="store_true", help="of sounds, when each part of a transcript is said"
  )
  sub.add_argument("--json", action="store_true", help="print the predictions as JSON")


def _classify(commands: Any) -> None:
  sub = command(
    commands,
    "classify",
    "Sort pictures, sounds or videos into labels of yours, without training on them, by a model of "
    "media and texts.",
    "mmjax classify --checkpoint runs/quickstart photos --labels 'cat,dog,house'",
  )
  allow_code(sub)
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


def _generate(commands: Any) -> None:
  sub = command(
    commands,
    "generate",
    "Write captions of pictures and clips, or transcripts of speech, by a model with a decoder or "
    "a CTC head; or go on from a prompt by a language model.",
    "mmjax generate --checkpoint runs/scene_captions photos/a.png photos/b.png --beams 4",
  )
  allow_code(sub)
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
  sub.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="of the draws")
  sub.add_argument(
    "--stop", action="append", default=[], metavar="TEXT", help="end texts before it; repeatable"
  )
  sub.add_argument(
    "--beams",
    type=number(Few),
    default=1,
    metavar="N",
    help="width of a decoder's beam search; default: 1, the likeliest token each time",
  )
  sub.add_argument(
    "--max-length",
    type=number(Count),
    default=0,
    metavar="N",
    help="tokens at most; default: as in training",
  )
  sub.add_argument(
    "--length-penalty",
    type=number(Exponent),
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


def _chat(commands: Any) -> None:
  sub = command(
    commands,
    "chat",
    "Converse with a language model on the terminal; /help there lists the commands.",
    "mmjax chat --checkpoint runs/answers --template plain",
  )
  allow_code(sub)
  _conversing(sub)
  sub.add_argument("--system", default="", metavar="TEXT", help="the system's turn, which stays")
  sub.add_argument(
    "--keep-media",
    action="store_true",
    help="when the history outgrows the window, drop turns with media last",
  )
  _sampling(sub)


def _serve(commands: Any) -> None:
  sub = command(
    commands,
    "serve",
    "Serve a checkpoint over HTTP in the form of OpenAI's API (chat, embeddings), with a page to "
    "try it. Needs: pip install 'mmjax[serve]'",
    "mmjax serve --checkpoint runs/quickstart --port 8000",
  )
  allow_code(sub)
  _conversing(sub)
  sub.add_argument(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="default: this machine alone"
  )
  sub.add_argument("--port", type=number(Count), default=8000, metavar="N", help="0 = a free one")
  sub.add_argument("--name", default="", metavar="TEXT", help="of the model; default: its folder's")
  sub.add_argument(
    "--key", default="", metavar="TEXT", help="what clients must present; default: $MMJAX_KEY"
  )
  sub.add_argument(
    "--rows", type=number(Few), default=8, metavar="N", help="texts written at the same time"
  )
  sub.add_argument(
    "--waiting", type=number(Examples), default=256, metavar="N", help="requests that may wait"
  )
  sub.add_argument(
    "--largest", type=number(Few), default=20, metavar="MIB", help="of a request, in MiB"
  )
  sub.add_argument(
    "--seconds", type=number(Positive), default=120.0, metavar="X", help="of a request at most"
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
    type=number(NonNegative),
    default=None,
    metavar="X",
    help="draw texts (language models); 0 = the likeliest token each time; default: as the "
    "generation_config.json of an imported model says, else 0",
  )
  sub.add_argument(
    "--top-k", type=number(Count), default=None, metavar="N", help="draw among so many; 0 = all"
  )
  sub.add_argument(
    "--top-p", type=number(Portion), default=None, metavar="X", help="draw among this probability"
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
    type=number(Count),
    default=0,
    metavar="N",
    help="tokens of history and answer; default: data.sequence.length, 4,096 at most",
  )
  sub.add_argument(
    "--max-length",
    type=number(Examples),
    default=256,
    metavar="N",
    help="tokens of an answer at most; default: 256",
  )
