"""A stranger with pictures and captions of their own: README.md alone, its eight commands as they
stand there, in a folder without the source.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.guides import ROOT, blocks, commands, read

SECTION = read("README.md", "## Your own pictures")
COMMANDS = commands(SECTION)
COLOURS = dict(
  red=(220, 40, 40), green=(40, 160, 60), blue=(40, 70, 220), yellow=(230, 200, 40), black=(20,) * 3
)
SHAPES = dict(circle="ellipse", square="rectangle", triangle="polygon", ring="arc")
SIDES = dict(left=4, middle=22, right=40)
# 60, of which a picture shows one.
CAPTIONS = [(colour, shape, side) for colour in COLOURS for shape in SHAPES for side in SIDES]


def draw(colour: str, shape: str, side: str, rng: np.random.Generator) -> Image.Image:
  """A picture of 64 pixels, on light noise."""
  picture = Image.fromarray(rng.integers(200, 256, (64, 64, 3), np.uint8))
  x, y = SIDES[side] + rng.integers(-3, 4), rng.integers(4, 40)
  box, pen = [x, y, x + 19, y + 19], ImageDraw.Draw(picture)
  if shape == "triangle":
    pen.polygon([(x, y + 19), (x + 19, y + 19), (x + 9, y)], fill=COLOURS[colour])
  elif shape == "ring":
    pen.arc(box, 0, 360, fill=COLOURS[colour], width=4)
  else:
    getattr(pen, SHAPES[shape])(box, fill=COLOURS[colour])
  return picture


def make_photos(folder: pathlib.Path) -> None:
  """photos/train and photos/test as README.md asks for them: a.jpg beside a.txt; a test picture for
  each caption.
  """
  rng = np.random.default_rng(0)
  for split, each in (("train", 6), ("test", 1)):
    (folder / split).mkdir(parents=True)
    for i, what in enumerate(CAPTIONS * each):
      draw(*what, rng).save(folder / split / f"{i}.jpg", quality=92)
      (folder / split / f"{i}.txt").write_text("a {} {} on the {}".format(*what))


def test_there_are_at_most_eight_commands():
  assert 3 <= len(COMMANDS) <= 8 and COMMANDS[0] == "pip install ."
  assert all(command.startswith("mmjax ") for command in COMMANDS[1:])


@pytest.mark.slow
def test_eight_commands_end_in_a_model_that_finds_pictures(tmp_path):
  """On new pictures of 60 captions: R@1 over 0.5 (chance 0.017), and the search finds what it is
  asked for.
  """
  clone, site, place = tmp_path / "clone", tmp_path / "site", tmp_path / "place"
  clone.mkdir()
  for name in ("setup.py", "pyproject.toml", "README.md"):
    shutil.copy(ROOT / name, clone)
  shutil.copytree(ROOT / "mmjax", clone / "mmjax", ignore=shutil.ignore_patterns("__pycache__"))
  make_photos(place / "photos")
  (config,) = blocks(SECTION, "python")
  (place / config.split()[1]).write_text(config)
  environment = {name: x for name, x in os.environ.items() if not name.startswith("MMJAX_")}
  environment |= dict(PYTHONPATH=str(site), MMJAX_DATA=str(tmp_path / "data"), JAX_PLATFORMS="cpu")

  def run(words: list[str], folder: pathlib.Path) -> str:
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout

  # What it depends on is there already, and the tests have no network.
  offline = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
  run([sys.executable, "-m", *shlex.split(COMMANDS[0]), *offline], clone)
  where = run([sys.executable, "-c", "import mmjax; print(mmjax.__file__)"], place)
  assert pathlib.Path(where.strip()).is_relative_to(site)
  for command in COMMANDS[1:]:
    printed = run([sys.executable, "-m", "mmjax.cli", *shlex.split(command)[1:]], place)

  scores = json.loads((place / "runs" / "photos" / "eval.json").read_text())["retrieval/test"]
  assert scores["images"] == 60
  assert min(scores["image_to_text/R@1"], scores["text_to_image/R@1"]) > 0.5, scores
  found = [line.split()[-1] for line in printed.splitlines()]  # of the search, best first
  captions = [(place / "photos/test" / name).with_suffix(".txt").read_text() for name in found]
  assert len(found) == 5
  assert sum(caption.startswith("a red circle") for caption in captions[:3]) >= 2, captions
  assert (place / "photos.html").exists() and (place / "runs/photos/report.html").exists()
