"""Preference optimisation as a whole: the same gradients packed or not, on one device or eight, in
parts or at once; a run that learns, is stopped and goes on with the reference that it had.
"""

from __future__ import annotations

import json
import math
import shutil

import jax
import numpy as np
import pytest

from mmjax import config as configs
from mmjax import evaluation
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.pipeline import Pipeline
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import load_tokenizer
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.state import checkpoint
from mmjax.training import loop, reference
from mmjax.training.program import Program
from tests.data.conftest import COLOURS, record
from tests.training.test_step import assert_close

STEPS = 24


def preferences(number):
  """A question whose answer is one of its words."""
  colour, other = COLOURS[number % 7], COLOURS[(number // 7 + number + 1) % 7]
  other = other if other != colour else "none"
  prompt = [dict(role="user", content=f"thing {number} is {colour}, which is it?")]
  return [dict(prompt=prompt, chosen=f"it is {colour}", rejected=f"{other} it is")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Data, a tokenizer, and two models to start from, base/ and other/."""
  root = tmp_path_factory.mktemp("preference")
  made = [record(n, captions={}, image=None, preferences=preferences(n)) for n in range(90)]
  splits = {"train": made[:63], "test": made[63:]}
  write_dataset("pairs", root, splits, fields=("preferences",))
  texts = [text for n in range(90) for one in preferences(n) for text in map(str, one.values())]
  train_tokenizer(texts, root / "tokenizers" / "pairs.model", vocab_size=400)
  for seed, name in enumerate(("base", "other")):
    c = config(root)
    program = Program(c, make_mesh(c, jax.devices()[:1]), steps=1)
    assets = load_tokenizer(c.data).to_assets()
    with jax.set_mesh(program.mesh):
      params = jax.device_get(program.init(seed).params)
    checkpoint.save_import(root / name, params, c, assets)
  return root


def config(root, *overrides, form="dpo", start=""):
  c = configs.base()
  c.data.dir, c.data.text.tokenizer, c.data.text.vocab_size = str(root), "pairs", 512
  c.data.sources.pairs = dict(name="pairs", text="preference", cache=True)
  c.data.text.template, c.data.sequence.length = "plain", 256
  c.model = dict(name="language_model", width=32, depth=1, heads=2, mlp=64, encoders={})
  c.objectives = dict(judged=dict(kind="preference", form=form, beta=0.5))
  c.optimizer, c.schedule = dict(name="adamw", lr=1e-2), dict(name="constant", warmup=0)
  c.train.steps, c.train.batch_size, c.checkpoint.every = STEPS, 8, 12
  c.precision.compute, c.log.tensorboard, c.log.every = "float32", False, 1
  c.evaluation.evaluators.held_out = dict(kind="preference", source="pairs", split="test")
  c.init["from"] = start
  return configs.resolve(c, overrides)


def gradients(pipeline, devices, batch):
  """(loss, gradients, sums) of a batch by a program on so many devices."""
  c = pipeline.config
  program = Program(c, make_mesh(c, jax.devices()[:devices]), steps=1)
  with jax.set_mesh(program.mesh):
    state = program.init(0)

    def function(params, batch):
      step = program.step
      return step.gradients(params, {}, batch, jax.random.key(0), step.objectives)[:3]

    run = program.in_mesh(jax.jit(function))
    return jax.device_get(run(state.params, multihost.to_device(batch, program.mesh)))


def with_references(pipeline):
  """The pipeline with made-up log-probabilities of its answers."""
  ((source, _),) = pipeline.judged
  values = np.random.default_rng(0).normal(-20, 2, (len(source), 1, 3)).astype(np.float32)
  pipeline.refer({source.fingerprint: values}, "made up")
  return pipeline


@pytest.mark.parametrize("form", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_packing_devices_and_microbatches_change_nothing(home, form):
  few = "data.sources.pairs.split=train[:16]"
  packed = with_references(Pipeline(config(home, few, form=form)))
  assert packed.examples <= 8
  batch = {name: packed.batch(0)[name] for name in ("sequence", "preference", "valid")}
  # the rows of the next epoch, which a batch is filled up with, do not count
  batch["valid"] = np.arange(8) < packed.examples
  want = gradients(packed, 1, batch)
  assert want[2]["judged"]["loss"][1] == 16 * (2 if form == "kto" else 1)
  parts = "train.microbatches=2" if form == "dpo" else "train.microbatches=1"
  alone = Pipeline(
    config(home, few, "data.sequence.pack=False", "train.batch_size=16", parts, form=form)
  )
  batch = with_references(alone).batch(0)
  assert_close(gradients(alone, 8, {name: batch[name] for name in batch if name != "id"}), want)


@pytest.fixture(scope="module")
def whole(home):
  """A run from base/."""
  c = config(home, start=str(home / "base"))
  assert loop.train(c, home / "whole") == 0
  return home / "whole"


def lines(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  names = ("step", "loss", "judged/accuracy", "judged/margin", "grad_norm")
  return [[row[name] for name in names] for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_run_prefers_held_out_answers_that_are_right(home, whole):
  assert lines(whole)[0][1] == pytest.approx(math.log(2), abs=1e-5)
  c = config(home)
  program = Program(c, make_mesh(c), steps=1)
  with jax.set_mesh(program.mesh):
    params = checkpoint.load_params(str(home / "base"), program.params_spec)
    found = evaluation.Evaluation(c, program.apply, program.mesh).run({"params": params})
  before = found["held_out"].metrics
  after = evaluation.read_eval_json(whole)["held_out"]
  assert before["pairs"] == after["pairs"] == 27 and before["preferred"] < 0.75
  assert after["preferred"] > 0.95 and after["preferred/low"] > before["preferred/high"]
  assert after["margin"] > before["margin"] + 2


def test_the_reference_is_what_the_start_makes_of_each_answer_alone(home):
  """Against the model's own score of each continuation, which knows of no packing."""
  c = config(home)
  pipeline, program = Pipeline(c), Program(c, make_mesh(c, jax.devices()[:1]), steps=1)
  with jax.set_mesh(program.mesh):
    state = program.init(0)
  ((source, table),) = pipeline.judged
  values = reference.computed(pipeline, program, state)[source.fingerprint]
  assert values.shape == (63, 1, 3) and (values[..., 2] == 0).all()
  piece = table[0][1]
  judged = source[piece.record]["preferences"][0]
  template, tokenizer = pipeline.template, load_tokenizer(c.data)
  for side, name in enumerate(("chosen", "rejected")):
    turns = [*judged["prompt"], dict(role="assistant", content=judged[name])]
    prompt, answer = (part.tokens for part in template.render(turns, tokenizer))
    batch = dict(sequence=dict(tokens=np.array([prompt + answer])))
    hidden, embedding, _ = program.model.apply(
      {"params": state.params}, batch, method="next_tokens"
    )
    chances = np.asarray(jax.nn.log_softmax(hidden[0] @ embedding.T))
    places = np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    np.testing.assert_allclose(
      values[piece.record, 0, side], chances[places, answer].sum(), rtol=1e-5
    )


@pytest.mark.parametrize("adapters", [False, True])
def test_pairs_about_pictures_are_learned_in_full_and_by_adapters(home, tmp_path, adapters):
  """A run begins where its reference is, and moves what it trains towards the chosen answers."""
  made = []
  for n in range(16):
    (one,) = preferences(n)
    (turn,) = one["prompt"]
    shown = [dict(type="image"), dict(type="text", text=turn["content"])]
    made.append(record(n, captions={}, preferences=[dict(one, prompt=[dict(turn, content=shown)])]))
  write_dataset("shown", home, {"train": made}, fields=("image", "preferences"))
  seen = dict(image=dict(kind="vit", patch=8, width=16, depth=1, heads=2))
  pictures = (
    "data.sources.pairs.name=shown",
    "data.image.size=16",
    "data.sequence.image=4",
    "data.sequence.slots=2",
    f"model.encoders={seen!r}",
    "model.connectors={'image': {'kind': 'mlp'}}",
    "evaluation.evaluators={}",
    "train.steps=4",
  )
  start = tmp_path / "start"
  c = config(home, *pictures)
  program = Program(c, make_mesh(c, jax.devices()[:1]), steps=1)
  with jax.set_mesh(program.mesh):
    params = jax.device_get(program.init(0).params)
  checkpoint.save_import(start, params, c, load_tokenizer(c.data).to_assets())
  by = ("lora.params='.*(qkv|mlp).*'", "lora.rank=4") if adapters else ()
  assert loop.train(config(home, *pictures, *by, start=str(start)), tmp_path / "run") == 0
  first, *_, last = lines(tmp_path / "run")
  assert first[1] == pytest.approx(math.log(2), abs=1e-6) and first[3] == 0
  assert first[4] > 0 and last[3] > 0.01


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_reference_and_notices_another(home, whole, capsys):
  """Bit for bit, also where the file is lost; not from another model."""
  base, parts = home / "moving", home / "parts"
  shutil.copytree(home / "base", base)
  c = config(home, start=str(base))
  begin = config(home, "train.steps=12", start=str(base))
  loop.train(begin, parts)
  assert "reference log-probabilities of 63 preferences" in capsys.readouterr().out
  written = (parts / reference.FILE).read_bytes()
  lost = shutil.copytree(parts, home / "lost")
  refused = shutil.copytree(parts, home / "refused")
  loop.train(c, parts)
  assert "reference log-prob" not in capsys.readouterr().out
  assert (parts / reference.FILE).read_bytes() == written
  assert lines(parts) == lines(whole)
  (lost / reference.FILE).unlink()
  loop.train(c, lost)
  assert "computed again, by the model that the run started" in capsys.readouterr().out
  assert lines(lost) == lines(whole)
  shutil.rmtree(base)
  shutil.copytree(home / "other", base)
  (refused / reference.FILE).write_bytes(written[: len(written) // 2])
  with pytest.raises(
    UserError, match="the model that the run starts from is another now"
  ) as caught:
    loop.train(c, refused)
  assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_fingerprint_of_a_model_follows_every_bit_and_no_mesh(home):
  found = set()
  for devices, overrides in ((1, ()), (8, ("sharding=fsdp", "mesh.fsdp=-1", "mesh.data=1"))):
    c = config(home, *overrides)
    program = Program(c, make_mesh(c, jax.devices()[:devices]), steps=1)
    with jax.set_mesh(program.mesh):
      state = program.init(0)
      found.add(reference.fingerprint(state, program.mesh))
  assert len(found) == 1
  embedding = state.params["embedding"]
  for changed in (embedding.at[7, 3].multiply(1 + 2e-7), embedding[::-1]):
    other = state.replace(params={**state.params, "embedding": changed})
    found.add(reference.fingerprint(other, program.mesh))
  assert len(found) == 3
