"""Seconds from a request to its first token, and requests a second, of `mmjax serve`, warm.

python tests/bench/serving.py --checkpoint runs/chat --template plain [--image 64] [--clients 32]

Streams are asked for one after another, then by many clients at once, with a picture where --image
gives its size. Requests of each kind are sent before, so that nothing is compiled meanwhile. The
client shares the processor with the server.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
QUESTIONS = ("what is it?", "how many are there?", "and to the left of it?")


def body_of(number: int, image: int, tokens: int) -> bytes:
  content: list[dict] = [dict(type="text", text=QUESTIONS[number % len(QUESTIONS)])]
  if image:
    pixels = np.random.default_rng(number % 5).integers(0, 256, (image, image, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content.insert(0, dict(type="image_url", image_url=dict(url=url)))
  messages = [dict(role="user", content=content)]
  return json.dumps(dict(messages=messages, stream=True, max_tokens=tokens)).encode()


def ask(port: int, body: bytes) -> tuple[float, float]:
  """(seconds to the first token, to the end)"""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
  begin = time.perf_counter()
  headers = {"Content-Type": "application/json"}
  connection.request("POST", "/v1/chat/completions", body, headers)
  answer = connection.getresponse()
  assert answer.status == 200, answer.read().decode()
  first = 0.0
  for line in answer:
    if line.startswith(b"data: {") and not first:
      (choice,) = json.loads(line[6:])["choices"]
      if choice["delta"].get("content") or choice["finish_reason"]:
        first = time.perf_counter() - begin
  connection.close()
  return first, time.perf_counter() - begin


def report(what: str, times: list[tuple[float, float]], wall: float) -> None:
  firsts = sorted(first for first, _ in times)
  print(
    f"{what}: first token median {statistics.median(firsts):.3f} s, "
    f"95% {firsts[int(0.95 * len(firsts))]:.3f} s, at most {firsts[-1]:.3f} s; "
    f"{len(times) / wall:.1f} requests a second"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--template", default="")
  parser.add_argument("--image", type=int, default=0, help="pixels of a side; 0 = text alone")
  parser.add_argument("--tokens", type=int, default=8)
  parser.add_argument("--requests", type=int, default=200)
  parser.add_argument("--clients", type=int, default=32)
  options = parser.parse_args()
  words = ["serve", "--checkpoint", options.checkpoint, "--port", "0"]
  words += ["--template", options.template] if options.template else []
  server = subprocess.Popen(
    [sys.executable, "-m", "mmjax.cli", *words],
    env=dict(os.environ, PYTHONPATH=str(ROOT)),
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert server.stderr is not None
    found = None
    while found is None:
      line = server.stderr.readline()
      assert line, "the server has ended"
      found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    port = int(found[1])
    bodies = [body_of(n, options.image, options.tokens) for n in range(options.requests)]
    for body in bodies[:6]:
      ask(port, body)
    begin = time.perf_counter()
    times = [ask(port, body) for body in bodies]
    report("one client", times, time.perf_counter() - begin)
    with ThreadPoolExecutor(options.clients) as pool:
      begin = time.perf_counter()
      times = list(pool.map(lambda body: ask(port, body), bodies))
      report(f"{options.clients} clients", times, time.perf_counter() - begin)
  finally:
    server.send_signal(signal.SIGINT)
    server.wait()


if __name__ == "__main__":
  main()
