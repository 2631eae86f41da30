"""mmjax/README.md, "Adding your own": its files are taken out as they stand, and its commands run
with them.
"""

from __future__ import annotations

import json
import re
import shlex
import sys

import pytest

import mmjax
from mmjax import cli
from mmjax.config import ConfigError, UserError
from mmjax.data.builders import build
from mmjax.kinds import KINDS, kind_function
from tests.guides import blocks, commands, read

SECTION = read("mmjax/README.md", "## Adding your own")
FILES = {re.match(r"# (\w+\.py) ", block)[1]: block for block in blocks(SECTION, "python")}
COMMANDS = commands(SECTION)
PARTS = {
  "encoder": "my_encoder:mixer",
  "fusion": "my_fusion:product",
  "objective": "my_objective:spread",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """(folder, run folder) after the commands, run in the folder of the files with two steps of
  training.
  """
  folder = tmp_path_factory.mktemp("own")
  for name, text in FILES.items():
    (folder / name).write_text(text)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setenv("MMJAX_DATA", str(folder / "data"))
    patch.setattr(sys, "path", [*sys.path])
    for command in COMMANDS:
      words = shlex.split(command)[1:]
      assert (
        cli.main(
          [
            *words,
            *(["--config.train.steps=2", "--config.log.every=1"] if words[0] == "train" else []),
          ]
        )
        == 0
      ), command
    yield folder, folder / "runs" / "squares"


def test_each_example_is_one_short_file():
  assert {"my_encoder.py", "my_fusion.py", "my_objective.py", "my_data.py"} < set(FILES)
  assert all(
    len(text.strip().splitlines()) < 40 and max(map(len, text.splitlines())) <= 120
    for text in FILES.values()
  )


def test_a_run_with_all_of_them_trains_and_is_evaluated(place):
  _, run = place
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [1, 2]
  assert all(
    {"spread/distance", "classes/accuracy"} <= set(line) for line in lines if "loss" in line
  )
  assert 0 <= json.loads((run / "eval.json").read_text())["classes"]["accuracy"] <= 1


def test_a_line_in_the_registry_gives_a_short_name(place, monkeypatch):
  for group, target in PARTS.items():
    monkeypatch.setitem(KINDS[group], "mine", target)
    assert kind_function({"kind": "mine"}, group) is kind_function({"kind": target}, group)
  c = mmjax.config.base()
  c.model = dict(
    name="fusion_encoder", fusion=dict(kind="mine"), encoders=dict(image=dict(kind="mine", depth=1))
  )
  resolved = mmjax.config.resolve(c)
  assert resolved.model.encoders.image.patch == 8 and resolved.model.fusion.width == 0
  with pytest.raises(
    ConfigError, match=r"unknown key model\.encoders\.image\.dept\. Did you mean 'depth'"
  ):
    mmjax.config.resolve(
      dict(
        c.to_dict(), model=dict(c.model.to_dict(), encoders=dict(image=dict(kind="mine", dept=1)))
      )
    )


def test_a_builder_is_found_by_its_function_and_a_second_build_changes_nothing(place):
  folder, _ = place
  said = []
  assert (
    build("my_data:build", folder / "data", said.append) == folder / "data" / "squares" / "1.0.0"
  )
  assert "train 192, test 48" in said[-1]
  with pytest.raises(UserError, match=r"kind 'my_data:biuld'"):
    build("my_data:biuld", folder / "data")
