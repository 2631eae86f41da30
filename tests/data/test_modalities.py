"""Batches of every modality: shapes, missing parts, labels, questions, words, mixing by steps,
records that stay together.
"""

import io

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.order import Order
from mmjax.data.pipeline import Pipeline, batch_spec
from mmjax.data.tokenizer_training import train_tokenizer
from tests.data.conftest import picture

WORDS = "red blue green apple house river stone bird"


def sound(i: int) -> bytes:
  import soundfile

  out = io.BytesIO()
  soundfile.write(
    out,
    np.sin(np.arange(800 + 100 * i) * 0.05 * (i + 1)).astype(np.float32) * 0.5,
    8000,
    format="FLAC",
  )
  return out.getvalue()


def record(i: int) -> dict:
  """Each third lacks its sound, each fourth its series; two questions, then three."""
  questions = [
    (f"is it {word}?", ("yes", "no")[k % 2]) for k, word in enumerate(WORDS.split()[: 2 + i % 2])
  ]
  return {
    "id": f"m{i}",
    "image": picture(i),
    "captions": {"en": [f"{WORDS.split()[i % 8]} apple"]},
    "label": ("a", "b", "a|c")[i % 3],
    "image_key": i,
    "audio": None if i % 3 == 0 else sound(i),
    "questions": questions,
    "facts": {"number": i},
    "series": None if i % 4 == 0 else np.full((3 + i % 3, 2), i, np.float32),
  }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("modalities")
  write_dataset(
    "many",
    root,
    {"train": map(record, range(12))},
    fields=("image", "audio", "series", "questions", "facts"),
  )
  write_dataset(
    "few",
    root,
    {"train": ({**record(i), "id": f"f{i}"} for i in range(12))},
    fields=("image", "questions"),
  )
  write_dataset(
    "others",
    root,
    {
      "train": (
        {**record(i), "id": f"o{i}", "questions": [("what is it?", "a cat")]} for i in range(4)
      )
    },
    fields=("image", "questions"),
  )
  write_dataset("plain", root, {"train": ({**record(i), "id": f"p{i}"} for i in range(4))})
  train_tokenizer([WORDS, "is it yes no?"] * 20, root / "tokenizers" / "t.model", 360)
  return root


def make(folder, **changes):
  c = configs.base()
  c.data.dir, c.train.batch_size, c.data.image.size = str(folder), 6, 8
  c.data.text.tokenizer, c.data.text.vocab_size, c.data.text.length = "t", 400, 8
  c.data.audio.seconds, c.data.series.length, c.data.series.channels = 0.25, 4, 2
  c.data.sources.many = dict(name="many")
  c.model = dict(
    name="dual_encoder",
    encoders=dict(image=dict(kind="vit", patch=4), text=dict(kind="transformer")),
  )
  c.data.modalities = ("image", "text", "audio", "series")
  overrides = [f"{k}={v!r}" for k, v in changes.items()]
  return configs.resolve(c, overrides)


def shapes(tree):
  return jax.tree.map(
    lambda x: (x.shape, np.dtype(x.dtype)), {k: v for k, v in tree.items() if k != "id"}
  )


@pytest.mark.parametrize(
  "changes",
  [
    {"data.missing": "mask"},
    {"data.missing": "mask", "data.label": "label", "data.classes": 3},
    {"data.missing": "mask", "data.label": "labels", "data.classes": 5, "data.text.words": True},
    {
      "data.missing": "mask",
      "data.label": "answer",
      "data.classes": 2,
      "data.sources.many.text": "question",
      "data.text.per_example": 3,
    },
  ],
)
def test_batches_are_what_the_spec_says(folder, changes):
  c = make(folder, **changes)
  assert shapes(Pipeline(c).batch(0)) == shapes(batch_spec(c))


def test_a_missing_modality_is_masked_or_its_row_skipped(folder):
  batch = Pipeline(make(folder, **{"data.missing": "mask"})).batch(1)
  number = np.array([int(name[1:]) for name in batch["id"]])
  assert batch["valid"].all() and batch["image"]["present"].all()
  np.testing.assert_array_equal(batch["audio"]["present"], number % 3 != 0)
  np.testing.assert_array_equal(batch["series"]["present"], number % 4 != 0)
  assert (
    not batch["audio"]["waveform"][~batch["audio"]["present"]].any()
    and not batch["series"]["mask"][~batch["series"]["present"]].any()
  )
  np.testing.assert_array_equal(
    batch["series"]["mask"].sum(1), np.where(number % 4 == 0, 0, np.minimum(4, 3 + number % 3))
  )

  skipped = Pipeline(make(folder)).batch(1)
  np.testing.assert_array_equal(skipped["valid"], (number % 3 != 0) & (number % 4 != 0))
  for modality in ("image", "audio", "series"):
    for array in skipped[modality].values():
      assert not array[~skipped["valid"]].any(), "rows that do not count are zeros"


def test_labels_are_those_of_the_records(folder):
  batch = Pipeline(
    make(folder, **{"data.label": "labels", "data.classes": 3, "data.modalities": ("image",)})
  ).batch(0)
  for name, row in zip(batch["id"], batch["label"], strict=True):
    assert (
      row.tolist()
      == {"a": [1, 0, 0], "b": [0, 1, 0], "a|c": [1, 0, 1]}[record(int(name[1:]))["label"]]
    )
  with pytest.raises(UserError, match="data.classes is 2, but many has 3: a, a|c, b"):
    Pipeline(make(folder, **{"data.label": "label", "data.classes": 2}))
  with pytest.raises(UserError, match="no source has such classes"):
    Pipeline(
      make(folder, **{"data.label": "answer", "data.classes": 2, "data.sources.many.name": "plain"})
    )
  # Its texts are captions: nobody answers.
  with pytest.raises(UserError, match="no source has such classes"):
    Pipeline(make(folder, **{"data.label": "answer", "data.classes": 2}))


def test_only_sources_of_questions_have_answers(folder):
  """As in configs/multitask.py: a source of captions may have questions, which are not asked."""
  changes = {
    "data.label": "answer",
    "data.mix": "steps",
    "data.modalities": ("image",),
    "data.sources.many.text": "question",
    "data.sources.plain.name": "others",
  }
  pipeline = Pipeline(make(folder, **changes, **{"data.classes": 2}))
  labels = {pipeline.source_of(step): pipeline.batch(step)["label"] for step in range(2)}
  assert (labels["many"] >= 0).all() and (labels["plain"] == -1).all()


def test_a_record_without_questions_is_skipped_or_has_no_answer(folder):
  changes = {
    "data.label": "answer",
    "data.classes": 2,
    "data.sources.many.text": "question",
    "data.modalities": ("image",),
  }
  empty = [{**record(i), "questions": [] if i % 2 else record(i)["questions"]} for i in range(12)]
  write_dataset("some", folder, {"train": empty}, fields=("image", "questions"))
  for missing, counts in (("mask", True), ("skip", False)):
    batch = Pipeline(
      make(folder, **changes, **{"data.missing": missing, "data.sources.many.name": "some"})
    ).batch(0)
    asked = np.array([int(name[1:]) % 2 == 0 for name in batch["id"]])
    np.testing.assert_array_equal(batch["valid"], asked | counts)
    np.testing.assert_array_equal(batch["label"] >= 0, asked)


def test_questions_and_their_answers_stay_together(folder):
  changes = {
    "data.label": "answer",
    "data.classes": 2,
    "data.sources.many.text": "question",
    "data.text.per_example": 2,
    "data.modalities": ("text",),
    "data.text.length": 24,
  }
  c = make(folder, **changes)
  pipeline = Pipeline(c)
  batch, decode = pipeline.batch(2), pipeline._examples.text.tokenizer.decode
  assert batch["text"]["tokens"].shape == (6, 2, 24) and batch["label"].shape == (6, 2)
  for name, tokens, mask, labels in zip(
    batch["id"], batch["text"]["tokens"], batch["text"]["mask"], batch["label"], strict=True
  ):
    pairs = dict(record(int(name[1:]))["questions"])
    asked = [decode(t[m]) for t, m in zip(tokens, mask, strict=True)]
    assert [pairs[q] for q in asked] == [("no", "yes")[label] for label in labels] and len(
      set(asked)
    ) == 2

  data = EvaluationData(c, dict(name="many", split="train", languages=("en",), text="question"), 5)
  rows = [
    row
    for b in data.batches(("text",))
    for row in zip(b["text"]["tokens"], b["text"]["mask"], b["label"], strict=True)
  ]
  seen = [
    decode(t[m])
    for tokens, mask, labels in rows
    for t, m, label in zip(tokens, mask, labels, strict=True)
    if label >= 0
  ]
  assert seen == [q for i in range(12) for q, _ in record(i)["questions"]], (
    "every question once, in order"
  )


def test_only_the_first_captions_when_asked(tmp_path):
  two = [{**record(i), "captions": {"en": [f"first {i}", f"second {i}"]}} for i in range(8)]
  write_dataset("two", tmp_path, {"train": two})
  train_tokenizer(["first second 0 1 2 3 4 5 6 7"] * 20, tmp_path / "tokenizers" / "t.model", 360)
  changes = {"data.sources.many.name": "two", "data.modalities": ("text",)}
  seen = {}
  for count in (0, 1):
    pipeline = Pipeline(make(tmp_path, **changes, **{"data.sources.many.captions": count}))
    decode = pipeline._examples.text.tokenizer.decode
    batch = [pipeline.batch(step)["text"] for step in range(4)]
    seen[count] = {
      decode(t[m]).split()[0] for b in batch for t, m in zip(b["tokens"], b["mask"], strict=True)
    }
  assert seen == {0: {"first", "second"}, 1: {"first"}}


def test_words_number_the_pieces_between_spaces(folder):
  batch = Pipeline(
    make(folder, **{"data.text.words": True, "data.modalities": ("text",), "data.text.length": 12})
  ).batch(0)
  for name, tokens, words, mask in zip(
    batch["id"], batch["text"]["tokens"], batch["text"]["words"], batch["text"]["mask"], strict=True
  ):
    decode = Pipeline(make(folder))._examples.text.tokenizer.decode
    caption = record(int(name[1:]))["captions"]["en"][0]
    assert [decode(tokens[words == w]).strip() for w in range(words.max() + 1)] == caption.split()
    assert (words[~mask] == -1).all() and words[mask][-1] == -1


def test_whole_steps_of_a_source(folder):
  changes = {
    "data.mix": "steps",
    "data.sources.many.modalities": ("audio", "text"),
    "data.sources.many.weight": 2.0,
    "data.missing": "mask",
    "data.sources.few": dict(name="few", modalities=("image", "text"), length=3),
  }
  c = make(folder, **changes)
  pipeline = Pipeline(c)
  sources = [pipeline.source_of(step) for step in range(9)]
  assert sources.count("many") == 6 and sources[:3] == sources[3:6] == sources[6:]
  seen = {"many": [], "few": []}
  for step, source in enumerate(sources):
    batch = pipeline.batch(step)
    assert shapes(batch) == shapes(batch_spec(c, source=source)) and {
      n[0] for n in batch["id"]
    } == {source[0]}
    assert batch["text"]["tokens"].shape[1] == (3 if source == "few" else c.data.text.length)
    seen[source] += batch["id"]
  assert len(set(seen["many"][:12])) == 12 and len(set(seen["few"][:12])) == 12, (
    "each source goes through its own epochs"
  )
  assert set(batch_spec(c)) == {"image", "text", "audio", "series", "valid"}, (
    "without a source: every modality"
  )
  with pytest.raises(UserError, match="data.sources.few.length is 99"):
    make(folder, **{**changes, "data.sources.few.length": 99})
  with pytest.raises(UserError, match="unless data.mix is 'steps'"):
    make(folder, **{**changes, "data.mix": "examples"})


@settings(max_examples=40, deadline=None)
@given(
  groups=st.integers(1, 7),
  count=st.integers(1, 6),
  extra=st.integers(0, 6),
  seed=st.integers(0, 2**40),
  batch=st.integers(1, 20),
)
def test_groups_stay_together_and_an_epoch_has_each_once(groups, count, extra, seed, batch):
  length = groups * count + extra % groups
  order = Order([length], [1.0], seed, batch)
  grouped = Order([length], [1.0], seed, batch, groups=[groups])
  total = groups * count
  rows = np.concatenate([grouped.rows(step)[1] for step in range(-(-total // batch))])[:total]
  assert sorted(rows.tolist()) == list(range(total))
  assert all(
    (chunk == chunk[0] + np.arange(groups)).all() and chunk[0] % groups == 0
    for chunk in rows.reshape(-1, groups)
  )
  if groups == 1:
    np.testing.assert_array_equal(order.rows(3)[1], grouped.rows(3)[1])


def rows_with_equal_media(split: str):
  """Six records of three sounds, clips (bytes only, not decoded) and series, two captions each."""
  for i in range(6):
    yield {
      **record(i),
      "id": f"{split}{i}",
      "audio": sound(i // 2),
      "series": np.full((3, 2), i // 2, np.float32),
      "image_key": i // 2,
    }


@pytest.mark.parametrize("cache", (False, True))
def test_equal_media_have_equal_keys_and_others_have_not(folder, cache):
  name = "equal_cached" if cache else "equal"
  write_dataset(
    name, folder, {"train": rows_with_equal_media("e")}, fields=("image", "audio", "series")
  )
  c = make(folder, **{"data.sources": {"equal": {"name": name, "cache": cache}}})
  data = EvaluationData(c, dict(name=name, split="train", cache=cache), 6)
  same = (np.arange(6) // 2)[:, None] == np.arange(6) // 2
  for _ in range(2):
    batch = next(data.batches(("image", "audio", "series")))
    for modality in ("image", "audio", "series"):
      key = batch[modality]["key"]
      assert key.dtype == np.uint32 and key.shape == (6, 2)
      np.testing.assert_array_equal((key[:, None] == key[None]).all(-1), same)
      whole = key[:, 0].astype(np.uint64) << np.uint64(32) | key[:, 1]
      np.testing.assert_array_equal(whole, data.media_keys[modality])
  assert len(set(data.media_keys["video"].tolist())) == 6  # what is absent is equal to nothing
  batch = Pipeline(c).batch(0)
  number = np.array([int(i[1:]) // 2 for i in batch["id"]])
  key = batch["audio"]["key"]
  np.testing.assert_array_equal((key[:, None] == key[None]).all(-1), number[:, None] == number)


def test_equal_sounds_are_positives_of_the_loss(folder):
  from mmjax.objectives.contrastive import labels_of, positives_of

  c = make(folder, **{"data.modalities": ("text", "audio")})
  name = "equal_loss"
  write_dataset(
    name, folder, {"train": rows_with_equal_media("l")}, fields=("image", "audio", "series")
  )
  batch = next(EvaluationData(c, dict(name=name, split="train"), 6).batches(("text", "audio")))
  rows = [labels_of(batch, ("text", "audio"), side, np.ones(6, bool)) for side in ("text", "audio")]
  np.testing.assert_array_equal(
    positives_of(*rows), (np.arange(6) // 2)[:, None] == np.arange(6) // 2
  )


def test_sounds_and_series_that_are_cut_are_named_and_counted(folder, capsys):
  long = (
    {**record(i), "id": f"c{i}", "audio": sound(i), "series": np.ones((5, 2), np.float32)}
    for i in range(12)
  )
  write_dataset("long", folder, {"train": long}, fields=("image", "audio", "series"))
  c = make(folder, **{"data.audio.seconds": 0.11, "data.sources": {"long": {"name": "long"}}})
  data = EvaluationData(c, dict(name="long", split="train"), 6)
  list(data.media("audio"))
  said = capsys.readouterr().err.splitlines()
  assert (
    said[0] == "only the beginning is used of a sound, 0.1 of 0.11 s (data.audio.seconds): long c1"
  )
  assert (
    len(said) == 5
    and said[-1] == "11 sounds exceed data.audio.seconds; only their beginning is used"
  )
  list(data.media("audio"))
  assert not capsys.readouterr().err  # once
  for _ in Pipeline(c).iterate(0, 4):
    pass
  said = capsys.readouterr().err
  assert (
    "12 sensor series exceed data.series.length" in said
    and "11 sounds exceed data.audio.seconds" in said
  )
