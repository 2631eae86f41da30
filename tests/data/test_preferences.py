"""Judged answers as rows of a language model: they stay together, share their media, and only they
are learned.
"""

from __future__ import annotations

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.data.builders import write_dataset
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.pipeline import Pipeline
from mmjax.data.show import show_data_set
from mmjax.data.tokenizers import load_tokenizer
from mmjax.objectives.language_modelling import language_modelling
from mmjax.objectives.preference import preference
from tests.data.conftest import picture, record
from tests.data.test_conversations import TALKS, asked, resolved, turn

ENTRY = dict(name="judged", split="train", languages=(), text="preference")
PREFERENCES = [
  [dict(prompt=[asked("what is it?")], chosen="a red thing", rejected="a blue thing")],
  [
    dict(
      prompt=[turn("user", "a thing?"), turn("assistant", "thing 1"), turn("user", "a number?")],
      chosen="number 1",
      rejected="number 2 in grey",
    )
  ],
  [
    dict(prompt=[asked("a thing, a thing?", 2)], chosen="white", rejected="thing 4 in pink"),
    dict(prompt=[turn("user", "in green?")], chosen="black in grey"),
  ],
  [dict(prompt=[turn("user", "red?")], rejected="blue")],
]


@pytest.fixture(scope="module")
def judged(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("judged")
  (folder / "tokenizers").symlink_to(tiny / "tokenizers")
  write_preferences(folder, "judged", PREFERENCES)
  return folder


def write_preferences(folder, name, each):
  made = []
  for n, preferences in enumerate(each):
    one = record(n, captions={}, media=[("image", picture(40 + n))], preferences=preferences)
    text = all(isinstance(t["content"], str) for p in preferences for t in p["prompt"])
    made.append(one | (dict(image=None, media=[]) if text else {}))
  write_dataset(name, folder, {"train": made}, fields=("image", "preferences", "media"))


def config(folder, name="judged", form="dpo", length=160, **changes):
  changes = {
    "data.sources.it.text": "preference",
    "objectives.judged.kind": "preference",
    "objectives.judged.form": form,
    "train.batch_size": 2,
    **changes,
  }
  return resolved(folder, name, length, **changes)


def answers_in(batch, tokenizer):
  """{(prompt, chosen, rejected, other): slots of its media} of each place of a batch."""
  s, found = batch["sequence"], {}
  for row, places in enumerate(batch["preference"]["answers"]):
    for place in places[places.any(1)]:
      told, prompts, slots = [], [], []
      for segment in place:
        here = (s["segment_ids"][row] == segment) & (segment > 0)
        learned = here & s["loss_mask"][row]
        told.append(tokenizer.decode(s["tokens"][row][learned]))
        if segment:
          prompts.append(s["tokens"][row][here & ~learned].tolist())
          slots.append(s["media_index"][row][here & (s["media_index"][row] >= 0)].tolist())
          assert s["tokens"][row][here][-1] == tokenizer.eos_id and learned.sum() > 1
          np.testing.assert_array_equal(s["positions"][row][here], np.arange(here.sum()))
      assert all(one == prompts[0] for one in prompts) and all(one == slots[0] for one in slots)
      found[tuple(told)] = slots[0]
  return found


def batches(pipeline):
  for step in range(-(-pipeline.examples // pipeline.config.train.batch_size)):
    yield pipeline.batch(step)


def test_answers_stand_side_by_side_share_media_and_alone_are_learned(judged, capfd):
  c = config(judged)
  tokenizer, pipeline = load_tokenizer(c.data), Pipeline(c)
  said = capfd.readouterr().err
  assert "judged: 5 preferences with 8 answers, " in said and "target tokens each" in said
  found = {}
  for batch in batches(pipeline):
    found |= answers_in(batch, tokenizer)
    assert not batch["preference"]["reference"].any()
  assert {told: len(set(slots)) for told, slots in found.items()} == {
    ("a red thing", "a blue thing", ""): 1,
    ("number 1", "number 2 in grey", ""): 0,
    ("white", "thing 4 in pink", ""): 2,
    ("black in grey", "", ""): 0,
    ("", "blue", ""): 0,
  }
  told = {
    told[:2] + (told[2] != "",)
    for batch in batches(Pipeline(config(judged, form="kto", length=224)))
    for told in answers_in(batch, tokenizer)
  }
  assert told == {(*told[:2], True) for told in found}  # each with an answer to another prompt


def test_no_row_parts_answers_and_what_fits_none_is_left_out(judged, capfd):
  alone = Pipeline(config(judged, **{"data.sequence.pack": False}))
  sizes = [(b["sequence"]["segment_ids"] > 0).sum(1) for b in batches(alone)]
  two = int(np.sort(np.concatenate(sizes))[-2])  # the second longest
  capfd.readouterr()
  c = config(judged, length=two, **{"data.sequence.slots": 2})
  found = {}
  for batch in batches(Pipeline(c)):
    found |= answers_in(batch, load_tokenizer(c.data))
  assert len(found) == 4 and "1 of 5 examples are longer than" in capfd.readouterr().err
  with pytest.raises(
    UserError, match="no preference fits data.sequence.length 8 and slots 3; the "
  ):
    Pipeline(config(judged, length=8))


def test_what_a_reference_made_of_answers_goes_with_them(judged):
  c = config(judged, **{"data.image.augment.rotate": 10.0})
  pipeline = Pipeline(c)
  ((source, table),) = pipeline.judged
  known = np.full((4, 2, 3), np.nan, np.float32)
  for row in table:
    for piece in row:
      known[piece.record, piece.part] = 10 * piece.record + piece.part
  pipeline.refer({source.fingerprint: known}, "model")
  assert pipeline.fingerprint()["reference"] == "model"
  pixels = {}
  for step in range(2 * pipeline.examples):
    batch = Pipeline(**pipeline.__getstate__()).batch(step) if not step else pipeline.batch(step)
    there = batch["preference"]["answers"].any(-1)
    for row, value in zip(
      np.nonzero(there)[0], batch["preference"]["reference"][there], strict=True
    ):
      assert value[0] in (0, 10, 20, 21, 30) and len(set(value)) == 1
      image = batch["media"]["image"]
      if value[0] == 0:  # drawn alike each time, so that it is what the reference saw
        seen = image["pixels"][row][image["present"][row]].tobytes()
        pixels.setdefault(len(seen), set()).add(seen)
  assert pixels and all(len(seen) == 1 for seen in pixels.values())
  known[1] = np.nan
  with pytest.raises(UserError, match="r001: the reference could not read it"):
    pipeline.config = config(judged, **{"data.max_unreadable": 0})
    list(batches(pipeline))


def test_held_out_answers_are_one_preference_a_row(judged):
  c = resolved(judged, "judged", 160)  # a config that trains on something else
  data = EvaluationData(c, ENTRY, 4)
  first, second = data.batches(("image",))
  assert first["preference"]["answers"].any((1, 2)).tolist() == [True] * 4
  assert second["valid"].tolist() == [True, False, False, False]
  assert not second["preference"]["answers"][1:].any()


def test_a_sheet_shows_both_answers_and_what_is_learned(judged, tmp_path, capfd):
  shown = show_data_set("judged", tmp_path / "s.html", config=config(judged), data_dir=str(judged))
  page = shown.read_text()
  assert page.count("<i>chosen</i>") == 4 and page.count("<i>rejected</i>") == 4
  assert "number 2 in grey</b>" in page and "thing 1</b>" not in page
  assert "judged: 5 preferences with 8 answers" in capfd.readouterr().err
  plain = show_data_set("judged", tmp_path / "p.html", data_dir=str(judged)).read_text()
  assert "<b>assistant: a blue thing" in plain


def test_rows_of_answers_and_of_conversations_mix(judged):
  """Language modelling learns the preferred answers of the ones, and all of the others."""
  c = config(judged, **{"train.batch_size": 8}).to_dict()
  c["data"]["sources"]["talks"] = dict(name="talks", text="conversation")
  c["objectives"]["words"] = dict(kind="language_modelling")
  write_dataset(
    "talks",
    judged,
    {"train": [record(9, captions={}, image=None, conversations=[TALKS[3]])]},
    fields=("conversations",),
  )
  batch = Pipeline(configs.resolve(c)).batch(0)
  answers = batch["preference"]["answers"].any((1, 2))
  assert answers.any() and not answers.all() and batch["valid"].all()
  hidden = np.zeros((8, 160, 4), np.float32)

  def forward(method):
    return hidden, np.zeros((512, 4), np.float32), 0.0

  s, p = batch["sequence"], batch["preference"]
  learned = sum(
    ((s["segment_ids"][row] == segment) & s["loss_mask"][row]).sum()
    for row in range(8)
    for segment in (p["answers"][row, :, 0] if answers[row] else [1])
    if segment
  )
  assert language_modelling(forward, batch, None)["loss"][1] == learned
  judged_pairs = (p["answers"][..., :2] > 0).all(-1).sum()
  assert preference(forward, batch, None)["loss"][1] == judged_pairs


@pytest.mark.parametrize(
  ("given", "message"),
  (
    (None, "no preference can be used .r000: it has no preferences"),
    (dict(prompt=[turn("user", "x")], chosen=" ", rejected="y"), "turn 2 .assistant. is empty"),
    (dict(prompt=[turn("assistant", "x")], chosen="x", rejected="y"), "roles out of order"),
    (dict(prompt=[asked("x", 3)], chosen="x", rejected="y"), "it has 2 pictures"),
  ),
)
def test_a_source_without_usable_answers_says_why(tiny, tmp_path, given, message):
  (tmp_path / "tokenizers").symlink_to(tiny / "tokenizers")
  write_preferences(tmp_path, "bad", [[given] if given else []])
  with pytest.raises(UserError, match=message) as caught:
    Pipeline(config(tmp_path, "bad"))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  (
    ({"data.sources.it.text": "conversation"}, "no entry of data.sources has text='preference'"),
    ({"objectives.judged.desirable": 2.0}, "desirable is 2.0, but form 'dpo' has none"),
    (
      {"objectives.judged.form": "kto", "objectives.judged.label_smoothing": 0.1},
      "label_smoothing is 0.1, but form 'kto' has none",
    ),
    (
      {"objectives.judged.form": "kto", "train.microbatches": 2},
      "objectives.judged: form 'kto' compares each answer with others of the whole batch",
    ),
    ({"objectives.judged.form": "dpop"}, "dpop"),
    ({"objectives.judged.beta": 0.0}, "beta"),
  ),
)
def test_settings_that_contradict_are_refused(judged, changes, message):
  with pytest.raises(ConfigError, match=message):
    config(judged, **changes)
