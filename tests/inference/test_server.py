"""A server under OpenAI's own client: the answers, many clients at once, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import uvicorn

import mmjax
from mmjax import config as configs
from mmjax.inference.connections import http_config
from mmjax.inference.server import Server
from mmjax.inference.slots import Slots, Text
from mmjax.parallel.mesh import single_device_mesh
from tests.inference import tiny
from tests.inference.test_language import PICTURES, config

SETTINGS = dict(template="chatml", max_length=6, rows=4, window=512)


@contextlib.contextmanager
def running(predictor, **settings):
  """(the server, its port)"""
  server = Server(predictor, name="tiny", **settings)
  with socket.socket() as listening:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of what it accepts too
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)  # who connects before the server runs waits
    http = uvicorn.Server(http_config(server.app, server.seconds, server.counts))
    thread = threading.Thread(target=http.run, kwargs=dict(sockets=[listening]))
    thread.start()
    try:
      yield server, listening.getsockname()[1]
    finally:
      http.should_exit = True
      thread.join()
      server.close()


def load(config, folder):
  return mmjax.load(tiny.save(config, folder), mesh=single_device_mesh())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  c = config().to_dict()
  c["data"]["sequence"]["length"] = 128
  return load(configs.resolve(c), tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
  root = tmp_path_factory.mktemp("media")
  (root / "a.png").write_bytes(tiny.png(PICTURES[0]))
  settings = dict(SETTINGS, largest=1 << 20, seconds=60)
  with running(model, media_root=str(root), **settings) as (server, port):
    yield server, port


@pytest.fixture(scope="module")
def hasty(model, served):
  """One that waits for nobody longer than 0.7 seconds; what it runs is compiled already."""
  with running(model, **SETTINGS, seconds=0.7) as (server, port):
    yield server, port


def client(port, **settings):
  return openai.OpenAI(
    base_url=f"http://127.0.0.1:{port}/v1", **dict(dict(api_key="none", max_retries=0), **settings)
  )


def picture(number):
  data = base64.b64encode(tiny.png(PICTURES[number])).decode()
  return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def messages(number, text="what is it?"):
  content = [picture(number % 3), {"type": "text", "text": text}] if number % 2 else text
  return [{"role": "system", "content": "you see"}, {"role": "user", "content": content}]


def post(port, path, body, headers=None, method="POST"):
  """(status, the answer as text)"""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  headers = {"Content-Type": "application/json"} if headers is None else headers
  body = body if isinstance(body, bytes) else json.dumps(body).encode()
  connection.request(method, path, body, headers)
  answer = connection.getresponse()
  return answer.status, answer.read().decode()


def test_answers_are_those_of_a_chat(model, served):
  one = model.chat(template="chatml", system="you see", max_length=6)
  want = one.send("what is it?", image=tiny.png(PICTURES[1]))
  api = client(served[1])
  made = api.chat.completions.create(
    model="tiny", messages=messages(1), seed=0, logprobs=True, top_logprobs=2
  )
  choice = made.choices[0]
  assert choice.message.content == want
  assert choice.finish_reason == ("length" if one.last.ended == "length" else "stop")
  assert made.usage.prompt_tokens == one.last.read
  assert made.usage.completion_tokens == len(one.last.tokens) == len(choice.logprobs.content)
  first = choice.logprobs.content[0]
  assert len(first.top_logprobs) == 2 and first.top_logprobs[0].logprob == first.logprob
  assert first.logprob == pytest.approx(one.last.scores[0], abs=1e-4)
  stream = api.chat.completions.create(
    model="tiny", messages=messages(1), stream=True, stream_options={"include_usage": True}
  )
  events = list(stream)
  assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == want
  assert events[-1].usage == made.usage and len(events) > 3
  drawn = dict(messages=messages(0), model="tiny", temperature=1.5, seed=3, max_tokens=12)
  texts = {api.chat.completions.create(**drawn).choices[0].message.content for _ in range(2)}
  assert len(texts) == 1 and texts != {
    api.chat.completions.create(**dict(drawn, seed=4)).choices[0].message.content
  }
  free = {name: value for name, value in drawn.items() if name != "seed"}
  texts_of = [api.chat.completions.create(**free).choices[0].message.content for _ in range(4)]
  assert len(set(texts_of)) > 1  # without a seed each draws anew
  whole = texts.pop()
  stop = whole[2:4]
  cut = api.chat.completions.create(**drawn, stop=[stop]).choices[0]
  assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_thirty_two_clients_at_once_get_what_each_would_get_alone(served):
  api = client(served[1])

  def ask(number):
    how = dict(temperature=1.2, seed=number) if number % 3 == 0 else {}
    made = api.chat.completions.create(
      model="tiny",
      messages=messages(number, f"turn {number % 5}"),
      max_tokens=2 + number % 7,
      **how,
    )
    return made.choices[0].message.content

  alone = [ask(number) for number in range(32)]
  with ThreadPoolExecutor(32) as pool:
    assert list(pool.map(ask, range(32))) == alone
  assert len(set(alone)) > 8


def test_one_who_stops_listening_frees_a_row(served):
  server, port = served
  stream = client(port).chat.completions.create(
    model="tiny", messages=messages(0), stream=True, max_tokens=60
  )
  next(iter(stream))
  stream.close()
  wait_until(lambda: not server.batcher.running)


def wait_until(holds):
  deadline = time.monotonic() + 60
  while not holds():
    assert time.monotonic() < deadline
    threading.Event().wait(0.01)


def raw(port, content, **options):
  """A connection that has sent this and has read nothing."""
  connection = socket.socket()
  connection.settimeout(60)
  for name, value in options.items():
    connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
  connection.connect(("127.0.0.1", port))
  connection.sendall(content)
  return connection


def request(body, size=0):
  """A request as bytes. size: that it says its body has; 0 = what it has."""
  head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
  return f"{head}\r\nContent-Length: {size or len(body)}\r\n\r\n{body}".encode()


def rest(connection):
  """What still comes before the server ends the connection."""
  content = bytearray()
  with contextlib.suppress(ConnectionResetError):
    while chunk := connection.recv(1 << 16):
      content += chunk
  return content.decode()


def test_one_who_gives_up_waiting_for_a_whole_answer_frees_a_row(served, monkeypatch):
  server, port = served
  ended, end = [], Slots.end

  def record(self, text, why="cancelled"):
    ended.append(why)
    end(self, text, why)

  monkeypatch.setattr(Slots, "end", record)
  long = dict(messages=messages(0), max_tokens=400, temperature=5.0, seed=1)
  connection = raw(port, request(json.dumps(long)))
  wait_until(lambda: server.batcher.running)
  connection.close()
  wait_until(lambda: not server.batcher.running)
  assert ended == ["cancelled"]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127"])
def test_one_who_does_not_say_what_it_wants_is_cut_off(hasty, sent):
  assert rest(raw(hasty[1], sent)) == ""
  assert hasty[0].counts['clients_cut_off_total{waiting_for="headers"}']


def test_one_who_does_not_send_its_body_is_told_and_cut_off(hasty):
  connection = raw(hasty[1], request("{", 100))
  assert b" 408 " in connection.recv(64)
  connection.sendall(b" ")  # and goes on as before
  assert "it took longer than 0.7 s" in rest(connection)


def test_one_who_reads_nothing_of_a_stream_is_cut_off(hasty, monkeypatch):
  server, port = hasty
  cut = 'clients_cut_off_total{waiting_for="reading"}'
  long = dict(messages=messages(0), max_tokens=400, temperature=5.0, seed=1)
  long |= dict(stream=True, logprobs=True, top_logprobs=5)
  monkeypatch.setattr(server, "seconds", 60.0)  # of the text; that of the connection stays
  connection = raw(port, request(json.dumps(long)), SO_RCVBUF=2048)
  wait_until(lambda: server.counts[cut])
  wait_until(lambda: not server.batcher.running)
  assert "[DONE]" not in rest(connection)


def test_a_fault_of_one_request_ends_no_other(served, monkeypatch):
  """Nor the thread that drives the model; where the cache is lost, it starts with a new one."""
  server, port = served
  path, body = "/v1/chat/completions", dict(messages=messages(0))
  before = post(port, path, body)

  def fail(*_):
    raise RuntimeError("no memory")

  def lose(variables, state, rows, *_):
    rows.token.delete()
    fail()

  with monkeypatch.context() as patch:
    patch.setattr(Text, "piece", fail)
    assert post(port, path, body)[0] == 500
  for fault in (fail, lose):
    slots = server.batcher._slots
    with monkeypatch.context() as patch:
      patch.setattr(slots, "_begin", fault)
      status, said = post(port, path, body)
      assert status == 500 and "RuntimeError" in said and "no memory" not in said
    status, said = post(port, path, body)
    assert status == 200 and json.loads(said)["choices"] == json.loads(before[1])["choices"]
    assert (server.batcher._slots is slots) == (fault is fail)


CASES = {
  "no JSON": (400, b"{", "no JSON"),
  "too large": (413, b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
  "a list": (400, [], "must be a JSON object"),
  "no messages": (400, {}, "messages must be a list"),
  "an unknown field": (
    400,
    dict(messages=messages(0), chat_template="{{x}}"),
    "'chat_template' is not known",
  ),
  "several answers": (400, dict(messages=messages(0), n=2), "n is not supported"),
  "tools": (400, dict(messages=messages(0), tools=[{}]), "tools is not supported"),
  "a wild temperature": (
    400,
    dict(messages=messages(0), temperature="hot"),
    "temperature is 'hot'",
  ),
  "no end of tokens": (400, dict(messages=messages(0), max_tokens=4000), "of a window of 512"),
  "a long turn": (400, dict(messages=messages(0, "word " * 500)), "of a window of 512"),
  "roles": (400, dict(messages=[dict(role="assistant", content="x")]), "roles out of order"),
  "no role": (400, dict(messages=[dict(role="boss", content="x")]), "turn 1 is by 'boss'"),
  "an empty turn": (400, dict(messages=[dict(role="user", content=" ")]), "is empty"),
  "a number that no float holds": (
    400,
    dict(messages=messages(0), temperature=10**400),
    "but must be float, 0 to 100",
  ),
  "no tokens at all": (
    400,
    dict(messages=messages(0), max_completion_tokens=0, max_tokens=2),
    "max_completion_tokens is 0",
  ),
  "a word for a switch": (
    400,
    dict(messages=messages(0), stream="false"),
    "stream must be true or false",
  ),
  "a switch for an object": (
    400,
    dict(messages=messages(0), stream_options=True),
    "stream_options must be an object",
  ),
  "no text to stop at": (400, dict(messages=messages(0), stop=0), "stop must be a text"),
  "a part of no type": (
    400,
    dict(messages=[dict(role="user", content=[dict(type=["text"])])]),
    "is of type ['text']",
  ),
  "a field twice": (
    400,
    b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    "'content' stands twice",
  ),
  "control characters": (
    400,
    {"messages": messages(0), "\x1b[31m\n\ud800": 1},
    r"field '\x1b[31m\n\ud800' is not known",
  ),
}
MEDIA = {
  "a path": ("/etc/passwd", "no such file in the media folder"),
  "a way out": ("../../../etc/passwd", "no such file in the media folder"),
  "an address": ("http://127.0.0.1/a.png", "give media as data: URLs"),
  "a store": ("s3://bucket/a.png", "give media as data: URLs"),
  "a file": ("file:///etc/passwd", "no such file in the media folder"),
  "no base64": ("data:image/png;base64,???", "not base64"),
  "no picture": ("data:image/png;base64,AAAA", "not a JPEG"),
  "no url": (7, "has no url"),
  "no name of a file": ("a\0.png", "no such file in the media folder"),
  "half a character": ("\ud800.png", "no such file in the media folder"),
  "too long a name": ("a" * 5000, "no such file in the media folder"),
}


@pytest.mark.parametrize("case", [*CASES, *MEDIA])
def test_what_it_refuses(served, case):
  if case in MEDIA:
    url, words = MEDIA[case]
    part = {"type": "image_url", "image_url": {"url": url}}
    status, body = 400, dict(messages=[dict(role="user", content=[part])])
  else:
    status, body, words = CASES[case]
  got, said = post(served[1], "/v1/chat/completions", body)
  error = json.loads(said)["error"]["message"]
  assert got == status and words in error and "\n" not in error


def test_whole_numbers_may_be_written_as_floats_and_types_in_capitals(served):
  body = dict(messages=messages(0), logprobs=True, top_logprobs=2.0, max_tokens=2.0)
  kind = {"Content-Type": "Application/JSON; charset=utf-8"}
  status, said = post(served[1], "/v1/chat/completions", body, kind)
  (choice,) = json.loads(said)["choices"]
  assert status == 200 and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_a_fault_of_the_program_is_told_as_the_api_tells_errors(served, monkeypatch, caplog):
  def fail(*_):
    raise RuntimeError("what no client should read")

  monkeypatch.setattr(Server, "job", fail)
  status, said = post(served[1], "/v1/chat/completions", dict(messages=messages(0)))
  assert status == 500 and json.loads(said)["error"]["message"] == "RuntimeError"
  assert "a request failed" in caplog.text


def test_a_bomb_of_a_picture_is_refused(served):
  import zlib

  def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

  head = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
  png = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", head)
    + chunk(b"IDAT", zlib.compress(bytes(99)))
    + chunk(b"IEND", b"")
  )
  url = "data:image/png;base64," + base64.b64encode(png).decode()
  part = {"type": "image_url", "image_url": {"url": url}}
  status, said = post(
    served[1], "/v1/chat/completions", dict(messages=[dict(role="user", content=[part])])
  )
  assert status == 400 and "megapixels" in said


def test_files_of_the_media_folder_hosts_forms_and_what_it_says_of_itself(served, monkeypatch):
  port, path = served[1], "/v1/chat/completions"
  part = {"type": "image_url", "image_url": {"url": "a.png"}}
  body = dict(messages=[dict(role="user", content=[part])], max_tokens=2)
  assert post(port, path, body)[0] == 200
  assert post(port, path, body, {"Content-Type": "text/plain"})[0] == 415
  named = {"Content-Type": "application/json", "Host": "evil.example"}
  assert post(port, path, body, named)[0] == 400
  assert json.loads(post(port, "/health", b"", method="GET")[1]) == dict(status="ok", model="tiny")
  (about,) = json.loads(post(port, "/v1/models", b"", method="GET")[1])["data"]
  assert (about["chat"], about["embeddings"], about["media"]) == (True, False, ["image"])
  with monkeypatch.context() as patch:
    patch.setattr(type(served[0].batcher), "alive", False)
    assert post(port, "/health", b"", method="GET")[0] == 503
  metrics = post(port, "/metrics", b"", method="GET")[1]
  assert "mmjax_chat_requests_total " in metrics and 'refused_total{status="415"} 1' in metrics
  status, said = post(port, "/v1/embeddings", dict(input="x"))
  assert status == 400 and "no shared space" in said
  assert "<title>mmjax</title>" in post(port, "/", b"", method="GET")[1]


def test_embeddings_are_those_of_the_model(tmp_path):
  model = load(tiny.config(), tmp_path)
  with running(model, key="secret") as (_, port):
    api = client(port, api_key="secret")
    found = api.embeddings.create(model="tiny", input=["a red heart", "rain on the sea"])
    rows = np.array([row.embedding for row in found.data])
    np.testing.assert_allclose(
      rows, model.encode_text(["a red heart", "rain on the sea"]), atol=1e-6
    )
    status, said = post(
      port,
      "/v1/embeddings",
      dict(input=[picture(0), "rain"]),
      {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )
    (image, _) = json.loads(said)["data"]
    assert status == 200
    np.testing.assert_allclose(image["embedding"], model.encode_image(PICTURES[0])[0], atol=1e-6)
    with pytest.raises(openai.AuthenticationError, match="Bearer token"):
      client(port).embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="no language model"):
      api.chat.completions.create(model="tiny", messages=messages(0))
