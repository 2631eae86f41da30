"""Prompts with media, in batches, piece by piece, and scored; by a tiny random language model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.inference.engine import settings_of_file
from mmjax.inference.generate import generate
from mmjax.models import block
from mmjax.parallel.mesh import single_device_mesh
from tests.inference import tiny


def config(**model):
  c = configs.base()
  c.data.image.size = 16
  c.data.text = dict(tokenizer="tiny", vocab_size=512)
  c.data.sequence.length, c.data.sequence.image = 32, 4
  c.model = dict(
    name="language_model",
    width=16,
    depth=2,
    heads=2,
    encoders=dict(image=dict(kind="vit", patch=8, width=16, depth=1, heads=2)),
    connectors=dict(image=dict(kind="mlp")),
    **model,
  )
  c.precision.compute = "float32"
  c.train.batch_size = 8
  c.objectives.words = dict(kind="language_modelling")
  return configs.resolve(c)


PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.save(config(), tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def model(folder):
  return mmjax.load(folder, mesh=single_device_mesh())


PROMPTS = ["a red", "<image> two blue birds on", "rain <image> on <image> the sea"]
IMAGES = [None, PICTURES[0], [PICTURES[1], PICTURES[2]]]


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.5, top_k=40, seed=3)], ids=str)
def test_texts_do_not_depend_on_the_prompts_beside_them(model, settings):
  together = model.generate(PROMPTS, image=IMAGES, max_length=6, **settings)
  assert len(set(together)) == 3
  for i in (0, 2) if not settings else (0,):  # row i draws by its number
    alone = model.generate(PROMPTS[i : i + 1], image=IMAGES[i : i + 1], max_length=6, **settings)
    assert alone == together[i : i + 1]


def test_texts_are_decoded_as_generation_config_says_unless_told_otherwise(model, monkeypatch):
  stated = dict(temperature=1.5, top_k=40)
  file = json.dumps(dict(stated, do_sample=True, top_p=None, eos_token_id=[1, 2])).encode()
  usual = settings_of_file(file)
  assert usual == dict(stated, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
  drawn = model.generate(PROMPTS, image=IMAGES, max_length=6, seed=3, **stated)
  greedy = model.generate(PROMPTS, image=IMAGES, max_length=6)
  monkeypatch.setattr(model, "usual_decoding", usual)
  assert model.generate(PROMPTS, image=IMAGES, max_length=6, seed=3) == drawn != greedy
  assert model.generate(PROMPTS, image=IMAGES, max_length=6, temperature=0) == greedy
  # what is not drawn has no temperature, but a penalty
  assert settings_of_file(b'{"temperature": 0.5, "repetition_penalty": 1.2}') == dict(
    temperature=0.0, repetition_penalty=1.2
  )
  with pytest.raises(UserError, match="generation_config.json: top_p is 'all'"):
    settings_of_file(b'{"do_sample": true, "top_p": "all"}')
  for content, words in {
    b"[]": "is no object of JSON",
    b"{": "is no readable JSON",
    b"\xff": "is no readable JSON",
    b'{"do_sample": true, "top_k": 2.5}': "top_k is 2.5, but must be whole",
    b'{"do_sample": true, "top_k": 1e30}': "top_k is 1e",
    b'{"repetition_penalty": 1e400}': "repetition_penalty is inf",
    b'{"do_sample": true, "temperature": 1%s}' % (b"0" * 400): "temperature is 1000",
    b'{"do_sample": true, "temperature": NaN}': "temperature is nan",
  }.items():
    with pytest.raises(UserError, match=words):
      settings_of_file(content)


def test_an_int8_cache_holds_nearly_what_the_float_one_does(folder, model):
  cached = block.empty_cache((2, 3, 7, 5), np.float32, int8=True).key
  vectors = np.random.default_rng(0).normal(0, 3, (2, 4, 3, 5)).astype(np.float32)
  vectors[0, 0, 0] = 0
  read = block.read_cache(block.update_cache(cached, vectors, np.array([1, 3])), np.float32)
  for row, start in enumerate((1, 3)):
    apart = np.abs(read[row, :, start : start + 4] - vectors[row].swapaxes(0, 1))
    most = np.abs(vectors[row]).max(-1).T[..., None]
    assert (apart <= most / 254 * 1.001).all()
    assert not np.delete(read[row], range(start, start + 4), 1).any()

  small = mmjax.load(folder, mesh=single_device_mesh(), cache="int8")
  logits, sizes = [], []
  for predictor in (model, small):
    batch, _ = predictor.language._batch(
      predictor.language.read(PROMPTS, dict(image=IMAGES)), range(3), 1
    )
    writer, variables = predictor.language.model, {"params": predictor.params}

    def run(batch, writer=writer, variables=variables):
      first, state = writer.apply(variables, batch, length=40, method="prefill")
      token, places = first.argmax(-1), batch["sequence"]["length"]
      then, _ = writer.apply(variables, token, places, state, method="decode_step")
      return first, then, state[0]

    *found, cache = jax.jit(run)(batch)
    logits.append(np.stack(found)[:, :3])
    sizes.append(sum(x.nbytes for x in jax.tree.leaves(cache)))
  assert 0 < np.abs(logits[1] - logits[0]).max() < 0.02 * logits[0].std()
  assert sizes[1] == sizes[0] * (8 + 4) / 32  # heads of 8 channels, with a scale each
  with pytest.raises(UserError, match="cache 'int4' is unknown; there are: float, int8"):
    mmjax.load(folder, cache="int4")


@pytest.mark.slow
def test_texts_of_an_int8_cache_are_the_same_in_batches_and_in_pieces(folder):
  small = mmjax.load(folder, mesh=single_device_mesh(), cache="int8")
  together = small.generate(PROMPTS, image=IMAGES, max_length=20)
  assert small.generate(PROMPTS[2:], image=IMAGES[2:], max_length=20) == together[2:]
  assert "".join(small.stream(PROMPTS[0], max_length=20)) == together[0]


def test_a_stream_gives_the_same_text_in_pieces(model):
  (whole,) = model.generate(["a red"], max_length=20)
  pieces = list(model.stream("a red", max_length=20))
  assert "".join(pieces) == whole and len(pieces) > 1
  stop = whole[len(whole) // 2 :][:3]
  (cut,) = model.generate(["a red"], max_length=20, stop=[stop])
  assert cut == whole[: whole.index(stop)]
  assert "".join(model.stream("a red", max_length=20, stop=[stop])) == cut


def test_scores_are_sums_of_log_probabilities(model):
  """The likelihood of an option is a product over its tokens, whatever stands beside it."""
  scores = model.score(["a red", "rain on"], ["heart", "the sea"])
  assert scores.shape == (2, 2) and (scores < 0).all()
  for i, prompt in enumerate(["a red", "rain on"]):
    for j, option in enumerate(["heart", "the sea"]):
      tokens = [*model.tokenizer.encode(prompt), *model.tokenizer.encode(option)]
      tokens.append(model.tokenizer.eos_id)
      start = len(model.tokenizer.encode(prompt))
      row = dict(sequence=dict(tokens=np.array([tokens], np.int32)))
      variables = {"params": model.params}
      hidden, table, _ = model._model.apply(variables, row, method="next_tokens")
      logits = np.asarray(hidden @ table.T, np.float64)[0]
      norm = np.log(np.exp(logits).sum(-1))
      want = sum(logits[k - 1, tokens[k]] - norm[k - 1] for k in range(start, len(tokens)))
      assert scores[i, j] == pytest.approx(want, abs=1e-3)


def test_files_and_prompts_by_the_command(folder, model, tmp_path):
  names = []
  for i in range(2):
    names.append(str(tmp_path / f"{i}.png"))
    tiny.Image.fromarray(PICTURES[i]).save(names[-1])
  got = generate(model, names, prompt="what is it", max_length=4)
  want = model.generate(["what is it"] * 2, image=[PICTURES[0], PICTURES[1]], max_length=4)
  assert got == list(zip(names, want, strict=True))
  assert generate(model, [], prompt="a red", max_length=4) == [
    ("", model.generate(["a red"], max_length=4)[0])
  ]


def test_learned_positions_hold_as_many_tokens_as_there_are(tmp_path):
  """Prompts are filled up to few lengths, which must cost no positions."""
  c = config(positions="learned", max_positions=40)
  model = mmjax.load(tiny.save(c, tmp_path), mesh=single_device_mesh())
  prompt = "a cat" * 4
  tokens = len(model.tokenizer.encode(prompt))
  assert 17 <= tokens <= 32
  (text,) = model.generate([prompt], max_length=41 - tokens)
  assert text.startswith(model.generate([prompt], max_length=2)[0])
  with pytest.raises(UserError, match="of a model of 40 positions"):
    model.generate([prompt], max_length=42 - tokens)


@pytest.mark.parametrize(
  "prompts, media, said",
  [
    (["<image> a"], {}, "1 places <image>, but 0"),
    (["a <image>"], dict(image=[[PICTURES[0], PICTURES[1]]]), "1 places <image>, but 2"),
    (["a", "b"], dict(image=[PICTURES[0]]), "2 prompts, but 1 items of image="),
    (["a"], dict(audio=["x.wav"]), "no encoder for audio"),
    ([""], {}, "prompt 1 is empty"),
    (["a"], dict(image=["missing.png"]), "missing.png"),
  ],
  ids=["too few", "too many", "other numbers", "no encoder", "empty", "missing"],
)
def test_wrong_prompts_are_refused_by_name(model, prompts, media, said):
  with pytest.raises(UserError, match=said):
    model.generate(prompts, **media)
