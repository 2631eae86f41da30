"""Steps of one source each: what a step's objectives do not use is left as it is, moments and
all.
"""

import jax
import numpy as np

from mmjax import config as configs
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.state.paths import by_name
from mmjax.training.forward import only_valid
from mmjax.training.program import Program


def test_a_step_changes_what_its_objectives_use_and_nothing_else():
  c = configs.base()
  c.train.batch_size, c.precision.compute, c.data.label, c.data.classes = 8, "float32", "label", 3
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer = (
    8,
    4,
    64,
    "none",
  )
  c.data.mix = "steps"
  c.data.sources.pictures = dict(name="a", modalities=("image",))
  c.data.sources.texts = dict(name="b", modalities=("text",), weight=2.0)
  c.model = dict(
    name="multitask",
    width=16,
    joint=False,
    encoders=dict(
      image=dict(kind="vit", patch=4, depth=1, heads=2),
      text=dict(kind="transformer", depth=1, heads=2),
    ),
  )
  c.objectives.look = dict(kind="classification", modalities=("image",), sources=("pictures",))
  c.objectives.read = dict(kind="classification", modalities=("text",), sources=("texts",))
  c.optimizer = dict(name="adamw", lr=1e-2, weight_decay=0.1)
  c.schedule = dict(name="constant", warmup=0)
  config = configs.resolve(c)
  step = Program(config, make_mesh(config, jax.devices()[:2]), steps=10)
  rng = np.random.default_rng(0)
  batches = {
    "pictures": {
      "image": {
        "pixels": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
        "key": np.zeros((8, 2), np.uint32),
      }
    },
    "texts": {
      "text": {
        "tokens": rng.integers(0, 64, (8, 4)).astype(np.int32),
        "mask": np.ones((8, 4), bool),
        "key": np.zeros((8, 2), np.uint32),
      }
    },
  }
  state = step.init(0)

  def host(tree):
    return {name: np.asarray(x) for name, x in by_name(tree).items()}

  before, moments = host(state.params), host(state.opt_states)
  for source, mine, other in (("pictures", "image", "text"), ("texts", "text", "image")):
    batch = {
      **batches[source],
      "label": rng.integers(0, 3, 8).astype(np.int32),
      "valid": np.ones(8, bool),
    }
    state, metrics = step.train(state, multihost.to_device(batch, step.mesh), source)
    assert set(metrics) >= {"loss", "look/loss" if source == "pictures" else "read/loss"}
    assert ("look/loss" in metrics) == (source == "pictures")
    after, now = host(state.params), host(state.opt_states)
    changed = {name.split("/")[0] for name in after if (after[name] != before[name]).any()}
    assert changed == {mine, f"{mine}_classifier"}, f"{other} is not in this step"
    assert not any((now[name] != moments[name]).any() for name in now if f"/{other}" in name)
    assert any((now[name] != moments[name]).any() for name in now if f"/{mine}/" in name)
    before, moments = after, now
  assert len(step.compile()) == 2 and step.flops_per_step() > 0


def test_with_moments_of_its_own_no_source_drowns_another():
  """Two tasks on one encoder: Adam's steps are blind to the scale of a loss; of shared moments, the
  larger loss would take the most.
  """

  def trained(weight: float) -> dict:
    c = configs.base()
    c.train.batch_size, c.precision.compute, c.data.label, c.data.classes = 8, "float32", "label", 3
    c.data.image.size, c.data.mix = 8, "steps"
    for name in ("first", "second"):
      c.data.sources[name] = dict(name=name, modalities=("image",))
    c.model = dict(
      name="multitask",
      width=16,
      joint=False,
      # without biases: the gradient of those of the keys is rounding alone
      encoders=dict(image=dict(kind="vit", patch=4, depth=1, heads=2, bias=False)),
    )
    c.objectives.first = dict(kind="classification", modalities=("image",), sources=("first",))
    c.objectives.second = dict(
      kind="classification", modalities=("image",), sources=("second",), weight=weight
    )
    c.optimizer = dict(name="adamw", lr=1e-2, eps=1e-30, clip=0.0, moments="source")
    c.schedule = dict(name="constant", warmup=0)
    config = configs.resolve(c)
    step = Program(config, make_mesh(config, jax.devices()[:1]), steps=10)
    state, rng = step.init(0), np.random.default_rng(0)
    for i in range(6):
      batch = {
        "image": {
          "pixels": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
          "key": np.zeros((8, 2), np.uint32),
        },
        "label": rng.integers(0, 3, 8).astype(np.int32),
        "valid": np.ones(8, bool),
      }
      source = ("first", "second")[i % 2]
      before = {name: np.asarray(x) for name, x in by_name(state.opt_states).items()}
      state, _ = step.train(state, multihost.to_device(batch, step.mesh), source)
      moved = {
        name
        for name, x in by_name(state.opt_states).items()
        if (np.asarray(x) != before[name]).any()
      }
      assert {name.split("/")[2] for name in moved if "/rule/" in name} == {source}
    return {name: np.asarray(x) for name, x in by_name(state.params).items()}

  # A power of two: gradients are scaled without rounding.
  one, other = (trained(1.0), trained(1024.0))
  # With shared moments more than 1e-2.
  assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-4


def test_rows_that_do_not_count_are_not_present_for_batch_statistics():
  valid = np.array([True, True, False, False])
  batch = {
    "valid": valid,
    "label": np.arange(4),
    "image": {"pixels": np.ones((4, 2))},
    "audio": {"present": np.array([True, False, True, False])},
    "series": {"present": np.ones((4, 3), bool)},
  }
  marked = only_valid(batch)
  np.testing.assert_array_equal(marked["image"]["present"], valid)
  np.testing.assert_array_equal(marked["audio"]["present"], [True, False, False, False])
  np.testing.assert_array_equal(marked["series"]["present"], np.repeat(valid[:, None], 3, 1))
  assert marked["label"] is batch["label"] and marked["image"]["pixels"] is batch["image"]["pixels"]
