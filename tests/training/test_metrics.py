"""TensorBoard's event files, read back record by record (TFRecord framing: length, checksum,
content, checksum).
"""

from __future__ import annotations

import json
import os
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mmjax.config import UserError
from mmjax.evaluation.report import read_metrics
from mmjax.training.metrics import MetricsFile, TensorBoard


def events(folder):
  (path,) = (folder / "tensorboard").iterdir()
  content, at, found = path.read_bytes(), 0, []
  while at < len(content):
    (length,) = struct.unpack_from("<Q", content, at)
    found.append(Event.FromString(content[at + 12 : at + 12 + length]))
    at += 16 + length
  return found


def test_numbers_become_events_and_what_is_past_the_restored_step_is_purged(tmp_path, monkeypatch):
  torch = object()
  monkeypatch.setitem(sys.modules, "torch", torch)
  board = TensorBoard(tmp_path, 3)
  assert sys.modules["torch"] is torch  # hidden from tensorboardX alone
  board.write(dict(step=4, time=8.5, loss=2.5, skipped_total=1, mfu=None))
  written = events(tmp_path)  # at once, not when the run ends
  board.write(dict(step=5, time=9.5, loss=float("nan")))
  board.close()
  assert [event.step for event in written] == [0, 4, 4] and written[
    0
  ].file_version == "brain.Event:2"
  assert written[1].session_log.status == SessionLog.START and written[2].wall_time == 8.5
  assert {value.tag: value.simple_value for value in written[2].summary.value} == {
    "loss": 2.5,
    "skipped_total": 1.0,
  }
  assert [event.step for event in events(tmp_path)] == [0, 4, 4, 5]


DAMAGED = ("", "\0\0", "[]", "null", "7", '{"step": "a"}', '{"step": null}', '{"step": [1]}',
  '{"loss": 1.0}', '{"step": true}', "[" * 100_000, '{"a":' * 50_000, '{"step": 3, "l')  # fmt: skip


def test_lines_that_a_disk_has_damaged_cost_themselves(tmp_path):
  rows = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 9, "loss": 0.9}]
  lines = [x for row in rows for x in (*DAMAGED, json.dumps(row))]
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"\xff\xfe\n" + "\n".join([*lines, *DAMAGED]).encode())
  assert [row["loss"] for row in read_metrics(path) if row["step"] is not True] == [0.1, 0.2, 0.9]
  file = MetricsFile(tmp_path, step=2)
  file.write({"step": 3, "loss": 0.3})
  file.close()
  assert file.last == rows[1]
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    *rows[:2],
    {"step": 3, "loss": 0.3},
  ]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(make, tmp_path, in_time):
  make(tmp_path / "metrics.jsonl")
  with pytest.raises(UserError, match="metrics.jsonl: cannot be read .*Move it away"):
    MetricsFile(tmp_path, step=2)
