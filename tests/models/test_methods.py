"""The methods that objectives ask of a model: one list, and what a config lacks for them."""

from __future__ import annotations

import pathlib
import re

import pytest

import mmjax.config
from mmjax.config import UserError
from mmjax.kinds import KINDS, kind_function
from mmjax.models import make_model
from mmjax.models.gan import TextToImageGan
from mmjax.models.language_model import LanguageModel
from mmjax.models.methods import METHODS
from mmjax.reference import methods as rows_of_methods
from mmjax.training.program import Program

BLOCK = dict(depth=1, heads=2)
TEXT = dict(kind="transformer", **BLOCK)
IMAGE = dict(kind="vit", patch=8, **BLOCK)
FUSION = dict(kind="merged_attention", **BLOCK)
OBJECTIVES = pathlib.Path(kind_function.__code__.co_filename).parent / "objectives"


def config(objective=None, encoders=None, **model):
  c = mmjax.config.base()
  c.model = dict(width=16, encoders=encoders or dict(image=IMAGE, text=TEXT), **model)
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    16,
    6,
    64,
    "none",
  )
  classifies = model["name"] == "multitask" or objective is not None
  c.data.label, c.data.classes = "label", 3 if classifies else 0
  c.data.values = 2 if model["name"] == "multitask" else 0
  if objective:
    c.objectives.one = objective
  return mmjax.config.resolve(c)


WHOLE = (
  config(name="dual_encoder", discriminator=4),
  config(
    name="multitask",
    fusion=FUSION,
    decoder=BLOCK,
    match=True,
    masked_text=True,
    masked_patches=("image",),
    discriminator=4,
  ),
  config(
    name="encoder",
    encoders=dict(text=dict(kind="bert", **BLOCK)),
    classes=2,
    masked_tokens=True,
    spelling=5,
  ),
)


def test_models_answer_what_they_list_and_the_list_has_every_method():
  answered = {*TextToImageGan.methods, *LanguageModel.methods}
  for c in WHOLE:
    model = make_model(c)
    assert all(callable(getattr(model, name)) for name in model.methods)
    answered |= set(model.methods)
  assert answered == set(METHODS)
  assert {row["method"].split("(")[0] for row in rows_of_methods()} == set(METHODS)
  assert all(row["gives"] and row["needs"] for row in rows_of_methods())


def test_objectives_name_what_they_ask_for():
  for kind, target in KINDS["objective"].items():
    named = kind_function(dict(kind=kind)).methods
    assert named and set(named) <= set(METHODS), target
  for path in OBJECTIVES.glob("[a-z]*.py"):
    text = path.read_text()
    asked = set(re.findall(r'forward(?:\.teacher)?\(\s*"(\w+)"', text))
    named = {
      name
      for kind, target in KINDS["objective"].items()
      if target.startswith(f"mmjax.objectives.{path.stem}:")
      for name in kind_function(dict(kind=kind)).methods
    }
    assert asked <= named | {"decode_with_memory"}, path.name  # the same part as `decode`


@pytest.mark.parametrize(
  "objective, model, message",
  [
    (dict(kind="captioning", source=("image",)), {}, "model.decoder, such as dict"),
    (dict(kind="masked_tokens"), dict(name="multitask"), "set model.masked_text"),
    (dict(kind="classification", modalities=("image",)), {}, "model.name is 'dual_encoder'"),
    (dict(kind="matching"), dict(name="multitask", fusion=FUSION), "set model.match to True"),
    (dict(kind="contrastive"), dict(name="multitask", joint=False), "set model.joint to True"),
  ],
)
def test_an_objective_of_a_part_that_the_model_lacks_is_refused(objective, model, message):
  """Before there is a mesh, a batch or a parameter."""
  c = config(objective, **(dict(name="dual_encoder") | model))
  with pytest.raises(UserError, match=rf"^objectives\.one \({objective['kind']}\).*{message}"):
    Program(c, None)
