"""The language model: what a prompt read at once, packing, and media in their places must keep."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

import mmjax
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.inference.engine import Decoding, go_on_from_prompts
from mmjax.models import make_model
from mmjax.objectives.language_modelling import language_modelling, next_targets

VOCABULARY, LENGTH, PLACES = 50, 24, 4
SPECIAL = dict(pad=0, bos=1, eos=2, unk=3, mask=4)


def resolved(places=PLACES, **settings):
  c = mmjax.config.base()
  c.data.text.vocab_size, c.data.image.size = VOCABULARY, 16
  c.data.sequence.length, c.data.sequence.slots, c.data.sequence.image = LENGTH, 2, places
  c.precision.compute = "float32"
  vit = dict(kind="vit", patch=4, width=16, depth=1, heads=2)
  c.model = dict(
    name="language_model",
    width=32,
    depth=2,
    heads=4,
    mlp=48,
    encoders=dict(image=vit),
    connectors=dict(image=dict(kind="mlp", fold=2)),
    block=dict(key_value_heads=2),
  )
  c.objectives.words = dict(kind="language_modelling")
  for name, value in settings.items():
    c.model[name] = value
  return configs.resolve(c, special_tokens=SPECIAL)


def examples(seed=0):
  """Three examples, one of them without a picture: (tokens, has a picture)."""
  random = np.random.default_rng(seed)
  return [
    (random.integers(5, VOCABULARY, size), picture)
    for size, picture in ((6, True), (5, False), (3, True))
  ]


def row(parts, pictures, length=LENGTH):
  """One row [1, L] of these examples, and its pictures."""
  s = dict(
    tokens=np.zeros(length, np.int32),
    positions=np.zeros(length, np.int32),
    segment_ids=np.zeros(length, np.int32),
    loss_mask=np.zeros(length, bool),
    media_index=np.full(length, -1, np.int32),
    media_offset=np.zeros(length, np.int32),
  )
  pixels, present = np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, bool)
  at = used = 0
  for number, (tokens, picture) in enumerate(parts, 1):
    start = at
    if picture:
      s["media_index"][at : at + PLACES] = used
      s["media_offset"][at : at + PLACES] = np.arange(PLACES)
      pixels[used], present[used] = pictures[number - 1], True
      at, used = at + PLACES, used + 1
    s["tokens"][at : at + len(tokens)] = tokens
    s["loss_mask"][at : at + len(tokens)] = True
    at += len(tokens)
    s["segment_ids"][start:at], s["positions"][start:at] = number, np.arange(at - start)
  batch = dict(sequence=s, media=dict(image=dict(pixels=pixels, present=present)))
  return jax.tree.map(lambda x: x[None], batch), at


def stacked(batches):
  return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


PICTURES = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
  return make_model(resolved())


@pytest.fixture(scope="module")
def params(model):
  batch, _ = row(examples(), PICTURES)
  return nn.unbox(jax.jit(model.init)(jax.random.key(0), batch))


@pytest.fixture(scope="module")
def gradient(model):
  @jax.jit
  def run(params, batch):
    def loss(params):
      found = language_modelling(
        lambda method: model.apply(params, batch, method=method), batch, None
      )
      return found["loss"][0], found

    (total, found), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return total, found["loss"][1], gradients

  return run


def test_the_loss_is_the_dense_one(model, params, gradient):
  batch, _ = row(examples(), PICTURES)
  hidden, table, _ = model.apply(params, batch, method="next_tokens")
  logits = np.asarray(jax.nn.log_softmax(hidden @ table.T))[0]
  s, total, count = batch["sequence"], 0.0, 0
  for place in range(1, LENGTH):
    if s["loss_mask"][0, place] and s["segment_ids"][0, place] == s["segment_ids"][0, place - 1]:
      total -= logits[place - 1, s["tokens"][0, place]]
      count += 1
  loss, weight, _ = gradient(params, batch)
  assert count == weight == 6 + 4 + 3  # an example without a picture has no token before its first
  np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_packed_examples_are_as_if_alone_and_see_nothing_of_each_other(params, model, gradient):
  """The same loss and gradient a token; and another example in the row changes no bit."""
  parts = examples()
  packed, _ = row(parts, PICTURES)
  alone = [row([part], PICTURES[i : i + 1])[0] for i, part in enumerate(parts)]
  loss, weight, by = gradient(params, packed)
  apart = [gradient(params, batch) for batch in alone]
  np.testing.assert_allclose(loss, sum(float(x[0]) for x in apart), rtol=1e-5)
  assert weight == sum(x[1] for x in apart)
  total = jax.tree.map(lambda *x: sum(x), *[x[2] for x in apart])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), by, total)

  hidden = jax.jit(lambda batch: model.apply(params, batch, method="next_tokens")[0])
  others = examples(seed=7)
  changed, _ = row([parts[0], others[1], others[2]], [PICTURES[0], None, PICTURES[1]])
  first = packed["sequence"]["segment_ids"][0] == 1
  before, after = np.asarray(hidden(packed))[0], np.asarray(hidden(changed))[0]
  np.testing.assert_array_equal(before[first], after[first])
  assert not np.allclose(before[~first][:8], after[~first][:8])


def test_branches_of_a_trunk_are_as_if_alone(params, model, gradient):
  """Three texts about one picture, which stands there once, and another example beside them; what
  one of them says changes no bit of the others.
  """
  (first, _), (second, _), (third, _) = examples()
  alone = [row([(text, True)], PICTURES[:1])[0] for text in (first, second, third)]
  other = row([(second, True)], PICTURES[1:2])[0]
  batch, at = row([(np.concatenate([first, second, third]), True)], PICTURES[:1], 32)
  s, start = {name: x[0] for name, x in batch["sequence"].items()}, PLACES
  s["trunks"] = np.zeros(32, np.int32)
  for number, text in enumerate((first, second, third), 2):
    here = slice(start, start := start + len(text))
    s["segment_ids"][here], s["trunks"][here] = number, 1
    s["positions"][here] = PLACES + np.arange(len(text))
  for name, value in s.items():
    if name != "trunks":
      value[at : at + PLACES + len(second)] = other["sequence"][name][0, : PLACES + len(second)]
  s["segment_ids"][at : at + PLACES + len(second)] = 9
  s["media_index"][at : at + PLACES] = 1
  pixels = batch["media"]["image"]["pixels"]
  pixels[0, 1], batch["media"]["image"]["present"][0, 1] = PICTURES[1], True
  batch["sequence"] = {name: x[None] for name, x in s.items()}
  together = gradient(params, batch)

  def without_firsts(one):  # of a branch the first token is no target
    one["sequence"]["loss_mask"][0, PLACES] = False
    return one

  apart = [gradient(params, one) for one in (*map(without_firsts, alone), other)]
  np.testing.assert_allclose(together[0], sum(float(x[0]) for x in apart), rtol=1e-5)
  assert together[1] == sum(x[1] for x in apart) == 5 + 4 + 2 + 5
  total = jax.tree.map(lambda *x: sum(x), *[x[2] for x in apart])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), together[2], total)

  hidden = jax.jit(lambda batch: model.apply(params, batch, method="next_tokens")[0])
  branch = s["segment_ids"] == 3
  tokens = np.where(branch, s["tokens"] % 40 + 7, s["tokens"])[None]
  changed = {**batch, "sequence": {**batch["sequence"], "tokens": tokens}}
  before, after = np.asarray(hidden(batch))[0], np.asarray(hidden(changed))[0]
  np.testing.assert_array_equal(before[~branch], after[~branch])
  assert not np.allclose(before[branch], after[branch])


def test_a_conversation_changes_no_bit_of_the_gradient_of_another(params, gradient):
  """Of turns of which some are no targets, with another conversation beside them."""
  parts, others = examples(), examples(seed=7)
  found = []
  for beside, picture in ((parts[2], PICTURES[2]), (others[2], PICTURES[1])):
    batch, _ = row([parts[0], parts[1], beside], [PICTURES[0], None, picture])
    s = batch["sequence"]
    batch["sequence"] = dict(s, loss_mask=s["loss_mask"] & (s["segment_ids"] < 3))
    batch["sequence"]["loss_mask"][:, PLACES : PLACES + 2] = False
    found.append(gradient(params, batch))
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert found[0][1] == 4 + 4


@pytest.mark.parametrize("both_ways", ["media", "prompt"])
def test_tokens_that_see_each_other_both_ways(both_ways, params):
  """In a packed row as alone, read at once as in training; a later token reaches an earlier one of
  its picture or prompt, and no other.
  """
  model = make_model(resolved(both_ways=both_ways, block=dict(key_value_heads=2, windows=(3, 0))))
  hidden = jax.jit(lambda batch: model.apply(params, batch, method="next_tokens")[0])
  parts = examples()

  def asked(parts, pictures):
    batch, end = row(parts, pictures)
    targets, segments = batch["sequence"]["loss_mask"], batch["sequence"]["segment_ids"][0]
    for number in range(1, segments.max() + 1):
      targets[0, np.flatnonzero((segments == number) & targets[0])[:2]] = False
    return batch, end

  packed, _ = asked(parts, PICTURES)
  together, at = np.asarray(hidden(packed))[0], 0
  for i, part in enumerate(parts):
    alone, end = asked([part], PICTURES[i : i + 1])
    np.testing.assert_allclose(hidden(alone)[0, :end], together[at : at + end], atol=1e-5)
    at += end
  alone, end = asked(parts[:1], PICTURES)
  prompt = {**alone, "sequence": {**alone["sequence"], "length": np.array([PLACES + 2])}}
  logits, _ = model.apply(params, prompt, length=LENGTH, method="prefill")
  last = model.apply(params, hidden(alone)[:, PLACES + 1], method="logits")
  np.testing.assert_allclose(logits, last, atol=1e-5)
  before = np.asarray(hidden(alone))[0]
  changed = jax.tree.map(np.copy, alone)
  if both_ways == "media":  # the last token of the picture is another of its tokens
    changed["sequence"]["media_offset"][0, PLACES - 1] = 0
  else:  # the last token of the prompt
    changed["sequence"]["tokens"][0, PLACES + 1] += 1
  first = np.abs(np.asarray(hidden(changed))[0] - before).max(-1) > 1e-6
  assert first[:end].all()
  changed["sequence"]["tokens"][0, end - 1] += 1  # a target reaches nothing before it
  again = np.asarray(hidden(changed))[0]
  changed["sequence"]["tokens"][0, end - 1] += 1
  np.testing.assert_array_equal(np.asarray(hidden(changed))[0, : end - 1], again[: end - 1])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_prompts_of_unequal_length_go_on_as_the_whole_row_says(positions, params, model):
  if positions == "learned":
    model = make_model(resolved(positions=positions, max_positions=40))
    params = nn.unbox(model.init(jax.random.key(0), row(examples(), PICTURES)[0]))
  rows = [row([part], PICTURES[i : i + 1]) for i, part in enumerate(examples())]
  batch, ends = stacked([x for x, _ in rows]), np.array([end for _, end in rows])
  hidden = model.apply(params, batch, method="next_tokens")[0]
  want = np.asarray(model.apply(params, hidden, method="logits"))
  lengths = ends - 2
  prompts = {**batch, "sequence": {**batch["sequence"], "length": lengths}}
  logits, state = model.apply(params, prompts, length=LENGTH + 2, method="prefill")
  index = np.arange(3)
  np.testing.assert_allclose(logits, want[index, lengths - 1], atol=1e-5)
  for more in range(2):
    places = lengths + more
    token = batch["sequence"]["tokens"][index, places]
    logits, state = model.apply(params, token, places, state, method="decode_step")
    np.testing.assert_allclose(logits, want[index, places], atol=1e-5)


@pytest.mark.parametrize(
  "decoding", [Decoding(), Decoding("beam", 3), Decoding("sample", temperature=2.0)], ids=str
)
def test_a_text_does_not_depend_on_the_prompts_beside_it(decoding, params, model):
  """Prompts of mixed lengths and media, in one batch and one by one."""
  rows = [row([part], PICTURES[i : i + 1]) for i, part in enumerate(examples())]
  batch, ends = stacked([x for x, _ in rows]), np.array([end for _, end in rows], np.int32)
  batch["sequence"]["length"] = ends
  run = jax.jit(
    lambda batch, ids: go_on_from_prompts(
      model, params, batch, 6, decoding, rng=jax.random.key(0), ids=ids
    )[0]
  )
  together = np.asarray(run(batch, np.arange(3)))
  for i in range(3):
    alone = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
    np.testing.assert_array_equal(run(alone, np.array([i])), together[i : i + 1])


def test_pictures_reach_the_text_in_their_order(params, model):
  part = [(np.array([7, 8, 9]), True)]
  hidden = jax.jit(lambda batch: model.apply(params, batch, method="next_tokens")[0])
  one, two = (hidden(row(part, PICTURES[i : i + 1])[0]) for i in (0, 1))
  assert not np.allclose(one[0, :7], two[0, :7])
  both = [(np.array([7]), True), (np.array([7]), True)]
  ahead, _ = row(both, PICTURES[:2])
  swapped, _ = row(both, PICTURES[1::-1])
  first = np.asarray(hidden(ahead))[0, :5]
  np.testing.assert_allclose(np.asarray(hidden(swapped))[0, 5:10], first, atol=1e-5)


@pytest.mark.parametrize(
  "connector, places",
  [(dict(kind="mlp", layers=1, pool=2), 4), (dict(kind="resampler", tokens=3, depth=1), 3)],
  ids=["pooled", "resampler"],
)
def test_other_connectors_give_the_places_that_the_config_says(connector, places):
  model = make_model(resolved(places, connectors=dict(image=connector)))
  batch, _ = row(examples(), PICTURES)
  variables = model.init(jax.random.key(0), batch)
  media, first, each = model.apply(variables, batch, method="media")
  assert media.shape == (1, 1, 2 * places, 32) and each.tolist() == [places] * 2
  assert first.tolist() == [0, places]


def test_a_connector_with_positions_tells_places_apart():
  from mmjax.models.connectors import Projector

  tokens, mask = np.ones((2, 16, 8), np.float32), np.ones((2, 16), bool)
  connector = Projector(32, fold=2, positions=True)
  values = nn.unbox(connector.init(jax.random.key(0), tokens, mask))
  out = np.asarray(connector.apply(values, tokens, mask))
  position = values["params"].pop("position")
  plain = Projector(32, fold=2).apply(values, tokens, mask)
  assert position.shape == (4, 32)
  np.testing.assert_allclose(out, np.asarray(plain) + position, rtol=1e-6)


def test_a_model_whose_connector_gives_other_places_is_refused():
  model = make_model(resolved(connectors=dict(image=dict(kind="mlp"))))  # 16 tokens a picture
  with pytest.raises(UserError, match="data.sequence.image is 4.*16"):
    model.init(jax.random.key(0), row(examples(), PICTURES)[0])


def test_targets_are_the_next_tokens_of_the_same_example():
  batch, _ = row([(np.array([7, 8]), False), (np.array([9, 10]), False)], [None, None], 6)
  assert np.asarray(next_targets(batch)).tolist() == [[8, -1, 10, -1, -1, -1]]
  batch["valid"] = np.array([False])
  assert (np.asarray(next_targets(batch)) == -1).all()


def test_a_model_that_reads_all_before_an_answer_as_one_prompt_learns_last_answers():
  c = mmjax.config.base()
  c.data.sources.it = dict(name="it", text="conversation")
  c.data.text.update(tokenizer="it", template="chatml")
  c.data.sequence.length = 16
  c.model = dict(name="language_model", width=32, heads=4, both_ways="prompt")
  c.objectives.words = dict(kind="language_modelling")
  with pytest.raises(configs.ConfigError, match="'each' or 'last', or both_ways to 'media'"):
    configs.resolve(c, special_tokens=SPECIAL)
  for loss in ("last", "each"):
    c.data.text.loss = loss
    configs.resolve(c, special_tokens=SPECIAL)


@pytest.mark.parametrize(
  "settings, said",
  [
    (dict(connectors={}), "model.encoders.image has no connector"),
    (dict(places=0), "data.sequence.image is 0"),
    (dict(encoders={}), "model.connectors.image has no encoder"),
    (dict(encoders=dict(text=dict(kind="transformer")), connectors={}), "leave it out"),
  ],
  ids=["no connector", "no places", "no encoder", "text"],
)
def test_contradictions_are_said_before_any_device_is_used(settings, said):
  with pytest.raises(configs.ConfigError, match=f"(?i){said}"):
    resolved(**settings)
