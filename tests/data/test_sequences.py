"""Rows of a language model: their targets are the texts, media stand in their places, one bad
medium costs its own example, and order, workers and rows change nothing.
"""

from __future__ import annotations

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.image import ImageTransform, decode
from mmjax.data.pipeline import Pipeline, batch_spec
from mmjax.data.tiles import cut_into_tiles
from mmjax.data.tokenizers import load_tokenizer
from tests.data.conftest import picture, record
from tests.data.test_pipeline import assert_equal

LENGTH, PLACES = 40, 4


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
  """A folder of records with questions, one of them without its picture's end, and of documents."""
  folder = tmp_path_factory.mktemp("asked")
  (folder / "tokenizers").symlink_to(tiny / "tokenizers")
  records = []
  for i in range(12):
    pairs = [("what is it?", f"thing {i}"), ("is it red?", "yes" if i % 2 else "no")]
    records.append(record(i, questions=pairs))
  records[3]["image"] = records[3]["image"][:40]
  write_dataset("asked", folder, {"train": records}, fields=("image", "questions"))
  long = " ".join(f"word {i} of a long text" for i in range(60))
  texts = [long, "a red thing", long[:200]]
  documents = [
    dict(id=str(i), captions={"en": [text]}, image_key=i) for i, text in enumerate(texts)
  ]
  write_dataset("texts", folder, {"train": documents}, fields=())
  return folder


def resolved(folder, source, kind, image=True, **changes):
  c = configs.base()
  c.data.dir, c.data.text.tokenizer, c.data.text.vocab_size = str(folder), "tiny", 512
  c.data.sources.it = dict(name=source, languages=("en",), text=kind)
  c.data.image.size, c.train.batch_size = 16, 4
  c.data.sequence.length, c.data.sequence.slots = LENGTH, 2
  vit = dict(kind="vit", patch=4, width=16, depth=1, heads=2)
  c.model = dict(name="language_model", width=16, encoders={}, connectors={})
  if image:
    c.data.sequence.image = PLACES
    c.model.encoders, c.model.connectors = dict(image=vit), dict(image=dict(kind="mlp", fold=2))
  c.objectives.words = dict(kind="language_modelling")
  return configs.resolve(c, [f"{path}={value!r}" for path, value in changes.items()])


def examples_of(batch, row):
  """(tokens of the targets, of the rest, places of media) of each example of a row."""
  s = {name: array[row] for name, array in batch["sequence"].items()}
  for number in range(1, s["segment_ids"].max() + 1):
    here = s["segment_ids"] == number
    text = here & (s["media_index"] < 0) if "media_index" in s else here
    media = s["media_index"][here & ~text] if "media_index" in s else np.zeros(0)
    yield s["tokens"][text & s["loss_mask"]], s["tokens"][text & ~s["loss_mask"]], media
    np.testing.assert_array_equal(s["positions"][here], np.arange(here.sum()))


def test_targets_are_the_answers_and_media_stand_before_the_question(asked):
  c = resolved(asked, "asked", "question")
  tokenizer, seen = load_tokenizer(c.data), 0
  transform = ImageTransform(c.data.image, train=False)
  pictures = {i: transform(picture(i)) for i in range(12)}
  pipeline = Pipeline(c)
  spec = batch_spec(c)
  for step in range(3):
    batch = pipeline.batch(step)
    assert {k: v.shape for k, v in batch["sequence"].items()} == {
      k: v.shape for k, v in spec["sequence"].items()
    }
    for row in range(4):
      used = []
      for targets, rest, media in examples_of(batch, row):
        if not len(targets):
          continue  # the example whose picture cannot be read
        answer = tokenizer.decode(targets.tolist()[:-1])
        assert targets[-1] == tokenizer.eos_id
        assert tokenizer.decode(rest.tolist()) in ("what is it?", "is it red?")
        (slot,) = set(media.tolist())
        assert len(media) == PLACES and slot not in used
        used.append(slot)
        if answer.startswith("thing"):
          shown = batch["media"]["image"]["pixels"][row, slot].astype(int)
          nearest = min(pictures, key=lambda i, shown=shown: np.abs(shown - pictures[i]).mean())
          assert nearest == int(answer.split()[1])  # training resizes by another filter
        seen += 1
  assert seen == 11 and pipeline.unreadable == 1  # each once in an epoch of 12 rows


def test_media_and_prompts_are_written_as_the_config_says(asked):
  settings = {
    "data.sequence.written.image": "a red {} word 1 ",
    "data.sequence.prompt": "is it {}!",
  }
  c = resolved(asked, "asked", "question", **settings)
  tokenizer, batch = load_tokenizer(c.data), Pipeline(c).batch(0)
  for row in range(4):
    s = {name: array[row] for name, array in batch["sequence"].items()}
    for targets, rest, media in examples_of(batch, row):
      if not len(targets):
        continue
      asked_for = ("is it what is it?!", "is it is it red?!")
      assert tokenizer.decode(rest.tolist()) in [f"a red word 1 {text}" for text in asked_for]
      at = np.flatnonzero(s["media_index"] == media[0])
      start = np.flatnonzero(s["segment_ids"] == s["segment_ids"][at[0]])[0]
      assert tokenizer.decode(s["tokens"][start : at[0]].tolist()) == "a red"
  with pytest.raises(UserError, match="data.sequence.prompt is 'is it', but has to have {} once"):
    resolved(asked, "asked", "question", **{"data.sequence.prompt": "is it"})


def test_several_questions_share_a_picture_in_training_and_none_in_evaluation(asked):
  """They stand side by side after it, each as if it stood alone."""
  c = resolved(asked, "asked", "question", **{"data.text.per_example": 2})
  tokenizer, orders, seen = load_tokenizer(c.data), set(), 0
  for step in range(3):
    batch = Pipeline(c).batch(step)
    for row in range(4):
      s = {name: array[row] for name, array in batch["sequence"].items()}
      for trunk in set(s["trunks"].tolist()) - {0}:
        here = s["segment_ids"] == trunk
        assert (s["media_index"][here] >= 0).all() and here.sum() == PLACES
        assert not s["loss_mask"][here].any() and not s["trunks"][here].any()
        np.testing.assert_array_equal(s["positions"][here], np.arange(PLACES))
        asks = []
        for segment in sorted(set(s["segment_ids"][s["trunks"] == trunk].tolist())):
          branch = s["segment_ids"] == segment
          own = np.arange(PLACES, PLACES + branch.sum())
          np.testing.assert_array_equal(s["positions"][branch], own)
          asks.append(tokenizer.decode(s["tokens"][branch & ~s["loss_mask"]].tolist()))
          *answer, end = s["tokens"][branch & s["loss_mask"]].tolist()
          assert end == tokenizer.eos_id
          assert tokenizer.decode(answer).startswith("thing") == (asks[-1] == "what is it?")
        assert sorted(asks) == ["is it red?", "what is it?"]
        orders.add(asks[0])
        seen += 1
  assert len(orders) == 2 and seen >= 11
  entry = dict(name="asked", split="train", languages=(), text="question")
  assert len(EvaluationData(c, entry, 8).items) == 24  # one question each


@pytest.mark.parametrize("change", ({"both_ways": "prompt"}, {"block.windows": (8, 0)}))
def test_questions_that_their_picture_sees_have_its_tokens_each_and_share_its_slot(asked, change):
  """As examples of their own would be, but that the picture is read once."""
  model = {f"model.{name}": value for name, value in change.items()}
  c = resolved(asked, "asked", "question", **{"data.text.per_example": 2}, **model)
  tokenizer, seen = load_tokenizer(c.data), 0
  for step in range(3):
    batch = Pipeline(c).batch(step)
    assert "trunks" not in batch["sequence"]
    for row in range(4):
      asks = {}
      for targets, rest, media in examples_of(batch, row):
        assert len(media) == PLACES and len(set(media)) == 1
        question = tokenizer.decode(rest.tolist())
        *answer, end = targets.tolist()
        assert end == tokenizer.eos_id
        assert tokenizer.decode(answer).startswith("thing") == (question == "what is it?")
        asks.setdefault(media[0], []).append(question)
      slots = np.flatnonzero(batch["media"]["image"]["present"][row]).tolist()
      assert sorted(asks) == slots
      assert all(sorted(of) == ["is it red?", "what is it?"] for of in asks.values())
      seen += len(asks)
  assert seen >= 11


def test_pictures_in_tiles_fill_a_slot_each(asked):
  settings = {"data.image.tiles.most": 2, "data.image.tiles.least": 2}
  with pytest.raises(UserError, match="slots is 2, but data.image.tiles.most is 2.*fill 3"):
    Pipeline(resolved(asked, "asked", "question", **settings))
  c = resolved(asked, "asked", "question", **settings, **{"data.sequence.slots": 3})
  tiles = [cut_into_tiles(decode(picture(i)), c.data.image)[0] for i in range(12)]
  batch, found = Pipeline(c).batch(0), []
  for row in range(4):
    (example,) = examples_of(batch, row)
    if not len(example[0]):
      continue  # the example whose picture cannot be read
    np.testing.assert_array_equal(example[2], np.repeat(np.arange(3), PLACES))
    there = batch["sequence"]["media_index"][row] >= 0
    offsets = batch["sequence"]["media_offset"][row][there]
    np.testing.assert_array_equal(offsets, np.tile(np.arange(PLACES), 3))
    shown = batch["media"]["image"]["pixels"][row]
    found += [i for i in range(12) if (shown == tiles[i]).all()]
    assert batch["media"]["image"]["present"][row].all()
  assert len(set(found)) >= 3
  # Prompts have room for all tiles of one picture, and no more.
  c = resolved(asked, "asked", "question", **settings, **{"data.sequence.slots": 7})
  data = EvaluationData(c, dict(name="asked", split="train", languages=(), text="question"), 8)
  for batch in data.prompts(()):
    assert batch["media"]["image"]["pixels"].shape[:2] == (8, 3)
    assert batch["media"]["image"]["present"][batch["valid"]].all()


def test_long_documents_are_cut_into_pieces_and_nothing_is_lost(asked, capsys):
  c = resolved(asked, "texts", "document", image=False)
  tokenizer, pipeline = load_tokenizer(c.data), Pipeline(c)
  assert "of them padding" in capsys.readouterr().err
  found = {}
  for row in pipeline.tables[0]:
    for piece in row:
      found.setdefault(piece.record, []).append((piece.start, piece.stop))
  for number in range(3):
    text = pipeline.sources[0][number]["captions"]["en"][0]
    count = len(tokenizer.encode(text)) + 1
    places = sorted(found[number])
    assert places[0][0] == 0 and places[-1][1] == count
    assert all(a[1] == b[0] + 1 for a, b in zip(places, places[1:], strict=False))
  data = EvaluationData(c, dict(name="texts", split="train", languages=(), text="document"), 4)
  targets = 0
  for batch in data.batches(()):
    s = batch["sequence"]
    targets += int((s["loss_mask"][:, 1:] & (s["segment_ids"][:, 1:] > 0)).sum())
  texts = [pipeline.sources[0][number]["captions"]["en"][0] for number in range(3)]
  assert targets == sum(len(tokenizer.encode(text)) for text in texts)  # all but the first, <eos>


def test_examples_that_fit_no_row_are_left_out_and_counted(asked, capsys):
  pipeline = Pipeline(resolved(asked, "asked", "question", **{"data.sequence.length": 23}))
  said = capsys.readouterr().err
  kept = sum(map(len, pipeline.tables[0]))
  assert f"{12 - kept} of 12 examples are longer" in said and 0 < kept < 12
  with pytest.raises(UserError, match="no example fits data.sequence.length 6"):
    Pipeline(resolved(asked, "asked", "question", **{"data.sequence.length": 6}))


def test_batches_are_the_same_whatever_the_rows_and_workers(asked):
  c = resolved(asked, "asked", "question")
  whole = [Pipeline(c).batch(step) for step in range(3)]
  for step, batch in enumerate(Pipeline(c).iterate(1, 3), 1):
    assert_equal(batch, whole[step])
  part = Pipeline(c, rows=[2, 0]).batch(2)
  for name, array in part["sequence"].items():
    np.testing.assert_array_equal(array, whole[2]["sequence"][name][[2, 0]])


def test_a_prompt_is_what_comes_before_the_answer(asked):
  c = resolved(asked, "asked", "question")
  data = EvaluationData(c, dict(name="asked", split="train", languages=(), text="question"), 8)
  tokenizer, number = load_tokenizer(c.data), 0
  for batch in data.prompts(()):
    for row in np.flatnonzero(batch["valid"]):
      s = {name: array[row] for name, array in batch["sequence"].items()}
      assert not s["loss_mask"].any() and batch["media"]["image"]["pixels"].shape[1] == 1
      text = s["tokens"][PLACES : s["length"]]
      while data.items[number].record == 3:  # whose picture cannot be read
        number += 1
      assert tokenizer.decode(text.tolist()) == data.question(data.items[number])[0]
      number += 1
  assert number == len(data.items) == 24
