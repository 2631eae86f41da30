"""A run that starts from another checkpoint has that checkpoint's batch statistics, through the
front door.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mmjax
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.interop.huggingface import import_hf
from mmjax.parallel.mesh import single_device_mesh
from mmjax.state import checkpoint
from mmjax.state.paths import by_name
from mmjax.training import loop, start
from mmjax.training.program import Program
from tests.data.conftest import COLOURS, record
from tests.inference import tiny
from tests.interop.test_single_encoders import folder_of


class Started(Exception):
  """The run has come to its first step."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """A checkpoint of a ResNet classifier of transformers with random weights and statistics."""
  root = tmp_path_factory.mktemp("resnet")
  folder_of("resnet classifier", root / "hf")
  import_hf(root / "hf", root / "mmjax")
  return root / "mmjax"


def test_a_fine_tuned_resnet_evaluates_like_its_checkpoint_before_the_first_step(
  imported, tmp_path, monkeypatch, capsys
):
  write_dataset(
    "tiny", tmp_path / "data", {"train": [record(i) for i in range(14)]}, card="# tiny\n"
  )
  there = checkpoint.load_config(imported).to_dict()
  c = configs.base()
  c.data.dir, c.data.sources.tiny, c.train.steps, c.train.batch_size = (
    str(tmp_path / "data"),
    dict(name="tiny"),
    3,
    8,
  )
  c.data.image.update(there["data"]["image"])
  c.data.label, c.data.classes, c.precision.compute, c.log.tensorboard = (
    "label",
    len(COLOURS),
    "float32",
    False,
  )
  c.model = dict(
    name="multitask",
    width=there["model"]["width"],
    unprojected=("image",),
    encoders=there["model"]["encoders"],
  )
  c.objectives.classes = dict(kind="classification", modalities=("image",))
  c.init["from"], c.init.map = str(imported), (("image/.*", r"\g<0>"), (".*", None))
  seen = []

  def first(step, state, batch, source=""):
    pictures = np.stack([predictor.pixels(picture) for picture in tiny.pixels(8)])
    batch, variables = {"image": {"pixels": pictures}}, step.evaluation_variables(state)
    with jax.transfer_guard("allow"):
      seen.append(step.apply(variables, "embedding", ("image",), batch))
    seen.append(jax.device_get(state.model_state))
    raise Started

  predictor = mmjax.load(imported, mesh=single_device_mesh())
  monkeypatch.setattr(start, "make_mesh", lambda config: single_device_mesh())
  monkeypatch.setattr(Program, "compile", lambda self: [])
  monkeypatch.setattr(
    loop, "Summary", lambda *_: SimpleNamespace(memory=lambda: "nothing is compiled")
  )
  monkeypatch.setattr(Program, "train", first)
  with pytest.raises(Started):
    loop.train(configs.resolve(c), tmp_path / "run")
  np.testing.assert_allclose(seen[0], predictor.encode_image(tiny.pixels(8)), atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, seen[1], checkpoint.load_model_state(imported))
  lines = capsys.readouterr().out.splitlines()
  assert "loaded batch_stats/image/stem_norm/mean" in lines and not any(
    line.startswith("new batch_stats") for line in lines
  )


# -- Tokenizers ------------------------------------------------------------------------------------


def fine_tuned(checkpoint_folder, tokenizer, **changes):
  """(config, program) of a run from a checkpoint of tiny.config, with a tokenizer of this path."""
  c = tiny.config().to_dict()
  c["init"]["from"] = str(checkpoint_folder)
  c["data"]["text"]["tokenizer"] = str(tokenizer)
  config = configs.resolve(c, [f"{key}={value!r}" for key, value in changes.items()])
  return config, Program(config, single_device_mesh(), steps=1, examples=8)


def test_another_tokenizer_under_loaded_embeddings_is_refused_unless_asked_for(tmp_path):
  saved = tiny.save(tiny.config(), tmp_path)
  same = fine_tuned(saved, tmp_path / "tiny.model")
  assert start.new_embeddings(*same) == ()
  other = train_tokenizer(
    ["entirely other words", "of another text"] * 30, tmp_path / "b.model", 400
  )
  with pytest.raises(UserError, match=r"trained with another one: .*text/embedding.*'new'"):
    start.new_embeddings(*fine_tuned(saved, other))
  new = fine_tuned(saved, other, **{"init.tokenizer": "new"})
  assert start.new_embeddings(*new) == (("text/embedding", None),)
  lines: list[str] = []
  state = start.new_state(*new, log=lines.append)
  assert any(line.startswith("new text/embedding") for line in lines)
  there = checkpoint.load_params(saved)
  kernel = ("text", "layers", "mlp", "up", "kernel")
  here = state.params
  for key in kernel:
    here, there = here[key], there[key]
  np.testing.assert_array_equal(here, there)
  # a text tower that starts anew may have any tokenizer
  anew = {"init.map": (("text.*", None), (".*", r"\g<0>"))}
  assert start.new_embeddings(*fine_tuned(saved, other, **anew)) == ()


def test_parts_come_from_several_checkpoints(tmp_path):
  """The picture tower of one and the rest of another, as a language model of two imports is
  begun."""
  first, second = tiny.save(tiny.config(), tmp_path), tmp_path / "second"
  found = checkpoint.load_assets(first)
  checkpoint.save_import(str(second), tiny.random_params(tiny.config(), 1), tiny.config(), found)
  rules = ((r"image/.*", r"\g<0>", str(second)), (r".*", r"\g<0>"))
  tokenizer = tmp_path / "tiny.model"
  config, program = fine_tuned(first, tokenizer, **{"init.map": rules})
  lines: list[str] = []
  params = by_name(start.new_state(config, program, log=lines.append).params)
  of = {"image": by_name(checkpoint.load_params(second))}
  rest = by_name(checkpoint.load_params(first))
  for name, value in params.items():
    there = of.get(name.split("/")[0], rest)
    np.testing.assert_array_equal(value, there[name])
  assert any(line == f"loaded image/patch/kernel of {second}" for line in lines), lines
  assert not any(line.startswith("new ") for line in lines)
  assert any(not np.array_equal(of["image"][name], rest[name]) for name in rest)
  nobody = ((r"image/.*", r"\g<0>", ""), (r".*", r"\g<0>"))
  with pytest.raises(configs.ConfigError, match="names no checkpoint as its third item"):
    fine_tuned(first, tokenizer, **{"init.map": nobody})
  with pytest.raises(configs.ConfigError, match="init.map names .*, but init.from is empty"):
    fine_tuned("", tokenizer, **{"init.map": rules})
