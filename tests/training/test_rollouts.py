"""GRPO as a whole: rows of answers against rows of the data, advantages, rewards; a run that
earns more and more, one that is stopped and goes on; settings that make no sense.
"""

from __future__ import annotations

import json
import statistics

import jax
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.data.builders import write_dataset
from mmjax.data.pipeline import Pipeline, batch_spec, prompt_spec
from mmjax.data.rollouts import Asked
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import load_tokenizer
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.training import find_lr, loop
from mmjax.training.program import Program
from mmjax.training.rollouts import Rewards, Rollouts, advantages, rows_of_answers
from tests.data.conftest import COLOURS, record
from tests.training.test_step import assert_close

GROUP, MOST = 4, 5


def questions(number):
  """Two questions whose answer is their last word."""
  first, second = COLOURS[number % 7], COLOURS[(number // 7) % 7]
  return [(f"say {word}", word) for word in (first, second)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  root = tmp_path_factory.mktemp("rollouts")
  made = [record(n, captions={}, questions=questions(n), facts={"n": n}) for n in range(49)]
  talks = []
  for n in range(16):
    (asked, said), (again, last) = questions(n)
    turns = [("user", asked), ("assistant", said), ("user", again), ("assistant", last)]
    talk = [dict(role=role, content=text) for role, text in turns]
    talks.append(record(n, captions={}, image=None, conversations=[talk], facts={"n": n}))
  write_dataset("words", root, {"train": made}, fields=("questions", "facts"))
  write_dataset("talks", root, {"train": talks}, fields=("conversations", "facts"))
  texts = [text for n in range(49) for one in COLOURS for text in (one, f"say {one} thing {n}")]
  train_tokenizer(texts, root / "tokenizers" / "words.model", vocab_size=400)
  return root


def config(home, *overrides, pictures=False, **settings):
  c = configs.base()
  c.data.dir, c.data.text.tokenizer, c.data.text.vocab_size = str(home), "words", 512
  c.data.sources.words = dict(name="words", text="question", cache=True)
  c.data.sequence.length = 48
  c.data.image.size, c.data.sequence.image = 16, 4
  encoders = dict(image=dict(kind="vit", patch=8, width=16, depth=1, heads=2)) if pictures else {}
  c.model = dict(
    name="language_model",
    width=48,
    depth=1,
    heads=2,
    mlp=96,
    encoders=encoders,
    connectors=dict(image=dict(kind="mlp")) if pictures else {},
  )
  c.objectives.rl = dict(kind="grpo", answers=GROUP, max_length=MOST, **settings)
  c.optimizer, c.schedule = dict(name="adamw", lr=3e-3), dict(name="constant", warmup=0)
  c.train.steps, c.train.batch_size, c.checkpoint.every = 4, 8, 2
  c.precision.compute, c.log.tensorboard, c.log.every = "float32", False, 1
  return configs.resolve(c, overrides)


def shapes(tree):
  return jax.tree.map(lambda x: (tuple(x.shape), np.dtype(x.dtype).name), tree)


@pytest.mark.parametrize("pictures", [False, True])
def test_rows_of_answers_are_those_of_data_with_these_answers(home, pictures):
  """Where the model happens to say what the records have, then a rest that does not count."""
  c = config(home, pictures=pictures)
  pipeline = Pipeline(c)
  prompts = pipeline.batch(0)
  assert shapes({k: v for k, v in prompts.items() if k != "id"}) == shapes(prompt_spec(c))
  asked, tokenizer = pipeline.asked(0), load_tokenizer(c.data)
  answers = np.full((8 * GROUP, MOST), 7, np.int32)
  for row in range(len(answers)):
    said = [*tokenizer.encode(asked[row // GROUP].answer), tokenizer.eos_id]
    answers[row, : len(said)] = said
  given = {name: x for name, x in prompts.items() if name != "id"}
  rows = jax.device_get(rows_of_answers(given, answers, 48, (tokenizer.eos_id,)))
  spec = shapes(batch_spec(c))
  assert shapes(rows) == {name: value for name, value in spec.items() if name != "rollout"}
  taught = configs.base()
  taught.update(c.copy_and_resolve_references().to_dict())
  taught.objectives = dict(text=dict(kind="language_modelling"))
  taught.data.sequence.pack = False
  examples = Pipeline(configs.resolve(taught))._examples
  source, index, _ = pipeline.order.rows(0)
  for number, i in enumerate(index.tolist()):
    (piece,) = pipeline.tables[0][i]
    want = examples.rows_of_sequences([(pipeline.sources[0], [piece])], [None])
    for row in range(number * GROUP, (number + 1) * GROUP):
      for part in ("sequence", "media") if pictures else ("sequence",):
        got = jax.tree.map(lambda x, row=row: x[row : row + 1], rows[part])
        jax.tree.map(np.testing.assert_array_equal, got, want[part])


def test_every_question_is_asked_once_an_epoch_and_conversations_at_their_end(home):
  pipeline = Pipeline(config(home, "train.batch_size=49"))
  both = [one for step in range(2) for one in pipeline.asked(step)]
  want = sorted((q, a, n) for n in range(49) for q, a in questions(n))
  assert pipeline.examples == 98 and sorted((q, a, f["n"]) for q, a, f in both) == want
  of_talks = ("data.sources.words.name=talks", "data.sources.words.text=conversation")
  c = config(home, *of_talks, "data.text.template=plain", "data.sequence.length=120")
  pipeline = Pipeline(c)
  batch, asked = pipeline.batch(0), pipeline.asked(0)
  for row, (question, answer, facts) in enumerate(asked):
    (first, said), (again, last) = questions(facts["n"])
    assert (question, answer) == (again, last)
    tokens = batch["sequence"]["tokens"][row, : batch["sequence"]["length"][row]]
    text = load_tokenizer(c.data).decode(tokens.tolist())
    assert text.startswith(f"user: {first} assistant: {said}")
    assert text.endswith(f"{again} assistant:")


def test_every_answer_of_a_conversation_is_asked_for_where_each_is_learned(home):
  of_talks = ("data.sources.words.name=talks", "data.sources.words.text=conversation")
  given = ("data.text.template=plain", "data.sequence.length=120", "data.text.loss=each")
  pipeline = Pipeline(config(home, *of_talks, *given, "train.batch_size=32"))
  asked, tokens = pipeline.asked(0), pipeline.batch(0)["sequence"]
  want = sorted((q, a, n) for n in range(16) for q, a in questions(n))
  assert pipeline.examples == 32
  assert sorted((q, a, facts["n"]) for q, a, facts in asked) == want
  tokenizer = load_tokenizer(config(home).data)
  for row, (question, _, facts) in enumerate(asked):
    text = tokenizer.decode(tokens["tokens"][row, : tokens["length"][row]].tolist())
    assert text.endswith(f"{question} assistant:")
    (first, _), (last, _) = questions(facts["n"])
    turn = [first, last].index(question) + 1
    assert text.count("user:") == turn or (first == last and text.count("user:") == 2)


def test_advantages_are_those_within_a_group():
  rewards = np.random.default_rng(0).choice([0.0, 0.1, 1.0, 1.1], (50, 3))
  rewards[0], rewards[1] = 0.1, [0.3, 0.1 + 0.2, 0.3]
  for normalise in (True, False):
    found, tied = advantages(rewards, normalise)
    assert tied[:2].all() and not tied.all()
    for group, row, equal in zip(rewards.tolist(), found.tolist(), tied, strict=True):
      mean, spread = statistics.fmean(group), statistics.pstdev(group)
      assert equal == (spread < 1e-9)
      want = [0 if equal else (x - mean) / (spread if normalise else 1) for x in group]
      np.testing.assert_allclose(row, want, rtol=1e-9, atol=1e-12)


def judge(facts, question, answer, text):
  """A check of this file's own."""
  if not text:
    raise ValueError("no text")
  return {"colour": text in COLOURS, "short": len(text) < facts["most"]}


def test_rewards_of_what_can_be_checked(home):
  where = f"{__name__}:judge"
  c = config(home, exact=1.0, form=0.25, pattern="[a-z]+", right=0.5, check=where)
  rewards, tokenizer = Rewards(c, c.objectives.rl), load_tokenizer(c.data)
  texts = ["red", "Red ", "blue", "red red", "green"]
  answers = np.full((5, 24), tokenizer.pad_id, np.int32)
  for row, text in enumerate(texts):
    said = [*tokenizer.encode(text), *([tokenizer.eos_id] if text != "blue" else [])]
    answers[row, : len(said)] = said
  found = rewards([Asked("which?", "red", {"most": 5})], answers)
  assert found["exact"].tolist() == [True, True, False, False, False]
  assert found["formed"].tolist() == [True, False, False, False, True]
  assert found["right"].tolist() == [True, False, True, False, False]
  np.testing.assert_allclose(found["reward"], [1.75, 1.0, 0.5, 0.0, 0.25])
  unread = rewards([None], answers)
  assert not unread["reward"].any() and not unread["advantage"].any() and unread["tied"].all()
  answers[0, 0] = tokenizer.eos_id
  with pytest.raises(UserError, match=r"objectives.rl.check .* failed for the text ''.*no text"):
    rewards([Asked("which?", "red", {"most": 5})], answers)


@pytest.fixture(scope="module")
def whole(home):
  """A run with two updates a step."""
  c = config(home, updates=2, form=0.5)
  assert loop.train(c, home / "whole") == 0
  return home / "whole"


def lines(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  skipped = ("time", "examples_per_second", "mfu", "data_wait_fraction", "memory", "goodput")
  return [
    {k: v for k, v in row.items() if k not in skipped and not k.startswith(("time/", "lost/"))}
    for row in rows
    if "loss" in row
  ]


def test_a_run_that_is_stopped_goes_on_bit_for_bit(home, whole):
  """Answers, rewards and both updates of a step."""
  settings = dict(updates=2, form=0.5)
  loop.train(config(home, "train.steps=2", **settings), home / "parts")
  loop.train(config(home, **settings), home / "parts")
  assert lines(home / "parts") == lines(whole) and len(lines(whole)) == 4
  row = lines(whole)[0]
  names = ("reward", "exact", "formed", "tied", "tokens", "entropy", "clipped")
  assert {f"rl/{name}" for name in names} <= set(row)
  assert 1 <= row["rl/tokens"] <= MOST and 0 < row["rl/entropy"] < 7 and row["skipped"] == 0


def has_e(facts, question, answer, text):
  return {"e": "e" in text}


@pytest.mark.parametrize(
  "normalise, pictures", [(True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_answers_earn_more_and_more(home, tmp_path, normalise, pictures):
  """Of a model that begins with noise, where one answer in ten has the letter."""
  more = ("train.steps=36", "checkpoint.every=36", "objectives.rl.answers=8", "optimizer.lr=6e-3")
  reward = dict(exact=0.0, right=1.0, check=f"{__name__}:has_e", normalise=normalise)
  c = config(home, *more, pictures=pictures, **reward)
  assert loop.train(c, tmp_path / "run") == 0
  right = [row["rl/right"] for row in lines(tmp_path / "run")]
  assert statistics.fmean(right[:3]) < 0.3 and statistics.fmean(right[-3:]) > 0.9, right


def test_answers_at_a_low_temperature_are_those_of_evaluation(home):
  """Against the text that evaluators generate, of each prompt alone."""
  c = config(home, temperature=1e-4)
  pipeline, program = Pipeline(c), Program(c, make_mesh(c), steps=1)
  batch = pipeline.batch(0)
  with jax.set_mesh(program.mesh):
    state, rollouts = program.init(0), Rollouts(c, program, pipeline)
    rollouts.compile()
    prompts = multihost.to_device(batch, program.mesh)
    rows = jax.device_get(rollouts.answered(state, prompts, 1)["sequence"])
    how, variables = ((), MOST, 1, 1.0), program.evaluation_variables(state)
    texts = program.apply(variables, "generate_text", how, {"sequence": prompts["sequence"]})
  for row, text in enumerate(np.repeat(jax.device_get(texts), GROUP, axis=0)):
    begin, size = batch["sequence"]["length"][row // GROUP], rows["loss_mask"][row].sum()
    assert rows["tokens"][row, begin : begin + size].tolist() == text[:size].tolist()


@pytest.mark.slow
def test_microbatches_change_nothing(home):
  pipeline, found = Pipeline(config(home)), []
  for parts in (1, 2):
    c = config(home, f"train.microbatches={parts}")
    program = Program(c, make_mesh(c, jax.devices()[:1]), steps=1)
    with jax.set_mesh(program.mesh):
      state, rollouts = program.init(0), Rollouts(c, program, pipeline)
      rollouts.compile()
      rows = rollouts.answered(state, multihost.to_device(pipeline.batch(0), program.mesh), 1)
      rows["rollout"]["advantage"] = np.arange(8 * GROUP, dtype=np.float32) % 5 - 2

      def function(params, batch, step=program.step):
        return step.gradients(params, {}, batch, jax.random.key(0), step.objectives)[:3]

      found.append(jax.device_get(program.in_mesh(jax.jit(function))(state.params, rows)))
  assert_close(*found)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(exact=0.0), "exact, right and form are all 0"),
    (dict(right=1.0), r"right is 1.0, but objectives.rl.check is empty"),
    (dict(check="a:b"), r"check is 'a:b', but objectives.rl.right is 0"),
    (dict(pattern="a+"), r"pattern is 'a\+', but objectives.rl.form is 0"),
    (dict(form=1.0, pattern="("), r"objectives.rl.pattern: '\(' is no regular expression"),
    (dict(beta=0.1), r"beta is 0.1, but objectives.rl.teacher is empty"),
    (dict(teacher="runs/x"), r"teacher is 'runs/x', but objectives.rl.beta is 0"),
    (dict(max_length=48), r"max_length is 48, but rows have data.sequence.length 48"),
    (dict(sources=("words",)), r"objectives.rl.sources has no place"),
  ],
)
def test_settings_that_make_no_sense_end_in_one_line(home, settings, message):
  c = config(home)
  tree = c.copy_and_resolve_references().to_dict()
  tree["objectives"]["rl"].update(settings)
  with pytest.raises(ConfigError, match=message) as caught:
    configs.check(configs.resolve(tree))
  assert "\n" not in str(caught.value)


def test_what_it_does_not_cover_is_refused_by_name(home, tmp_path, monkeypatch):
  for override, message in (
    ("data.sources.words.text=caption", "data.sources.words.text is 'caption'"),
    ("objectives.text={'kind': 'language_modelling'}", "objectives.text has no place beside it"),
    ("objectives.rl.answers=1", "objectives.rl.answers"),
  ):
    with pytest.raises(ConfigError, match=message):
      configs.check(config(home, override))
  c = config(home, "data.sequence.length=8")
  with pytest.raises(UserError, match="words: no prompt leaves room for an answer of 5 tokens"):
    Pipeline(c)
  with pytest.raises(UserError, match="--find-lr looks where the loss falls"):
    find_lr.find_lr(config(home), tmp_path)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="objective 'grpo' runs in one process, but there are 2"):
    Rollouts.of(config(home), None, None)
