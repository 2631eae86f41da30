"""Every launch script parses, is clean, explains itself, and does nothing when asked for a dry
run.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.guides import commands, read
from tests.launch.fakes import LAUNCH, ROOT

SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = ("--config", "configs/quickstart.py", "--workdir", "runs/my run", "--config.seed=3")
DRY = {
  "restart.sh": ("--dry-run", "--", "mmjax", "train", *TRAIN),
  "local_multiprocess.sh": ("2", "--dry-run", *TRAIN),
  "tpu_vm.sh": (
    "pod",
    "--zone",
    "z",
    "--create",
    "v5litepod-16",
    "--version",
    "v",
    "--dry-run",
    *TRAIN,
  ),
  "slurm.sbatch": ("--dry-run", *TRAIN),
  "gke_jobset.sh": ("--dry-run", *TRAIN),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_parses(script):
  subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
  found = shutil.which(
    "shellcheck", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
  )
  assert found, "pip install -e .[dev] brings shellcheck"
  done = subprocess.run(
    [found, "--external-sources", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", DRY)
def test_help_names_the_dry_run_and_gives_an_example(fakes, script):
  printed = fakes.run(script, "--help", cwd=ROOT)
  assert "--dry-run" in printed and "--config configs/" in printed


@pytest.mark.parametrize("script", DRY)
def test_a_dry_run_calls_and_writes_nothing(fakes, tmp_path, script):
  for name in (
    "mmjax",
    "gcloud",
    "kubectl",
    "srun",
    "scancel",
    "scontrol",
    "squeue",
    "tar",
    "ssh",
    "mktemp",
  ):
    fakes.add(name, "exit 9")
  fakes.environment["IMAGE"] = "mmjax:tpu"
  before = sorted(tmp_path.rglob("*"))
  printed = fakes.run(script, *DRY[script], cwd=ROOT)
  assert fakes.calls() == [] and sorted(tmp_path.rglob("*")) == before
  assert "quickstart.py" in printed and "--config.seed=3" in printed


@pytest.mark.parametrize(
  ("script", "words", "message"),
  [
    ("restart.sh", (), "Usage"),
    ("restart.sh", ("--max-restarts", "many", "true"), "whole number"),
    ("local_multiprocess.sh", ("--config", "x"), "Usage"),
    ("local_multiprocess.sh", ("2", "--devices", "x"), "whole number"),
    ("tpu_vm.sh", ("pod", "--config", "x"), "Usage"),
    ("tpu_vm.sh", ("pod", "--zone", "z"), "no --config"),
    (
      "tpu_vm.sh",
      ("pod", "--zone", "z", "--create", "v5litepod-16", "--config", "x"),
      "needs --version",
    ),
    ("gke_jobset.sh", ("--config", "x"), "set IMAGE"),
  ],
)
def test_bad_usage_is_named(fakes, script, words, message):
  assert message in fakes.run(script, *words, code=2)


COMMANDS = commands(read("launch/README.md", "## Several hosts"))


def test_the_guide_names_every_launcher():
  named = " ".join(COMMANDS)
  assert all(f"launch/{script}" in named for script in DRY)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_guide_are_understood(fakes, command):
  """As they stand there, but for --dry-run; sbatch gives its script what follows it."""
  fakes.add(
    "sbatch",
    'while [[ $1 = --* ]]; do shift; done; script=$1; shift; bash "$script" --dry-run "$@"',
  )
  options = "" if command.startswith("sbatch") else " --dry-run"
  command = re.sub(r"(launch/\w+\.sh(?: \d)?)", rf"\1{options}", command)
  done = subprocess.run(
    ["bash", "-c", command], cwd=ROOT, env=fakes.environment, capture_output=True, text=True
  )
  assert done.returncode == 0 and "quickstart.py" in done.stdout, done.stdout + done.stderr


def test_the_image_has_what_it_needs_and_no_privileges():
  lines = [
    line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and line[0] != "#"
  ]
  assert lines[0].startswith("FROM python:3.12-slim") and lines[-1] == 'ENTRYPOINT ["mmjax"]'
  assert next(line for line in reversed(lines) if line.startswith("USER ")) == "USER mmjax"
  copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
  kept = {
    line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
  }
  assert set(copied) == kept and all((ROOT / name).exists() for name in copied)
  named = set(re.findall(r'"([\w.]+\.(?:md|toml|py))"', (ROOT / "setup.py").read_text()))
  assert named <= kept | {"mmjax"}, "setup.py reads a file that the image lacks"


def test_no_path_or_address_of_one_machine():
  for path in LAUNCH.iterdir():
    text = path.read_text()
    assert not re.search(r"/root/|gcr\.io|pkg\.dev|docker\.io|10\.\d+\.\d+\.\d+", text), path
    if path.suffix == ".yaml":
      yaml.safe_load(re.sub(r"\$\{(\w+)\}", "1", text))
