"""report.html: self-contained, well formed, and written whatever is missing."""

from __future__ import annotations

import html.parser
import json
import os
import re

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.evaluation import (
  Result,
  flat_metrics,
  provenance,
  read_eval_json,
  read_provenance,
  report,
  write_eval_json,
)
from mmjax.evaluation.examples import sound_uri
from mmjax.evaluation.report import picture_uri, read_metrics, write_report
from mmjax.evaluation.report_charts import _ticks, chart, evaluation_charts, training_charts

VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects what the page would load."""

  def __init__(self, text):
    super().__init__()
    self.open, self.loads, self.text = [], [], ""
    self.feed(text)
    assert not self.open, self.open

  def handle_starttag(self, tag, attributes):
    self.loads += [v for k, v in attributes if k in ("src", "href")]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.loads += [v for k, v in attributes if k in ("src", "href")]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


@pytest.fixture(scope="module")
def config():
  c = configs.base()
  c.model = dict(
    name="dual_encoder", encoders=dict(image=dict(kind="vit"), text=dict(kind="transformer"))
  )
  return configs.resolve(c)


def heads():
  """What the evaluators of labels, values and speech show."""
  picture = np.zeros((8, 8, 3), np.uint8)
  scores = dict(name="<i>ok", examples=3.0, precision=0.5, recall=1.0, f1=2 / 3, auc=0.75)
  rows = [
    dict(said="ok", true="bad", note="97% sure", picture=picture),
    dict(said="ok", true="bad", note="9% sure", sound=sound_uri(np.zeros(800, np.int16), 8000)),
    dict(said="ok", true="bad", note="8% sure", curve=np.zeros((5, 2)), text="what is it?"),
  ]
  return {
    "labels": Result(
      {"accuracy": 0.7, "majority": 0.6},
      {
        "classes": dict(kind="classes", rows=[scores]),
        "reliability": dict(kind="reliability", points=[(0.6, 0.5, 4), (0.9, 0.95, 20)]),
        "mistakes": dict(kind="mistakes", wrong=9, of=30, rows=rows),
      },
    ),
    "values": Result(
      {"mae": 2.0}, {"x": dict(kind="scatter", name="weight", points=[(1.0, 1.5), (3.0, 2.0)])}
    ),
    "speech": Result(
      {"word_error_rate": 0.2}, {"x": dict(kind="word_confusions", rows=[("red", "", 3)])}
    ),
  }


def test_mistakes_classes_values_and_provenance_are_shown(tmp_path, config):
  c = config.to_dict()
  c["data"]["label"], c["data"]["classes"] = "label", 2
  c["evaluation"]["evaluators"] = dict(labels=dict(kind="classification", source="squares"))
  marks = {"labels (split)": "squares/1.0.0/test: 30 examples, content 12ab"}
  about = provenance(configs.resolve(c), marks, "checkpoints/24", 24)
  write_eval_json(tmp_path, heads(), about)
  text = write_report(tmp_path, config, heads()).read_text()
  page = Page(text)
  assert "<i>ok" not in text and "<i>ok" in page.text
  assert text.count("<audio controls") == 1 and text.count('<svg class="curve"') == 1
  for words in (
    "9 of 30 are wrong",
    "what is it?",
    "labels: calibration",
    "values: weight",
    "checkpoints/24",
    "content 12ab",
    "(nothing)",
  ):
    assert words in page.text or words in text, words
  bars = re.findall(r'class="label">([\w ]+)</div>\s*<div class="bar"', text)
  assert bars == ["accuracy", "majority", "word error rate"], "an error has no share of anything"
  stored = json.loads((tmp_path / "eval.json").read_text())
  assert stored["provenance"]["labels"]["step"] == 24 and stored["values"] == {"mae": 2.0}
  assert set(read_eval_json(tmp_path)) == {"labels", "values", "speech"}
  write_eval_json(tmp_path, {"values": Result({"mae": 1.0}, {})})
  assert set(read_provenance(tmp_path)) == {"labels"}, "what was not run now keeps its own"


def figures():
  picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
  results = [
    dict(text="<b>red & blue</b>", score=0.5, correct=True),
    dict(text="نص", score=0.25, correct=False),
  ]
  shots = [dict(picture=picture, score=0.5, correct=False)]
  return {
    "retrieval/a": Result(
      {"image_to_text/R@1": 0.41, "images": 500.0, "unreadable": 0.0},
      {
        "image_to_text": dict(
          kind="retrieval",
          query="image",
          target="text",
          rows=[dict(picture=picture, rank=1, of=500, expected=[dict(text="x")], top=results)],
        ),
        "text_to_image": dict(
          kind="retrieval",
          query="text",
          target="image",
          rows=[dict(text="a query", rank=9, of=500, expected=[dict(picture=picture)], top=shots)],
        ),
      },
    ),
    "zero": Result(
      {"accuracy": 0.6},
      {"confusion": dict(kind="confusion", names=["a", "b"], matrix=np.array([[3, 1], [0, 2]]))},
    ),
  }


def test_a_whole_report_loads_nothing_and_escapes_captions(tmp_path, config):
  lines = [
    json.dumps(
      {
        "step": s,
        "time": 100.0 + s,
        "loss": 3.0 / s,
        "lr": 1e-3,
        "examples_per_second": None if s == 1 else 900.0,
        "align/accuracy": s / 100,
      }
    )
    for s in range(1, 60)
  ]
  lines += [
    json.dumps({"step": s, "time": 1.0, "retrieval/a/image_to_text/R@1": s / 100}) for s in (20, 40)
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 60, "lo')
  text = write_report(tmp_path, config, figures(), tmp_path / "metrics.jsonl").read_text()
  page = Page(text)
  assert page.loads and all(link.startswith("data:image/") for link in page.loads)
  assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
  assert "<b>red" not in text and "<b>red & blue</b>" in page.text
  for words in (
    "retrieval/a",
    "0.410",
    "Learning rate",
    "a taken for b: 1 of 4",
    "batch_size",
    "rank 9 of 500",
    "found first",
  ):
    assert words in text
  assert text.count("data-chart=") >= 5


@pytest.mark.parametrize("results", [{}, {"e": Result({"anything": 3.0}, {})}])
def test_without_metrics_or_figures_there_is_still_a_page(tmp_path, config, results):
  Page(write_report(tmp_path, config, results, tmp_path / "missing.jsonl").read_text())
  Page(write_report(tmp_path, config, results).read_text())


def test_scores_of_evaluators_not_run_now_come_from_eval_json(tmp_path, config):
  write_eval_json(tmp_path, {"old": Result({"accuracy": 0.25}, {})})
  assert "0.250" in write_report(tmp_path, config, {}).read_text()


def test_eval_json_keeps_other_evaluators_and_survives_damage(tmp_path):
  write_eval_json(tmp_path, {"a": Result({"m": 1.0}, {})})
  write_eval_json(tmp_path, {"b": Result({"m": np.float32(2)}, {})})
  assert json.loads((tmp_path / "eval.json").read_text()) == {"a": {"m": 1.0}, "b": {"m": 2.0}}
  (tmp_path / "eval.json").write_text("{")
  assert read_eval_json(tmp_path) == {}
  assert flat_metrics({"a/b": Result({"c/d": 1.0}, {})}) == {"a/b/c/d": 1.0}
  assert sorted(os.listdir(tmp_path)) == ["eval.json"]


@pytest.mark.parametrize("name", ["eval.json", "summary.json", "cut.json", "cpu_threads.json"])
def test_what_is_no_file_of_a_run_neither_hangs_nor_ends_a_reader(tmp_path, name, in_time):
  from mmjax.parallel import threads
  from mmjax.training import goodput

  def read():
    assert read_eval_json(tmp_path) == {}
    assert report._measured(tmp_path) == report._cut(tmp_path) == []
    assert goodput._read(tmp_path / name) == {}

  path = tmp_path / name
  for content in (b"[" * 100_000, b"[1]", b"\xff\xfe", b'{"cut": 5}'):
    path.write_bytes(content)
    read()
    assert threads.recorded(tmp_path) == 0
  path.unlink()
  os.mkfifo(path)
  read()


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path, config):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    write_report(tmp_path / "file", config, {})


def test_metrics_lines_that_are_damaged_are_passed_over(tmp_path):
  (tmp_path / "m").write_text(
    '{"step": 1, "loss": 2.0}\n[]\n{"loss": 1}\nnot json\n{"step": 2, "loss": null}\n'
  )
  rows = read_metrics(tmp_path / "m")
  assert [row["step"] for row in rows] == [1, 2]
  assert training_charts(rows) == ([], [])


def test_long_curves_are_thinned_and_ticks_are_round():
  svg = str(chart("t", [("s", [(i, float(i)) for i in range(10000)])])["svg"])
  assert len(svg) < 40000
  assert _ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
  assert chart("flat", [("s", [(1, 2.0), (2, 2.0)])])["legend"][0]["last"] == "2"
  assert not evaluation_charts([dict(step=1, **{"e/accuracy": 0.5})], ["e"])


def test_pictures_are_small_data_uris():
  assert picture_uri(np.zeros((48, 48, 3), np.uint8)).startswith("data:image/png;base64,")
  assert (
    len(picture_uri(np.random.default_rng(0).integers(0, 255, (600, 400, 3), np.uint8))) < 30000
  )
