"""Every `mmjax plan` of the guide is run as it stands there, of a small copy of its config, in a
process of its own: for the slice by the TPU compiler where libtpu is installed, else on as many
simulated devices.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests.guides import ROOT, commands, read

COMMANDS = [line for line in commands(read("launch/README.md")) if line.startswith("mmjax plan")]
TOWER = "width=256 depth=2 heads=4 mlp=512"
DUAL = {f"model.encoders.{name}": TOWER for name in ("image", "text")}
WORDS = {"data.text": "vocab_size=512", "data.sequence": "length=64"}
SEEN = {"model.encoders.image": f"{TOWER} patch=16", "data.image": "size=64"}
LANGUAGE = {"model": "width=256 depth=2 heads=4 mlp=512 eos_id=2 pad_id=0", **WORDS}
SMALL = {  # config -> {what the settings begin with: settings}
  "siglip_b16": dict(DUAL, **{"model": "width=256"}),
  "siglip_so400m14": dict(DUAL, **{"model": "width=256"}),
  "captioner_7b": {
    "model": "width=256",
    "model.encoders.image": TOWER,
    "model.decoder": "depth=2 heads=4 mlp=512",
    "data.text": "vocab_size=512 length=32",
  },
  "words_1b": dict(LANGUAGE, **{"model.block": "key_value_heads=2"}),
  "multimodal_8b": {
    **LANGUAGE,
    **SEEN,
    "data.text": "vocab_size=512 pad_id=0",
    "data.sequence": "length=64 image=4 slots=2",
    "model.block": "key_value_heads=2",
  },
  "answers_lora_7b": {
    **LANGUAGE,
    **SEEN,
    "data.text": "vocab_size=512 pad_id=0",
    "data.sequence": "length=64 image=16 slots=2",
    "model.media_ids": "image=3",
    "lora": "rank=4",
    "train": "steps=20",
  },
}


def test_there_is_a_command_for_every_larger_config():
  assert {pathlib.Path(shlex.split(line)[3]).stem for line in COMMANDS} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_guide_plans(line, tmp_path):
  words = shlex.split(line)[1:]
  settings = SMALL[pathlib.Path(words[2]).stem]
  small = [
    f"--config.{prefix}.{setting}" for prefix, some in settings.items() for setting in some.split()
  ]
  environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  done = subprocess.run(
    [sys.executable, "-m", "mmjax.cli", *words, *small],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=dict(environment, HOME=str(tmp_path), JAX_PLATFORMS="cpu"),
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "plan.json").read_text())
  assert found["fits"] and found["topology"]["name"] == words[words.index("--topology") + 1]
  assert found["memory"]["peak"] > 0 and found["memory"]["parameters"] > 0
  assert "--sweep" not in words or len(found["sweep"]) > 3
  assert words[words.index("--topology") + 1] in done.stdout
