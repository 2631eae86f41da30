"""What a run says of its step: figures of executables and devices that are not there, added up by
hand.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import pytest

from mmjax.training import summary
from mmjax.training.summary import Summary
from tests.training.test_step import make_step

GIB = 2**30
CHIP = SimpleNamespace(
  platform="tpu", device_kind="TPU v5 lite", memory_stats=lambda: {"bytes_limit": 16 * GIB}
)


def executable(gib: float) -> SimpleNamespace:
  """Of a step whose temporaries take that much."""
  sizes = dict(
    argument_size_in_bytes=GIB,
    temp_size_in_bytes=gib * GIB,
    output_size_in_bytes=GIB + 8,
    alias_size_in_bytes=GIB,
  )
  return SimpleNamespace(
    memory_analysis=lambda: SimpleNamespace(**sizes, peak_memory_in_bytes=(gib + 0.5) * GIB)
  )


def test_on_a_tpu_the_plan_has_a_time_and_a_utilisation(devices, monkeypatch, tmp_path):
  step = make_step(devices=1)
  flops, asked = step.flops_per_step(), []
  monkeypatch.setattr(jax, "local_devices", lambda: [CHIP])
  monkeypatch.setattr(
    summary, "utilisation", lambda flops, seconds: flops / seconds / 197e12 if seconds else None
  )
  monkeypatch.setattr(summary, "memory_in_use", lambda: 4.0 * GIB)
  told = Summary(step, [executable(3)], lambda *of: asked.append(of) or flops / (0.4 * 197e12))
  assert told.memory().endswith(", temporaries 3.00 GiB; peak 3.50 GiB of 16.00 GiB")
  assert told.work().endswith(" of the model; estimated 0.0 ms, MFU 40.0%") and [
    of[2] for of in asked
  ] == [""]
  seconds = flops / (0.3 * 197e12)
  text = told.compare(seconds, tmp_path)
  assert text.endswith(
    "FLOP/s, MFU 30.0% (estimated 40.0%), memory 4.00 GiB (planned 3.50 GiB a device)"
  )
  written = json.loads((tmp_path / summary.NAME).read_text())
  assert written["text"] == text and written["planned"]["mfu"] == pytest.approx(0.4)
  assert written["measured"]["examples_per_second"] == pytest.approx(32 / seconds)


def test_an_estimate_that_fails_and_a_compiler_that_tells_nothing_end_no_run(
  devices, monkeypatch, caplog
):
  monkeypatch.setattr(jax, "local_devices", lambda: [CHIP])
  told = Summary(
    make_step(devices=1), [SimpleNamespace(memory_analysis=lambda: None)], lambda *of: {}["cycles"]
  )
  assert told.memory().endswith("peak 0.0 MiB of 16.00 GiB") and told.work().endswith(
    "FLOP of the model"
  )
  assert "no estimate of the time of a step: KeyError: 'cycles'" in caplog.text


def test_without_an_estimate_or_rows_it_says_what_there_is(devices, tmp_path):
  told = Summary(make_step(devices=1), [executable(3)], lambda *of: pytest.fail("asked on a CPU"))
  assert told.memory().endswith("peak 4.00 GiB")  # arguments, temporaries and 8 bytes
  assert told.work().endswith("FLOP of the model")
  assert told.compare(None, tmp_path).startswith(
    "measured: memory "
  ) and "of the whole process (planned 4.00 GiB a device)" in told.compare(None, tmp_path)


@pytest.mark.parametrize("told", ["", "[]", "[" * 100_000, '{"text": "measured"}'])
def test_that_a_run_ended_is_noted_whatever_became_of_its_summary(told, tmp_path):
  (tmp_path / summary.NAME).write_text(told)
  Summary.finished(SimpleNamespace(), tmp_path, 7)
  assert summary.finished_step(tmp_path) == 7
