"""Documents of one's own to a language model that goes on from prompts, by commands alone; and the
documents that cannot be used.
"""

from __future__ import annotations

import json
import random

import pytest

from mmjax.data.builders.convert import convert
from mmjax.data.sources import open_source
from tests.e2e.commands import run

CONFIG = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.train.steps, c.train.batch_size = 200, 8
  c.data.sources.books = dict(name="books", text="document", cache=True)
  c.data.text.tokenizer, c.data.text.vocab_size = "books", 400
  c.data.sequence.length = 48
  c.model = dict(name="language_model", width=32, depth=1, heads=2, mlp=64, encoders={})
  c.precision.compute = "float32"
  c.objectives.words = dict(kind="language_modelling")
  c.optimizer = dict(name="adamw", lr=1e-2)
  c.log.tensorboard, c.log.every = False, 10
  books = dict(source="books", split="test", text="document")
  c.evaluation.evaluators.test = dict(kind="likelihood", **books)
  c.evaluation.evaluators.loss = dict(kind="loss", **books)
  return c
"""
WHO = ("the cat", "a bird", "my dog", "the old man", "her sister")
DOES = ("sees", "finds", "likes", "draws")
WHAT = ("a red ball", "the sea", "two stones", "some bread")


def document(seed):
  draw = random.Random(seed)
  lines = [
    f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}." for _ in range(1 + seed % 9)
  ]
  return " ".join(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("documents")
  for split, seeds in (("train", range(200)), ("test", range(1000, 1030))):
    lines = [json.dumps(dict(id=str(seed), text=document(seed))) for seed in seeds]
    (folder / f"{split}.jsonl").write_text("\n".join(lines))
  (folder / "config.py").write_text(CONFIG)
  return folder


def test_documents_are_converted_learned_and_written_on(place, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(place / "data"))
  for split in ("train", "test"):
    file = str(place / f"{split}.jsonl")
    run("data", "convert", "documents", file, "--name", "books", "--split", split)
  run("data", "tokenizer", "--source", "books", "--name", "books", "--vocab-size", "400")
  printed = run("train", "--config", str(place / "config.py"), "--workdir", str(place / "run"))
  assert "of them padding" in printed.stderr
  rows = [json.loads(x) for x in (place / "run" / "metrics.jsonl").read_text().splitlines()]
  rows = [row for row in rows if "loss" in row]
  assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
  table = json.loads((place / "run" / "eval.json").read_text())
  scores = table["test"]
  assert table["loss"]["loss"] == pytest.approx(scores["loss"], rel=1e-4)
  assert scores["examples"] == 30 and scores["bits_per_byte"] < 1.2  # the grammar: about 0.3
  monkeypatch.setenv("MMJAX_DATA", str(place / "nothing"))  # the run has its tokenizer
  out = run(
    *("generate", "--checkpoint", str(place / "run"), "--prompt", "the old man"),
    *("--max-length", "8", "--stop", "."),
  ).stdout.strip()
  assert any(out.startswith(verb) for verb in DOES), out


def test_documents_that_cannot_be_used_are_counted(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  books = tmp_path / "books"
  (books / "more").mkdir(parents=True)
  (books / "a.txt").write_text("one\n\ntwo")
  (books / "more" / "b.md").write_text("three")
  (books / "empty.txt").write_text(" \n")
  (books / "latin.txt").write_bytes("naïve".encode("latin-1"))
  (books / "c.jsonl").write_text('{"text": "four"}\n{"title": "five"}\nbroken\n{"text": 6}\n')
  summary = json.loads(
    run("data", "convert", "documents", str(books), "--name", "b", "--json").stdout
  )
  assert summary["examples"] == 3
  assert summary["skipped"] == {"no text": 3, "broken text": 1, "broken row": 1}


def test_equal_documents_fall_into_one_split(tmp_path):
  for i in range(40):  # each text in two files, whose names tell nothing
    for copy in ("a", "b"):
      file = tmp_path / "books" / f"{copy}{i}.txt"
      file.parent.mkdir(exist_ok=True)
      file.write_text(document(i + 9 * i))
  convert("documents", tmp_path / "books", "b", tmp_path / "data", split="train:1,test:1")
  texts = []
  for split in ("train", "test"):
    source = open_source(dict(name="b", split=split), str(tmp_path / "data"))
    texts.append({source[i]["captions"]["en"][0] for i in range(len(source))})
  assert all(texts) and not texts[0] & texts[1]
