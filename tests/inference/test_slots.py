"""Texts side by side in one cache: each is the text that it would be alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.config import UserError
from mmjax.inference.engine import Decoding, restrict
from mmjax.inference.slots import Slots
from mmjax.parallel.mesh import single_device_mesh
from tests.inference import tiny
from tests.inference.test_language import IMAGES, PROMPTS, config

SAMPLE = Decoding("sample", temperature=1.5, top_k=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tiny.save(config(), tmp_path_factory.mktemp("slots"))
  return mmjax.load(folder, mesh=single_device_mesh())


@pytest.fixture(scope="module")
def slots(model):
  return Slots(model.language, 3, 64)


def finish(slots, *texts):
  while any(not text.ended for text in texts):
    slots.step()
  return [text.text for text in texts]


def read(model, number):
  return model.language.read(PROMPTS[number : number + 1], {"image": IMAGES[number : number + 1]})[
    0
  ]


def test_texts_that_begin_at_other_times_are_those_of_generate(model, slots):
  """Greedy and drawn ones, of other lengths, with and without pictures, in rows used before."""
  whole = model.generate(PROMPTS, image=IMAGES, max_length=20)
  (drawn,) = model.generate(
    PROMPTS[1:2], image=IMAGES[1:2], max_length=12, temperature=1.5, top_k=40, seed=5
  )
  first = slots.begin(read(model, 0), 20)
  slots.step()
  second = slots.begin(read(model, 1), 20)
  third = slots.begin(read(model, 1), 12, SAMPLE, seed=5)
  with pytest.raises(UserError, match="all 3 rows are in use"):
    slots.begin(read(model, 2), 20)
  assert finish(slots, first, third) == [whole[0], drawn]
  fourth = slots.begin(read(model, 2), 20)
  assert finish(slots, second, fourth) == whole[1:]
  assert [len(text.tokens) for text in (third, fourth)] == [12, 20]


def test_pieces_stop_and_cancel(model, slots):
  (whole,) = model.generate(PROMPTS[:1], max_length=20)
  stop = whole[len(whole) // 2 :][:3]
  text, other = slots.begin(read(model, 0), 20, stop=[stop]), slots.begin(read(model, 0), 20)
  pieces = [text.piece()]
  while not text.ended:
    slots.step()
    pieces.append(text.piece())
  assert "".join(pieces) == whole[: whole.index(stop)] and text.ended == "stop"
  slots.end(other)
  assert other.ended == "cancelled" and slots.free == 3 and slots.step() == []


def test_scores_are_those_of_the_model(model, slots):
  text = slots.begin(read(model, 0), 4)
  finish(slots, text)
  assert all(
    best[0] == (token, score)
    for token, score, best in zip(text.tokens, text.scores, text.best, strict=True)
  )
  ending = model.language.text(text.tokens)
  if model.tokenizer.encode(ending) == text.tokens:
    (want,) = model.score(PROMPTS[:1], [ending])[0]
    assert sum(text.scores) >= want - 1e-3  # `score` counts the end too


def test_a_prompt_that_goes_on_from_an_earlier_one_reuses_its_cache(model):
  """The answers are those of whole prompts, and only what is new is read."""
  again, fresh = Slots(model.language, 1, 64, reuse=True), Slots(model.language, 1, 64)
  prompt, images = PROMPTS[2], IMAGES[2]
  for turn in range(3):
    (one,) = model.language.read([prompt], {"image": [images]})
    texts = [slots.begin(one, 6) for slots in (again, fresh)]
    assert finish(again, texts[0]) == finish(fresh, texts[1])
    assert texts[0].scores == pytest.approx(texts[1].scores, abs=1e-4)
    assert texts[1].reused == 0 and (texts[0].reused > 4) == (turn > 0)
    prompt += " <image> and rain"
    images = [*images, IMAGES[1]]
  (other,) = model.language.read([PROMPTS[2]], {"image": [IMAGES[2][::-1]]})
  before = len(model.tokenizer.encode("rain "))
  text = again.begin(other, 6)  # the same words about other pictures
  assert text.reused <= before + 1


def test_a_window_that_is_too_small_is_one_line(model, slots):
  with pytest.raises(UserError, match="more than the window of 64"):
    slots.begin(read(model, 0), 64)
  with pytest.raises(UserError, match="beam search"):
    slots.begin(read(model, 0), 4, Decoding("beam", 2))


def test_settings_of_rows_restrict_as_settings_of_all():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)) * 3, jnp.float32)
  settings = [
    (0, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (9, 0.5, 0.0),
    (0, 1.0, 0.2),
    (7, 0.9, 0.1),
  ]
  of_rows = (jnp.asarray(x)[:, None] for x in zip(*settings, strict=True))
  together = restrict(logits, *of_rows)
  for row, how in enumerate(settings):
    alone = restrict(logits[row : row + 1], *how)
    np.testing.assert_array_equal(jax.device_get(together[row : row + 1]), jax.device_get(alone))
