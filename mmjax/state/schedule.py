"""Learning rate over time: kinds `(steps, warmup, *, settings) -> (step -> factor in [0, 1])`.

`step` counts from 0 (the first update has step 0), as a number, an array, or a traced value; the
factor is float32. The warm-up is linear, `(step + 1) / warmup`, so that no update is spent at rate
0; it ends at step `warmup - 1` with factor 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mmjax.config import ConfigError, in_steps, settings
from mmjax.kinds import kind_function
from mmjax.ranges import Duration, Portion, Share, Steps, StepsOrNever, is_duration

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def cosine(steps: int, warmup: int, *, final: Share = 0.0) -> Schedule:
  """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, arXiv:1608.03983, without
  restarts).

  final: share of the peak rate at the end.
  """

  def factor(step):
    done = _progress(step, warmup, steps)
    return _warm_up(step, warmup) * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

  return factor


def rsqrt(
  steps: int,
  warmup: int,
  *,
  timescale: Steps = Duration(10_000),
  cooldown: StepsOrNever = Duration(0),
) -> Schedule:
  """sqrt(timescale / (timescale + steps since the warm-up)) (Zhai et al. 2022, arXiv:2106.04560,
  appendix B).

  timescale: steps after the warm-up until the rate has fallen to 0.71 of its peak.
  `cooldown`: linear to zero over the last steps; the part before it does not depend on the length
  of the run.
  """

  def factor(step):
    since = jnp.maximum(jnp.asarray(step, jnp.float32) - warmup, 0)
    return (
      _warm_up(step, warmup)
      * jax.lax.rsqrt(1 + since / timescale)
      * (1 - _progress(step, steps - cooldown, steps))
    )

  return factor


def cooldown(
  steps: int,
  warmup: int,
  *,
  cooldown: StepsOrNever = Duration("20%"),
  shape: Literal["linear", "sqrt"] = "linear",
  final: Share = 0.0,
) -> Schedule:
  """Constant, then down to `final` over the last `cooldown` steps (Hägele et al. 2024,
  arXiv:2405.18392).

  cooldown: steps on the way down. shape: linear, or 1 - sqrt. final: share of the peak at the end.
  """

  def factor(step):
    done = _progress(step, steps - cooldown, steps)
    done = jnp.sqrt(done) if shape == "sqrt" else done
    return _warm_up(step, warmup) * (1 - (1 - final) * done)

  return factor


def constant(steps: int, warmup: int) -> Schedule:
  """The peak rate all the time after the warm-up."""
  del steps
  return lambda step: _warm_up(step, warmup)


def exponential(steps: int, warmup: int, *, first: Portion = 1e-3) -> Schedule:
  """From `first` to 1 by a constant factor each step (Smith 2017, arXiv:1506.01186): a range test.

  first: share of the peak rate at the first step.
  """

  def factor(step):
    done = _progress(step, warmup, steps - 1)
    return _warm_up(step, warmup) * jnp.exp(math.log(first) * (1 - done))

  return factor


def make_schedule(config: FrozenConfigDict, *, steps: int, examples: int | None = None) -> Schedule:
  """The factor of config.schedule for a run of `steps`; `examples` (of an epoch) for durations in
  epochs.

  Raises ConfigError: warm-up and cool-down do not fit into the run, or a duration whose whole is
  not known.
  """
  entry, kind = config.schedule, kind_function(config.schedule, "schedule")

  def convert(value):
    return in_steps(value, steps=steps, batch_size=config.train.batch_size, examples=examples)

  parameters = inspect.signature(kind, eval_str=True).parameters
  arguments = {
    name: convert(value) if is_duration(parameters[name].annotation) else value
    for name, value in settings(entry).items()
  }
  warmup = convert(entry.warmup)
  if warmup + arguments.get("cooldown", 0) > steps:
    raise ConfigError(
      f"schedule: a warm-up of {warmup} and a cool-down of {arguments.get('cooldown', 0)} steps "
      f"do not fit into train.steps = {steps}. Shorten schedule.warmup, or give it as a share "
      "such as '5%'"
    )
  return kind(steps, warmup, **arguments)


def same_past(old: Schedule, new: Schedule, upto_step: int) -> bool:
  """Whether both give the same factor at every step before `upto_step`: a run may go on with `new`
  where it had `old`.
  """
  return all(
    np.array_equal(old(part), new(part))
    for part in np.array_split(np.arange(upto_step), 1 + upto_step // 2**20)
  )


def _warm_up(step: jax.typing.ArrayLike, warmup: int) -> jax.Array:
  return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / max(1, warmup))


def _progress(step: jax.typing.ArrayLike, start: int, stop: int) -> jax.Array:
  """0 up to `start`, 1 from `stop` on, linear between."""
  return jnp.clip((jnp.asarray(step, jnp.float32) - start) / max(1, stop - start), 0, 1)
