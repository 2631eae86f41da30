"""The whole state of a run: everything that a step reads and writes, besides the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class TrainState(flax.struct.PyTreeNode):
  """A pytree; a step maps it to the next one.

  step: int32 scalar, the number of steps done (also the position in the data).
  params: nested dict of arrays, unboxed; names are final, because checkpoints and regexes use them.
  model_state: nested dict of what a model keeps besides parameters (batch statistics); {} if
  nothing.
  opt_states: {group of parameters: its optimizer's state}; "main", and those of config.optimizers.
  ema: exponential moving average of the parameters, shaped like them, or None.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_states: dict[str, Any]
  ema: Any = None

  @property
  def eval_params(self) -> Any:
    """The parameters that evaluation and export use: the moving average where there is one."""
    return self.params if self.ema is None else self.ema


def clamped(params: Any, config: Mapping[str, Any]) -> Any:
  """`params` with the log of the logit scale at most that of model.scale_max, as CLIP clamps it
  after every update (Radford et al.
  2021, arXiv:2103.00020, section 2.5): what is stored, exported and used is then one number.
  params: NumPy or JAX arrays."""
  limit = config.get("model", {}).get("scale_max")
  if not limit or "log_scale" not in params:
    return params
  minimum = jnp.minimum if isinstance(params["log_scale"], jax.Array) else np.minimum
  return {**params, "log_scale": minimum(params["log_scale"], np.float32(math.log(limit)))}
