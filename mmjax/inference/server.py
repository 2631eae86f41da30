"""`mmjax serve`: a checkpoint behind HTTP, in the form of OpenAI's API, and a page to try it.

POST /v1/chat/completions   a language model answers; streams; pictures and sound as data URLs
POST /v1/embeddings         a model with a shared space embeds texts and media
GET  /v1/models  /health  /metrics  /
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.media import WORDS
from mmjax.inference.batcher import Batcher, Busy, Job, News
from mmjax.inference.chat import Conversations
from mmjax.inference.engine import decoding_of
from mmjax.inference.predictor import Predictor

log = logging.getLogger("mmjax")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVE = "pip install 'mmjax[serve]'"
# Parts of a message: {type in OpenAI's form: modality}
PARTS = {
  "image_url": "image",
  "input_audio": "audio",
  "audio_url": "audio",
  "video_url": "video",
  "series_url": "series",
}
# Fields of a request that change no answer; every other that is not read is refused.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are read only to see that they ask for nothing: {name: what is nothing}
NOTHING = {
  "frequency_penalty": (0, None),
  "presence_penalty": (0, None),
  "logit_bias": ({}, None),
  "n": (1, None),
  "tools": ([], None),
  "tool_choice": ("none", "auto", None),
  "response_format": ({"type": "text"}, None),
  "parallel_tool_calls": (True, False, None),
  "modalities": (["text"], None),
}
CHAT = {
  "model",
  "messages",
  "stream",
  "stream_options",
  "max_tokens",
  "max_completion_tokens",
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "repetition_penalty",
  "seed",
  "stop",
  "logprobs",
  "top_logprobs",
}
EMBED = {"model", "input", "encoding_format", "dimensions"}


class Refused(Exception):
  """A request that is answered by a status and one line."""

  def __init__(self, status: int, why: str, kind: str = "invalid_request_error"):
    super().__init__(why)
    self.status, self.why, self.kind = status, why, kind


class Server:
  """What answers the requests; `app` is its ASGI application. Call `close` at the end.

  rows: texts that are written at the same time. waiting: requests that may wait for a row.
  largest: bytes of a request. seconds: that a request may take, and that a client may send or read
  nothing. key: what clients must present, "" = nothing. media_root: a folder whose files messages
  may name; "" = none.
  """

  def __init__(
    self,
    predictor: Predictor,
    *,
    name: str = "mmjax",
    template: str = "",
    window: int = 0,
    max_length: int = 256,
    rows: int = 8,
    waiting: int = 256,
    largest: int = 20 << 20,
    seconds: float = 120.0,
    key: str = "",
    media_root: str = "",
    hosts: tuple[str, ...] = LOOPBACK,
  ):
    self.predictor, self.name, self.largest, self.seconds = predictor, name, largest, seconds
    self.key, self.max_length = key, max_length
    self.media_root = Path(media_root).resolve() if media_root else None
    self.counts: Counter[str] = Counter()
    self.started = time.time()
    self.prompts = self.batcher = None
    if predictor.language is not None:
      self.prompts = Conversations(predictor, template, window)
      self.batcher = Batcher(predictor, rows, self.prompts.window, self.prompts.ends, most=waiting)
    elif not predictor.joint:
      raise UserError(
        "this checkpoint neither converses (model.name 'language_model') nor embeds (model.joint)"
      )
    self.app = _application(self, hosts)

  def warm(self) -> None:
    """Compiles what a short message needs, so that the first client waits less."""
    if self.prompts is None or self.batcher is None:
      return
    ended = threading.Event()

    def tell(news: News) -> None:
      if news.last:
        ended.set()

    read = self.prompts.read([{"role": "user", "content": "a"}])
    length = min(4, self.prompts.window - self.prompts.language.size(read))
    self.batcher.submit(Job(read, length, decoding_of({}), 0, (), tell))
    ended.wait()

  def close(self) -> None:
    """Ends the thread that drives the model."""
    if self.batcher:
      self.batcher.close()

  # -- Chat ----------------------------------------------------------------------------------------

  def job(self, body: Mapping[str, Any], tell: Callable[[News], None]) -> Job:
    """A request as a job. Raises Refused, UserError."""
    if self.prompts is None:
      raise Refused(400, "this checkpoint is no language model: it has /v1/embeddings")
    _check_fields(body, CHAT)
    messages = [self._message(n, m) for n, m in enumerate(_list(body, "messages"))]
    read = self.prompts.read(messages)
    room = self.prompts.window - self.prompts.language.size(read)
    wanted = _number(body, "max_tokens", int, 1, 1 << 20)
    wanted = _number(body, "max_completion_tokens", int, 1, 1 << 20, wanted)
    if room < 1 or (wanted or 0) > room:
      raise Refused(
        400,
        f"the messages take {self.prompts.window - room} tokens of a window of "
        f"{self.prompts.window}, and max_tokens is {wanted or self.max_length}. Shorten them",
      )
    decoding = decoding_of(
      self.predictor.usual_decoding,
      temperature=_number(body, "temperature", float, 0, 100),
      top_p=_number(body, "top_p", float, 1e-6, 1),
      top_k=_number(body, "top_k", int, 0, 1 << 20),
      min_p=_number(body, "min_p", float, 0, 0.999),
      repetition_penalty=_number(body, "repetition_penalty", float, 0.01, 100),
    )
    if _number(body, "top_logprobs", int, 0, 20, 0) > 5:
      raise Refused(400, "top_logprobs is at most 5 here")
    for name, kind in dict(stream=bool, logprobs=bool, stream_options=dict).items():
      if not isinstance(body.get(name), (kind, type(None))):
        raise Refused(400, f"{name} must be {'an object' if kind is dict else 'true or false'}")
    given = body.get("stop")
    stop = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) for s in stop):
      raise Refused(400, "stop must be a text or up to 16 of them")
    seed = _number(body, "seed", int, 0, 2**32 - 1)
    seed = secrets.randbelow(2**32) if seed is None else seed
    return Job(read, wanted or min(self.max_length, room), decoding, seed, stop, tell)

  def _message(self, number: int, message: Any) -> dict[str, Any]:
    """A message with its media decoded from data URLs."""
    where = f"messages[{number}]"
    if not isinstance(message, dict):
      raise Refused(400, f"{where} is no object")
    extra = set(message) - {"role", "content", "name"}
    if extra:
      raise Refused(400, f"{where}: field {sorted(extra)[0]!r:.60} is not known here")
    content = message.get("content")
    if isinstance(content, list):
      content = [self._part(f"{where}.content[{n}]", part) for n, part in enumerate(content)]
    elif not isinstance(content, str):
      raise Refused(400, f"{where}.content must be a text or a list of parts")
    role = message.get("role")
    return {"role": "system" if role == "developer" else role, "content": content}

  def _part(self, where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
      return {"type": "text", "text": part["text"]}
    if not isinstance(kind, str) or kind not in PARTS:
      raise Refused(400, f"{where} is of type {kind!r:.60}; parts are text, {', '.join(PARTS)}")
    given = part.get(kind)
    if kind == "input_audio" and isinstance(given, dict) and isinstance(given.get("data"), str):
      data = _decoded(where, given["data"])
    else:
      url = given.get("url") if isinstance(given, dict) else given
      data = self._content(where, url)
    modality = PARTS[kind]
    if modality not in self.predictor.media:
      known = ", ".join(self.predictor.media) or "text alone"
      raise Refused(400, f"{where}: this model reads no {WORDS[modality]}s; it reads {known}")
    return {"type": modality, "item": self._read(where, modality, data)}

  def _read(self, where: str, modality: str, data: bytes) -> dict[str, np.ndarray]:
    try:
      return self.predictor.media[modality](data, where)
    except UserError as error:
      raise Refused(400, str(error)) from error

  def _content(self, where: str, url: Any) -> bytes:
    """The bytes that a URL stands for."""
    if not isinstance(url, str):
      raise Refused(400, f"{where} has no url")
    if url.startswith("data:"):
      head, _, data = url.partition(",")
      if not head.endswith(";base64"):
        raise Refused(400, f"{where}: a data URL must be base64")
      return _decoded(where, data)
    if self.media_root is None or "://" in url.removeprefix("file://"):
      raise Refused(400, f"{where}: give media as data: URLs; files and addresses are not opened")
    try:
      path = (self.media_root / url.removeprefix("file://").lstrip("/")).resolve()
      if path.is_relative_to(self.media_root) and path.is_file():
        if path.stat().st_size > self.largest:
          raise Refused(413, f"{where}: the file is larger than {self.largest} bytes")
        return path.read_bytes()
    except (OSError, ValueError):  # no name of a file, or one that may not be read
      pass
    raise Refused(400, f"{where}: no such file in the media folder")

  # -- Embeddings ----------------------------------------------------------------------------------

  def embed(self, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request for embeddings. Raises Refused, UserError."""
    p = self.predictor
    if not p.joint:
      raise Refused(400, "this checkpoint has no shared space: it has /v1/chat/completions")
    _check_fields(body, EMBED)
    if _number(body, "dimensions", int, 1, 1 << 20, p.width) != p.width:
      raise Refused(400, f"dimensions is {body['dimensions']}, but embeddings have {p.width}")
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
      raise Refused(400, "encoding_format is float or base64")
    given = body.get("input")
    items = given if isinstance(given, list) else [given]
    if not 0 < len(items) <= 256:
      raise Refused(400, "input must be a text, a part, or 1 to 256 of them")
    rows: list[Any] = [None] * len(items)
    groups: dict[str, list[tuple[int, Any]]] = {}
    for n, item in enumerate(items):
      if isinstance(item, str):
        groups.setdefault("text", []).append((n, item))
        continue
      part = self._part(f"input[{n}]", item)
      kind = part["type"]
      groups.setdefault(kind, []).append((n, part["text"] if kind == "text" else part["item"]))
    for modality, members in groups.items():
      found = p.encode(modality, [item for _, item in members])
      for (n, _), row in zip(members, found, strict=True):
        rows[n] = row
    data = [
      dict(object="embedding", index=n, embedding=_vector(row, form)) for n, row in enumerate(rows)
    ]
    usage = dict(prompt_tokens=len(items), total_tokens=len(items))
    return dict(object="list", data=data, model=self.name, usage=usage)

  # -- What it says of itself ----------------------------------------------------------------------

  def about(self) -> dict[str, Any]:
    """The model, as /v1/models lists it."""
    p = self.predictor
    return dict(
      id=self.name,
      object="model",
      created=int(self.started),
      owned_by="mmjax",
      chat=self.prompts is not None,
      embeddings=bool(p.joint),
      media=list(p.media),
      reads_text=self.prompts is not None or "text" in p.modalities,
      scale=p.scale,
    )

  def metrics(self) -> str:
    """Counters in the text form of Prometheus."""
    gauges = dict(uptime_seconds=round(time.time() - self.started))
    if self.batcher:
      gauges |= dict(running=self.batcher.running, waiting=self.batcher.waiting)
    lines, before = [], ""
    for kind, values in (("counter", self.counts), ("gauge", gauges)):
      for name, value in sorted(values.items()):
        family = name.partition("{")[0]
        if family != before:
          lines.append(f"# TYPE mmjax_{family} {kind}")
        lines.append(f"mmjax_{name} {value}")
        before = family
    return "\n".join(lines) + "\n"


def serve(
  predictor: Predictor, host: str, port: int, ready: Callable[[str], None], **settings: Any
) -> None:
  """Serves until it is interrupted. ready: called with the address. Raises UserError: the library
  is not installed, the address cannot be used, or what `Server` refuses.
  """
  try:
    import uvicorn

    from mmjax.inference.connections import http_config
  except ImportError as error:
    raise UserError(f"serving needs uvicorn and starlette: {SERVE}") from error
  import socket

  hosts = LOOPBACK if host in LOOPBACK else ()
  server = Server(predictor, hosts=hosts, **settings)
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
      listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        listening.bind((host, port))
      except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({error.strerror or error})") from error
      config = http_config(server.app, server.seconds, server.counts)
      server.warm()
      listening.listen(2048)  # before it is said: who connects at once waits, and is answered
      address = f"[{host}]" if ":" in host else host
      ready(f"http://{address}:{listening.getsockname()[1]}")
      with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
        uvicorn.Server(config).run(sockets=[listening])
  finally:
    server.close()


# -- HTTP ------------------------------------------------------------------------------------------


def _application(server: Server, hosts: tuple[str, ...]) -> Any:
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
      body = await run_in_threadpool(json.loads, bytes(content), object_pairs_hook=_once)
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


def _vector(row: np.ndarray, form: str) -> list[float] | str:
  row = np.asarray(row, "<f4")
  return base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()


# -- Fields of a request ---------------------------------------------------------------------------


def _check_fields(body: Mapping[str, Any], known: set[str]) -> None:
  for name, value in body.items():
    if name in known or name in IGNORED:
      continue
    if name in NOTHING:
      if value not in NOTHING[name]:
        raise Refused(400, f"{name} is not supported here; leave it out")
      continue
    raise Refused(400, f"field {name!r:.60} is not known here")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON. Raises ValueError: it has a field twice, of which readers take either."""
  found = dict(pairs)
  if len(found) < len(pairs):
    twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    raise ValueError(f"field {twice!r:.60} stands twice")
  return found


def _list(body: Mapping[str, Any], name: str) -> list:
  value = body.get(name)
  if not isinstance(value, list) or not value:
    raise Refused(400, f"{name} must be a list of at least one")
  return value


def _number(
  body: Mapping[str, Any], name: str, kind: type, least: float, most: float, default: Any = None
) -> Any:
  value = body.get(name)
  if value is None:
    return default
  fine = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
  if not fine or (kind is int and value != int(value)):
    raise Refused(
      400, f"{name} is {value!r:.40}, but must be {kind.__name__}, {least:g} to {most:g}"
    )
  return kind(value)


def _decoded(where: str, data: str) -> bytes:
  with contextlib.suppress(binascii.Error, ValueError):
    return base64.b64decode(data, validate=True)
  raise Refused(400, f"{where}: not base64")
