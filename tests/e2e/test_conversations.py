"""Conversations of one's own to a model that holds them, by commands alone: converted, learned,
stopped and gone on with, judged, talked to.
"""

from __future__ import annotations

import json
import shutil

import pytest

import mmjax
from tests.e2e.commands import run

CONFIG = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.train.steps, c.train.batch_size = 60, 4
  c.data.sources.talks = dict(name="talks", text="conversation", cache=True)
  c.data.text.tokenizer, c.data.text.vocab_size = "talks", 400
  c.data.text.template = "mine.jinja"
  c.data.sequence.length = 96
  c.model = dict(name="language_model", width=32, depth=1, heads=2, mlp=64, encoders={})
  c.precision.compute = "float32"
  c.objectives.words = dict(kind="language_modelling")
  c.optimizer = dict(name="adamw", lr=2e-2)
  c.schedule = dict(name="constant", warmup=0)
  c.checkpoint.every = 30
  c.log.tensorboard, c.log.every = False, 1
  c.evaluation.evaluators.talks = dict(
    kind="dialogue", source="talks", split="train", modalities=(), max_length=8, limit=20
  )
  return c
"""
TEMPLATE = (
  "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
  "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
COLOURS = ("red", "blue", "green", "white")


@pytest.mark.slow
def test_conversations_are_learned_gone_on_with_and_held(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  monkeypatch.chdir(tmp_path)
  lines = []
  for number in range(40):
    colour, other = COLOURS[number % 4], COLOURS[number // 4 % 4]
    turns = [f"i like {colour} and {other}", "good", "what first?", colour, "and then?", other]
    roles = ("user", "assistant")
    messages = [dict(role=roles[n % 2], content=text) for n, text in enumerate(turns)]
    lines.append(json.dumps(dict(messages=messages)))
  lines.append(json.dumps(dict(messages=[dict(role="user", content="<image>?")])))
  (tmp_path / "talks.jsonl").write_text("\n".join(lines))
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "mine.jinja").write_text(TEMPLATE)
  done = run("data", "convert", "conversations", "talks.jsonl", "--name", "talks", "--json")
  summary = json.loads(done.stdout)
  assert summary["examples"] == 40 and summary["skipped"] == {"placeholders": 1}
  run("data", "tokenizer", "--source", "talks", "--name", "talks", "--vocab-size", "400")

  printed = run("train", "--config", "config.py", "--workdir", "whole").stderr
  assert "talks: 40 conversations, " in printed and "target tokens each" in printed
  run("train", "--config", "config.py", "--workdir", "parts", "--config.train.steps=30")
  run("train", "--config", "config.py", "--workdir", "parts")
  whole, parts = (losses(tmp_path / name) for name in ("whole", "parts"))
  assert len(whole) == 60 and whole == parts
  scores = json.loads((tmp_path / "whole" / "eval.json").read_text())["talks"]
  assert scores["turn1"] == 1 and scores["dialogues"] == 20 and 0 <= scores["hidden/turn2"] <= 1
  assert all(0 <= scores[f"{name}/accuracy"] <= 1 for name in ("returned", "stayed"))

  words = ("eval", "--checkpoint", "whole")
  assert "wrote 20 prompts" in run(*words, "--judge-prompts", "prompts.jsonl").stdout
  asked = map(json.loads, (tmp_path / "prompts.jsonl").read_text().splitlines())
  said = [json.dumps(dict(custom_id=line["custom_id"], score=7)) for line in asked]
  (tmp_path / "answers.jsonl").write_text("\n".join(said[1:]))
  run(*words, "--judge-scores", "answers.jsonl")
  judged = json.loads((tmp_path / "whole" / "eval.json").read_text())["talks"]
  assert judged == {**scores, **{k: v for k, v in judged.items() if k.startswith("judge/")}}
  assert (judged["judge/score"], judged["judge/unscored"]) == (7, 1)
  assert "A judge gives it 7 of 10." in (tmp_path / "whole" / "report.html").read_text()

  (tmp_path / "mine.jinja").write_text(TEMPLATE.replace("assistant:", "me:"))
  more = "--config.train.steps=61"
  refused = run("train", "--config", "config.py", "--workdir", "parts", more, code=1)
  assert "template" in refused.stderr
  (tmp_path / "mine.jinja").unlink()
  shutil.rmtree(tmp_path / "data")
  chat = mmjax.load(tmp_path / "whole").chat()  # with the template of the run
  assert chat.send("i like green and white") == "good"


def losses(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows if "loss" in row}
