"""An xprof trace of some steps: `mmjax train --profile START:STOP` writes it to RUN/profile, for
TensorBoard's or xprof's viewer.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jax

from mmjax.config import ConfigError


class Profile:
  """Traces the steps START to STOP, both included, of the process that writes. Use it in `with`.

  text: "START:STOP", "" = nothing. first, last: the steps that this start of the run makes. Raises
  ConfigError: another range.
  """

  def __init__(self, text: str, workdir: Path, *, first: int, last: int, active: bool = True):
    start, stop = parse(text) if text else (0, 0)
    if text and not first <= start <= stop <= last:
      raise ConfigError(
        f"--profile {text}: this start of the run makes the steps {first} to {last}; name some of "
        f"them, such as {min(first + 2, last)}:{min(first + 4, last)}"
      )
    self._start, self._stop = (start, stop) if active else (0, 0)
    self._folder, self._running = workdir / "profile", False

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *_) -> None:
    self._end()

  @contextlib.contextmanager
  def step(self, at: int):
    """Around the whole of a step, its data included."""
    if at == self._start:
      jax.profiler.start_trace(self._folder)
      self._running = True
    with (
      jax.profiler.StepTraceAnnotation("train", step_num=at)
      if self._running
      else contextlib.nullcontext()
    ):
      yield

  def after(self, at: int, results: Any) -> str:
    """After a step is dispatched. At the last one: waits for `results`, writes the trace, returns
    its folder; else "".
    """
    if not self._running or at < self._stop:
      return ""
    jax.block_until_ready(results)
    self._end()
    return str(self._folder)

  def _end(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def parse(text: str) -> tuple[int, int]:
  """(START, STOP) of "START:STOP". Raises ConfigError."""
  match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
  if not match or not 0 < int(match[1]) <= int(match[2]):
    raise ConfigError(
      f"--profile {text!r}: write START:STOP, the first and the last step to trace, such as 10:12"
    )
  return int(match[1]), int(match[2])
