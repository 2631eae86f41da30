"""Requests from many clients as texts side by side: a thread of its own drives the model, each
request gets what it would get alone.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mmjax.config import UserError
from mmjax.inference.engine import Decoding
from mmjax.inference.language import Read
from mmjax.inference.predictor import Predictor
from mmjax.inference.slots import Slots, Text

log = logging.getLogger("mmjax")


class Busy(UserError):
  """As many requests wait as may."""


class News(NamedTuple):
  """What has come of a text: a piece of it, and its tokens number `first` up to `until`. Whoever
  reads it may be behind the text, which goes on meanwhile: `ended` is what it was then. error: what
  went wrong; internal: by a fault of ours, not of the request.
  """

  piece: str = ""
  first: int = 0
  until: int = 0
  text: Text | None = None
  ended: str = ""
  error: str = ""
  internal: bool = False

  @property
  def last(self) -> bool:
    return bool(self.error or self.ended)


class Job:
  """A request on its way. tell: called with each News, from the thread of the model."""

  def __init__(
    self,
    read: Read,
    max_length: int,
    decoding: Decoding,
    seed: int,
    stop: Sequence[str],
    tell: Callable[[News], None],
  ):
    self.arguments = (read, max_length, decoding, seed, stop)
    self.tell, self.cancelled = tell, False
    self.text: Text | None = None
    self.told = 0

  def cancel(self) -> None:
    """Nobody reads it any more."""
    self.cancelled = True


class Batcher:
  """Runs jobs, `rows` at a time; as many as `most` wait. Call `close` at the end."""

  def __init__(
    self, predictor: Predictor, rows: int, window: int, ends: Sequence[int], most: int = 256
  ):
    self._predictor, self._most = predictor, most
    self._shape = (rows, window, tuple(ends))
    self._slots = self._make()
    self._waiting: queue.Queue[Job | None] = queue.Queue()
    self._running: list[Job] = []
    self._open = True
    self._thread = threading.Thread(target=self._run, name="mmjax-batcher", daemon=True)
    self._thread.start()

  @property
  def waiting(self) -> int:
    """Jobs that have no row yet."""
    return self._waiting.qsize()

  @property
  def running(self) -> int:
    """Texts under way."""
    return len(self._running)

  @property
  def alive(self) -> bool:
    """Whether the thread that drives the model is."""
    return self._thread.is_alive()

  def submit(self, job: Job) -> None:
    """Takes a job. Raises Busy: too many wait."""
    if self.waiting >= self._most:
      raise Busy(f"{self._most} requests wait already; try again later")
    self._waiting.put(job)

  def close(self) -> None:
    """Ends the thread; texts under way end as they are."""
    self._open = False
    self._waiting.put(None)
    self._thread.join()

  def _make(self) -> Slots:
    assert self._predictor.language is not None
    with self._predictor.in_use():
      return Slots(self._predictor.language, *self._shape)

  def _run(self) -> None:
    with self._predictor.in_use():
      while self._open:
        self._begin_waiting()
        if not self._running:
          continue
        try:
          for job in self._running:
            if job.cancelled and job.text:
              self._slots.end(job.text)
          self._slots.step()
        except Exception as error:  # a fault of the program: every text under way has it
          log.exception("a step of the model failed")
          self._start_anew(type(error).__name__)
          continue
        for job in self._running:
          self._tell(job)
        self._running = [job for job in self._running if job.text and not job.text.ended]
    for job in self._running:
      self._fail(job, "the server stops", internal=True)

  def _start_anew(self, why: str) -> None:
    """With an empty cache, for the old one may be half-written: all texts under way are lost."""
    for job in self._running:
      self._fail(job, why, internal=True)
    self._running, self._slots = [], self._make()

  def _begin_waiting(self) -> None:
    """Gives waiting jobs free rows; waits for one where no text is under way."""
    while self._slots.free:
      try:
        job = self._waiting.get(block=not self._running)
      except queue.Empty:
        return
      if job is None:
        return
      if job.cancelled:
        continue
      try:
        job.text = self._slots.begin(*job.arguments)
      except UserError as error:
        self._fail(job, str(error))
      except Exception as error:
        log.exception("a request failed")
        self._fail(job, type(error).__name__, internal=True)
        if self._slots.lost:
          self._start_anew("a request beside it failed")
      else:
        self._tell(job)
        if not job.text.ended:
          self._running.append(job)

  def _tell(self, job: Job) -> None:
    """What has come of a text. What goes wrong in it is this job's alone."""
    text = job.text
    assert text is not None
    first, job.told = job.told, len(text.tokens)
    try:
      news = News(text.piece(), first, job.told, text, text.ended)
    except Exception as error:
      log.exception("a text cannot be read")
      self._slots.end(text)
      self._fail(job, type(error).__name__, internal=True)
      return
    with contextlib.suppress(RuntimeError):  # the loop of a client that has gone
      job.tell(news)

  def _fail(self, job: Job, why: str, internal: bool = False) -> None:
    with contextlib.suppress(RuntimeError):
      job.tell(News(error=why, internal=internal))
