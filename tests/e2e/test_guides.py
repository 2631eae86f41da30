"""Every `mmjax` command and every program of the guides runs as it is written, on small data in a
folder of its own. Recipes, which take minutes each, are in test_recipes.py, launchers in
tests/launch.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import urllib.request

import numpy as np
import pytest
from PIL import Image

from mmjax import cli
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_video import clip
from tests.data.test_video import encode as encode_video
from tests.e2e.commands import ROOT, SMALL, command, environment, read_until, start
from tests.guides import blocks, commands, read
from tests.inference import tiny
from tests.inference.test_language import config as language_config

TEXTS = {  # in the order in which they are run
  # without "A config that fits", which test_init.py runs
  "configs/README.md": re.sub(
    r"\n## A config that fits\n.*?(?=\n## )",
    "",
    read("configs/README.md").split("\n### easy_vqa\n")[0],
    flags=re.S,
  ),
  "mmjax/README.md": read("mmjax/README.md").split("\n## Adding your own\n")[0],
  "mmjax/data/README.md": read("mmjax/data/README.md"),
  "launch/README.md": read("launch/README.md", "## Train, stop, resume")
  + read("launch/README.md", "## See what a run does"),
}
COMMANDS = [
  command for text in TEXTS.values() for command in commands(text) if command.startswith("mmjax ")
]


def picture(seed: int) -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(
    out, "PNG"
  )
  return out.getvalue()


def make_inputs(folder: pathlib.Path) -> None:
  """What the guides' commands name: photos/, speech/, shards/, parts/, path/to/clip-folder, and the
  annotations that stand in mmjax/data/README.md, with the media that these name.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq
  import torch
  from transformers import CLIPConfig, CLIPModel

  for name in ("photos", "speech", "shards", "parts", "path/to"):
    (folder / name).mkdir(parents=True)
  for name, kind in (("a.wav", "WAV"), ("b.flac", "FLAC")):
    (folder / "speech" / name).write_bytes(sound(tone(0.3, 22_050), 22_050, kind=kind))
    (folder / "speech" / name).with_suffix(".txt").write_text("a red heart")
  for i in range(6):
    (folder / "photos" / f"{i}.png").write_bytes(picture(i))
    (folder / "photos" / f"{i}.txt").write_text(
      f"a red heart, number {i}, with a green frame and {i} dots"
    )
  shown = re.findall(
    r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", TEXTS["mmjax/data/README.md"], re.S | re.M
  )
  assert len(shown) >= 7
  for name, text in shown:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
  (folder / "latin.csv").write_bytes((folder / "odd.csv").read_text().encode("cp1252"))
  for folder_name in ("val", "talk"):
    (folder / folder_name).mkdir()
  for number in range(42, 48):
    (folder / "val" / f"{number:012d}.jpg").write_bytes(picture(number))
  make_folders(folder)
  (folder / "talk" / "one.wav").write_bytes(sound(tone(0.3, 16_000), 16_000, kind="WAV"))
  for i in range(10):
    with tarfile.open(folder / "shards" / f"{i:05d}.tar", "w") as tar:
      for name, data in ((f"{i}.png", picture(i)), (f"{i}.txt", b"a caption")):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  pq.write_table(
    pa.table(dict(image=[picture(i) for i in range(4)], caption=[f"words {i}" for i in range(4)])),
    folder / "parts" / "a.parquet",
  )
  for name in ("a.png", "b.png"):
    (folder / name).write_bytes(picture(7))
  torch.manual_seed(0)
  tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
  CLIPModel(
    CLIPConfig(
      text_config=dict(
        **tower,
        vocab_size=64,
        max_position_embeddings=16,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
      ),
      vision_config=dict(**tower, image_size=32, patch_size=16),
      projection_dim=16,
    )
  ).save_pretrained(folder / "path/to/clip-folder")
  (folder / "path/to/clip-folder/preprocessor_config.json").write_text(
    json.dumps(
      dict(
        crop_size=dict(height=32, width=32),
        size=dict(shortest_edge=32),
        do_resize=True,
        do_center_crop=True,
        do_normalize=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        resample=3,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_processor_type="CLIPImageProcessor",
      )
    )
  )
  from tokenizers import Tokenizer, models, pre_tokenizers, processors

  vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{chr(97 + i): 3 + i for i in range(26)}}
  tokenizer = Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
  )
  tokenizer.save(str(folder / "path/to/clip-folder/tokenizer.json"))
  (folder / "path/to/clip-folder/tokenizer_config.json").write_text(
    json.dumps(
      dict(
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        model_max_length=16,
        tokenizer_class="PreTrainedTokenizerFast",
      )
    )
  )


def make_folders(folder: pathlib.Path) -> None:
  """Own files without a table: of classes, of splits, of sensors, of clips, of several media."""
  series = "\n".join(["x,y", "0.1,9.8", "0.2,9.7"])
  film = encode_video(clip(6))
  for name, data in {
    "animals/cat/a.png": picture(1),
    "animals/dog/b.png": picture(2),
    "divided/train/cat/a.png": picture(1),
    "divided/val/dog/b.png": picture(2),
    "divided/test/cat/c.png": picture(3),
    "walks/run/a.csv": series.encode(),
    "walks/sit/b.csv": series.encode(),
    "clips/a.mkv": film,
    "clips/a.txt": b"it moves",
    "scenes/a.png": picture(4),
    "scenes/a.wav": sound(tone(0.3, 16_000), 16_000, kind="WAV"),
    "scenes/a.csv": series.encode(),
    "scenes/a.txt": b"a green thing",
    "books/one.txt": b"A cat sat.\n\nIt slept.",
    "books/more/two.md": b"A dog ran.",
  }.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def make_models(folder: pathlib.Path) -> None:
  """Small models of random parameters in the place of two recipes' runs."""
  for name, kind, encoders, more in (
    ("speech_text", "dual_encoder", ("audio", "text"), {}),
    ("speech_recognition", "captioner", ("audio",), {"model.decoder": dict(depth=1, heads=2)}),
  ):
    (folder / name).mkdir()
    tiny.save(tiny.media_config(kind, encoders, **more), folder / name).rename(
      folder / "runs" / name
    )
  (folder / "answers").mkdir()
  tiny.save(language_config(), folder / "answers").rename(folder / "runs" / "answers")


def served(words: list[str]) -> int:
  """The exit code of a server that is asked to end once it has answered. Its port is free."""
  process = start(*words, "--port", "0")
  try:
    (address,) = re.findall(r"http://127.0.0.1:\d+", read_until(process, "serving runs/")[-1])
    with urllib.request.urlopen(f"{address}/health", timeout=60) as answer:
      assert answer.status == 200
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
  finally:
    process.kill()
  return process.returncode


def talked(words: list[str]) -> int:
  """The exit code of a chat of one message, whose answer is printed."""
  done = subprocess.run(
    command(*words, "--max-length", "4"),
    input="once upon\n",
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.stdout.strip(), done.stderr
  return done.returncode


APART = {"serve": served, "chat": talked}  # they wait for somebody: each in a process of its own


@pytest.fixture(scope="module")
def place(tmp_path_factory, embedded_data):
  """A folder where the guides' commands have been run, in their order; (folder, {command: exit
  code}).
  """
  folder = tmp_path_factory.mktemp("guides")
  make_inputs(folder)
  (folder / "configs").symlink_to(ROOT / "configs")
  before, data = os.getcwd(), os.environ["MMJAX_DATA"]
  mine = folder / "data"
  mine.mkdir()
  for path in pathlib.Path(data).iterdir():
    if path.name == "openmoji":
      (mine / path.name).symlink_to(path)
  (mine / "tokenizers").mkdir()
  (mine / "tokenizers" / "quickstart.model").symlink_to(
    pathlib.Path(data) / "tokenizers" / "quickstart.model"
  )
  os.environ["MMJAX_DATA"] = str(mine)
  os.chdir(folder)
  try:
    # What `bash launch/quickstart.sh` leaves behind, from a smaller model.
    small = [*SMALL, "--config.train.steps=2", "--config.evaluation.every=0"]
    done = {}
    assert (
      cli.main(
        ["train", "--config", "configs/quickstart.py", "--workdir", "runs/quickstart", *small]
      )
      == 0
    )
    make_models(folder)
    for line in COMMANDS:
      words = shlex.split(line)[1:]
      if words[0] in APART:
        done[line] = APART[words[0]](words)
      else:
        traced = ["--config.train.steps=13"] if "--profile" in words else []
        done[line] = cli.main([*words, *([*small, *traced] if words[0] == "train" else [])])
    yield folder, done
  finally:
    os.chdir(before)
    os.environ["MMJAX_DATA"] = data


def program(text: str, word: str) -> str:
  """The Python block of a guide that has this word."""
  (found,) = [block for block in blocks(text, "python") if word in block]
  return found


def python(folder: pathlib.Path, code: str) -> str:
  """What a program prints, run in a process of its own in `folder`."""
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=folder,
    env=environment(),
    check=True,
    capture_output=True,
    text=True,
  ).stdout


def test_there_are_commands_of_every_kind():
  first = {" ".join(command.split()[1:3]) for command in COMMANDS}
  assert first >= {
    *("data build", "data convert", "data show", "data tokenizer"),
    *("config show", "config keys", "config kinds", "import --from", "export --checkpoint"),
    *("train --config", "eval --checkpoint", "embed --checkpoint", "search --checkpoint"),
    "generate --checkpoint",
  }


def test_every_command_runs(place):
  assert {command: code for command, code in place[1].items() if code} == {}


def test_six_lines_of_the_readme_and_those_of_the_guide_run(place):
  first = program(read("README.md"), "mmjax.load")
  assert len(first.strip().splitlines()) == 6
  shapes = "print(pictures.shape, texts.shape, best.shape, share.shape)"
  guide = program(read("mmjax/README.md"), 'mmjax.load("runs/quickstart")')
  done = python(place[0], f"{first}{shapes}\n{guide}print(images.shape, texts.shape)")
  assert done.splitlines() == ["(2, 16) (2, 16) (2,) (1, 2)", "(2, 16) (2, 16)"]


def test_the_example_of_language_models_runs(place):
  code = program(read("mmjax/README.md"), 'mmjax.load("runs/answers")')
  shown = "print()\nprint(len(answers), len(drawn), odds.shape)"
  assert python(place[0], f"{code}{shown}").splitlines()[-1] == "1 1 (1, 2)"


def test_the_example_of_sound_runs(place):
  code = program(read("mmjax/README.md"), "encode_audio")
  python(place[0], code + "\nassert len(texts) == 1")


def test_the_recall_by_numpy_is_the_evaluators(place):
  folder, _ = place
  scores = json.loads((folder / "runs/quickstart/eval.json").read_text())
  printed = float(python(folder, program(read("configs/README.md"), "e.npz")))
  assert printed == pytest.approx(scores["retrieval/combinations"]["image_to_text/R@1"])


def test_the_stablehlo_loader_is_ten_statements_and_runs(place):
  code = program(read("mmjax/README.md"), "deserialize")
  assert len(ast.parse(code).body) <= 10
  blocked = (
    "import sys\nfor name in ('mmjax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', "
    "'sentencepiece'): sys.modules[name] = None\n"
  )
  python(place[0], blocked + code)


def test_converters_read_all_of_the_examples_shown(place):
  """Each form gives the records and the captions that the guide's example has."""
  folder, _ = place

  def metadata(name):
    from mmjax.data.builders import find_version

    newest = find_version(folder / "data", name)
    return json.loads((newest / "metadata.json").read_text())

  def sizes(name):
    from mmjax.data.builders import find_version, split_sizes

    return split_sizes(find_version(folder / "data", name))

  assert sizes("coco") == sizes("questions") == sizes("chat") == {"train": 2}
  assert sizes("table") == {"test": 1, "train": 1}
  assert sizes("mine") == sizes("mine_too") == {"train": 4}
  assert sizes("animals") == {"train": 2} and metadata("animals")["labels"] == ["cat", "dog"]
  assert sizes("divided") == {"test": 1, "train": 1, "validation": 1}
  assert sizes("whole") == {"all": 3} and metadata("divided")["labels"] == ["cat", "dog"]
  assert metadata("walks")["fields"] == ["series"] and metadata("walks")["labels"] == ["run", "sit"]
  assert metadata("clips")["fields"] == ["video"]
  assert (
    metadata("scenes")["fields"] == ["image", "audio", "series"] and sizes("scenes")["train"] == 1
  )
  assert sizes("tags") == {"train": 6} and metadata("price")["values"] == ["price", "area"]
  assert metadata("state")["labels"] == ["poor", "fair", "good"] and sizes("near") == {"train": 1}
  assert sum(sizes("halves").values()) == 5 and len(sizes("halves")) == 2
  assert sizes("books") == sizes("notes") == {"train": 2} and metadata("books")["fields"] == []
  assert sizes("odd") == {"train": 2, "test": 2} and metadata("odd")["languages"] == ["de", "en"]
  assert sizes("latin") == {"train": 2} and sizes("web") == {"train": 10}
  assert metadata("questions")["answers"] == ["a farmer", "yes"]
  assert (folder / "elsewhere" / "odd").is_dir()
