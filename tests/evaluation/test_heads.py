"""Evaluators of heads and decoders against brute force: real data and batches, a model whose
answers are scripted.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import load_tokenizer
from mmjax.evaluation import Evaluation
from mmjax.parallel.mesh import make_mesh
from tests.data.conftest import picture

WORDS = ("red", "blue", "green", "stone")
COUNT, BROKEN, LABELS = 9, 4, ("a", "b", "c")


def caption(i):
  return (
    f"the {WORDS[i % 4]} apple"
    if i % 2
    else f"the {WORDS[i % 4]} house on a {WORDS[(i + 1) % 4]} apple"
  )


def record(i):
  choices = [f"{word} apple" for word in WORDS]
  return {
    "id": f"h{i}",
    "image": picture(i) if i != BROKEN else b"junk",
    "captions": {"en": [caption(i)]},
    "label": LABELS[(i * i) % 3],
    "image_key": i,
    "facts": {"voice": "v" + str(i % 2), "choices": [choices, i % 4]},
  }


READABLE = [i for i in range(COUNT) if i != BROKEN]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """world(apply, **evaluator) -> Result of that evaluator; `apply(method, batch, constants)` plays
  the model.
  """
  root = tmp_path_factory.mktemp("heads")
  write_dataset("heads", root, {"test": map(record, range(COUNT))}, fields=("image", "facts"))
  words = [*WORDS, "the", "apple", "house", "on", "a"]
  train_tokenizer(
    [" ".join(np.roll(words, i)[: 1 + i % 5]) for i in range(400)],
    root / "tokenizers" / "t.model",
    400,
  )
  c = configs.base()
  (
    c.data.dir,
    c.data.image.size,
    c.data.text.tokenizer,
    c.data.text.vocab_size,
    c.data.text.length,
  ) = str(root), 8, "t", 400, 16
  c.data.text.words, c.data.label, c.data.classes, c.evaluation.batch_size = True, "label", 3, 4
  c.model = dict(
    name="dual_encoder",
    encoders=dict(image=dict(kind="vit", patch=4), text=dict(kind="transformer")),
  )

  def run(apply, constants=(), overrides=(), **evaluator):
    c.evaluation.evaluators = {"it": dict(source="heads", **evaluator)}
    config = configs.resolve(c, overrides)
    jitted = jax.jit(
      lambda constants, method, args, batch: apply(method, batch, constants), static_argnums=(1, 2)
    )
    return Evaluation(config, jitted, make_mesh(config, jax.devices()[:2])).run(constants)["it"]

  run.tokenizer = load_tokenizer(configs.resolve(c).data)
  return run


def number(batch):
  """Which record each row is, on the device."""
  return batch["image"]["key"][:, 1].astype(jnp.int32)


def test_classification_counts_what_is_right(world):
  def said(i):
    return (i + 1) % 3

  result = world(
    lambda method, batch, _: 5.0 * jax.nn.one_hot((number(batch) + 1) % 3, 3),
    kind="classification",
    by="voice",
  )
  truth = np.array([LABELS.index(record(i)["label"]) for i in READABLE])
  correct = np.array([said(i) == t for i, t in zip(READABLE, truth, strict=True)])
  assert result.metrics["accuracy"] == correct.mean()
  assert "accuracy@5" not in result.metrics, "of three classes it says nothing"
  recalls = [correct[truth == c].mean() for c in np.unique(truth)]
  assert result.metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))
  assert result.metrics["b/recall"] == pytest.approx(correct[truth == 1].mean())
  assert result.metrics["majority"] == np.bincount(truth).max() / len(truth)
  for voice in (0, 1):
    assert (
      result.metrics[f"v{voice}/accuracy"] == correct[[i % 2 == voice for i in READABLE]].mean()
    )
  assert result.metrics["examples"] == len(READABLE) and result.metrics["unreadable"] == 1
  worst = result.figures["mistakes"]
  assert worst["wrong"] == len(worst["rows"]) == (~correct).sum()
  assert all(
    row["picture"].shape == (8, 8, 3) and row["said"] != row["true"] for row in worst["rows"]
  )
  assert np.trace(result.figures["confusion"]["matrix"]) == correct.sum()


def test_several_labels_and_hidden_modalities(world):
  """Classes a and b as independent labels; a model that knows them only where it is shown the
  picture.
  """

  def classify(method, batch, _):
    shown = batch["image"].get("present", jnp.ones(4, bool))[:, None]
    return jnp.where(
      shown, 4.0 * jax.nn.one_hot((number(batch) ** 2) % 3, 3) - 2, 0.1 * number(batch)[:, None]
    )

  several = ("data.label=labels",)
  seen = world(classify, overrides=several, kind="classification").metrics
  assert seen["exact"] == seen["f1"] == seen["auc"] == seen["a/f1"] == 1
  assert seen["mean_average_precision"] == 1 and seen["accuracy"] == 1 and seen["unreadable"] == 1
  blind = world(classify, overrides=several, kind="classification", drop=("image",)).metrics
  assert blind["mean_average_precision"] < 0.9


def judge(facts, text):
  return {"voice": facts["voice"] == "v1", "apple": "apple" in text}


def test_captions_are_decoded_and_compared(world):
  texts = [caption(i) if i % 3 else "the stone house" for i in range(COUNT)]
  table = np.zeros((COUNT, 16), np.int32)
  for i, text in enumerate(texts):
    # What comes after the end does not count.
    ids = [*world.tokenizer.encode(text), world.tokenizer.eos_id, 7, 7]
    table[i, : len(ids)] = ids
  result = world(
    lambda method, batch, table: table[number(batch)],
    jnp.asarray(table),
    kind="captions",
    by="voice",
    check="tests.evaluation.test_heads:judge",
    examples=4,
  )
  metrics = result.metrics
  assert metrics["exact"] == np.mean([texts[i] == caption(i) for i in READABLE])
  assert metrics["right/apple"] == np.mean(["apple" in texts[i] for i in READABLE])
  assert metrics["right"] == np.mean(["apple" in texts[i] and i % 2 == 1 for i in READABLE])
  assert metrics["v1/right/voice"] == 1 and metrics["v0/right/voice"] == 0
  from jiwer import wer

  assert metrics["word_error_rate"] == pytest.approx(
    wer([caption(i) for i in READABLE], [texts[i] for i in READABLE])
  )
  assert (
    metrics["examples"] == len(READABLE)
    and metrics["unreadable"] == 1
    and 0 < metrics["cider_d"] < 10
  )
  shown = result.figures["texts"]["rows"]
  assert len(shown) == 4 and all(row["picture"].shape == (8, 8, 3) for row in shown)


def test_every_word_is_hidden_once(world):
  """A model that always says "apple" is right where one was hidden, and nowhere else."""
  (apple,), mask = world.tokenizer.encode("apple"), world.tokenizer.mask_id
  seen = []

  def fill(method, batch, _):
    tokens = batch["text"]["tokens"]
    jax.debug.callback(lambda t: seen.append(np.asarray(t)), tokens)
    return jnp.where(tokens == mask, apple, tokens)

  result = world(fill, kind="masked_words", skip=("the", "on", "a"))
  words = [
    word for i in range(COUNT) for word in caption(i).split() if word not in ("the", "on", "a")
  ]
  assert result.metrics["words"] == len(words)
  assert result.metrics["accuracy"] == words.count("apple") / len(words)
  hidden = np.concatenate(seen) == mask
  starts = (np.diff(np.pad(hidden, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(1)
  assert starts.max() == 1 and hidden.any(), "one word at a time"


def test_multiple_choice_picks_the_nearest(world):
  first = [world.tokenizer.encode(word)[0] for word in WORDS]
  assert len(set(first)) == 4
  # Wrong for each third.
  aim = np.array([first[i % 4] if i % 3 else first[(i + 1) % 4] for i in range(COUNT)], np.int32)

  def embed(method, batch, aim):
    return jax.nn.one_hot(
      batch["text"]["tokens"][:, 0] if "text" in batch else aim[number(batch)], 400
    )

  result = world(embed, jnp.asarray(aim), kind="multiple_choice", modality="image", by="voice")
  correct = {i: i % 3 > 0 for i in READABLE}
  assert (
    result.metrics["accuracy"] == np.mean(list(correct.values()))
    and result.metrics["chance"] == 0.25
  )
  assert result.metrics["v0/accuracy"] == np.mean([correct[i] for i in READABLE if i % 2 == 0])
  tie = world(lambda method, batch, _: jnp.ones((4, 8)), kind="multiple_choice", modality="image")
  assert tie.metrics["accuracy"] == 0, "ties are pessimistic"


@pytest.mark.parametrize(
  "entry, said",
  [
    (
      dict(kind="captions", check="nowhere:judge"),
      r"evaluators\.it\.check 'nowhere:judge': No module named 'nowhere'",
    ),
    (
      dict(kind="multiple_choice", modality="image", choices="two words:x"),
      r"choices 'two words:x': write module:function",
    ),
  ],
)
def test_a_function_that_is_not_there(world, entry, said):
  with pytest.raises(UserError, match=said):
    world(lambda method, batch, _: jnp.zeros((4, 8)), **entry)
