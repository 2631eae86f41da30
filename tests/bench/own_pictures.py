"""From a folder of pictures as a user has it to the first page and the first score.

  python tests/bench/own_pictures.py

Makes the folder, then runs the commands of the guide, each in a process of its own: `data convert`,
`data show`, `init`, and `train` until it prints its first scores. Prints the seconds of each and of
the processors for it.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 200)}
SHAPES = ("circle", "cross", "square")
GROUNDS = {"sand": (214, 196, 150), "grass": (150, 190, 120), "snow": (232, 236, 242)}
SPLIT = ("--split", "train:80,validation:10,test:10")
SCORE = r"^step \d+: \w[\w-]*/"  # the line of an evaluation


class Took(NamedTuple):
  """Seconds of the clock, and of the processors."""

  wall: float
  processor: float


def photograph(kind: int, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
  """A coloured shape of any place and size on uneven ground."""
  wide, high = size
  ground = np.array(list(GROUNDS.values())[kind // 9 % 3])
  light = ground + rng.normal(0, 18, (high // 32 + 1, wide // 32 + 1, 1))
  small = Image.fromarray(np.uint8(np.clip(light, 0, 255)))
  image = small.resize(size, Image.Resampling.BICUBIC)
  pen, r = ImageDraw.Draw(image), int(rng.integers(high // 6, high // 3))
  x, y = int(rng.integers(r, wide - r)), int(rng.integers(r, high - r))
  colour, shape = list(COLOURS.values())[kind % 3], SHAPES[kind // 3 % 3]
  if shape == "circle":
    pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
  elif shape == "square":
    pen.rectangle([x - r, y - r, x + r, y + r], fill=colour)
  else:
    pen.rectangle([x - r, y - r // 4, x + r, y + r // 4], fill=colour)
    pen.rectangle([x - r // 4, y - r, x + r // 4, y + r], fill=colour)
  return image


def make(folder: pathlib.Path, count: int, size: tuple[int, int], labels: bool) -> int:
  """0.jpg beside 0.txt, or shape/0.jpg; returns the bytes of the pictures."""
  rng, total = np.random.default_rng(0), 0
  camera = Image.fromarray(rng.integers(0, 24, (2 * size[1], 2 * size[0], 3), np.uint8))
  for number in range(count):
    kind = number % 27
    shape = SHAPES[kind // 3 % 3]
    path = folder / (f"{shape}/{number}.jpg" if labels else f"{number}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = (int(rng.integers(side)) for side in size)
    noise = camera.crop((x, y, x + size[0], y + size[1]))
    ImageChops.subtract(photograph(kind, size, rng), noise).save(path, quality=90)
    total += path.stat().st_size
    if not labels:
      caption = f"a {list(COLOURS)[kind % 3]} {shape} on {list(GROUNDS)[kind // 9 % 3]}"
      path.with_suffix(".txt").write_text(caption)
  return total


def run(words: Sequence[str], until: str = "") -> Took:
  """What a command took, to its end or, if a line of its output has `until`, to that line."""
  before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
  command = [sys.executable, "-m", "mmjax.cli", *words]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert process.stdout
  wall = used = 0.0
  said = []
  for line in process.stdout:
    said.append(line)
    if until and not wall and re.search(until, line):
      wall, used = time.monotonic() - start, _processor(process.pid)
      print(line.strip())
      process.send_signal(signal.SIGKILL)  # what follows is not of interest
  process.wait()
  if not wall and (until or process.returncode):
    sys.exit(f"mmjax {' '.join(words)} did not get there:\n{''.join(said)}")
  if until:
    return Took(wall, used)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return Took(time.monotonic() - start, used)


def _processor(process: int) -> float:
  """Seconds of the processors that a process has had so far, by Linux."""
  fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(count: int, size: tuple[int, int], labels: bool) -> None:
  """Prints what each command took, and all so far, in the current folder."""
  total = make(pathlib.Path("photos"), count, size, labels)
  print(f"{count:,} pictures of {size[0]}x{size[1]}, {total / 1e6:.0f} MB", flush=True)
  task = "classification" if labels else "retrieval"
  commands = {
    "convert": ["data", "convert", "folder", "photos", "--name", "photos", *SPLIT],
    "show": ["data", "show", "photos", "--out", "photos.html"],
    "init": ["init", task, "--source", "photos", "--out", "photos.py"],
    "train": ["train", "--config", "photos.py", "--workdir", "run"],
  }
  wall = processor = 0.0
  for name, words in commands.items():
    took = run(words, until=SCORE if name == "train" else "")
    wall, processor = wall + took.wall, processor + took.processor
    print(
      f"{name}: {took.wall:.1f} s, {took.processor:.1f} s of processors; "
      f"so far {wall:.1f} s, {processor:.1f} s",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--count", type=int, default=3000)
  parser.add_argument("--width", type=int, default=640)
  parser.add_argument("--height", type=int, default=480)
  parser.add_argument("--labels", action="store_true", help="a folder a class, not captions")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    os.environ["MMJAX_DATA"] = folder + "/data"
    measure(options.count, (options.width, options.height), options.labels)
    os.chdir("/")


if __name__ == "__main__":
  main()
