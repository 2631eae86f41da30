"""The benchmarks of the guide run as it shows them, but at sizes that say nothing about speed."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests.guides import ROOT, commands, read
from tests.inference import tiny
from tests.inference.test_language import config as language_config

SMALL = {
  "input_pipeline": "--seconds 0.1 --size 32",
  "train_step": "--batch 8 --width 32 --depth 1 --pairs 1 --threads 1",
  "checkpoint": "--megabytes 2 --rounds 1 --workdir .",
  "startup": "--runs 1",
  "generation": "--rows 1 --prompt 4 --tokens 4 --pairs 1",
  "serving": "--requests 2 --clients 2 --checkpoint answers",
}
# Need data that take minutes to make, or libtpu; test_recipes.py, README
ELSEWHERE = ("ngram", "baselines", "products")
SHOWN = [
  (words, pathlib.Path(words[1]).stem)
  for words in map(shlex.split, commands(read("tests/bench/README.md")))
  if words[0] == "python"
]


def test_every_benchmark_is_shown():
  found = {path.stem for path in (ROOT / "tests/bench").glob("*.py")} - {"gpu", "__init__"}
  found = {name for name in found if not name.startswith("test_")}
  assert {name for _, name in SHOWN} == found == {*SMALL, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize(
  "words, name",
  [pair for pair in SHOWN if pair[1] in SMALL],
  ids=[" ".join(words[1:]) for words, name in SHOWN if name in SMALL],
)
def test_a_benchmark_runs(words, name, embedded_data, tmp_path):
  if name == "serving":
    tiny.save(language_config(), tmp_path).rename(tmp_path / "answers")
  done = subprocess.run(
    [sys.executable, ROOT / words[1], *words[2:], *SMALL[name].split()],
    cwd=tmp_path,
    env=dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu"),
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0 and done.stdout.strip(), done.stderr[-3000:]
