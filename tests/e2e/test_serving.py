"""`mmjax serve` under load: 2,000 requests of 32 clients at once, with some who ask badly and
some who leave. Each gets what it would get alone, and the process grows by nothing.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmjax import config as configs
from tests.e2e.commands import read_until, start, used
from tests.inference import tiny
from tests.inference.test_language import PICTURES, config

pytestmark = pytest.mark.slow  # minutes

CLIENTS, REQUESTS, KINDS = 32, 2000, 210
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@pytest.fixture(scope="module")
def port_and_process(tmp_path_factory):
  c = config().to_dict()
  c["data"]["sequence"]["length"] = 128
  place = tiny.save(configs.resolve(c), tmp_path_factory.mktemp("serving"))
  words = ("--template", "chatml", "--port", "0")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MMJAX_DATA", "")
    process = start("serve", "--checkpoint", str(place), *words)
  printed = read_until(process, "serving ")[-1]
  yield int(ADDRESS.search(printed)[1]), process
  process.send_signal(signal.SIGINT)
  assert process.wait(60) == 0


def body_of(number: int) -> dict:
  """Request `number`: greedy and drawn ones, with and without pictures, of other lengths; every
  21st asks for what is refused.
  """
  number %= KINDS
  data = base64.b64encode(tiny.png(PICTURES[number % 3])).decode()
  picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
  text = f"turn {number % 5}"
  content = [picture, {"type": "text", "text": text}] if number % 2 else text
  body = dict(messages=[dict(role="user", content=content)], max_tokens=3 + number % 9)
  body |= dict(temperature=1.2, seed=number) if number % 3 == 0 else {}
  return body | (dict(max_tokens=9000) if number % 21 == 20 else {})


def ask(port: int, number: int, stream: bool = False, leave: bool = False) -> tuple[int, str]:
  """(status, text of the answer). leave: after the first event of a stream."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
  body = json.dumps(body_of(number) | dict(stream=stream))
  connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
  answer = connection.getresponse()
  if leave:
    answer.readline()
    connection.close()
    return 0, ""
  content = answer.read().decode()
  connection.close()
  if answer.status != 200:
    return answer.status, json.loads(content)["error"]["message"]
  if not stream:
    return 200, json.loads(content)["choices"][0]["message"]["content"]
  lines = [line.removeprefix("data: ") for line in content.splitlines() if line]
  assert lines.pop() == "[DONE]"
  pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
  return 200, "".join(pieces)


def test_two_thousand_requests_are_answered_as_if_alone_and_nothing_grows(port_and_process):
  port, process = port_and_process
  alone = [ask(port, number) for number in range(KINDS)]
  assert len(set(alone)) > 40 and [status for status, _ in alone].count(400) == KINDS // 21

  def one(number: int) -> tuple[int, str]:
    leave = number % 50 == 49 and alone[number % KINDS][0] == 200
    found = ask(port, number, stream=leave or number % 4 == 0, leave=leave)
    return alone[number % KINDS] if leave else found

  seen = []
  with ThreadPoolExecutor(CLIENTS) as pool:
    for first in range(0, REQUESTS, REQUESTS // 4):
      numbers = range(first, first + REQUESTS // 4)
      assert list(pool.map(one, numbers)) == [alone[n % KINDS] for n in numbers]
      seen.append(used(process.pid))
  print(seen)
  assert seen[-1]["memory"] - seen[0]["memory"] < 16, seen
  assert seen[-1]["files"] <= seen[0]["files"] + 4 and seen[-1]["threads"] <= seen[0]["threads"] + 4
