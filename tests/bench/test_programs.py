"""The benchmarks of the guide run as it shows them, but at sizes that say nothing about speed."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from tests.e2e import small_data
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
  "own_pictures": "--count 80 --width 64 --height 48",
}
ELSEWHERE = ("ngram", "baselines", "products")  # below, and test_ngram.py
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
  assert printed([*words[1:], *SMALL[name].split()], tmp_path).strip()


def printed(words: Sequence[str], folder: pathlib.Path, **environment: str) -> str:
  """What a program of the repository prints, run in `folder`."""
  path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
  done = subprocess.run(
    [sys.executable, ROOT / words[0], *words[1:]],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  "source, recipe",
  [
    ("spoken_commands", "speech_commands"),
    ("rare_animals", "rare_animals"),
    ("basket_prices", "basket_prices"),
  ],
)
def test_simple_baselines_of_a_small_data_set_are_scored(source, recipe, tmp_path):
  (line,) = [words for words, name in SHOWN if name == "baselines"]
  assert source in read("tests/bench/README.md", "## Simple baselines") and len(line) == 3
  small_data.build(tmp_path / "data", [recipe])
  found = json.loads(printed([line[1], source], tmp_path, MMJAX_DATA=str(tmp_path / "data")))
  for one in [found] if "chosen" in found else found.values():
    assert one["chosen"] and set(one["validation"]) == set(one["test"])
    assert np.isfinite(list(one["test"].values())).all()


@pytest.mark.slow
def test_cycles_of_products_are_counted(tmp_path):
  pytest.importorskip("libtpu")
  (line,) = [words for words, name in SHOWN if name == "products"]
  assert printed(line[1:], tmp_path).strip()
