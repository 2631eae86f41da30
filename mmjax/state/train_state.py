"""The whole state of a run: everything that a step reads and writes, besides the batch."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
  """A pytree; a step maps it to the next one.

  step: int32 scalar, the number of steps done (also the position in the data).
  params: nested dict of arrays, unboxed; names are final, because checkpoints and regexes use them.
  model_state: nested dict of what a model keeps besides parameters (batch statistics); {} if nothing.
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
