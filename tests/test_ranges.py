"""Every number of a config has a range, and what lies outside is refused before anything starts."""

from __future__ import annotations

import inspect
import math
import pathlib
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.describe import explain
from mmjax.keys import KEYS
from mmjax.kinds import ENTRIES, KINDS, kind_function, kind_settings
from mmjax.ranges import Duration, Range
from tests.test_config import small

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def settings():
  """[(where, annotation, default)] of every key and every setting of every kind of the package."""
  for key in KEYS:
    yield key.path, key.type, key.default
  for group, kinds in KINDS.items():
    for kind in kinds:
      for name, parameter in kind_settings(kind_function({"kind": kind}, group)).items():
        yield f"{group} {kind}.{name}", parameter.annotation, parameter.default


ALL = list(settings())


def test_every_number_states_its_range():
  missing = []
  for where, annotation, default in ALL:
    numbers = (
      isinstance(default, tuple) and default and all(isinstance(x, (int, float)) for x in default)
    )
    if annotation in (int, float, Duration) or numbers and not range_of(annotation):
      missing.append(where)
  assert not missing


def range_of(annotation) -> Range | None:
  """The range that an annotation states; it may say other things too, such as Special or
  Function.
  """
  return next(
    (part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Range)), None
  )


def test_every_default_lies_in_its_range():
  for where, annotation, default in ALL:
    if range_of(annotation) and default is not inspect.Parameter.empty:
      assert range_of(annotation).holds(default), where


def outside(annotation, default):
  """Values that a setting must not take, nearest first."""
  bounds = range_of(annotation)
  bare = typing.get_args(annotation)[0]
  low = bounds.least if bounds.least is not None else bounds.above
  high = bounds.most if bounds.most is not None else bounds.below
  step = 1 if bare in (int, Duration) else 1e-3
  if low is not None:
    yield low - step
    if bounds.above is not None:
      yield low
  if high is not None:
    yield high + step
  if bare is not int and bare is not Duration:
    yield from (math.nan, math.inf, -math.inf)


def as_given(value, annotation, default):
  bare = typing.get_args(annotation)[0]
  if bare in (int, Duration):
    return int(value)
  return float(value) if bare is float else (float(value),) * max(1, len(default))


def test_a_value_outside_is_refused_by_the_name_of_its_key():
  tried = 0
  for key in KEYS:
    if not range_of(key.type):
      continue
    path = key.path.replace("data.sources.*", "data.sources.emoji").replace(
      "objectives.*", "objectives.align"
    )
    if path.startswith("optimizers.*"):
      continue  # as optimizer
    for value in outside(key.type, key.default):
      with pytest.raises(configs.ConfigError) as error:
        config = small()
        node, (*above, last) = config, path.split(".")
        for name in above:
          node = node[name]
        node[last] = as_given(value, key.type, key.default)
        configs.resolve(config)
      assert path in str(error.value), (path, value, error.value)
      tried += 1
  assert tried > 150


def test_a_setting_of_a_kind_outside_its_range_is_refused_by_name():
  tried = 0
  for pattern, (group, selector) in ENTRIES.items():
    if pattern == "optimizers.*":
      continue  # as optimizer
    for kind in KINDS[group]:
      parameters = kind_settings(kind_function({"kind": kind}, group)).values()
      needed = {p.name: "x" for p in parameters if p.default is p.empty}
      for parameter in parameters:
        if not range_of(parameter.annotation):
          continue
        for value in outside(parameter.annotation, parameter.default):
          tree = configs.base().to_dict()
          if pattern.startswith("model."):
            of_language = pattern.startswith("model.connectors")
            tree["model"]["name"] = "language_model" if of_language else "multitask"
          node, (*above, last) = tree, pattern.replace("*", "it").split(".")
          for part in above:
            node = node.setdefault(part, {})
          set_to = as_given(value, parameter.annotation, parameter.default)
          node[last] = {**needed, selector: kind, parameter.name: set_to}
          with pytest.raises(configs.ConfigError) as error:
            configs.resolve(tree)
          message = str(error.value)
          assert parameter.name in message and "must be" in message, (kind, value, message)
          tried += 1
  assert tried > 500


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("train.ema=1.5", "train.ema is 1.5, but must be at least 0 and below 1"),
    ("train.ema=1", "train.ema is 1.0, but must be at least 0 and below 1"),
    ("optimizer.lr=-1", "optimizer.lr is -1.0, but must be at least 0"),
    ("optimizer.b2=2", "optimizer.b2 is 2.0"),
    ("data.text.drop_words=2", "data.text.drop_words is 2.0"),
    (
      "data.image.augment.crop=(2, 3)",
      "data.image.augment.crop is (2, 3), but must be above 0 and at most 1, in ascending",
    ),
    ("data.image.augment.crop=(0.9, 0.2)", "in ascending order"),
    ("data.image.std=(0, 0, 0)", "data.image.std is (0, 0, 0), but must be above 0"),
    ("model.encoders.text.heads=-1", "model.encoders.text.heads is -1, but must be at least 0"),
    ("log.every=0", "log.every is 0, but must be above 0"),
    ("log.every=-3", "log.every is -3"),
    ("evaluation.every=-1", "evaluation.every is -1, but must be at least 0"),
    ("data.workers=-1", "data.workers is -1"),
    ("data.workers=1000", "data.workers is 1000, but must be at least 0 and at most 256"),
    ("data.threads=1000", "data.threads is 1000, but must be at least 1 and at most 256"),
    ("train.max_skipped=-1", "train.max_skipped is -1"),
    ("objectives.align.weight=-1", "objectives.align.weight is -1.0"),
    ("data.sources.emoji.weight=-1", "data.sources.emoji.weight is -1.0"),
    ("data.sources.emoji.weight=0", "every source has weight 0"),
    (
      "data.text.length=1000000000",
      "data.text.length is 1000000000, but must be at least 1 and at most 1_048_576",
    ),
    ("data.image.size=100000", "data.image.size is 100000"),
    ("schedule.warmup=300%", "schedule.warmup is '300%', but must be at most 100%"),
    ("train.steps=50%", "train.steps '50%' is a share of itself"),
    ("train.steps=0 epochs", "train.steps is '0 epochs', but must be above 0"),
    (
      "model.encoders.text.heads=7",
      "model.encoders.text: width 512 is not divisible by 7 heads; the nearest that is: 511",
    ),
    ("model.scale_init=1000", "model.scale_init 1000.0 is above model.scale_max 100.0"),
    ("model.unprojected=('audio',)", 'model.unprojected names "audio"'),
    ("checkpoint.best=val/R@1", "checkpoint.best 'val/R@1' is no metric of evaluation.evaluators"),
  ],
)
def test_absurd_overrides_are_refused_in_one_line(override, words):
  with pytest.raises(configs.ConfigError) as error:
    configs.resolve(small(), [override])
  assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_a_classification_without_labels_is_refused():
  config = small()
  config.objectives.classes = dict(kind="classification")
  with pytest.raises(
    configs.ConfigError, match="objectives.classes classifies, but data.label is 'none'"
  ):
    configs.resolve(config)


@given(st.floats(-2, 2), st.floats(-2, 2), st.lists(st.floats(-3, 3), max_size=4))
def test_a_range_holds_what_lies_between_its_bounds(low, high, values):
  closed, half_open = Range(low, high), Range(above=low, below=high, ascending=True)
  assert closed.holds(tuple(values)) == all(low <= v <= high for v in values)
  assert half_open.holds(tuple(values)) == (
    all(low < v < high for v in values) and sorted(values) == values
  )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docs_say_what_every_line_of_a_shipped_config_means_and_takes(path):
  config = configs.load(str(path))
  for name, _ in configs.flatten(config):
    text = explain(name, config)
    assert text == "none named" or len(text.rpartition(" (")[0]) > 4 and text.endswith(")"), (
      name,
      text,
    )
