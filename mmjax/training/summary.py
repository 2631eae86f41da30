"""What a step should take, by the compiler and the formula, and what it then took: two lines at the
start of a run, one at its end.

RUN/summary.json keeps the figures, and report.html shows the last line. Nothing is compiled for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mmjax import files
from mmjax.files import replace_file
from mmjax.training.memory import compiled_bytes, gib, state_bytes
from mmjax.training.metrics import memory_in_use, utilisation
from mmjax.training.program import Program

log = logging.getLogger("mmjax")
NAME = "summary.json"
# (step, executable, source) -> seconds of a step on the devices that it was compiled for; None
# where nothing tells.
Estimate = Callable[[Program, jax.stages.Compiled, str], float | None]


class Summary:
  """The plan of a run's step, and the comparison with what was measured.

  compiled: the executables, one a kind of step, in the order of program.sources. estimate: asked
  once, where there are TPUs.
  """

  def __init__(
    self,
    program: Program,
    compiled: Sequence[jax.stages.Compiled],
    estimate: Estimate | None = None,
  ):
    self._program, self._compiled, self._estimate = program, compiled, estimate
    self._device = jax.local_devices()[0]
    used = [
      compiled_bytes(executable, peak_known=self._device.platform != "cpu")
      for executable in compiled
    ]
    self.bytes = {**state_bytes(program), **max(used, key=lambda kind: kind["peak"])}
    self.flops = 0.0
    self.seconds: float | None = None

  def memory(self) -> str:
    """The first line: the memory of a device."""
    parts = ", ".join(
      f"{name.replace('_', ' ')} {gib(self.bytes[name])}"
      for name in ("parameters", "optimizer", "average", "model_state", "batch", "temporaries")
      if self.bytes[name]
    )
    limit = (self._device.memory_stats() or {}).get("bytes_limit")
    return f"memory of a device: {parts}; peak {gib(self.bytes['peak'])}" + (
      f" of {gib(limit)}" if limit else ""
    )

  def work(self) -> str:
    """The second line. It takes a moment: call it while the devices compute."""
    self.flops = self._program.flops_per_step()
    if self._estimate and self._device.platform == "tpu":
      try:
        each = {
          source: self._estimate(self._program, one, source)
          for one, source in zip(self._compiled, self._program.sources, strict=True)
        }
        known = {source: seconds for source, seconds in each.items() if seconds is not None}
        if len(known) == len(each):
          self.seconds = self._program.mean_over_kinds(known.__getitem__)
      except Exception as error:  # a run does not end because a plan of it cannot be made
        log.warning("no estimate of the time of a step: %s: %s", type(error).__name__, error)
    text = f"a step: {_flop(self.flops)} of the model"
    return (
      f"{text}; estimated {self.seconds * 1e3:.1f} ms{_mfu(utilisation(self.flops, self.seconds))}"
      if self.seconds
      else text
    )

  def compare(self, seconds: float | None, folder: Path) -> str:
    """The last line; writes NAME in `folder`. seconds: of a step as measured, None if there were
    too few.
    """
    # Not counted yet where a run had only its end left to do.
    self.flops = self.flops or self._program.flops_per_step()
    planned: dict[str, Any] = dict(
      flops=self.flops,
      seconds=self.seconds,
      mfu=utilisation(self.flops, self.seconds or 0),
      memory=self.bytes,
    )
    measured: dict[str, Any] = dict(
      seconds=seconds, memory=memory_in_use(), mfu=utilisation(self.flops, seconds or 0)
    )
    parts = []
    if seconds:
      measured.update(
        examples_per_second=self._program.config.train.batch_size / seconds,
        flops_per_second=self.flops / seconds,
      )
      parts += [
        f"{seconds * 1e3:.1f} ms a step"
        + (f" (estimated {self.seconds * 1e3:.1f})" if self.seconds else ""),
        f"{measured['examples_per_second']:,.0f} examples/s",
        f"{_flop(measured['flops_per_second'])}/s{_mfu(measured['mfu'])}"
        + (f" (estimated {100 * planned['mfu']:.1f}%)" if planned["mfu"] else ""),
      ]
    cpu = self._device.platform == "cpu"
    parts.append(
      f"memory {gib(measured['memory'])}{' of the whole process' if cpu else ''} (planned "
      f"{gib(self.bytes['peak'])} a device)"
    )
    text = f"measured: {', '.join(parts)}"
    replace_file(
      folder / NAME,
      json.dumps(dict(planned=planned, measured=measured, text=text), indent=2) + "\n",
    )
    return text

  def finished(self, folder: Path, step: int) -> None:
    """Notes, after all else that a run leaves, that it ended at `step`."""
    path = folder / NAME
    try:
      told = files.read_json(path)
    except (OSError, ValueError):  # a disk that lost it
      told = {}
    told = told if isinstance(told, dict) else {}
    replace_file(path, json.dumps({**told, "finished": step}, indent=2) + "\n")


def finished_step(folder: Path) -> int | None:
  """The step at which the run in a folder (a path or URL) has ended with all that it leaves; None:
  it has not.
  """
  try:
    step = files.read_json(folder / NAME)["finished"]
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None
  return step if isinstance(step, int) else None


def _mfu(share: float | None) -> str:
  return f", MFU {100 * share:.1f}%" if share else ""


def _flop(count: float) -> str:
  scale, unit = next(
    ((scale, unit) for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if count >= scale),
    (1e6, "M"),
  )
  return f"{count / scale:.1f} {unit}FLOP"
