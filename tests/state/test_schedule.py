"""Schedules: values at the ends, and when a run may go on with another length."""

import jax
import numpy as np
import pytest

from mmjax.config import ConfigError
from mmjax.state.schedule import constant, cooldown, cosine, make_schedule, rsqrt, same_past

ALL = {
  "cosine": cosine(100, 10),
  "rsqrt": rsqrt(100, 10, timescale=20, cooldown=30),
  "cooldown": cooldown(100, 10, cooldown=30),
  "sqrt cooldown": cooldown(100, 10, cooldown=30, shape="sqrt"),
  "constant": constant(100, 10),
}


@pytest.mark.parametrize("name", list(ALL))
def test_shape(name):
  factor = jax.jit(ALL[name])(np.arange(130))
  np.testing.assert_allclose(
    factor[:10], np.arange(1, 11) / 10, rtol=0.35 if name == "rsqrt" else 0.03
  )
  assert factor.dtype == np.float32 and np.all(factor[:100] > 0) and np.all(factor <= 1)
  assert np.all(np.diff(factor[10:]) <= 0)
  assert np.all(factor[100:] == (1 if name == "constant" else pytest.approx(0, abs=1e-6)))


def test_formulas():
  np.testing.assert_allclose(ALL["cosine"](55), 0.5, rtol=1e-6)
  np.testing.assert_allclose(
    cosine(100, 0, final=0.1)(np.array([0, 50, 100])), [1, 0.55, 0.1], rtol=1e-6
  )
  np.testing.assert_allclose(
    rsqrt(10**6, 10, timescale=20)(70), 0.5, rtol=1e-6
  )  # sqrt(20 / (20 + 60))
  np.testing.assert_allclose(ALL["cooldown"](85), 0.5, rtol=1e-6)
  np.testing.assert_allclose(ALL["sqrt cooldown"](85), 1 - np.sqrt(0.5), rtol=1e-6)


def test_a_longer_run_has_the_same_past_until_the_cool_down():
  assert same_past(cooldown(100, 10, cooldown=30), cooldown(200, 10, cooldown=30), 71)
  assert not same_past(cooldown(100, 10, cooldown=30), cooldown(200, 10, cooldown=30), 72)
  assert same_past(constant(100, 10), constant(200, 10), 100)
  assert same_past(rsqrt(100, 10), rsqrt(200, 10), 100)
  assert not same_past(cosine(100, 10), cosine(200, 10), 20)
  assert not same_past(constant(100, 10), constant(100, 11), 5)
  assert same_past(cosine(100, 10), cosine(200, 10), 0)


def test_durations_are_resolved(make_config):
  config = make_config(schedule=dict(name="cooldown", cooldown="25%"), warmup="2 epochs")
  factor = make_schedule(config, steps=100, examples=5 * config.train.batch_size)
  np.testing.assert_allclose(
    factor(np.array([0, 9, 74, 75, 88])), [0.1, 1, 1, 1, 1 - 13 / 25], rtol=1e-6
  )
  with pytest.raises(ConfigError, match="do not fit into train.steps = 100"):
    make_schedule(make_config(schedule=dict(name="cooldown", cooldown=60), warmup=50), steps=100)
