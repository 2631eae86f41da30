"""HTTP of a server: its paths, and answers as one object or as a stream of events."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.config import UserError
from mmjax.inference.batcher import Busy, Job, News
from mmjax.inference.request_fields import Refused, unique_fields

if TYPE_CHECKING:
  from mmjax.inference.server import Server

log = logging.getLogger("mmjax")
SERVE = "pip install 'mmjax[serve]'"


def application(server: Server, hosts: tuple[str, ...]) -> Any:
  try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route
  except ImportError as error:
    raise UserError(f"serving needs uvicorn and starlette: {SERVE}") from error

  def refused(error: Refused) -> JSONResponse:
    server.counts[f'requests_refused_total{{status="{error.status}"}}'] += 1
    said = dict(message=error.why, type=error.kind, param=None, code=None)
    return JSONResponse({"error": said}, status_code=error.status)

  async def body_of(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
      raise Refused(415, "send application/json")
    content = bytearray()
    async for chunk in request.stream():
      content += chunk
      if len(content) > server.largest:
        raise Refused(413, f"the request is larger than {server.largest} bytes")
    try:
      body = await run_in_threadpool(json.loads, bytes(content), object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
      raise Refused(400, f"no JSON ({str(error)[:100]})") from error
    if not isinstance(body, dict):
      raise Refused(400, "the request must be a JSON object")
    return body

  async def while_there(request: Request, work: Coroutine) -> Any:
    """What `work` gives. Raises ClientDisconnect: the client has left. Its request is all read."""

    async def leave() -> None:
      while (await request.receive())["type"] != "http.disconnect":
        pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      if not tasks[0].done():
        raise ClientDisconnect
      return await tasks[0]
    finally:
      for task in tasks:
        task.cancel()

  def answering(handler: Callable) -> Callable:
    """Authorises, bounds the time, and says refusals as OpenAI's API does."""

    async def answer(request: Request) -> Any:
      try:
        if server.key:
          given = request.headers.get("authorization", "").removeprefix("Bearer ")
          if not hmac.compare_digest(given.encode(), server.key.encode()):
            raise Refused(401, "give the server's key as a Bearer token", "authentication_error")
        async with asyncio.timeout(server.seconds):
          return await handler(request)
      except Refused as error:
        return refused(error)
      except Busy as error:
        return refused(Refused(429, str(error), "rate_limit_error"))
      except UserError as error:
        return refused(Refused(400, str(error)))
      except TimeoutError:
        return refused(Refused(408, f"it took longer than {server.seconds:g} s", "timeout_error"))
      except ClientDisconnect:
        return PlainTextResponse("", status_code=400)
      except Exception as error:  # a fault of the program: told in the form of the API, and logged
        log.exception("a request failed")
        return refused(Refused(500, type(error).__name__, "server_error"))

    return answer

  async def chat(request: Request) -> Any:
    body = await body_of(request)
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[News] = asyncio.Queue()

    def tell(one: News) -> None:
      loop.call_soon_threadsafe(news.put_nowait, one)

    job = await run_in_threadpool(server.job, body, tell)
    assert server.batcher is not None
    server.batcher.submit(job)
    server.counts["chat_requests_total"] += 1
    answer = _Answer(server, body, job, news)
    if body.get("stream"):
      # what goes wrong before the first news has a status of its own
      first = await while_there(request, answer.first())
      return StreamingResponse(answer.events(first), media_type="text/event-stream")
    try:
      return JSONResponse(await while_there(request, answer.whole()))
    finally:
      job.cancel()

  async def embeddings(request: Request) -> Any:
    body = await body_of(request)
    found = await run_in_threadpool(server.embed, body)
    server.counts["embedding_requests_total"] += 1
    return JSONResponse(found)

  async def models(_: Request) -> Any:
    return JSONResponse(dict(object="list", data=[server.about()]))

  async def health(_: Request) -> Any:
    fine = server.batcher is None or server.batcher.alive
    said = dict(status="ok" if fine else "the thread of the model has ended", model=server.name)
    return JSONResponse(said, status_code=200 if fine else 503)

  async def metrics(_: Request) -> Any:
    return PlainTextResponse(server.metrics())

  async def page(_: Request) -> Any:
    content = Path(__file__).with_name("page.html").read_text()
    policy = (
      "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
      "img-src data: blob:; media-src data: blob:; connect-src 'self'; base-uri 'none'; "
      "form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(content, headers={"Content-Security-Policy": policy})

  return Starlette(
    routes=[
      Route("/", page),
      Route("/health", health),
      Route("/metrics", answering(metrics)),
      Route("/v1/models", answering(models)),
      Route("/v1/chat/completions", answering(chat), methods=["POST"]),
      Route("/v1/embeddings", answering(embeddings), methods=["POST"]),
    ],
    # A page of another site could otherwise reach a server of this machine by a name of its own.
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else [],
  )


class _Answer:
  """A job as what OpenAI's API sends: one object, or events."""

  def __init__(self, server: Server, body: Mapping[str, Any], job: Job, news: asyncio.Queue):
    self.server, self.job, self.news = server, job, news
    self.logprobs = bool(body.get("logprobs"))
    self.top = int(body.get("top_logprobs") or 0)
    self.with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    self.about = dict(
      id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=server.name
    )

  async def first(self) -> News:
    """The first news of it. Raises Refused: it went wrong."""
    try:
      news = await self.news.get()
    except asyncio.CancelledError:
      self.job.cancel()
      raise
    if news.error:
      raise Refused(
        500 if news.internal else 400,
        news.error,
        "server_error" if news.internal else "invalid_request_error",
      )
    return news

  async def whole(self) -> dict[str, Any]:
    """The answer as one object."""
    content, scores = "", []
    while True:
      news = await self.first()
      content += news.piece
      scores += self._scores(news)
      if news.last:
        break
    choice = dict(
      index=0,
      message=dict(role="assistant", content=content, refusal=None),
      finish_reason=_finish(news),
      logprobs=dict(content=scores, refusal=None) if self.logprobs else None,
    )
    return dict(self.about, object="chat.completion", choices=[choice], usage=self._usage(news))

  async def events(self, news: News) -> AsyncIterator[str]:
    """The answer as events, from its first news on."""
    deadline = asyncio.get_running_loop().time() + self.server.seconds
    try:
      yield self._event(dict(role="assistant", content=""), None, [])
      while True:
        if news.error:
          said = dict(message=news.error, type="server_error", param=None, code=None)
          yield f"data: {json.dumps(dict(error=said))}\n\n"
          break
        scores = self._scores(news)
        if news.piece or scores:
          yield self._event(dict(content=news.piece), None, scores)
        if news.last:
          yield self._event({}, _finish(news), [])
          if self.with_usage:
            usage = dict(self.about, object="chat.completion.chunk", choices=[])
            yield f"data: {json.dumps(dict(usage, usage=self._usage(news)))}\n\n"
          break
        async with asyncio.timeout_at(deadline):  # around no `yield`: it would end whoever reads
          news = await self.news.get()
      yield "data: [DONE]\n\n"
    except TimeoutError:
      said = dict(message=f"it took longer than {self.server.seconds:g} s", type="timeout_error")
      yield f"data: {json.dumps(dict(error=said))}\n\n"
    finally:
      self.job.cancel()

  def _event(self, delta: dict[str, Any], finish: str | None, scores: list) -> str:
    choice: dict[str, Any] = dict(index=0, delta=delta, finish_reason=finish)
    if self.logprobs:
      choice["logprobs"] = dict(content=scores, refusal=None)
    event = dict(self.about, object="chat.completion.chunk", choices=[choice])
    return f"data: {json.dumps(event)}\n\n"

  def _scores(self, news: News) -> list[dict[str, Any]]:
    """Log-probabilities of new tokens, where they are asked for."""
    if not self.logprobs or news.text is None:
      return []
    text, tokenizer = news.text, self.server.predictor.tokenizer

    def one(token: int, score: float) -> dict[str, Any]:
      piece = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
      return dict(token=piece, logprob=max(score, -9999.0), bytes=list(piece.encode()))

    return [
      dict(
        one(text.tokens[n], text.scores[n]),
        top_logprobs=[one(*pair) for pair in text.best[n][: self.top]],
      )
      for n in range(news.first, news.until)
    ]

  def _usage(self, news: News) -> dict[str, int]:
    text = news.text
    assert text is not None
    written = len(text.tokens)
    self.server.counts["tokens_read_total"] += text.read
    self.server.counts["tokens_written_total"] += written
    return dict(
      prompt_tokens=text.read, completion_tokens=written, total_tokens=text.read + written
    )


def _finish(news: News) -> str:
  return "length" if news.ended == "length" else "stop"
