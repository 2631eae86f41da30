"""Processes of a run that differ in config, data or code all end before the first step, and say in
what they differ."""

import json
import shutil
import threading

import pytest

from mmjax import config as configs
from mmjax.config import ConfigError, UserError
from mmjax.data.pipeline import Pipeline
from mmjax.parallel import multihost
from mmjax.training import agreement
from tests.e2e import squares

EVALUATED = {"retrieval/test (split)": "squares/1.0.0/test: 48 examples"}


@pytest.fixture
def on_processes(monkeypatch):
  """on_processes(f, g, ...): what each raises when they run as processes 0, 1, ... that gather
  texts from each other."""

  def run(*functions):
    gate, texts, errors = (
      threading.Barrier(len(functions)),
      [""] * len(functions),
      [None] * len(functions),
    )
    local = threading.local()

    def gather(text):
      texts[local.number] = text
      gate.wait()
      told = list(texts)
      gate.wait()
      return told

    def process(number):
      local.number = number
      try:
        functions[number]()
      except UserError as error:
        errors[number] = error

    monkeypatch.setattr(multihost, "gather_texts", gather)
    monkeypatch.setattr(multihost.jax, "process_count", lambda: len(functions))
    threads = [threading.Thread(target=process, args=(number,)) for number in range(len(functions))]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return errors

  return run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The config of the squares, with a data folder of its own."""
  folder = tmp_path_factory.mktemp("squares")
  file = squares.make(folder)

  def load(*overrides):
    return configs.load(str(file), [f"config.data.dir={folder / 'data'}", *overrides])

  return load


@pytest.fixture(scope="module")
def facts(config):
  return agreement.facts(config(), Pipeline(config()), EVALUATED)


def check(facts, **changes):
  return lambda: agreement.check(
    {**facts, **{name.replace("__", "."): value for name, value in changes.items()}}
  )


def test_equal_processes_go_on_and_what_differs_is_named_on_all(facts, on_processes):
  assert on_processes(check(facts), check(facts)) == [None, None]
  errors = on_processes(check(facts), check(facts, optimizer__lr="0.05"), check(facts))
  for error in errors:
    assert isinstance(error, ConfigError)
    assert (
      f"the 3 processes of this run differ: optimizer.lr is {facts['optimizer.lr']} on process 0 "
      "(host" in str(error)
    )
    assert "and 1 more, 0.05 on process 1 (host" in str(error)


def test_settings_data_and_code_are_compared_but_not_where_a_host_keeps_its_data(
  config, facts, tmp_path, monkeypatch
):
  other = config("config.data.workers=1", "config.seed=1")
  theirs = agreement.facts(other, Pipeline(other), EVALUATED)
  assert {name for name in facts if facts[name] != theirs[name]} == {"seed", "the data (order)"}
  squares.build(tmp_path / "other", count=130)
  shutil.copytree(f"{other.data.dir}/tokenizers", tmp_path / "other" / "tokenizers")
  copied = config(f"config.data.dir={tmp_path / 'other'}")
  theirs = agreement.facts(copied, Pipeline(copied), EVALUATED)
  assert "content" in facts["the data of data.sources.squares"]
  assert "the data of data.sources.squares" in {n for n in facts if facts[n] != theirs.get(n)}
  assert "data.dir" not in facts
  package = tmp_path / "mmjax"
  package.mkdir()
  (package / "__init__.py").write_text("x = 1\n")
  monkeypatch.setattr(agreement.mmjax, "__file__", str(package / "__init__.py"))
  first = agreement.code(other)
  (package / "sub").mkdir()
  (package / "sub" / "more.py").write_text("y = 2\n")
  agreement._digest.cache_clear()
  assert {name for name in first if first[name] != agreement.code(other)[name]} == {
    "the code of mmjax"
  }
  assert facts["the code of mmjax"] != first["the code of mmjax"] and json.dumps(facts)


def test_a_fault_of_one_process_ends_all(on_processes):
  def good():
    return multihost.together(lambda: 1)

  def bad():
    def make():
      raise ConfigError("no data set 'x'")

    return multihost.together(make)

  for error in on_processes(good, bad, good):
    assert isinstance(error, ConfigError) and str(error) == "process 1 of 3: no data set 'x'"
  assert on_processes(good, good) == [None, None]
