"""Conversations as rows of a language model: targets, media in their turns, short rows, packing,
what is said before the first step.
"""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import linen as nn

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.evaluation_data import EvaluationData
from mmjax.data.image import ImageTransform
from mmjax.data.pipeline import Pipeline
from mmjax.data.show import show_data_set
from mmjax.data.tokenizers import load_tokenizer
from mmjax.models import make_model
from mmjax.objectives.language_modelling import language_modelling
from tests.data.conftest import picture, record

PLACES = 4
ENTRY = dict(name="chat", split="train", languages=(), text="conversation")


def turn(role, content):
  return {"role": role, "content": content}


def asked(text, pictures=1):
  return turn("user", [{"type": "image"}] * pictures + [{"type": "text", "text": text}])


TALKS = [
  [turn("system", "be red"), asked("what is it?"), turn("assistant", "a red thing")],
  [
    asked("a thing?"),
    turn("assistant", "thing 1 in blue"),
    turn("user", "a number?"),
    turn("assistant", "number 1"),
  ],
  [
    turn("user", "a pink thing?"),
    turn("assistant", "white"),
    asked("grey?"),
    turn("assistant", "a"),
  ],
  [turn("user", "in green?"), turn("assistant", "black in grey")],
  [asked("a thing, a thing?", 2), turn("assistant", "thing 4 in pink")],
]


@pytest.fixture(scope="module")
def chat(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("chat")
  (folder / "tokenizers").symlink_to(tiny / "tokenizers")
  write_records(folder, "chat", [dict(conversations=[talk]) for talk in TALKS])
  return folder


def write_records(folder, name, changes):
  records = []
  for n, change in enumerate(changes):
    text = all(isinstance(t["content"], str) for t in change["conversations"][0])
    made = record(n, captions={}, media=[("image", picture(40 + n))], **change)
    records.append(made | (dict(image=None, media=[]) if text else {}))
  write_dataset(name, folder, {"train": records}, fields=("image", "conversations", "media"))


def resolved(folder, name="chat", length=96, **changes):
  c = configs.base()
  c.data.dir, c.data.text.tokenizer, c.data.text.vocab_size = str(folder), "tiny", 512
  c.data.sources.it = dict(name=name, text="conversation")
  c.data.image.size, c.train.batch_size, c.data.text.template = 16, 5, "plain"
  c.data.sequence.length, c.data.sequence.slots, c.data.sequence.image = length, 3, PLACES
  vit = dict(kind="vit", patch=4, width=16, depth=1, heads=2)
  c.model = dict(name="language_model", width=16, depth=1, heads=2)
  c.model.encoders, c.model.connectors = dict(image=vit), dict(image=dict(kind="mlp", fold=2))
  c.objectives.words = dict(kind="language_modelling")
  c.precision.compute = "float32"
  return configs.resolve(c, [f"{path}={value!r}" for path, value in changes.items()])


def examples_of(batch):
  """(target tokens, pictures in the order of their places) of each conversation."""
  s, pixels = batch["sequence"], batch["media"]["image"]["pixels"]
  for row in range(len(s["tokens"])):
    for number in range(1, s["segment_ids"][row].max() + 1):
      here = s["segment_ids"][row] == number
      media = s["media_index"][row][here]
      assert (media >= 0).sum() % PLACES == 0 and not (
        s["loss_mask"][row][here] & (media >= 0)
      ).any()
      slots = list(dict.fromkeys(media[media >= 0].tolist()))
      yield s["tokens"][row][here & s["loss_mask"][row]], [pixels[row, slot] for slot in slots]


@pytest.mark.parametrize("cache", [False, True])
def test_targets_are_the_assistants_turns_and_media_stand_in_theirs(cache, chat):
  c = resolved(chat)
  tokenizer, transform = load_tokenizer(c.data), ImageTransform(c.data.image, train=False)
  for loss in ("every", "last"):
    changes = {"data.text.loss": loss, "data.sources.it.cache": cache}
    batch = Pipeline(resolved(chat, **changes)).batch(0)
    found = {}
    for targets, pictures in examples_of(batch):
      said = " | ".join(map(tokenizer.decode, np.split(targets, 1 + np.flatnonzero(targets == 2))))
      found[said.removesuffix(" | ")] = pictures
    answers = [[t["content"] for t in talk if t["role"] == "assistant"] for talk in TALKS]
    wanted = [" | ".join(texts if loss == "every" else texts[-1:]) for texts in answers]
    assert set(found) == set(wanted)
    for n, text in enumerate(wanted):
      of = [picture(n), picture(40 + n)] if n == 4 else [] if n == 3 else [picture(n)]
      assert len(found[text]) == len(of)
      for seen, data in zip(found[text], of, strict=True):
        # of other pictures it is 80 and more; training draws how it resizes
        assert np.abs(seen.astype(int) - transform(data)).mean() < 15


def test_each_answer_is_an_example_of_its_own(chat, capfd):
  """With all before it as its prompt, as the last answer of a conversation that ends there."""
  c = resolved(chat, **{"data.text.loss": "each"})
  tokenizer, pipeline = load_tokenizer(c.data), Pipeline(c)
  wanted = [t["content"] for talk in TALKS for t in talk if t["role"] == "assistant"]
  assert f"chat: {len(wanted)} answers, " in capfd.readouterr().err
  found, step = [], 0
  while len(found) < len(wanted):
    batch = pipeline.batch(step)
    found += [tokenizer.decode(targets[:-1]) for targets, _ in examples_of(batch)]
    step += 1
  assert set(found) == set(wanted)
  assert sum(len(row) for row in pipeline.tables[0]) == len(wanted)
  sequences = pipeline._examples.sequences
  for row in pipeline.tables[0]:
    for piece in row:
      record = pipeline.sources[0][piece.record]
      parts = sequences.parts(record, pipeline.sources[0], piece, None)
      talk = record["conversations"][max(piece.part, 0)][: piece.stop]
      assert parts == sequences.turns(record, talk, loss="last")
  sizes = [
    sequences.size(sequences.parts(pipeline.sources[0][p.record], pipeline.sources[0], p, None))
    for row in pipeline.tables[0]
    for p in row
  ]
  few = resolved(chat, length=sorted(sizes)[3], **{"data.text.loss": "each"})
  kept = len([piece for row in Pipeline(few).tables[0] for piece in row])
  said = capfd.readouterr().err
  assert 0 < kept < len(wanted) and f"{kept} answers, " in said
  assert f"{len(wanted) - kept} of " in said and "left out" in said


def test_what_does_not_fit_loses_whole_exchanges_and_is_counted(chat, capfd):
  whole = Pipeline(resolved(chat, **{"data.sequence.pack": False}))
  assert "chat: 5 conversations, " in capfd.readouterr().err
  sizes = (whole.batch(0)["sequence"]["segment_ids"] > 0).sum(1)
  two = max(sizes) - 1  # the longest has two exchanges
  cut = Pipeline(resolved(chat, length=int(two), **{"data.sequence.pack": False}))
  said = capfd.readouterr().err
  assert "conversations are longer than a row" in said and "end after the last answer" in said
  pieces = [piece for row in cut.tables[0] for piece in row]
  assert all(piece.stop in (0, 2) for piece in pieces) and any(piece.stop for piece in pieces)
  for targets, _ in examples_of(cut.batch(0)):
    assert targets[-1] == 2  # nothing is cut within an answer


@pytest.mark.parametrize(
  ("talk", "message"),
  (
    ([turn("user", "x")], "no conversation has a target"),
    ([turn("assistant", "x"), turn("user", "x")], "roles out of order: turn 1 is the assistant's"),
    ([turn("user", "x"), turn("assistant", " ")], "r000: turn 2 .assistant. is empty"),
    ([asked("x", 3), turn("assistant", "y")], "r000: it has 2 pictures, but <image> stands 3"),
    (
      [turn("user", [{"type": "audio"}]), turn("assistant", "y")],
      "sounds, of which the model has no encoder",
    ),
  ),
)
def test_a_source_without_targets_says_why(tiny, tmp_path, talk, message, capfd):
  (tmp_path / "tokenizers").symlink_to(tiny / "tokenizers")
  write_records(tmp_path, "bad", [dict(conversations=[talk])])
  with pytest.raises(UserError, match=message) as caught:
    Pipeline(resolved(tmp_path, "bad"))
  assert "\n" not in str(caught.value)
  write_records(tmp_path, "mixed", [dict(conversations=[talk]), dict(conversations=[TALKS[0]])])
  Pipeline(resolved(tmp_path, "mixed"))
  assert message == "no conversation has a target" or " faults, such as " in capfd.readouterr().err


def test_a_template_must_end_turns_with_a_token_that_ends_texts(chat):
  with pytest.raises(UserError, match="no chat template: data.text.template is empty"):
    Pipeline(resolved(chat, **{"data.text.template": ""}))
  with pytest.raises(UserError, match=r"ends turns with token 6, .* Set model.end_ids=\(6,\)"):
    Pipeline(resolved(chat, **{"data.text.template": "chatml"}))
  Pipeline(resolved(chat, **{"data.text.template": "chatml", "model.end_ids": (6,)}))


def test_replies_are_asked_as_training_shows_them(chat):
  data = EvaluationData(resolved(chat), ENTRY, 2)
  asked = [(1, TALKS[1][:1]), (1, TALKS[1][:3]), (3, TALKS[3][:1])]
  batches = list(data.replies(asked))
  assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, False]]
  whole = next(data.batches(("image",)))["sequence"]
  prompt, length = batches[0]["sequence"], batches[0]["sequence"]["length"]
  for row in range(2):
    text = slice(0, length[row])
    np.testing.assert_array_equal(prompt["tokens"][row, text], whole["tokens"][1, text])
    assert whole["loss_mask"][1, length[row]] and not whole["loss_mask"][1, length[row] - 1]


def test_packed_conversations_train_as_alone(chat):
  """The same loss and gradient a token, from the stored records on."""
  packed, alone = (
    Pipeline(resolved(chat, length=192, **{"data.sequence.pack": pack, "train.batch_size": size}))
    for pack, size in ((True, 2), (False, 5))
  )
  assert packed.examples == 2 and alone.examples == 5
  model = make_model(packed.config)
  batches = [pipeline.batch(0) for pipeline in (packed, alone)]
  batches = [{k: b[k] for k in ("sequence", "media")} for b in batches]
  batches[0] = jax.tree.map(  # rows of padding: one program for both
    lambda x: np.concatenate([x, np.zeros((3, *x.shape[1:]), x.dtype)]), batches[0]
  )
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batches[0]))

  @jax.jit
  def gradient(params, batch):
    def loss(params):
      found = language_modelling(lambda m: model.apply(params, batch, method=m), batch, None)
      return found["loss"][0] / found["loss"][1]

    return jax.value_and_grad(loss)(params)

  (loss, gradients), (loss_alone, alone_gradients) = (gradient(params, b) for b in batches)
  np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
  largest = max(float(abs(g).max()) for g in jax.tree.leaves(gradients))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest),
    gradients,
    alone_gradients,
  )


@pytest.mark.parametrize("loss, counted", [("every", "5 conversations, "), ("each", "7 answers, ")])
def test_the_sample_sheet_colours_what_is_learned(loss, counted, chat, tmp_path, capfd):
  changes = {"data.text.template": "chatml", "model.end_ids": (6,), "data.text.loss": loss}
  config = resolved(chat, **changes)
  page = show_data_set("chat", tmp_path / "s.html", config=config, data_dir=str(chat)).read_text()
  assert counted in capfd.readouterr().err
  talks = re.findall(r'<pre class="talk">(.*?)</pre>', page, re.S)
  learned = [re.findall(r"<b>(.*?)</b>", talk) for talk in talks]
  assert ["thing 1 in blue", "&lt;|im_end|&gt;", "number 1", "&lt;|im_end|&gt;"] in learned
  assert any("&lt;image&gt;a thing?" in talk and "<b>&lt;image" not in talk for talk in talks)
  plain = show_data_set("chat", tmp_path / "p.html", data_dir=str(chat)).read_text()
  assert "<b>assistant: thing 1 in blue\n</b>" in plain and "no picture" not in plain


def test_a_bad_conversation_costs_only_itself_and_idle_media_are_named(tiny, tmp_path, capfd):
  (tmp_path / "tokenizers").symlink_to(tiny / "tokenizers")
  bad = [turn("assistant", "x")]
  talks = [TALKS[1], bad, TALKS[3]]
  picture_unused = dict(conversations=[TALKS[3], TALKS[3][:1] + [turn("assistant", "red")]])
  records = [record(0, captions={}, conversations=talks), record(1, captions={}, **picture_unused)]
  write_dataset("several", tmp_path, {"train": records}, fields=("image", "conversations"))
  pipeline = Pipeline(resolved(tmp_path, "several", **{"data.sequence.pack": False}))
  said = capfd.readouterr().err
  assert "several: 4 conversations" in said and "2 faults, such as r000: roles out of order" in said
  assert pipeline.examples == 5 and pipeline.batch(0)["valid"].sum() == 4
  records = [record(1, captions={}, **picture_unused)]
  write_dataset("idle", tmp_path, {"train": records}, fields=("image", "conversations"))
  Pipeline(resolved(tmp_path, "idle"))
  assert "r001: its picture stands in no conversation" in capfd.readouterr().err
