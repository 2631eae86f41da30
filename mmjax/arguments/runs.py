"""What trains and measures: init, train, eval, plan."""

from __future__ import annotations

import argparse
from typing import Any

from mmjax.arguments.parser import allow_code, command, data_dir


def add_commands(commands: Any) -> None:
  _init(commands)
  _train(commands)
  _eval(commands)
  _plan(commands)


def _init(commands: Any) -> None:
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
  data_dir(sub)


def _train(commands: Any) -> None:
  sub = command(
    commands,
    "train",
    "Start a run, or resume it: the same command does both.",
    "mmjax train --config configs/quickstart.py --workdir runs/quickstart "
    "--config.optimizer.lr=1e-3",
    overrides=True,
  )
  allow_code(sub)
  _config(sub)
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


def _eval(commands: Any) -> None:
  sub = command(
    commands,
    "eval",
    "Evaluate a checkpoint: writes eval.json and report.html.",
    "mmjax eval --checkpoint runs/quickstart --suite 'retrieval/*'",
    overrides=True,
  )
  allow_code(sub)
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


def _plan(commands: Any) -> None:
  sub = command(
    commands,
    "plan",
    "Memory, time and cost of a run on a TPU slice, from its compiler, without TPUs, or roughly on "
    "GPUs; writes plan.json.",
    "mmjax plan --config configs/siglip_b16.py --topology v5e-16",
    overrides=True,
  )
  allow_code(sub)
  _config(sub)
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


def _config(sub: argparse.ArgumentParser) -> None:
  sub.add_argument(
    "--config",
    required=True,
    metavar="FILE",
    help="config file; FILE:ARG passes ARG to its get_config",
  )
