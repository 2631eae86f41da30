"""Small folders of the kinds of data that users have, made of ordinary files and tables.

What is asked for can only be seen or heard: names of files say nothing, and no answer is much
commoner than the others.
"""

from __future__ import annotations

import csv
import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

from mmjax.data.builders.speech import RATE as SPOKEN
from mmjax.data.builders.speech import Voice, speak

COLOURS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 200)}
SHAPES = ("circle", "cross", "square")
SIZE = (40, 32)
WORDS = ("yes", "no", "stop", "go")
THINGS = ("film", "book", "song", "room", "meal", "walk", "trip")
WORDS_OF = {
  "well": ("lovely", "warm", "bright", "great", "fine", "happy"),
  "ill": ("cold", "dull", "poor", "sad", "awful", "bleak"),
}
VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb+m3", "en-029", "en-us+m1", "en-gb+f4", "en-us+Annie")
MOVES = {"left": (-3, 0), "right": (3, 0), "up": (0, -3), "down": (0, 3)}
RATE = 16_000
HERTZ = {"low": 300, "high": 1500}


def draw(shape: str, colour: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
  """A shape of any place and size on a light ground."""
  image = Image.new("RGB", SIZE, tuple(rng.integers(200, 256, 3).tolist()))
  pen, r = ImageDraw.Draw(image), int(rng.integers(7, 12))
  x, y = int(rng.integers(r, SIZE[0] - r)), int(rng.integers(r, SIZE[1] - r))
  if shape == "circle":
    pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
  elif shape == "square":
    pen.rectangle([x - r, y - r, x + r, y + r], fill=colour)
  else:
    pen.rectangle([x - r, y - 2, x + r, y + 2], fill=colour)
    pen.rectangle([x - 2, y - r, x + 2, y + r], fill=colour)
  return image


def pictures_with_captions(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """0.png and 0.txt, "a red circle": nine captions."""
  folder.mkdir()
  for i in range(count):
    colour, shape = list(COLOURS)[i % 3], SHAPES[i // 3 % 3]
    draw(shape, COLOURS[colour], rng).save(folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(f"a {colour} {shape}\n")


def pictures_with_labels(
  folder: pathlib.Path, count: int, rng: np.random.Generator, hint: int = 0
) -> None:
  """A folder a shape. hint: how much brighter one channel is, another for each shape: easier."""
  for shape in SHAPES:
    (folder / shape).mkdir(parents=True)
  for i in range(count):
    colour = rng.integers(0, 90, 3) + hint * (np.arange(3) == i % 3)
    draw(SHAPES[i % 3], tuple(colour.tolist()), rng).save(folder / SHAPES[i % 3] / f"{i}.png")


def speech(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """0.wav and 0.txt: one of four words, by eight voices at any speed and pitch."""
  folder.mkdir()
  for i in range(count):
    voice = Voice(
      VOICES[i // 4 % len(VOICES)], int(rng.integers(120, 200)), int(rng.integers(30, 70))
    )
    soundfile.write(folder / f"{i}.wav", speak(WORDS[i % 4], voice), SPOKEN)
    (folder / f"{i}.txt").write_text(WORDS[i % 4])


def clips(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """A folder a direction, of mp4 files of eight frames in which a square moves that way."""
  for move in MOVES:
    (folder / move).mkdir(parents=True)
  for i in range(count):
    move = list(MOVES)[i % 4]
    (dx, dy), colour = MOVES[move], tuple(rng.integers(0, 120, 3).tolist())
    x, y = rng.integers(27, 38, 2).tolist()
    with av.open(str(folder / move / f"{i}.mp4"), "w") as file:
      stream = file.add_stream("mpeg4", rate=8)
      stream.height = stream.width = 64
      for time in range(-4, 4):
        frame = Image.new("RGB", (64, 64), (230, 230, 230))
        at = (x + dx * time, y + dy * time)
        ImageDraw.Draw(frame).rectangle([at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7], fill=colour)
        file.mux(stream.encode(av.VideoFrame.from_image(frame)))
      file.mux(stream.encode())


def wave(cycles: float, rng: np.random.Generator, steps: int = 60) -> np.ndarray:
  """[steps, 2]: a wave of some cycles at any phase in noise, about a large mean; and noise."""
  turn = 2 * math.pi * (cycles * np.arange(steps) / steps + rng.uniform())
  return np.stack([1000 + 5 * np.sin(turn) + rng.normal(size=steps), rng.normal(size=steps)], 1)


def write_series(path: pathlib.Path, series: np.ndarray) -> None:
  np.savetxt(path, series, "%.4f", delimiter=",", header="pressure,noise", comments="")


def series_with_labels(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """A folder a kind, of .csv files of two channels with a line of names."""
  kinds = dict(idle=2, walk=4, run=8)
  for kind in kinds:
    (folder / kind).mkdir(parents=True)
  for i in range(count):
    kind = list(kinds)[i % 3]
    write_series(folder / kind / f"{i}.csv", wave(kinds[kind], rng))


def write_table(folder: pathlib.Path, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
  """`metadata.csv` in a folder."""
  with open(folder / "metadata.csv", "w", newline="") as file:
    csv.writer(file).writerows([names, *rows])


def series_with_values(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """.csv files and a table of them, `metadata.csv`, with the cycles of each as its value."""
  folder.mkdir()
  rows = []
  for i in range(count):
    cycles = rng.uniform(1, 9)
    write_series(folder / f"{i}.csv", wave(cycles, rng))
    rows.append([f"{i}.csv", f"{cycles:.3f}"])
  write_table(folder, ["file_name", "cycles"], rows)


def texts_with_labels(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """A table of texts without media, `metadata.csv`: what is said of things, well or ill."""
  folder.mkdir()
  rows = []
  for i in range(count):
    kind = list(WORDS_OF)[i % 2]
    said = rng.choice(WORDS_OF[kind], int(rng.integers(1, 4)))
    rows.append([f"The {rng.choice(THINGS)} was {' and '.join(said)}.", kind])
  write_table(folder, ["text", "label"], rows)


def pictures_with_questions(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """A table of pictures, `metadata.csv`, with three questions about each: its colour, its shape,
  and whether it has one of the three colours. Who sees nothing is right of a third of the first two
  and of half of the last."""
  folder.mkdir()
  rows = []
  for i in range(count):
    colour, shape = list(COLOURS)[i % 3], SHAPES[i // 3 % 3]
    draw(shape, COLOURS[colour], rng).save(folder / f"{i}.png")
    asked = colour if rng.uniform() < 0.5 else list(COLOURS)[(i + 1) % 3]
    rows.append([f"{i}.png", "what colour is it?", colour])
    rows.append([f"{i}.png", "what shape is it?", shape])
    rows.append([f"{i}.png", f"is it {asked}?", "yes" if asked == colour else "no"])
  write_table(folder, ["image", "question", "answer"], rows)


def several_media(folder: pathlib.Path, count: int, rng: np.random.Generator) -> None:
  """A table of a picture, a sound and a series a row. The label takes the picture and the sound."""
  folder.mkdir()
  kinds = list(itertools.product(COLOURS, HERTZ))
  rows = []
  for i in range(count):
    colour, pitch = kinds[i % len(kinds)]
    draw(SHAPES[i // 6 % 3], COLOURS[colour], rng).save(folder / f"{i}.png")
    hertz = HERTZ[pitch] * rng.uniform(0.8, 1.25)
    tone = 0.3 * np.sin(2 * math.pi * hertz * np.arange(RATE // 2) / RATE)
    soundfile.write(folder / f"{i}.wav", tone + 0.02 * rng.normal(size=tone.size), RATE)
    write_series(folder / f"{i}.csv", wave(3, rng))
    rows.append([f"{i}.png", f"{i}.wav", f"{i}.csv", f"{colour} {pitch}"])
  write_table(folder, ["image", "audio", "series", "label"], rows)
