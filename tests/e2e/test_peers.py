"""A process that fails before it has joined the others of its run ends them too; they say why."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from tests.e2e import squares
from tests.e2e.commands import command, environment

SECONDS = 100  # far below the 300 s that JAX waits for a process to join


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("world")
  squares.make(folder)
  (folder / "broken.py").write_text("def get_config(arg=''\n")
  return folder


@pytest.mark.parametrize(
  "process, words, says",
  [
    (0, ("--config", "{}/tiny.py", "--allow-changes"), "unknown argument '--allow-changes'"),
    pytest.param(
      1, ("--config", "{}/gone.py"), "gone.py: no such config file", marks=pytest.mark.slow
    ),
    pytest.param(0, ("--config", "{}/broken.py"), "SyntaxError", marks=pytest.mark.slow),
    pytest.param(
      1, ("--config", "{}/tiny.py", "--profile", "3"), "START:STOP", marks=pytest.mark.slow
    ),
  ],
)
def test_a_mistake_on_one_host_ends_all_with_it(process, words, says, world, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    where = f"localhost:{free.getsockname()[1]}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MMJAX_DATA", str(world / "data"))
    variables = environment(MMJAX_COORDINATOR=where, MMJAX_PROCESSES="2")
  wrong, good = [word.format(world) for word in words], ["--config", str(world / "tiny.py")]
  jobs = [
    subprocess.Popen(
      command("train", "--workdir", tmp_path / "run", *(wrong if number == process else good)),
      env=dict(variables, MMJAX_PROCESS_ID=str(number)),
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  try:
    told = [job.communicate(timeout=SECONDS)[1] for job in jobs]
  finally:
    for job in jobs:
      job.kill()
  assert [job.returncode for job in jobs] == [2, 2], told
  lines = [[line for line in text.splitlines() if line.startswith("mmjax: ")] for text in told]
  assert [len(found) for found in lines] == [1, 1] and says in lines[process][0], told
  other = lines[1 - process][0]
  assert other.startswith(f"mmjax: process {process} of 2: ") and says in other, other
  assert not os.path.exists(tmp_path / "run" / "checkpoints")
