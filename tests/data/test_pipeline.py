"""Batches: the same whatever the workers, rows and start; captions, unreadable records, no JAX
backend; evaluation data.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.examples import streams
from mmjax.data.image import ImageTransform
from mmjax.data.pipeline import Pipeline, batch_spec
from mmjax.data.text import text_key
from mmjax.data.tokenizers import load_tokenizer
from tests.data.conftest import picture, record


def assert_equal(a, b):
  assert a["id"] == b["id"]

  def arrays(batch):
    return {k: v for k, v in batch.items() if k != "id"}

  jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


def entry(**changes):
  return {
    "name": "tiny",
    "split": "test",
    "languages": ("en",),
    "path": "",
    "weight": 1.0,
    "cache": False,
    **changes,
  }


def test_the_spec_describes_the_batches(config):
  c = config()
  batch = {k: v for k, v in Pipeline(c).batch(0).items() if k != "id"}
  spec = batch_spec(c)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
    lambda x: (x.shape, x.dtype), spec
  )
  assert batch_spec(c, 3)["text"]["tokens"].shape == (3, 12)
  assert "text" not in batch_spec(
    config(**{"model.encoders": dict(image=dict(kind="vit", patch=8))})
  )


def test_a_batch_holds_the_records_of_its_ids(config):
  c = config(**{"data.text.drop_words": 0.0, "data.image.augment.rotate": 0.0})
  batch, tokenizer = Pipeline(c).batch(3), load_tokenizer(c.data)
  evaluate = ImageTransform(c.data.image, train=False)
  for row, name in enumerate(batch["id"]):
    i = int(name[1:])
    captions = [caption for captions in record(i)["captions"].values() for caption in captions]
    text = tokenizer.decode(
      [
        int(t)
        for t, real in zip(batch["text"]["tokens"][row], batch["text"]["mask"][row], strict=True)
        if real
      ]
    )
    # Perhaps cut.
    assert any(caption.startswith(text.rstrip("⁇ ").rstrip()) for caption in captions)
    assert tuple(batch["text"]["key"][row]) in [text_key(caption) for caption in captions]
    assert batch["image"]["key"][row].tolist() == [2**32 - 1, 2**32 - 1 - i]
    assert np.abs(batch["image"]["pixels"][row].astype(int) - evaluate(picture(i))).mean() < 12
  assert batch["valid"].all()


def test_any_step_any_rows_any_start(config):
  c = config()
  whole = [Pipeline(c).batch(step) for step in range(8)]
  for start in (0, 5):
    for step, batch in zip(range(start, 8), Pipeline(c).iterate(start, 8), strict=True):
      assert_equal(batch, whole[step])
  rows = np.array([6, 1, 2])
  for step, batch in enumerate(Pipeline(c, rows=rows).iterate(0, 3)):
    for modality, name in (
      ("image", "pixels"),
      ("image", "key"),
      ("text", "tokens"),
      ("text", "mask"),
      ("text", "key"),
    ):
      np.testing.assert_array_equal(batch[modality][name], whole[step][modality][name][rows])
    assert batch["id"] == [whole[step]["id"][row] for row in rows]
  assert list(Pipeline(c).iterate(4, 4)) == []
  assert_equal(Pipeline(c).batch(10**12), Pipeline(c).batch(10**12))


@pytest.mark.parametrize("workers", [2, 3])
def test_worker_processes_change_nothing(config, workers):
  expected = list(Pipeline(config()).iterate(2, 7))
  pipeline = Pipeline(config(**{"data.workers": workers}))
  for a, b in zip(pipeline.iterate(2, 7), expected, strict=True):
    assert_equal(a, b)
    assert type(a["image"]["pixels"]) is np.ndarray
  assert pipeline.ids(4) == expected[2]["id"]


@pytest.mark.parametrize(
  "changes",
  [{"data.threads": 1}, {"data.threads": 4, "data.prefetch": 9}, {"data.sources.tiny.cache": True}],
)
def test_threads_prefetch_and_cache_change_nothing(config, changes):
  for a, b in zip(
    Pipeline(config(**changes)).iterate(0, 12), Pipeline(config()).iterate(0, 12), strict=True
  ):
    assert_equal(a, b)


def test_the_seed_changes_order_captions_and_augmentation(config):
  a, b = Pipeline(config()).batch(0), Pipeline(config(seed=1)).batch(0)
  assert a["id"] != b["id"]
  # Two epochs.
  first, second = (Pipeline(config(**{"train.batch_size": 37})).batch(step) for step in (0, 1))
  assert sorted(first["id"]) == sorted(second["id"]) and first["id"] != second["id"]
  place = [second["id"].index(name) for name in first["id"]]
  assert (first["image"]["pixels"] != second["image"]["pixels"][place]).any(
    axis=(1, 2, 3)
  ).mean() > 0.9
  assert 0.3 < (first["text"]["key"] != second["text"]["key"][place]).any(axis=1).mean() < 1


def test_ids_of_the_global_batch(config):
  pipeline = Pipeline(config(), rows=np.array([1]))
  assert pipeline.ids(5) == Pipeline(config()).batch(5)["id"]
  assert pipeline.examples == 37


def test_captions_come_evenly_from_the_languages(config):
  c = config(**{"train.batch_size": 37, "data.text.drop_words": 0.0})
  german = {text_key(f"ein Ding {i}") for i in range(60)}
  drawn = np.concatenate(
    [[tuple(key) in german for key in Pipeline(c).batch(step)["text"]["key"]] for step in range(6)]
  )
  assert 0.4 < drawn.mean() < 0.6
  only = config(**{"data.sources.tiny.languages": ("de",), "data.text.drop_words": 0.0})
  assert {tuple(key) for key in Pipeline(only).batch(0)["text"]["key"]} <= german


def test_a_mixture_of_sources(config):
  c = config(
    **{
      "data.sources.more": dict(name="tiny", split="test", languages=("en",), weight=3.0),
      "train.batch_size": 16,
    }
  )
  ids = Pipeline(c).batch(0)["id"]
  assert sum(int(name[1:]) >= 50 for name in ids) == 12
  fingerprint = Pipeline(c).fingerprint()
  assert (
    json.loads(json.dumps(fingerprint)) == fingerprint
    and fingerprint != Pipeline(config()).fingerprint()
  )


def test_unreadable_records_keep_their_rows(config, capsys):
  c = config(**{"data.sources.tiny.name": "broken"})
  pipeline = Pipeline(c)
  for step in (0, 1):
    batch = pipeline.batch(step)
    bad = {name: row for row, name in enumerate(batch["id"]) if not batch["valid"][row]}
    assert sorted(bad) == ["r002", "r005"] and "unreadable" not in batch
    for row in bad.values():
      assert not batch["image"]["pixels"][row].any() and batch["text"]["mask"][row].sum() == 1
  assert pipeline.unreadable == 2
  lines = capsys.readouterr().err.splitlines()
  assert (
    len(lines) == 2
    and any("broken r002" in line for line in lines)
    and any("no caption in en, de" in line for line in lines)
  )


def test_too_many_unreadable_records_end_the_run(config):
  c = config(**{"data.sources.tiny.name": "broken", "data.max_unreadable": 1})
  with pytest.raises(
    UserError, match="2 records could not be read.*data.max_unreadable is 1.*broken r00"
  ):
    list(Pipeline(c).iterate(0, 3))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"data.sources.tiny.name": "tinny"},
      "data.sources.tiny: no data set 'tinny'.*Did you mean 'tiny'",
    ),
    ({"data.sources.tiny.weight": 0.0}, "every source has weight 0"),
    ({"data.sources": {}}, "data.sources is empty"),
    ({"data.text.vocab_size": 99}, "data.text.vocab_size is 99, but tokenizer .* has 400 pieces"),
  ],
)
def test_mistakes_show_before_the_first_batch(config, changes, words):
  with pytest.raises(UserError, match=words):
    Pipeline(config(**changes))


PROBE = """
import os, sys
import mmjax.data.pipeline as lib
from mmjax import config
from jax._src import xla_bridge


class Probe(lib._Make):
  def __call__(self, step):
    batch = super().__call__(step)
    from jax._src import xla_bridge
    backends, platforms = sorted(xla_bridge._backends), os.environ.get("JAX_PLATFORMS")
    batch["id"] = [f"{os.getpid()} {backends} {platforms}"]
    return batch


if __name__ == "__main__":
  lib._Make = Probe
  pipeline = lib.Pipeline(config.from_json(sys.argv[1]))
  pipeline.batch(0), pipeline.ids(3), lib.batch_spec(pipeline.config)
  ids = [batch["id"][0] for batch in pipeline.iterate(0, 4)]
  assert not xla_bridge._backends, xla_bridge._backends
  print(os.getpid(), *ids, sep="\\n")
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_no_process_starts_a_jax_backend(config, tmp_path, workers):
  from mmjax.config import to_json

  (tmp_path / "probe.py").write_text(PROBE)
  environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {
    "PYTHONPATH": os.getcwd()
  }
  done = subprocess.run(
    [sys.executable, str(tmp_path / "probe.py"), to_json(config(**{"data.workers": workers}))],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr and "leaked" not in done.stderr
  main, *seen = done.stdout.splitlines()
  seen = [line.split(" ", 1) for line in seen]
  assert len(seen) == 4 and all(rest == f"[] {'cpu' if workers else None}" for _, rest in seen)
  assert len({pid for pid, _ in seen}) == max(1, workers) and (
    main in {pid for pid, _ in seen}
  ) == (not workers)


def test_evaluation_data(config):
  data = EvaluationData(config(), entry(), batch_size=4)
  assert len(data) == 10
  batches = list(data.images())
  assert [name for b in batches for name in b["id"]] == [f"r{i:03d}" for i in range(50, 60)] + [
    "",
    "",
  ]
  assert [b["valid"].tolist() for b in batches] == [
    [True] * 4,
    [True] * 4,
    [True, True, False, False],
  ]
  assert batches[0]["image"]["pixels"].shape == (4, 16, 16, 3) and "text" not in batches[0]
  np.testing.assert_array_equal(
    np.concatenate([b["label"] for b in batches]), [*data.labels, -1, -1]
  )
  assert [data.label_names[i] for i in data.labels] == [record(i)["label"] for i in range(50, 60)]
  np.testing.assert_array_equal(
    data.media_keys["image"], np.uint64(2**64 - 1) - np.arange(50, 60, dtype=np.uint64)
  )
  assert [(c.text, c.language, c.example) for c in data.captions[:2]] == [
    ("a green thing number 50", "en", 0),
    ("thing 50 in green", "en", 0),
  ]
  assert (
    len(data.captions) == 20
    and len(EvaluationData(config(), entry(languages=()), 4).captions) == 30
  )
  high, low = text_key("thing 50 in green")
  assert data.captions[1].key == high << 32 | low
  np.testing.assert_array_equal(data.picture(3), batches[0]["image"]["pixels"][3])


def test_evaluation_batches_of_some_rows_and_texts(config):
  whole, rows = EvaluationData(config(), entry(), 4), np.array([3, 0])
  part = EvaluationData(config(), entry(cache=True), 4, rows=rows)
  for a, b in zip(whole.images(), part.images(), strict=True):
    assert b.pop("id") == [a["id"][row] for row in rows]
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(y, x[rows]),
      {k: v for k, v in a.items() if k != "id"},
      b,
    )
  texts = ["a red thing", "", "ein Ding", "x", "y"]
  first, second = whole.texts(texts)
  assert first["valid"].all() and second["valid"].tolist() == [True, False, False, False]
  assert first["text"]["tokens"].shape == second["text"]["tokens"].shape == (4, 12) and set(
    first
  ) == {"text", "valid"}
  np.testing.assert_array_equal(
    next(part.texts(texts))["text"]["tokens"], first["text"]["tokens"][rows]
  )
  *_, last = part.texts(texts)
  np.testing.assert_array_equal(last["text"]["tokens"], second["text"]["tokens"][rows])


def test_evaluation_of_unreadable_records(config, capsys):
  data = EvaluationData(config(), entry(name="broken", split="train"), 4)
  valid = np.concatenate([b["valid"] for b in data.images()])
  assert valid.tolist() == [True, True, False, True, True, True, True, True]
  assert data.unreadable == 1 and "broken r002" in capsys.readouterr().err
  assert (data.picture(2) == 255).all()


def test_random_streams_are_those_of_philox():
  for row, rng in zip((0, 7, 3), streams(-1, 5, (0, 7, 3)), strict=True):
    expected = np.random.Generator(np.random.Philox(key=2**64 - 1, counter=[0, 0, row, 5]))
    assert rng.random() == expected.random() and rng.integers(1000) == expected.integers(1000)
