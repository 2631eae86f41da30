"""Regular expressions of strangers: they end, or are refused by name."""

import re
import threading

import pytest

from mmjax import config as configs
from mmjax import regexes
from mmjax.config import UserError
from mmjax.state.paths import matches
from mmjax.state.transfer import origin
from tests.inference import tiny

NAME = "text/layers/attention/qkv/kernel"
ENDLESS = "(.|.)*(.|.)*!"


def test_what_takes_for_ever_is_cut_short_once_for_all_names(monkeypatch):
  monkeypatch.setattr(regexes, "SECONDS", 0.5)
  pattern = ENDLESS + "a"
  for name in (NAME, NAME + "s"):
    with pytest.raises(UserError, match="took more than 0.5 s for names such as 'text/layers"):
      regexes.compiled(pattern).fullmatch(name)
  with pytest.raises(UserError, match="took more than"):
    matches(pattern, NAME)
  found = []
  thread = threading.Thread(target=lambda: found.append(_said(pattern)))
  thread.start()
  thread.join()
  assert "took more than" in found[0]


def _said(pattern):
  try:
    return regexes.compiled(pattern).fullmatch(NAME)
  except UserError as error:
    return str(error)


def test_another_alarm_rings_all_the_same(in_time):
  import signal

  before = signal.getsignal(signal.SIGALRM)
  assert regexes.compiled(".*/kernel").fullmatch(NAME)[0] == NAME
  assert signal.getsignal(signal.SIGALRM) is before
  assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 20


@pytest.mark.parametrize("key", ["lora.params", "lora.full"])
def test_a_stored_config_ends(tmp_path, key, monkeypatch):
  """The adapters of a downloaded checkpoint are found by its regexes."""
  monkeypatch.setattr(regexes, "SECONDS", 0.5)
  usual = {"lora.params": "text/.*kernel", "lora.full": (), "lora.rank": 2}
  endless = ENDLESS + key  # one that no other test has met
  hostile = usual | {key: (endless,) if key == "lora.full" else endless}
  good, bad = (
    configs.resolve(
      configs.ConfigDict(tiny.config().to_dict()),
      [f"{name}={value!r}" for name, value in c.items()],
    )
    for c in (usual, hostile)
  )
  from mmjax.state.checkpoint import save_import

  save_import(str(tmp_path / "it"), tiny.random_params(good), bad, tiny.assets(tmp_path))
  import mmjax

  with pytest.raises(UserError, match=re.escape("regular expression '(.|.)*(.|.)*!lora")):
    mmjax.load(tmp_path / "it")


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ("lora.params='a{99999999999}'", "lora.params: .*repetition number is too large"),
    (f"optimizer.decay={'(' * 3000 + ')' * 3000!r}", "optimizer.decay: .*recursion"),
  ],
)
def test_what_cannot_be_compiled_is_named_by_its_key(given, words):
  with pytest.raises(UserError, match=words):
    configs.resolve(configs.ConfigDict(tiny.config().to_dict()), [given])


def test_ranges_that_are_none_and_groups_that_are_not_there():
  assert not matches("x/layers[-]y", "x/layers/y", 3).any()
  assert not matches("x/layers[" + "9" * 5000 + "]/y", "x/layers/y", 3).any()
  assert matches(r"x/layers\[-2:\]/y", "x/layers/y", 3).tolist() == [False, True, True]
  assert matches("x/layers[1]/y", "x/layers/y", 3).tolist() == [False, True, False]
  for target in (r"b\7", r"\g<none>", 5):
    with pytest.raises(UserError, match="init.map: .* is no name with groups of"):
      origin("a", (("(a)", target),), {})
