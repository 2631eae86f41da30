"""Schedules: values at the ends, and when a run may go on with another length."""

import math

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


# The papers' formulas at a step: `since` the warm-up of 10, `down` = share of the last 30 done.
SHAPES = {
  "cosine": lambda since, down: (1 + math.cos(math.pi * since / 90)) / 2,
  "rsqrt": lambda since, down: math.sqrt(20 / (20 + since)) * (1 - down),
  "cooldown": lambda since, down: 1 - down,
  "sqrt cooldown": lambda since, down: 1 - math.sqrt(down),
  "constant": lambda since, down: 1.0,
}


@pytest.mark.parametrize("name", list(ALL))
def test_every_step_is_that_of_the_formula(name):
  want = []
  for step in range(130):
    now = min(step, 100)  # what comes after the end stays as the end is
    shape = SHAPES[name](max(now - 10, 0), max(now - 70, 0) / 30)
    want.append(min((step + 1) / 10, 1) * shape)
  factor = jax.jit(ALL[name])(np.arange(130))
  assert factor.dtype == np.float32
  np.testing.assert_allclose(factor, want, rtol=1e-5, atol=1e-6)


def test_formulas():
  np.testing.assert_allclose(ALL["cosine"](55), 0.5, rtol=1e-6)
  np.testing.assert_allclose(
    cosine(100, 0, final=0.1)(np.array([0, 50, 100])), [1, 0.55, 0.1], rtol=1e-6
  )
  # sqrt(20 / (20 + 60)).
  np.testing.assert_allclose(rsqrt(10**6, 10, timescale=20)(70), 0.5, rtol=1e-6)
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
