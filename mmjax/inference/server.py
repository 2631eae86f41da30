"""`mmjax serve`: a checkpoint behind HTTP, in the form of OpenAI's API, and a page to try it.

POST /v1/chat/completions   a language model answers; streams; pictures and sound as data URLs
POST /v1/embeddings         a model with a shared space embeds texts and media
GET  /v1/models  /health  /metrics  /
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.media import WORDS
from mmjax.inference.batcher import Batcher, Job, News
from mmjax.inference.chat import Conversations
from mmjax.inference.engine import decoding_of
from mmjax.inference.predictor import Predictor
from mmjax.inference.request_fields import Refused, check_fields, decoded, list_of, number_of
from mmjax.inference.routes import SERVE, application

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Parts of a message: {type in OpenAI's form: modality}
PARTS = {
  "image_url": "image",
  "input_audio": "audio",
  "audio_url": "audio",
  "video_url": "video",
  "series_url": "series",
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
    self.app = application(self, hosts)

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
    check_fields(body, CHAT)
    messages = [self._message(n, m) for n, m in enumerate(list_of(body, "messages"))]
    read = self.prompts.read(messages)
    room = self.prompts.window - self.prompts.language.size(read)
    wanted = number_of(body, "max_tokens", int, 1, 1 << 20)
    wanted = number_of(body, "max_completion_tokens", int, 1, 1 << 20, wanted)
    if room < 1 or (wanted or 0) > room:
      raise Refused(
        400,
        f"the messages take {self.prompts.window - room} tokens of a window of "
        f"{self.prompts.window}, and max_tokens is {wanted or self.max_length}. Shorten them",
      )
    decoding = decoding_of(
      self.predictor.usual_decoding,
      temperature=number_of(body, "temperature", float, 0, 100),
      top_p=number_of(body, "top_p", float, 1e-6, 1),
      top_k=number_of(body, "top_k", int, 0, 1 << 20),
      min_p=number_of(body, "min_p", float, 0, 0.999),
      repetition_penalty=number_of(body, "repetition_penalty", float, 0.01, 100),
    )
    if number_of(body, "top_logprobs", int, 0, 20, 0) > 5:
      raise Refused(400, "top_logprobs is at most 5 here")
    for name, kind in dict(stream=bool, logprobs=bool, stream_options=dict).items():
      if not isinstance(body.get(name), (kind, type(None))):
        raise Refused(400, f"{name} must be {'an object' if kind is dict else 'true or false'}")
    given = body.get("stop")
    stop = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) for s in stop):
      raise Refused(400, "stop must be a text or up to 16 of them")
    seed = number_of(body, "seed", int, 0, 2**32 - 1)
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
      data = decoded(where, given["data"])
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
      return decoded(where, data)
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
    check_fields(body, EMBED)
    if number_of(body, "dimensions", int, 1, 1 << 20, p.width) != p.width:
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


def _vector(row: np.ndarray, form: str) -> list[float] | str:
  row = np.asarray(row, "<f4")
  return base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()
