"""A low-rank adapter by commands alone: trained, killed, evaluated, written from, exported."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from tests.e2e.commands import metrics, parameters, read_until, run, start
from tests.e2e.test_language_models import CONFIG, document

ADAPT = """
from base import get_config as base

def get_config(arg=""):
  c = base()
  c.train.steps, c.log.every, c.checkpoint.every, c.train.ema = 24, 1, 4, 0.5
  c.init["from"] = {base!r}
  c.lora = dict(params="layers/.*kernel", rank=2, dropout=0.1, full=("norm/scale",))
  return c
"""


@pytest.mark.slow
def test_an_adapter_is_killed_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  for split, seeds in (("train", range(200)), ("test", range(1000, 1030))):
    file = tmp_path / f"{split}.jsonl"
    file.write_text("\n".join(json.dumps(dict(id=str(i), text=document(i))) for i in seeds))
    run("data", "convert", "documents", str(file), "--name", "books", "--split", split)
  run("data", "tokenizer", "--source", "books", "--name", "books", "--vocab-size", "400")
  base, whole, broken = (tmp_path / name for name in ("base", "whole", "broken"))
  (tmp_path / "base.py").write_text(CONFIG)
  (tmp_path / "adapt.py").write_text(ADAPT.format(base=str(base)))
  steps = "--config.train.steps=20"
  run("train", "--config", str(tmp_path / "base.py"), "--workdir", str(base), steps)

  def adapt(folder):
    return ("train", "--config", str(tmp_path / "adapt.py"), "--workdir", str(folder))

  printed = run(*adapt(whole)).stdout
  assert "all that is trained" in printed and "layers/mlp/up" in printed
  for words in ("step 7/24", "step 14/24"):
    process = start(*adapt(broken))
    read_until(process, words)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  run(*adapt(broken))
  assert metrics(broken) == metrics(whole)
  assert parameters(broken) == parameters(whole)

  for folder in (base / "checkpoints").iterdir():
    if folder.name == "20":
      large = sum(path.stat().st_size for path in (folder / "params").rglob("*"))
  small = sum(p.stat().st_size for p in (whole / "checkpoints" / "24" / "params").rglob("*"))
  assert small < 0.5 * large
  loss = json.loads((whole / "eval.json").read_text())["loss"]["loss"]
  run("eval", "--checkpoint", str(whole), "--out", str(tmp_path / "eval"))
  again = json.loads((tmp_path / "eval" / "eval.json").read_text())["loss"]["loss"]
  assert again == pytest.approx(loss, rel=1e-6)
  prompt = ("--prompt", "the old man", "--max-length", "6")
  text = run("generate", "--checkpoint", str(whole), *prompt).stdout
  run("export", "--checkpoint", str(whole), "--to", "safetensors", "--out", str(tmp_path / "out"))
  from safetensors.numpy import load_file

  assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
  shutil.move(base, tmp_path / "moved")
  refused = run("generate", "--checkpoint", str(whole), *prompt, code=1).stderr
  assert f"is an adapter and needs its base {base}" in refused and "Traceback" not in refused
  moved = run(
    "generate", "--checkpoint", str(whole), *prompt, MMJAX_BASE=str(tmp_path / "moved")
  ).stdout
  assert moved == text
