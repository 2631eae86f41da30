"""TensorBoard's event files, read back record by record (TFRecord framing: length, checksum,
content, checksum).
"""

from __future__ import annotations

import struct
import sys

from tensorboardX.proto.event_pb2 import Event, SessionLog

from mmjax.training.metrics import TensorBoard


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
