"""What happens to machines: stopped and interrupted processes, dead workers, full disks, folders
that vanish, thousands of steps. A run goes on as if nothing had been, or ends in one line and loses
nothing.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from tests.e2e import squares
from tests.e2e.commands import (
  ROOT,
  command,
  environment,
  metrics,
  parameters,
  read_until,
  run,
  start,
  used,
)

pytestmark = pytest.mark.slow  # a dozen real processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A folder with the squares, whose data every command in here finds."""
  folder = tmp_path_factory.mktemp("world")
  squares.make(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MMJAX_DATA", str(folder / "data"))
    yield folder


@pytest.fixture(scope="module")
def whole(world):
  run(*train(world, world / "whole"))
  return world / "whole"


def train(world, workdir, *overrides: str) -> list[str]:
  words = ["train", "--config", str(world / "tiny.py"), "--workdir", str(workdir)]
  return [*words, *(f"--config.{word}" for word in overrides)]


def same(folder: pathlib.Path, whole: pathlib.Path) -> None:
  assert metrics(folder) == metrics(whole) and parameters(folder) == parameters(whole)
  assert (folder / "report.html").exists() and (folder / "summary.json").exists()


def one_line(printed: str) -> str:
  """The one line that a failed command says last, without a traceback."""
  lines = [line for line in printed.splitlines() if line.startswith("mmjax: ")]
  assert lines and "Traceback" not in printed, printed[-3000:]
  return lines[-1]


def children(pid: int) -> list[int]:
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[1]) == pid:
      found.append(int(path.parent.name))
  return found


def test_interrupted_twice(world, whole, tmp_path):
  process = start(*train(world, tmp_path))
  read_until(process, "step 6/24")
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGINT)
  printed = process.communicate(timeout=60)[0]
  assert process.returncode in (1, 75) and "Traceback" not in printed, printed[-3000:]
  run(*train(world, tmp_path))
  same(tmp_path, whole)


def test_stopped_and_continued(world, whole, tmp_path):
  process = start(*train(world, tmp_path))
  for words in ("examples an epoch", "step 6/24", "step 17/24"):
    read_until(process, words)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.send_signal(signal.SIGCONT)
  assert process.communicate(timeout=200)[0] is not None and process.returncode == 0
  same(tmp_path, whole)


def test_a_data_worker_that_dies(world, whole, tmp_path):
  long = ("data.workers=1", "train.steps=4000", "evaluation.every=0", "checkpoint.every=10")
  process = start(*train(world, tmp_path, *long))
  read_until(process, "step 12/4000")
  workers = [pid for pid in children(process.pid) if b"spawn" in cmdline(pid)]
  assert workers
  for pid in workers:
    os.kill(pid, signal.SIGKILL)
  printed = process.communicate(timeout=200)[0]
  assert process.returncode == 1 and "worker" in one_line(printed).lower(), printed[-3000:]
  saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  run(*train(world, tmp_path, *long, f"train.steps={saved + 2}"), "--allow-change")
  assert [row["step"] for row in metrics(tmp_path)] == list(range(1, saved + 3))


def cmdline(pid: int) -> bytes:
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  except OSError:
    return b""


@pytest.mark.parametrize("name", ["build", "convert", "tokenizer", "export", "embed", "train"])
def test_a_disk_that_is_full(world, whole, tmp_path, name):
  """Files over 4 KiB cannot be written."""
  pictures = tmp_path / "pictures" / "red"
  pictures.mkdir(parents=True)
  for number in range(40):
    (pictures / f"{number}.png").write_bytes(squares.picture("red", number % 20))
  out = tmp_path / "out"
  words = {
    "build": ["data", "build", "tests.e2e.squares:build", "--data-dir", out],
    "convert": ["data", "convert", "folder", pictures.parent, "--name", "red", "--data-dir", out],
    "tokenizer": ["data", "tokenizer", "--source", "squares", "--name", "full"],
    "export": ["export", "--checkpoint", whole, "--to", "safetensors", "--out", out],
    "embed": ["embed", "--checkpoint", whole, "--images", pictures, "--out", out],
    "train": train(world, out),
  }[name]
  limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 4; exec "$@"', "limited", *command(*words)]
  env = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  done = subprocess.run(limited, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
  assert "cannot" in one_line(done.stderr) or "could not" in one_line(done.stderr)
  assert not list(out.glob("*/*/dataset_info.json")) and not (out / "model.safetensors").exists()
  assert not (world / "data" / "tokenizers" / "full.model").exists()
  if name in ("build", "convert", "export", "train"):
    run(*words)  # with space, the same command does its work


def test_a_run_folder_that_vanishes(world, whole, tmp_path):
  process = start(*train(world, tmp_path / "run", "train.steps=4000", "evaluation.every=0"))
  read_until(process, "step 6/4000")
  shutil.rmtree(tmp_path / "run", ignore_errors=True)
  lines = read_until(process, "step 400/4000")
  process.send_signal(signal.SIGTERM)
  printed = "".join(lines) + process.communicate(timeout=100)[0]
  assert process.returncode in (1, 75) and "Traceback" not in printed, printed[-3000:]
  run(*train(world, tmp_path / "run"), "--allow-change", code=None)


TRUNCATES = """
import os, pathlib
from mmjax.data.pipeline import Pipeline

make, data = Pipeline._make, pathlib.Path({data!r})

def made(self, step):
  if step == 11 and (data / "goes").exists():
    os.truncate(next(data.glob("squares/*/*train*")), 0)
  return make(self, step)

Pipeline._make = made
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_goes_away_and_comes_back(world, whole, tmp_path, workers):
  """While step 12 is read, and between that and the next start; in a worker process, too."""
  data, away = tmp_path / "data", tmp_path / "away"
  shutil.copytree(world / "data", data)
  (data / "goes").touch()
  (tmp_path / "sitecustomize.py").write_text(TRUNCATES.format(data=str(data)))
  words = train(world, tmp_path / "run", f"data.workers={workers}", "data.prefetch=1")
  env = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "MMJAX_DATA": str(data)}

  def start_again(code: int) -> str:
    done = subprocess.run(command(*words), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr

  assert "went away while it was read" in one_line(start_again(1))
  assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
  data.rename(away)
  assert "squares" in one_line(start_again(1)) and (tmp_path / "run" / "checkpoints" / "4").is_dir()
  shutil.copytree(world / "data", data)
  start_again(0)
  same(tmp_path / "run", whole)


def test_three_thousand_steps_grow_nothing(world, tmp_path):
  words = ("train.steps=3000", "evaluation.every=500", "checkpoint.every=100", "data.workers=0")
  process = start(*train(world, tmp_path, *words))
  seen = {}
  for step in (600, 1200, 2900):
    read_until(process, f"step {step}/3000")
    seen[step] = used(process.pid)
  process.communicate(timeout=300)
  print(seen)
  assert process.returncode == 0
  memory, files, threads = (
    [seen[step][name] for step in seen] for name in ("memory", "files", "threads")
  )
  assert memory[2] - memory[1] < 24, seen
  assert files[2] <= files[1] + 2 and threads[2] <= threads[1] + 2, seen


# Root may write everywhere, but for a process without these capabilities.
LIMITS = ("--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
def test_a_folder_that_cannot_be_written_is_named_and_stays_as_it_was(world, whole, tmp_path):
  closed, photos = tmp_path / "closed", tmp_path / "photos"
  photos.mkdir()
  (photos / "a.png").write_bytes(squares.picture("red"))
  (photos / "a.txt").write_text("a red square")
  (closed / "run").mkdir(parents=True)
  for folder in (closed / "run", closed):
    folder.chmod(0o555)
  into = ("--name", "mine", "--data-dir", closed)
  for words in (
    train(world, closed / "run"),
    train(world, closed / "new"),
    ("data", "convert", "folder", photos, *into, "--workers", "1"),
    ("data", "build", "easy_vqa", "--data-dir", closed),
    ("export", "--checkpoint", whole, "--to", "safetensors", "--out", closed / "model"),
    ("embed", "--checkpoint", whole, "--images", photos, "--out", closed / "e.npz"),
  ):
    limited = [*(["setpriv", *LIMITS] if os.geteuid() == 0 else []), *command(*words)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    line = one_line(done.stderr)
    assert done.returncode == 1 and str(closed) in line, line
    assert "cannot be written" in line or "cannot write" in line, line
  assert [path.name for path in closed.rglob("*")] == ["run"]


def test_a_clock_that_runs_backwards_changes_nothing(world, whole, tmp_path):
  (tmp_path / "sitecustomize.py").write_text(
    "import time\n"
    "real, began = time.time, time.time()\n"
    "time.time = lambda: began - 100 * (real() - began)\n"
  )
  backwards = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
  for words in (
    train(world, tmp_path / "run"),
    train(world, tmp_path / "run"),  # it is complete
    ("eval", "--checkpoint", tmp_path / "run"),
    ("export", "--checkpoint", tmp_path / "run", "--to", "safetensors", "--out", tmp_path / "out"),
  ):
    done = subprocess.run(
      command(*words), env=backwards, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
  same(tmp_path / "run", whole)
  assert (tmp_path / "out" / "model.safetensors").exists()
