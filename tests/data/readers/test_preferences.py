"""Judged answers in the forms that people have: every row is read, or left out by name."""

from __future__ import annotations

import json

import pytest

from mmjax.data.sources import open_source
from mmjax.data.tokenizer_training import turns_of
from tests.data.readers.test_forms import photos, records  # noqa: F401
from tests.data.test_convert import run
from tests.data.test_tars import write_tar


def turn(role, content):
  return dict(role=role, content=content)


IMAGE = {"type": "image"}
HELLO = [turn("user", "Hello?")]


def said(text):
  return {"type": "text", "text": text}


def write(path, rows):
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def kept(tmp_path, name="mine"):
  source = open_source(dict(name=name), str(tmp_path / "data"))
  return [one for n in range(len(source)) for one in source[n]["preferences"]]


def test_pairs_of_texts_of_messages_and_of_llava(tmp_path, photos):  # noqa: F811
  talk = [turn("system", "Be short."), *HELLO]
  pair = dict(prompt=HELLO, chosen="Hi.", rejected="Go.")
  rows = [
    dict(prompt="Hello?", chosen="Hi.", rejected="Go."),
    dict(prompt=HELLO, chosen=[turn("assistant", "Hi.")], rejected=[turn("assistant", "Go.")]),
    dict(
      prompt="Hello?",
      chosen=[*HELLO, turn("assistant", "Hi.")],
      rejected=[*HELLO, turn("assistant", "Go.")],
    ),
    dict(
      input={"messages": HELLO},
      preferred_output=[turn("assistant", "Hi.")],
      non_preferred_output=[turn("assistant", "Go.")],
    ),
    dict(question="Hello?", chosen="Hi.", rejected="Go."),
    dict(chosen=[*talk, turn("assistant", "Hi.")], rejected=[*talk, turn("assistant", "Go.")]),
    dict(
      image="0.png",
      conversations=[{"from": "human", "value": "<image>\nWhat?"}],
      chosen={"from": "gpt", "value": "A cat."},
      rejected={"from": "gpt", "value": "A dog."},
    ),
    dict(image="1.png", prompt="What?", chosen="A cat.", rejected="A dog."),
    dict(
      prompt=[
        turn("user", [{"type": "image_url", "image_url": {"url": f"{n}.png"}} for n in (2, 3)])
      ],
      chosen="Two.",
      rejected="One.",
    ),
  ]
  summary = run(tmp_path, "conversations", write(photos / "pairs.jsonl", rows))
  assert (summary.examples, summary.rows, summary.skipped) == (9, 9, {})
  found = kept(tmp_path)
  assert found[:5] == [pair] * 5 and found[5] == pair | dict(prompt=talk)
  two = dict(chosen="A cat.", rejected="A dog.")
  assert found[6] == two | dict(prompt=[turn("user", [IMAGE, said("\nWhat?")])])
  assert found[7] == two | dict(prompt=[turn("user", [IMAGE, said("What?")])])
  assert found[8]["prompt"] == [turn("user", [IMAGE, IMAGE])]
  record = records(tmp_path)["2.png"]
  assert len(record["media"]) == 1 and "questions" not in record
  assert {"user: Hello?", "assistant: Hi.", "assistant: Go."} <= set(
    turns_of(dict(preferences=found[:1]))
  )


def test_single_answers_of_which_it_is_said_whether_they_are_good(tmp_path, photos):  # noqa: F811
  rows = [
    dict(prompt="Hello?", completion="Hi.", label=True),
    dict(prompt=HELLO, completion=[turn("assistant", "Go.")], label=False),
    dict(prompt="Hello?", completion="Hi.", label="maybe"),
  ]
  summary = run(tmp_path, "jsonl", write(photos / "judged.jsonl", rows))
  assert summary.skipped == {"broken row": 1}
  assert kept(tmp_path) == [dict(prompt=HELLO, chosen="Hi."), dict(prompt=HELLO, rejected="Go.")]
  source = open_source(dict(name="mine"), str(tmp_path / "data"))
  assert source.labels == () and source[0]["label"] == ""
  (photos / "judged.csv").write_text(
    "image,prompt,completion,label\n0.png,What?,A cat.,True\n0.png,What?,A dog.,False\n"
  )
  assert run(tmp_path, "csv", photos / "judged.csv", "table").rows == 2
  assert [sorted(one) for one in kept(tmp_path, "table")] == [
    ["chosen", "prompt"],
    ["prompt", "rejected"],
  ]


def test_what_teaches_nothing_is_left_out_by_name(tmp_path, photos):  # noqa: F811
  other = [turn("user", "Bye?"), turn("assistant", "x")]
  rows = [
    dict(prompt="a?", chosen="x", rejected="y"),
    dict(prompt="a?", chosen="x", rejected=" x "),
    dict(prompt="a?", chosen="x", rejected=" "),
    dict(prompt="a?", chosen=None, rejected="y"),
    dict(prompt="a?", chosen=[], rejected="y"),
    dict(chosen=[*HELLO, turn("assistant", "y")], rejected=other),
    dict(prompt="a?", chosen=[*HELLO, turn("assistant", "y")], rejected="z"),
    dict(prompt=None, chosen="x", rejected="y"),
    dict(prompt="a?", chosen=HELLO, rejected="y"),
    dict(prompt="a?", chosen=3, rejected="y"),
    dict(prompt="<image>?", chosen="x", rejected="y"),
    dict(prompt="a?", chosen="half \ud83d", rejected="y"),
  ]
  summary = run(tmp_path, "jsonl", write(photos / "bad.jsonl", rows))
  assert summary.rows == 1 and summary.skipped == {
    "empty answer": 3,
    "broken row": 3,
    "prompts differ": 2,
    "equal answers": 1,
    "placeholders": 1,
    "broken text": 1,
  }
  listed = [json.loads(line) for line in open(f"{summary.folder}/skipped-train.jsonl")]
  assert listed[0] == dict(
    id="bad.jsonl:2", reason="equal answers", detail="its two answers are equal"
  )


def test_pairs_in_parquet_and_in_tars(tmp_path, photos):  # noqa: F811
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as parquet

  pixels = [(photos / f"{n}.png").read_bytes() for n in range(2)]
  parts = [turn("user", [{"type": "image", "text": None}, {"type": "text", "text": "What?"}])]
  table = {
    "images": [[{"bytes": data, "path": None}] for data in pixels],
    "prompt": [parts] * 2,
    "chosen": [[turn("assistant", [said("A cat.")])]] * 2,
    "rejected": [[turn("assistant", [said("A dog.")])], [turn("assistant", [said("A cat.")])]],
  }
  parquet.write_table(pa.table(table), photos / "pairs.parquet")
  summary = run(tmp_path, "parquet", photos / "pairs.parquet")
  pair = dict(prompt=[turn("user", [IMAGE, said("What?")])], chosen="A cat.", rejected="A dog.")
  assert summary.skipped == {"equal answers": 1} and kept(tmp_path) == [pair]
  content = json.dumps(dict(prompt="What?", chosen="A cat.", rejected="A dog.")).encode()
  write_tar(photos / "a.tar", [("x.png", pixels[0]), ("x.json", content)])
  run(tmp_path, "webdataset", photos / "a.tar", "tar")
  assert kept(tmp_path, "tar") == [pair]
