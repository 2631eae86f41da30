"""SIGTERM and Ctrl-C as a wish that the loop fulfils between two steps."""

from __future__ import annotations

import os
import signal
from typing import Any


class StopSignal:
  """Within `with`, SIGTERM and Ctrl-C set `received`; a second Ctrl-C interrupts at once."""

  def __init__(self) -> None:
    self.received, self.name = False, "a signal to another process"
    self._before: dict[int, Any] = {}

  def is_received(self) -> bool:
    return self.received

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if self.received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received, self.name = True, "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    os.write(2, f"\n{self.name}: finishing this step and saving ...\n".encode())
