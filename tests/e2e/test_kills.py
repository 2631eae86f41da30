"""200 kills at random moments over seven commands: what comes of them is what an unbroken one
makes, and whatever is there in between under its final name is whole."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import pytest

from mmjax.data.builders import find_version
from mmjax.data.sources import open_source
from mmjax.state import checkpoint
from tests.e2e import squares
from tests.e2e.commands import command, environment, metrics, parameters

KILLS = {
  "tokenizer": 45, "build": 45, "convert": 40, "import": 25, "export": 20, "eval": 15, "train": 15
}  # fmt: skip
CONVERT = """
import sys
from mmjax.data.builders.convert import convert
convert("folder", sys.argv[1], "pictures", sys.argv[2], workers=2, shard_rows=8)
"""

pytestmark = pytest.mark.slow  # minutes of real processes


def test_there_are_two_hundred():
  assert sum(KILLS.values()) >= 200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A folder with the data set of squares, its tokenizer and config, and pictures to convert."""
  folder = tmp_path_factory.mktemp("world")
  squares.make(folder)
  source = folder / "pictures"
  for number, colour in enumerate([*squares.COLOURS] * 16):
    (source / colour).mkdir(parents=True, exist_ok=True)
    (source / colour / f"{number}.png").write_bytes(squares.picture(colour, number % 20))
  return folder


@pytest.fixture(scope="module")
def finished(world):
  """A run that nothing interrupted."""
  done(train(world, world / "run"), world)
  return world / "run"


@pytest.fixture(scope="module")
def foreign(world):
  """A folder of transformers."""
  import transformers

  config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    image_size=32, patch_size=8,
  )  # fmt: skip
  transformers.ViTModel(config).save_pretrained(world / "vit")
  processor = transformers.ViTImageProcessor(size=dict(height=32, width=32))
  processor.save_pretrained(world / "vit")
  return world / "vit"


def train(world, workdir) -> list[str]:
  return command("train", "--config", world / "tiny.py", "--workdir", workdir)


def start(words: list[str], world) -> subprocess.Popen:
  with mock.patch.dict(os.environ, MMJAX_DATA=str(world / "data")):
    env = environment(PYTHONUNBUFFERED="1")
  with open(world / "printed", "a") as printed:
    return subprocess.Popen(words, env=env, cwd=world, stdout=printed, stderr=printed)


def done(words: list[str], world) -> float:
  """Seconds that the command takes when nothing interrupts it."""
  begin = time.monotonic()
  assert start(words, world).wait() == 0, (world / "printed").read_text()[-3000:]
  return time.monotonic() - begin


def killed(
  name: str, words: list[str], world, look: Callable[[], object], forget: Callable[[], None]
) -> None:
  """Kills `words` KILLS[name] times; one that ends before its kill is undone by `forget`.

  look: what there is of its result, None = nothing under the final name; else it must be whole.
  """
  seconds = done(words, world)
  whole, moments = look(), random.Random(name)
  assert whole is not None
  forget()
  assert look() is None
  kills, ended, seen = 0, 0, 0  # seen: killed after the result was there, before the end
  while kills < KILLS[name]:
    process = start(words, world)
    try:
      code = process.wait(timeout=moments.uniform(0.2, 1.1) * seconds)
      assert code == 0, (world / "printed").read_text()[-3000:]
      ended += 1
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      kills += 1
    if (found := look()) is not None:
      assert found == whole, f"half-written after kill {kills} of {name}"
      seen += 1
      forget()
  done(words, world)
  assert look() == whole
  print(
    f"{name}: {kills} kills, of them {seen - ended} after the result was there; "
    f"{ended} starts ended before; {seconds:.1f} s unbroken"
  )


def tree(folder: pathlib.Path) -> str | None:
  """A digest of all files of a folder, None without it; but of the time and place in a summary."""
  if not folder.is_dir():
    return None
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
  return digest.hexdigest()


def remove(path: pathlib.Path) -> Callable[[], None]:
  def forget() -> None:
    import shutil

    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)

  return forget


def test_tokenizer(world):
  out = world / "data" / "tokenizers" / "killed.model"
  words = command(
    "data", "tokenizer", "--source", "squares", "--name", "killed", "--vocab-size", "400"
  )
  killed("tokenizer", words, world, lambda: out.read_bytes() if out.exists() else None, remove(out))


def test_build(world):
  data = world / "built"
  words = command("data", "build", "tests.e2e.squares:build", "--data-dir", data)

  def look():
    folder = find_version(data, "squares")
    return folder and (json.loads((folder / "metadata.json").read_text()), records(data))

  def records(data):
    entries = [dict(name="squares", split=split, languages=()) for split in ("train", "test")]
    opened = [open_source(entry, data) for entry in entries]
    return [source[row] for source in opened for row in range(len(source))]

  killed("build", words, world, look, remove(data / "squares" / "1.0.0"))
  assert not list((data / "squares").glob("incomplete*"))


def test_convert(world):
  data = world / "converted"
  words = [sys.executable, "-c", CONVERT, str(world / "pictures"), str(data)]
  killed(
    "convert",
    words,
    world,
    lambda: tree(find_version(data, "pictures") or data / "none"),
    remove(data / "pictures" / "1.0.0"),
  )
  names = {path.name for path in (data / "pictures").iterdir()}
  assert names <= {"1.0.0", "owner", "converting-train"}


def test_import(world, foreign):
  out = world / "imported"
  words = command("import", "--from", "hf", foreign, "--out", out)

  def look():
    if not out.exists():
      return None
    config = checkpoint.load_config(str(out)).to_dict()
    return parameters(out), checkpoint.load_assets(str(out)), config

  killed("import", words, world, look, remove(out))
  assert not list(world.glob(".imported*"))


def test_export(world, finished):
  out = world / "exported"
  words = command("export", "--checkpoint", finished, "--to", "safetensors", "--out", out)
  killed("export", words, world, lambda: tree(out), remove(out))
  assert not list(world.glob(".exported*"))


def test_eval(world, finished):
  out = world / "evaluated"
  words = command("eval", "--checkpoint", finished, "--out", out)

  def look():
    if not (out / "eval.json").exists():
      return None
    page = out / "report.html"
    assert not page.exists() or page.read_text().rstrip().endswith("</html>")
    return (out / "eval.json").read_bytes()

  killed("eval", words, world, look, remove(out))
  assert (out / "report.html").exists()
  made, run = json.loads(look()), json.loads((finished / "eval.json").read_text())
  for table in (made, run):  # beside its run a checkpoint is named from there, elsewhere in full
    for about in table["provenance"].values():
      assert (finished / about.pop("checkpoint")).samefile(finished / "checkpoints" / "24")
  assert made == run


def test_train(world, finished):
  """Killed again and again, the run goes on; then it equals the one that nothing interrupted."""
  run, moments, kills, runs = world / "killed", random.Random("train"), 0, 0
  seconds = done(train(world, world / "warm"), world)
  while kills < KILLS["train"]:
    runs += 1
    process = start(train(world, run), world)
    try:
      process.wait(timeout=moments.uniform(0.3, 1.0) * seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      kills += 1
    code = process.wait()
    assert code in (0, -9), (world / "printed").read_text()[-3000:]
    if code == 0 and kills < KILLS["train"]:  # done before the kill: another run
      same_run(run, finished)
      remove(run)()
  done(train(world, run), world)
  same_run(run, finished)
  print(f"train: {kills} kills in {runs} starts, {seconds:.1f} s unbroken")


def same_run(run: pathlib.Path, whole: pathlib.Path) -> None:
  assert metrics(run) == metrics(whole)
  assert parameters(run) == parameters(whole)
  assert (run / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
  assert json.loads((run / "summary.json").read_text())["finished"] == 24
  there = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
  assert there <= {path.name for path in run.iterdir()}
  assert sorted(os.listdir(run / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))
