"""Checkpoints and configs of strangers: no code of theirs runs unless the user names its module,
and a mistake is one line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import mmjax
from mmjax import cli
from mmjax import config as configs
from mmjax.config import ConfigError, UntrustedCode, UserError
from mmjax.state import checkpoint
from mmjax.state.checkpoint import save_import
from mmjax.training import start
from tests.e2e.commands import run
from tests.inference import tiny

TRAP = (
  "import pathlib\npathlib.Path({mark!r}).touch()\nfrom mmjax.models.encoders.image import vit\n"
)


@pytest.fixture
def mmjax_command(capsys):
  """Runs a command in this process: (exit code, stderr)."""

  def command(*words):
    try:
      code = cli.main(list(map(str, words)))
    except SystemExit as error:
      code = error.code
    return code, capsys.readouterr().err

  return command


@pytest.fixture
def trap(tmp_path, monkeypatch):
  """A module `trap_module` that leaves `ran` when it is imported, findable from the current
  folder.
  """
  (tmp_path / "trap_module.py").write_text(TRAP.format(mark=str(tmp_path / "ran")))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
  yield tmp_path / "ran"
  sys.modules.pop("trap_module", None)


def stored(**changes) -> dict:
  """A config as a checkpoint holds it, with {"dotted.path": value} changed."""
  tree = json.loads(configs.to_json(tiny.config()))
  for path, value in changes.items():
    node = tree
    *heads, last = path.split("/")
    for head in heads:
      node = node.setdefault(head, {})
    node[last] = value
  return tree


def hostile(folder: Path, **changes) -> Path:
  """An import folder whose config was changed by hand and whose checksums are right."""
  config = tiny.config()
  save_import(
    str(folder / "theirs"), tiny.random_params(config), stored(**changes), tiny.assets(folder)
  )
  return folder / "theirs"


HOSTILE = [
  ("model/encoders/image/kind", "trap_module:vit"),
  ("model/encoders/image/kind", "os:system"),
  ("model/encoders/image/kind", "mmjax.config:os"),
  ("model/encoders/image/kind", "mmjax.remote:shutil"),
  ("model/encoders/image/kind", "mmjax.state.storage:delete"),
  ("model/name", "trap_module:vit"),
  ("optimizer/name", "os:system"),
  ("schedule/name", "os:system"),
  ("objectives/align/kind", "trap_module:vit"),
  ("model/fusion", dict(kind="trap_module:vit")),
  ("model/decoder", dict(kind="trap_module:vit")),
  ("optimizers/other", dict(name="trap_module:vit", params="x")),
  ("evaluation/evaluators/it", dict(kind="trap_module:vit", source="x")),
  ("evaluation/evaluators/it", dict(kind="captions", source="x", check="trap_module:vit")),
  ("evaluation/evaluators/it", dict(kind="captions", source="x", check="mmjax.config:load")),
  ("evaluation/evaluators/it", dict(kind="multiple_choice", source="x", choices="trap_module:vit")),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE)
def test_a_stored_config_names_only_this_package(trap, path, value):
  if path in ("model/fusion", "model/decoder"):
    changes = {
      "model/name": "captioner" if path == "model/decoder" else "fusion_encoder",
      path: value,
    }
  else:
    changes = {path: value}
  tree = stored(**changes)
  if "model/name" in changes:
    tree["model"].pop("projection_function")  # a setting of dual encoders alone
  with pytest.raises((UntrustedCode, ConfigError)) as error:
    configs.from_json(json.dumps(tree))
  assert isinstance(error.value, UntrustedCode) and "--allow-code" in str(error.value)
  assert not trap.exists()


@pytest.mark.parametrize(
  "target",
  ["mmjax.x:os.system", "os.path:join:x", "mmjax/../os:system", ":system", "os:", "os:system\n"],
)
def test_what_is_no_function_is_no_way_around(target):
  with pytest.raises(UserError):
    configs.from_json(
      json.dumps(stored(**{"model/encoders/image/kind": target})), ("mmjax.x", "os")
    )


def test_the_checkpoint_cannot_allow_itself(trap):
  changes = {"allow_code": ["trap_module"], "model/encoders/image/kind": "trap_module:vit"}
  with pytest.raises(UntrustedCode):
    configs.from_json(json.dumps(stored(**changes)))
  assert configs.from_json(json.dumps(stored(allow_code=["trap_module"]))).allow_code == ()
  assert not trap.exists()


def test_what_the_user_names_is_allowed(trap):
  text = json.dumps(stored(**{"model/encoders/image/kind": "trap_module:vit"}))
  for allowed in (("trap_module",), "trap_module"):
    resolved = configs.from_json(text, allowed)
    assert resolved.model.encoders.image.kind == "trap_module:vit" and resolved.allow_code == (
      "trap_module",
    )
  assert trap.exists()
  with pytest.raises(UntrustedCode):
    configs.from_json(text, ("trap", "trap_module.sub"))


def test_functions_of_this_package_need_no_leave():
  entry = dict(
    kind="captions", source="emoji_scenes", check="mmjax.data.builders.emoji_scenes:check_caption"
  )
  assert configs.from_json(json.dumps(stored(**{"evaluation/evaluators/it": entry})))
  full = {"model/encoders/image/kind": "mmjax.models.encoders.image:vit"}
  assert configs.from_json(json.dumps(stored(**full)))


def test_every_command_refuses_and_names_the_module(trap, tmp_path, mmjax_command):
  folder = hostile(tmp_path, **{"model/encoders/image/kind": "trap_module:vit"})
  (tmp_path / "a.png").write_bytes(tiny.png(tiny.pixels(1)[0]))
  out = tmp_path / "out"
  for words in (
    ("export", "--to", "safetensors", "--out", out),
    ("export", "--to", "stablehlo", "--out", out),
    ("export", "--to", "hf", "--out", out),
    ("embed", "--images", tmp_path, "--out", tmp_path / "e.npz"),
    ("search", "--images", tmp_path, "words"),
    ("generate", tmp_path / "a.png"),
    ("eval",),
  ):
    code, told = mmjax_command(words[0], "--checkpoint", folder, *words[1:])
    assert (
      code == 1 and "--allow-code trap_module" in told and "model.encoders.image.kind" in told
    ), (words, told)
    assert told.count("\n") == 1 and "Traceback" not in told
  with pytest.raises(UntrustedCode, match="trap_module"):
    mmjax.load(folder)
  assert not trap.exists() and not out.exists()
  code, told = mmjax_command(
    "export",
    "--checkpoint",
    folder,
    "--to",
    "safetensors",
    "--out",
    out,
    "--allow-code",
    "trap_module",
  )
  assert code == 0 and trap.exists() and (out / "model.safetensors").exists(), told
  assert mmjax.load(folder, allow_code=("trap_module",)).config.allow_code == ("trap_module",)


def test_a_teacher_is_a_stranger_too(trap, tmp_path):
  from mmjax.parallel.mesh import single_device_mesh
  from mmjax.training.teacher import Teacher

  folder = hostile(tmp_path, **{"model/encoders/image/kind": "trap_module:vit"})
  with pytest.raises(UntrustedCode, match="trap_module"):
    Teacher(str(folder), tiny.config(), single_device_mesh(), {})
  assert not trap.exists()
  own = configs.FrozenConfigDict(tiny.config().to_dict() | {"allow_code": ("trap_module",)})
  Teacher(str(folder), own, single_device_mesh(), {})
  assert trap.exists()


OWN = """
import json, pathlib
def get_config(arg=""):
  import mmjax
  c = mmjax.config.base()
  image = dict(kind="trap_module:vit", width=16, depth=1, heads=2, patch=8)
  c.model = dict(name="encoder", width=16, encoders=dict(image=image))
  return c
"""


def test_a_users_own_config_names_what_it_likes_and_resumes(trap, tmp_path):
  (tmp_path / "own.py").write_text(OWN)
  config = configs.load(str(tmp_path / "own.py"))
  assert config.allow_code == ("trap_module",) and trap.exists()
  run_folder = tmp_path / "run"
  run_folder.mkdir()
  (run_folder / "config.json").write_text(configs.to_json(config))
  start.open_workdir(run_folder, config, False)
  other = configs.resolve(configs.base())
  with pytest.raises(UserError, match="trap_module"):
    start.open_workdir(run_folder, other, False)


def test_a_checkpoint_whose_config_is_none(tmp_path):
  for content in (dict(model=5), dict(seed="x"), dict(unknown=1)):
    folder = tmp_path / str(len(str(content)))
    save_import(str(folder), tiny.random_params(tiny.config()), content, {})
    with pytest.raises(UserError, match="its config is none of this version"):
      checkpoint.load_config(folder)


# -- Configs that end the process, return nonsense, or contradict their own form -------------------


BAD = {
  "exits": ("import sys\nsys.exit(0)\n", "sys.exit(0)"),
  "exits_later": ("import sys\ndef get_config(arg=''):\n  sys.exit(75)\n", "sys.exit(75)"),
  "base": (
    "class Stop(BaseException): pass\ndef get_config(arg=''):\n  raise Stop('why')\n",
    "Stop: why",
  ),
  "generator": ("def get_config(arg=''):\n  raise GeneratorExit\n", "GeneratorExit"),
  "none": ("def get_config(arg=''):\n  pass\n", "returned None"),
  "list": ("def get_config(arg=''):\n  return [1]\n", "returned [1]"),
  "number": ("get_config = 3\n", "TypeError"),
  "itself": (
    "import mmjax\ndef get_config(arg=''):\n  c = {}\n  c['model'] = c\n  return c\n",
    "model contains itself",
  ),
  "itself_too": (
    "import mmjax\ndef get_config(arg=''):\n  c = mmjax.config.base()\n  c.model.encoders = {}\n"
    "  c.model.encoders.image = c.model\n  return c\n",
    "contains itself",
  ),
  "list_in_itself": (
    "def get_config(arg=''):\n  x = []\n  x.append(x)\n  return dict(init=dict(map=x))\n",
    "contains itself",
  ),
  "deep": (
    "def get_config(arg=''):\n  c = {}\n  for _ in range(5000): c = dict(model=c)\n  return c\n",
    "nested deeper",
  ),
  "keys": ("def get_config(arg=''):\n  return {3: 4}\n", "key 3"),
  "syntax": ("def get_config(:\n", "SyntaxError"),
  "recursion": ("def get_config(arg=''):\n  return get_config()\n", "RecursionError"),
  "kind_exits": (
    "import mmjax\ndef get_config(arg=''):\n  return dict(model=dict(name='exiting_kind:model'))\n",
    "sys.exit(0)",
  ),
  "kind_breaks": (
    "def get_config(arg=''):\n  return dict(model=dict(name='breaking_kind:model'))\n",
    "ZeroDivisionError",
  ),
  "kind_is_none": (
    "import mmjax\ndef get_config(arg=''):\n  return dict(model=dict(name='os:name'))\n",
    "is no function",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_is_none(name, tmp_path, monkeypatch, mmjax_command):
  text, expected = BAD[name]
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
  (tmp_path / "exiting_kind.py").write_text("import sys\nsys.exit(0)\n")
  (tmp_path / "breaking_kind.py").write_text("1 / 0\n")
  (tmp_path / "c.py").write_text(text)
  for words in (
    ("train", "--config", "c.py", "--workdir", tmp_path / "run"),
    ("config", "show", "c.py"),
  ):
    code, told = mmjax_command(*words)
    assert code == 2 and told.startswith("mmjax: c.py: ") and expected in told, told
    assert told.count("\n") == 1 and "Traceback" not in told
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("override", "key"),
  [
    ("train.steps=1e999", "train.steps"),
    ("train.steps='1e999 steps'", "train.steps"),
    ("train.steps='1.2.3 steps'", "train.steps"),
    ("train.steps='.. steps'", "train.steps"),
    (f"train.steps=1{'0' * 400}", "train.steps"),
    ("optimizer.lr=1e999", "optimizer.lr"),
    (f"optimizer.lr=1{'0' * 400}", "optimizer.lr"),
    ("optimizer.lr=-1e999", "optimizer.lr"),
    ("=3", "--config.KEY=VALUE"),
    ("train.steps", "--config.KEY=VALUE"),
    ("train..steps=3", "train."),
    ("." * 50 + "=3", "deeper"),
    (".".join("a" * 20_000) + "=3", "deeper"),
    ("train.steps=" + "(" * 5000, "train.steps"),
    ("seed=" + "-" * 5000 + "1", "seed"),
    ("seed={}[0]", "seed"),
    ("train=3", "train"),
    ("train.steps.more=3", "train.steps"),
    ("data.sources=3", "data.sources"),
    ("data.image.mean=(1e999,0,0)", "data.image.mean"),
    ("\x1b[31m=3", "unknown key"),
    ("seed={[]:1}", "seed"),
  ],
)
def test_an_override_that_is_none(override, key, tmp_path, mmjax_command):
  (tmp_path / "c.py").write_text(
    "import mmjax\ndef get_config(arg=''):\n  return mmjax.config.base()\n"
  )
  code, told = mmjax_command("config", "show", tmp_path / "c.py", f"--config.{override}")
  assert code == 2 and key in told and told.count("\n") == 1 and "Traceback" not in told, told[:500]
  assert len(told) < 3000


def test_a_kind_that_exits_while_it_works_is_no_success(tmp_path, monkeypatch):
  """A launcher takes exit code 0 for done."""
  (tmp_path / "exiting.py").write_text(
    "import sys\ndef model(encoders, data, precision, *, width: int = 8):\n  sys.exit(0)\n"
  )
  (tmp_path / "c.py").write_text(
    "import mmjax\ndef get_config(arg=''):\n  c = mmjax.config.base()\n"
    "  c.model = dict(name='exiting:model', encoders=dict(image=dict(kind='vit', depth=1)))\n"
    "  c.data.sources.a = dict(name='openmoji')\n  return c\n"
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("mmjax.training.loop.train", lambda *_, **__: sys.exit(0))
  monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
  assert cli.main(["train", "--config", "c.py", "--workdir", str(tmp_path / "run")]) == 1


def test_a_config_that_exits_ends_the_process_with_2(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
  done = run(
    "train", "--config", str(tmp_path / "exits.py"), "--workdir", str(tmp_path / "run"), code=2
  )
  assert "sys.exit(0)" in done.stderr and "exits.py" in done.stderr
