"""Every kind of the registry: importable, each of its settings documented, usable in a config
without any setting.
"""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

import mmjax
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.keys import KEYS
from mmjax.kinds import ENTRIES, KINDS, kind_function

ALL = [(group, name) for group, kinds in KINDS.items() for name in kinds]
COMMON = {key.path.split(".")[-1] for key in KEYS}
ARGUMENTS = {
  "model": ("encoders", "data", "precision"),
  "fusion": ("modalities", "data", "precision"),
  "encoder": ("data", "precision"),
  "decoder": ("data", "precision"),
  "objective": ("forward", "batch", "rng"),
  "evaluator": ("context",),
}


def parameters(function):
  every = inspect.signature(function).parameters.values()
  return [p for p in every if p.kind is not p.KEYWORD_ONLY], [
    p for p in every if p.kind is p.KEYWORD_ONLY
  ]


def documentation(group, name, seen=()):
  """The docstring of a kind, and of those that it sends the reader to: "see `multitask`"."""
  text = inspect.getdoc(kind_function({"kind": name}, group)) or ""
  others = [
    other
    for other in re.findall(r"see\s+`(\w+)`", text, re.IGNORECASE)
    if other in KINDS[group] and other not in seen
  ]
  return " ".join([text, *(documentation(group, other, (*seen, name)) for other in others)])


@pytest.mark.parametrize("group, name", ALL)
def test_a_kind_says_what_it_is_and_what_each_setting_means(group, name):
  function = kind_function({"kind": name}, group)
  positional, settings = parameters(function)
  assert tuple(p.name for p in positional) == ARGUMENTS.get(
    group, tuple(p.name for p in positional)
  )
  text = documentation(group, name)
  assert len(inspect.getdoc(function).splitlines()[0]) > 20
  known = COMMON if group in ("optimizer", "schedule") else set()  # those that KEYS explain
  assert [
    p.name for p in settings if not re.search(rf"\b{p.name}\b", text) and p.name not in known
  ] == []
  assert all(p.annotation is not p.empty for p in settings)


@pytest.mark.parametrize("group, name", ALL)
def test_a_kind_resolves_with_its_defaults(group, name):
  config = mmjax.config.base().to_dict()
  (pattern, (_, selector)) = next(
    (pattern, entry) for pattern, entry in ENTRIES.items() if entry[0] == group
  )
  _, settings = parameters(kind_function({"kind": name}, group))
  needed = {p.name: "something" for p in settings if p.default is p.empty}
  config["optimizers"] = {
    p.default: dict(params=f"{p.default}/.*") for p in settings if p.name == "group"
  }
  config["data"]["classes"], config["data"]["label"] = 3, "label"
  config["data"]["text"]["tokenizer"], config["data"]["values"] = "any", 2
  config["model"]["encoders"] = {
    m: dict(kind=k)
    for m, k in dict(
      image="vit", text="transformer", audio="whisper", video="frames", series="series"
    ).items()
  }
  if pattern.startswith("model.connectors") or name == "language_model":
    config["model"] = dict(
      name="language_model",
      encoders=dict(image=dict(kind="vit")),
      connectors=dict(image=dict(kind="mlp")),
    )
    config["data"]["sequence"] |= dict(length=16, image=4)
  elif pattern.startswith("model."):
    config["model"]["name"] = "multitask"
  node = config
  *above, last = pattern.replace("*", "image" if "connectors" in pattern else "text").split(".")
  for key in above:
    node = node[key]
  before = (
    node.get(last)
    if isinstance(node.get(last), dict) and group in ("model", "optimizer", "schedule")
    else {}
  )
  node[last] = {**before, selector: name, **needed}
  resolved = configs.resolve(config)
  for key in above:
    resolved = resolved[key]
  entry = resolved[last]
  for p in settings:
    if "Fields(" in str(p.annotation) and p.name not in entry:
      continue  # a dict of settings that names none
    special = "Special(" in str(p.annotation)  # those are the tokenizer's
    if (
      p.default is not p.empty
      and not special
      and p.name not in before
      and not isinstance(entry[p.name], (configs.FrozenConfigDict, type(None)))
    ):
      assert entry[p.name] == p.default, p.name
  assert entry[selector] == name


def test_every_file_of_kinds_is_in_the_registry():
  """A function that looks like a kind of encoder, fusion or objective has its line."""
  package = pathlib.Path(mmjax.__file__).parent
  lines = {target for kinds in KINDS.values() for target in kinds.values()}
  for path in [
    *package.glob("models/encoders/*.py"),
    package / "models" / "fusion.py",
    *package.glob("objectives/*.py"),
  ]:
    module = "mmjax." + ".".join(path.relative_to(package).with_suffix("").parts)
    text = path.read_text()
    found = re.findall(
      r"^def ([a-z]\w*)\((?:modalities: tuple, )?data: Mapping\[str, Any\], precision: "
      r"Mapping\[str, Any\], \*,",
      text,
      re.MULTILINE,
    )
    found += re.findall(r"^@objective\(.*\)\ndef (\w+)\(", text, re.MULTILINE)
    assert {f"{module}:{name}" for name in found} <= lines, path


def test_a_function_of_ones_own_is_a_kind_and_a_missing_one_is_said(tmp_path, monkeypatch):
  (tmp_path / "somebodys.py").write_text("def schedule(steps, *, lr: float = 1.0):\n  return lr\n")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
  assert kind_function({"kind": "somebodys:schedule"}, "schedule")(10, lr=0.5) == 0.5
  with pytest.raises(UserError, match=r"kind 'somebodys:shedule'.*has no attribute"):
    kind_function({"kind": "somebodys:shedule"}, "schedule")
  with pytest.raises(UserError, match=r"kind 'nobodys:schedule': No module named 'nobodys'"):
    kind_function({"kind": "nobodys:schedule"}, "schedule")
