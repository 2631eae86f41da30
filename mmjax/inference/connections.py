"""HTTP connections that hold nothing for ever: a client that does not send its request, or does not
read its answer, is cut off.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def http_config(app: Any, seconds: float, counts: Counter[str]) -> uvicorn.Config:
  """How uvicorn serves `app`. seconds: that the headers of a request may take, and that a client
  may read nothing of an answer. counts: counts the clients that were cut off.
  """

  class Bounded(H11Protocol):
    """uvicorn bounds neither: by itself it only ends connections that are idle after an answer."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self.wait_for("headers")

    def data_received(self, data: bytes) -> None:
      super().data_received(data)  # which also ends the bound of an idle connection
      asks = self.cycle is not None and not self.cycle.response_complete
      if asks and not self.flow.write_paused:
        self.stop_waiting()
      elif self.timer is None:
        self.wait_for("headers")

    def pause_writing(self) -> None:
      super().pause_writing()
      self.wait_for("reading")

    def resume_writing(self) -> None:
      super().resume_writing()
      self.stop_waiting()

    def connection_lost(self, error: Exception | None) -> None:
      self.stop_waiting()
      super().connection_lost(error)

    def wait_for(self, what: str) -> None:
      self.stop_waiting()
      self.timer = self.loop.call_later(seconds, self.cut_off, what)

    def stop_waiting(self) -> None:
      if self.timer is not None:
        self.timer.cancel()
        self.timer = None

    def cut_off(self, what: str) -> None:
      self.timer = None
      counts[f'clients_cut_off_total{{waiting_for="{what}"}}'] += 1
      self.transport.abort()  # `close` would wait for the client to read what is left

  return uvicorn.Config(
    app,
    http=Bounded,
    ws="none",
    log_level="warning",
    lifespan="off",
    timeout_keep_alive=10,
    h11_max_incomplete_event_size=64 << 10,
  )
