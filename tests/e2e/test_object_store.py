"""A run in an object store, data and all, equals the run on the disk."""

from __future__ import annotations

import json
import os
import signal

import pytest
import requests

from mmjax import cli, files
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.training import evaluate, loop
from mmjax.training.metrics import MetricsFile
from tests.e2e.commands import (
  QUICKSTART,
  ROOT,
  SMALL,
  example_ids,
  metrics,
  parameters,
  read_until,
  run,
  run_processes,
  start,
)
from tests.guides import commands, read

FEW = [word.removeprefix("--") for word in SMALL] + [
  "config.train.steps=6",
  "config.checkpoint.every=3",
  "config.evaluation.every=0",
  "config.log.tensorboard=True",
]


def copy(url, folder):
  """Everything at a URL but the checkpoints, in a folder of this machine."""
  for name in files.sizes(url):
    if not name.startswith("checkpoints/"):
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes((files.as_path(url) / name).read_bytes())
  return folder


@pytest.fixture(scope="module")
def data(object_store, embedded_data):
  """The URL of a copy of the embedded data."""
  url = files.as_path("s3://bucket/data")
  for path in [*embedded_data.glob("openmoji/*/*"), *embedded_data.glob("tokenizers/*")]:
    (url / path.relative_to(embedded_data).as_posix()).write_bytes(path.read_bytes())
  return str(url)


def test_a_run_that_fails_and_goes_on_in_a_store_equals_one_on_the_disk(
  data, tmp_path, monkeypatch, capsys
):
  assert loop.train(configs.load(QUICKSTART, FEW), tmp_path / "here") == 0
  monkeypatch.setenv("MMJAX_DATA", data)
  config, url = configs.load(QUICKSTART, FEW), "s3://bucket/runs/a"
  write = MetricsFile.write

  def fail(self, row):
    if row["step"] == 5:
      raise KeyboardInterrupt
    write(self, row)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(MetricsFile, "write", fail)
    loop.train(config, url)
  assert [row["step"] for row in metrics(copy(url, tmp_path / "broken"))] == [1, 2, 3, 4]
  assert loop.train(config, url) == 0
  assert "resume s3://bucket/runs/a at step 3 of 6" in capsys.readouterr().out
  there = copy(url, tmp_path / "there")
  assert metrics(there) == metrics(tmp_path / "here")
  assert parameters(url) == parameters(tmp_path / "here")
  assert {"config.json", "goodput.json", "metrics.jsonl", "report.html", "tensorboard"} <= set(
    os.listdir(there)
  )
  assert json.loads((there / "goodput.json").read_text())["seconds"]["stopped"] > 0
  assert loop.train(config, url) == 0 and "is complete" in capsys.readouterr().out

  (files.as_path(url) / "eval.json").write_text('{"other": {"a": 1.0}}')
  table = evaluate.evaluate(url, suite="zero_shot/*")
  written = json.loads((files.as_path(url) / "eval.json").read_text())
  assert list(written.pop("provenance")) == list(table)
  assert written == {"other": {"a": 1.0}} | table
  assert (
    "wrote s3://bucket/runs/a/eval.json and s3://bucket/runs/a/report.html"
    in capsys.readouterr().out
  )
  with pytest.raises(
    UserError, match="s3://bucket/runs/a holds a run with other settings: optimizer.lr"
  ):
    loop.train(configs.load(QUICKSTART, [*FEW, "config.optimizer.lr=0.5"]), url)


def test_a_bucket_that_cannot_be_written_is_one_line(object_store, embedded_data, capsys):
  def refused(workdir, *words):
    assert cli.main(["train", "--config", QUICKSTART, "--workdir", workdir, *SMALL]) == 1
    line = capsys.readouterr().err.splitlines()
    assert len(line) == 1 and all(
      word in line[0] for word in (*words, workdir, "Check the bucket's name")
    ), line

  refused("s3://nobody/run", "bucket does not exist")
  # From now on credentials count, and nobody knows these.
  requests.post(f"{object_store}/moto-api/reset-auth", data="0", timeout=10)
  try:
    refused("s3://bucket/run", "Forbidden")
  finally:
    requests.post(f"{object_store}/moto-api/reset-auth", data="inf", timeout=10)


def test_the_commands_of_the_guide_run(data, monkeypatch):
  """As they stand there but for the folder of the run, by a smaller model."""
  monkeypatch.chdir(ROOT)
  lines = commands(read("launch/README.md", "## Object stores"))
  assert len(lines) == 3 and lines[0].startswith("pip install ")
  for line in lines[1:]:
    variables, _, words = line.replace("runs/a", "runs/guide").partition("mmjax ")
    for variable in variables.split():
      monkeypatch.setenv(*variable.split("=", 1))
    more = [*SMALL, *(f"--{word}" for word in FEW)] if words.startswith("train") else []
    assert cli.main([*words.split(), *more]) == 0, line
  assert (files.as_path("s3://bucket/runs/guide") / "eval.json").exists()


@pytest.mark.slow
def test_killed_in_a_store_equals_the_unbroken_run_on_the_disk(data, object_store, tmp_path):
  run("train", "--config", QUICKSTART, "--workdir", str(tmp_path / "here"), *SMALL)
  words = (
    "train",
    "--config",
    QUICKSTART,
    "--workdir",
    "s3://bucket/runs/killed",
    *SMALL,
    f"--config.data.dir={data}",
  )
  cache = dict(MMJAX_CACHE=os.environ["MMJAX_CACHE"])
  for when in ("examples an epoch", "step 5/24", "step 9/24", "step 12/24", "step 18/24"):
    process = start(*words, **cache)
    read_until(process, when)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  process = start(*words, **cache)
  read_until(process, "step 21/24")
  process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == 75
  run(*words, **cache)
  assert metrics(copy("s3://bucket/runs/killed", tmp_path / "there")) == metrics(tmp_path / "here")
  assert parameters("s3://bucket/runs/killed") == parameters(tmp_path / "here")


@pytest.mark.slow
def test_two_processes_write_what_one_reads(data, object_store, tmp_path):
  run("train", "--config", QUICKSTART, "--workdir", str(tmp_path / "here"), *SMALL)
  url, cache = "s3://bucket/runs/two", dict(MMJAX_CACHE=os.environ["MMJAX_CACHE"])
  words = (
    "train",
    "--config",
    QUICKSTART,
    "--workdir",
    url,
    *SMALL,
    f"--config.data.dir={data}",
    "--allow-change",
  )
  run_processes(
    2,
    *words,
    "--config.train.steps=12",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.sharding=fsdp",
    devices=2,
    **cache,
  )
  assert sum("ocdbt.process_1/d/" in name for name in files.sizes(f"{url}/checkpoints/12")) > 0
  run(*words, **cache)
  assert example_ids(metrics(copy(url, tmp_path / "there"))) == example_ids(
    metrics(tmp_path / "here")
  )
