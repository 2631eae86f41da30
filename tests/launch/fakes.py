"""Stand-ins on PATH for the programs that launchers call: each writes its arguments to a file, then
runs a few lines of bash.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


class Fakes:
  """A folder of fake programs; `calls()` is what was called, in order, one line a call."""

  def __init__(self, folder: pathlib.Path):
    self.bin, self.log = folder / "bin", folder / "calls"
    self.bin.mkdir()
    self.log.touch()
    self.environment = {
      k: v
      for k, v in os.environ.items()
      if not k.startswith(("SLURM_", "MMJAX_", "VIRTUAL_ENV", "DRY_RUN"))
    }
    self.environment.update(
      PATH=f"{self.bin}:{os.environ['PATH']}", CALLS=str(self.log), TMPDIR=str(folder)
    )

  def add(self, name: str, body: str = "") -> None:
    path = self.bin / name
    path.write_text(f'#!/usr/bin/env bash\nprintf \'%s\\n\' "{name} $*" >> "$CALLS"\n{body}\n')
    path.chmod(0o755)

  def calls(self, name: str = "") -> list[str]:
    return [line for line in self.log.read_text().splitlines() if line.startswith(name)]

  def start(self, script: str, *words: str, **settings) -> subprocess.Popen:
    # slurm.sbatch takes the .venv of its checkout unless one is active, which would hide the fakes.
    active = {"VIRTUAL_ENV": str(self.bin)} if script == "slurm.sbatch" else {}
    # A shell that runs the tests in the background has Ctrl-C ignored, and bash cannot trap what
    # was ignored when it started.
    return subprocess.Popen(
      ["bash", str(LAUNCH / script), *words],
      env=self.environment | active,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
      **settings,
    )

  def run(self, script: str, *words: str, code: int = 0, **settings) -> str:
    """Runs a launch script, checks its exit code, returns what it printed."""
    process = self.start(script, *words, **settings)
    try:
      printed = process.communicate(timeout=60)[0]
    finally:
      process.kill()
    assert process.returncode == code, f"exit code {process.returncode}\n{printed}"
    return printed
